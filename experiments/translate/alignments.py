"""The file of --alignments: whether it can be written is known before anything is translated."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.command_line import UsageError
from experiments.translate.config import Config
from experiments.translate.workdir import unfinished_of, write_text


def check(config: Config) -> None:
    """Refuse alignments that could not be written, or would take the place of something else.

    Raises:
      UsageError: one sentence that says why.
    """
    if not config.alignments:
        return
    if config.scores[0] == "none":
        raise UsageError("--alignments: none does not attend; name another of the --scores.")
    if not config.input and sys.stdin.isatty():
        raise UsageError("--alignments is for sentences from --input or a pipe; leave it out.")
    path = Path(config.alignments)
    try:
        if os.path.isfile(path):
            _check_existing(path, config)
        writable = _is_writable(path)
    except OSError:
        writable = False
    if not writable:
        raise UsageError(f"--alignments {path} cannot be written; name a file in a folder.")


def write(path: Path, lines: Iterable[str]) -> None:
    """Write lines to a file as a whole or not at all, or into a device or a pipe."""
    text = "".join(f"{line}\n" for line in lines)
    if _is_special(path):
        path.write_text(text, encoding="utf-8")
    else:
        write_text(_real(path), text)


def _check_existing(path: Path, config: Config) -> None:
    """Refuse to write over what is read, what is written to already, and what the run needs."""
    status = path.stat()
    taken = {
        "--input": _status(config.input),
        "standard input": _status_of(sys.stdin),
        "standard output": _status_of(sys.stdout),
    }
    for name, other in taken.items():
        if other and os.path.samestat(status, other):
            raise UsageError(f"--alignments {path} is the file of {name}; name another file.")
    if _real(path).is_relative_to(_real(config.directory)):
        raise UsageError(
            f"--alignments {path} is a file of the run in {config.directory}; name another file."
        )


def _is_writable(path: Path) -> bool:
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        return False
    if not _is_special(path):
        # What a file system forbids is known for certain only when it is tried.
        unfinished = unfinished_of(_real(path))
        unfinished.touch()
        unfinished.unlink()
    return True


def _is_special(path: Path) -> bool:
    """Whether a file is a device or a pipe, which nothing can take the place of."""
    return path.exists() and not path.is_file()


def _real(path: Path) -> Path:
    """Follow links, so that a file takes the place of a file and not of a link to it."""
    return Path(os.path.realpath(path))


def _status(path: str) -> os.stat_result | None:
    return os.stat(path) if os.path.exists(path) else None


def _status_of(stream: Any) -> os.stat_result | None:
    try:
        return os.fstat(stream.fileno())
    except (AttributeError, OSError, ValueError):  # it is closed, or no file at all
        return None
