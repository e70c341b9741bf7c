"""What the command lines of all programs share: absl flags, and one sentence for a mistake."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from absl import flags

Options = TypeVar("Options")


class UsageError(ValueError):
    """A request that cannot be met; the message is one sentence for the person who made it."""


class HelpRequested(Exception):  # noqa: N818  it is no error
    """`--help` was given; the argument is the text to print."""


def read(
    program: str, values: flags.FlagValues, arguments: Sequence[str], help: Callable[[], str]
) -> dict[str, Any]:
    """Read the arguments behind a program's name by its flags, and return the value of each.

    Raises:
      UsageError: an unknown flag, a value of another type, or an argument that is no flag.
      HelpRequested: the help text was asked for.

    >>> values = flags.FlagValues()
    >>> flags.DEFINE_integer("length", 16, "", flag_values=values)
    <absl.flags._flagvalues.FlagHolder ...>
    >>> read("draw", values, ["--lenght=8"], str)
    Traceback (most recent call last):
    experiments.command_line.UsageError: unknown flag --lenght; did you mean --length?
    """
    names = list(values)
    flags.DEFINE_flag(flags.BooleanFlag("help", False, "this text", short_name="h"), values)
    try:
        rest = values([program, *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, names, n=1)
        hint = f"did you mean --{near[0]}?" if near else "--help lists all flags."
        raise UsageError(f"unknown flag --{error.flagname}; {hint}") from None
    except flags.Error as error:
        raise UsageError(f"{' '.join(str(error).split())}; --help lists all flags.") from None
    if values["help"].value:
        raise HelpRequested(help())
    if rest:
        raise UsageError(f"{rest[0]!r} is no flag; write --name=value, and --help lists all flags.")
    return {name: values[name].value for name in names}


def show(text: object) -> None:
    """Print a text whose reader may stop early, as `| head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # nor is there anyone to tell so at exit, when Python flushes again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(
    program: str,
    arguments: Sequence[str] | None,
    parse: Callable[[Sequence[str]], Options],
    do: Callable[[Options], int | None],
) -> int:
    """Run a program and return its exit code: what `do` returns, 0 for None.

    2 for a request that cannot be met.
    """
    try:
        return do(parse(sys.argv[1:] if arguments is None else arguments)) or 0
    except HelpRequested as help:
        show(help)
        return 0
    except UsageError as error:
        return complain(program, error, 2)


def complain(program: str, sentence: object, code: int) -> int:
    """Say what went wrong, and return the exit code for it."""
    print(f"{program}: {sentence}", file=sys.stderr)
    return code
