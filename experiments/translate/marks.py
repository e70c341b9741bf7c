"""The mark of a run, by which its files are told from those of another run."""

from __future__ import annotations

from pathlib import Path

from experiments.command_line import UsageError
from experiments.files import write_sealed
from experiments.translate.workdir import LOST, MARK, Record, read_json


def mark_of(folder: Path) -> str | None:
    """Return what the files of the run in a folder are marked with; None if it holds no run.

    Two runs differ in it, also if they have the same configuration.
    """
    try:
        return read_json(folder / "config.json", folder, LOST).get(MARK)
    except UsageError:
        return None


def read_marked(path: Path, folder: Path, remedy: str, *, of_another: str) -> Record:
    """Return the record in a file of a run that has the mark of this run, without the mark.

    Args:
      path: of the file.
      folder: of the run.
      remedy: as in `read_json`.
      of_another: what to do about a file of another run, the end of the error message.

    Raises:
      UsageError: the file is missing, damaged or of another run.
    """
    record = read_json(path, folder, remedy)
    if record.pop(MARK, None) != mark_of(folder):
        raise UsageError(f"{path} was written by another run; {of_another}")
    return record


def write_marked(path: Path, folder: Path, record: Record) -> None:
    """Write a record with its SHA-256 and the mark of the run in a folder."""
    write_sealed(path, {MARK: mark_of(folder), **record})
