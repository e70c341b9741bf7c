"""The terminal as all programs print to it: text as it is, for a reader who may stop early."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.text import Text

_WIDTH = 140


class _Console(Console):
    """A console whose reader may stop early, as `| head` does."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console() -> Console:
    """Return a console in whose texts brackets and colons mean nothing.

    Where it is no terminal it is wide enough for all tables.
    """
    width = None if _Console().is_terminal else _WIDTH
    return _Console(width=width, markup=False, emoji=False, highlight=False)


def two_lines(value: str, remark: str) -> Text:
    """Return a value, with a remark dimmed below it where there is one."""
    return Text.assemble(value, ("\n" + remark if remark else "", "dim"))
