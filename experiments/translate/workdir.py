"""The folder of a run: whose it is, what was measured in it, and how it is written to."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from experiments.command_line import UsageError

Record = dict[str, Any]


class Owner(Protocol):
    """What a folder belongs to: a run, or a sweep of runs."""

    @property
    def directory(self) -> Path:
        """Its folder."""
        ...

    @property
    def identity(self) -> Record:
        """What may not change from one command in the folder to the next, as JSON has it."""
        ...


# What a run that was killed at once leaves behind.
_FIRST = (".lock", "config.json.unfinished")

_PATTERN = re.compile(r"[*?\[]")

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "sacrebleu")


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there as a whole or as it was before."""
    unfinished = unfinished_of(path)
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def unfinished_of(path: Path) -> Path:
    """Return the file that a text is written to before it takes its place."""
    return path.with_name(f"{path.name}.unfinished")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, as a whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def check(owner: Owner) -> None:
    """Refuse a folder that is not its owner's, before anything is computed or written.

    Raises:
      UsageError: it holds another run or other files, or cannot be written to; or Orbax would
        take its path for a pattern of paths, and leave its checkpoints unfinished.
    """
    folder = owner.directory
    hint = "give another --workdir."
    if found := _PATTERN.search(str(folder.absolute())):
        raise UsageError(
            f"--workdir {folder.absolute()} has a {found[0]} in its path, but checkpoints can be "
            f"saved only in a path without *, ? and [; {hint}"
        )
    if not folder.exists():
        parent = next(path for path in folder.absolute().parents if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"--workdir {folder} cannot be created in {parent}; {hint}")
        return
    if not folder.is_dir():
        raise UsageError(f"--workdir {folder} is a file, not a folder; {hint}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"--workdir {folder} is not to be written to; {hint}")
    path = folder / "config.json"
    if not path.exists():
        if any(file.name not in _FIRST for file in folder.iterdir()):
            raise UsageError(f"--workdir {folder} holds other files and no run; {hint}")
        return
    try:
        held = dict(json.loads(path.read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is not the configuration of a run; {hint}") from None
    differing = [name for name, value in owner.identity.items() if held.get(name) != value]
    if differing:
        name = differing[0]
        raise UsageError(
            f"--workdir {folder} holds another run (--{name} was {shown(held.get(name))}, now it "
            f"is {shown(owner.identity[name])}); {hint}"
        )


@contextlib.contextmanager
def opened(owner: Owner) -> Iterator[Path]:
    """Create the folder, keep other processes out of it, and write whose it is.

    Raises:
      UsageError: it cannot be written to, or another process is at work in it.
    """
    folder = owner.directory
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise UsageError(
            f"--workdir {folder} cannot be written to: {error.strerror}; give another --workdir."
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"--workdir {folder} is in use by another process; wait for it, or give another."
            ) from None
        if not (folder / "config.json").exists():
            write_json(
                folder / "config.json", {"config": owner.identity, "environment": environment()}
            )
        yield folder


def environment() -> Record:
    """Return what else a result depends on: versions, device and revision of the code."""
    import jax

    return {
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in _PACKAGES},
        "device": f"{jax.local_device_count()} x {jax.devices()[0].device_kind}",
        "processors": os.cpu_count(),
        "machine": platform.platform(),
        "revision": _revision(),
    }


def _revision() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None


class Log:
    """metrics.jsonl: one JSON object a line, each with `score` and `step`."""

    def __init__(self, path: Path):
        self.path = path

    def read(self, score: str) -> list[Record]:
        """Return the records of one mechanism, without a last line that was cut off.

        Raises:
          UsageError: another line is no record.
        """
        return [record for record in self._all() if record["score"] == score]

    def append(self, record: Record) -> None:
        """Add a record at the end."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def rewind(self, score: str, step: int) -> None:
        """Drop what one mechanism measured after a step, to measure it again.

        Raises:
          UsageError: a line but the last is no record.
        """
        kept = [r for r in self._all() if r["score"] != score or r["step"] <= step]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def _all(self) -> list[Record]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        return [self._record(number, line) for number, line in enumerate(lines[:-1], 1)]

    def _record(self, number: int, line: str) -> Record:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not {"score", "step"} <= record.keys():
            raise UsageError(
                f"{self.path} line {number} is damaged; delete that line, and the same command "
                "goes on."
            )
        return record


def shown(value: Any) -> str:
    """Write a value as on the command line."""
    return ",".join(value) if isinstance(value, list) else str(value)
