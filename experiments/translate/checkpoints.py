"""Atomic checkpoints: saved by Orbax, sealed by checksums, verified on load.

Orbax detects a missing file but not a flipped bit. The seal of a checkpoint has the SHA-256 of
its files, the mark of its run and the score, and is written last: a checkpoint without a seal is
unfinished.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from experiments.files import write_text
from experiments.translate.marks import mark_of
from experiments.translate.workdir import checkpoints_of, is_first, sealed_steps
from experiments.worker import told, wait

_KEPT = 2
# Seconds for the threads of Orbax to end after an error, and between two looks.
_PATIENCE, _PAUSE = 5, 0.2
# Orbax cannot read a checkpoint without this file.
_MANIFEST = "manifest.ocdbt"
_DAMAGED = "is damaged"
# What is in the messages of Orbax's threads and of tasks that failed after `save` had its error.
_RAISED_TOO = ("_SignalingThread.run() raised", "exception was never retrieved")
# How TensorStore ends a message of a system error.
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")


class Checkpoints:
    """The checkpoints of one mechanism; the last two are kept.

    Several processes save and restore together, and the first one seals, verifies and deletes.

    Args:
      folder: of the checkpoints, named by the score.
      run: the mark of the run, as `mark_of` returns it; the checkpoints of others are skipped.
    """

    def __init__(self, folder: Path, run: str | None = None):
        self.folder = folder.absolute()
        self.run = run
        self.damaged: list[str] = []

    @classmethod
    def of_run(cls, folder: Path, score: str) -> Checkpoints:
        """Return those of a score of the run in a folder."""
        return cls(checkpoints_of(folder, score), mark_of(folder))

    @property
    def steps(self) -> list[int]:
        """The steps of all sealed checkpoints, the last one first."""
        return sealed_steps(self.folder)

    def save(self, step: int, state: Any) -> None:
        """Save a pytree of arrays, and delete all but the last checkpoints up to this step.

        Later ones were found damaged: training restarted from an earlier one.

        Raises:
          OSError: the checkpoint cannot be written, or is incomplete; nothing of it is left.
        """
        path = self._path(step)
        try:
            if is_first():
                self.folder.mkdir(parents=True, exist_ok=True)
                self._delete(step)
            wait()
            with _silent_orbax(), ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(path, _named(state))
            if is_first():
                self._finish(step)
        except (OSError, ValueError) as error:
            if is_first():
                self._delete_parts(step)
            code, reason = _reason(error)
            raise OSError(
                code, f"checkpoint {step} cannot be saved in {self.folder}: {reason}"
            ) from None

    def restore(self, like: Any, *, tidy: bool = True) -> tuple[int, Any] | None:
        """Load the last valid checkpoint; `damaged` gets a sentence for each one skipped.

        Args:
          like: a pytree of arrays, or of their shapes.
          tidy: remove unfinished checkpoints; not while another process may be writing one.
        """
        if tidy and is_first():
            self._delete_unsealed()
        for step in told(self.steps):
            path = self._path(step)
            fault = told(self._fault(step) if is_first() else None)
            if fault is None:
                # It may have another structure, or be from another version of Orbax.
                with contextlib.suppress(KeyError, OSError, TypeError, ValueError):
                    return step, _loaded(path, like)
                fault = _DAMAGED
            self.damaged.append(f"checkpoint {step} in {self.folder} {fault}: skipped.")
        return None

    def _fault(self, step: int) -> str | None:
        """Return what is wrong with a checkpoint, None if it is as it was sealed in this run."""
        path, sealed = self._path(step), self._sealed(step)
        if (
            not isinstance(sealed, dict)
            or sealed.keys() != {"run", "score", "files"}
            or not path.is_dir()
        ):
            return _DAMAGED
        if sealed["run"] != self.run:
            return "was written by another run"
        if sealed["score"] != self.folder.name:
            return f"is one of {sealed['score']}"
        return None if sealed["files"] == _checksums(path) else _DAMAGED

    def _finish(self, step: int) -> None:
        """Seal a checkpoint that is written, and delete those before the one before it."""
        path = self._path(step)
        if not (path / _MANIFEST).is_file():
            raise ValueError(f"Orbax left it without its {_MANIFEST}")
        seal = {"run": self.run, "score": self.folder.name, "files": _checksums(path)}
        write_text(self._seal(step), json.dumps(seal))
        kept = [kept for kept in self.steps if kept <= step][:_KEPT]
        for other in set(self.steps) - set(kept):
            self._delete(other)

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def _seal(self, step: int) -> Path:
        return self.folder / f"{step:08d}.seal"

    def _sealed(self, step: int) -> Any:
        try:
            return json.loads(self._seal(step).read_text(encoding="utf-8"))
        except ValueError:
            return None

    def _delete_unsealed(self) -> None:
        for path in self.folder.glob("*"):
            if path.is_dir() and not path.with_name(f"{path.name}.seal").exists():
                shutil.rmtree(path, ignore_errors=True)

    def _delete_parts(self, step: int) -> None:
        """Delete a checkpoint, also what Orbax names otherwise until it is complete.

        Its threads may still be writing some of the files; until they have ended, more appear.
        """
        end = time.monotonic() + _PATIENCE
        while found := list(self.folder.glob(f"{self._path(step).name}*")):
            for unfinished in found:
                shutil.rmtree(unfinished, ignore_errors=True)
                with contextlib.suppress(OSError):
                    unfinished.unlink(missing_ok=True)
            if time.monotonic() > end:
                break
            time.sleep(_PAUSE)

    def _delete(self, step: int) -> None:
        self._seal(step).unlink(missing_ok=True)
        shutil.rmtree(self._path(step), ignore_errors=True)


@contextlib.contextmanager
def _silent_orbax() -> Iterator[None]:
    """Print none of the tracebacks of Orbax's threads and tasks, whose error `save` raises too."""
    logger, tasks = logging.getLogger("absl"), logging.getLogger("asyncio")
    before, logger.disabled = logger.disabled, True
    for each in (logger, tasks):
        each.addFilter(_unless_raised)
    report = sys.unraisablehook
    sys.unraisablehook = functools.partial(_unless_late, report)
    try:
        yield
        # After an error these stay: files that are still being written report when they are done.
        sys.unraisablehook = report
        for each in (logger, tasks):
            each.removeFilter(_unless_raised)
    finally:
        logger.disabled = before


