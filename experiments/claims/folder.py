"""The folder of a test of claims: that nothing of another program's is lost in it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from experiments.claims.claim import SETTINGS
from experiments.command_line import UsageError

# All that is written before the results are.
_BEFORE = ("cache", "errors", "figures", "results.json.unfinished")
_MEASURED = re.compile(rf"\d+-({'|'.join(SETTINGS)})-[0-9a-f]{{16}}\.json")
_HINT = "give another --workdir."


def writable(folder: Path) -> Path:
    """Create a folder, or refuse one that is another's or cannot be written to.

    Raises:
      UsageError: it holds other files, or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_ours(folder)
    except OSError as error:
        raise UsageError(f"--workdir {folder}: {error.strerror or error}; {_HINT}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"--workdir {folder} is not to be written to; {_HINT}")
    return folder


def are_verdicts(path: Path) -> bool:
    """Tell whether a file holds results of this program."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(held, dict) and {"setting", "claims"} <= held.keys()


def _check_ours(folder: Path) -> None:
    for name in ("results.json", "report.html"):
        if (folder / name).is_dir():
            raise UsageError(f"--workdir: {folder / name} is a folder; {_HINT}")
    path = folder / "results.json"
    if path.exists():
        if not are_verdicts(path):
            raise UsageError(f"--workdir {folder}: {path} is not of this program; {_HINT}")
    elif not _has_measurements(folder):
        others = sorted(file.name for file in folder.iterdir() if file.name not in _BEFORE)
        if others:
            raise UsageError(
                f"--workdir {folder} holds other files, such as {others[0]}, and no tests of "
                f"claims; {_HINT}"
            )


def _has_measurements(folder: Path) -> bool:
    """Tell whether a test was stopped here before it was over."""
    return any(_MEASURED.fullmatch(file.name) for file in folder.glob("cache/*.json"))