def _unless_raised(record: logging.LogRecord) -> bool:
    """Whether a message is not of a thread's or a task's error, which is raised elsewhere too."""
    said = record.getMessage()
    return not any(words in said for words in _RAISED_TOO)


def _unless_late(report: Callable[[Any], Any], error: Any) -> None:
    """Report an error that nobody catches, unless it says that nobody waits for a file any more."""
    if str(error.exc_value) != "Event loop is closed":
        report(error)


def _reason(error: OSError | ValueError) -> tuple[int, str]:
    """Return the number and the words of a system error, also of one that TensorStore reports."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno, error.strerror or str(error)
    if found := _OS_ERROR.search(str(error)):
        return int(found[1]), os.strerror(int(found[1]))
    return errno.EIO, " ".join(str(error).split())


def _loaded(path: Path, like: Any) -> Any:
    leaves, structure = jax.tree.flatten(like)
    with ocp.StandardCheckpointer() as checkpointer:
        named = checkpointer.restore(path, _named(jax.tree.map(_shape_of, like)))
    return structure.unflatten([named[_name(i)] for i in range(len(leaves))])


def _named(tree: Any) -> dict[str, Any]:
    return {_name(i): leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    # The devices that saved it may not be here.
    here = SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here)


def _name(index: int) -> str:
    return f"{index:04d}"


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
