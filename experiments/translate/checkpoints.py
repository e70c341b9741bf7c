"""Checkpoints that are whole or not there: saved by Orbax, sealed by checksums, checked on load.

Orbax notices a missing file but not a flipped bit. The seal of a checkpoint lists the SHA-256 of
its files and is written last, so that a checkpoint without one was never finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from experiments.command_line import UsageError
from experiments.translate.workdir import write_text

_KEPT = 2
# Without it Orbax finds nothing in a checkpoint.
_MANIFEST = "manifest.ocdbt"


class Checkpoints:
    """The checkpoints of one mechanism; the last two are kept."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        self.damaged: list[str] = []

    @property
    def steps(self) -> list[int]:
        """The steps of all sealed checkpoints, the last one first."""
        return sorted((int(seal.stem) for seal in self.folder.glob("*.seal")), reverse=True)

    def save(self, step: int, state: Any) -> None:
        """Save a pytree of arrays, and forget all but the last checkpoints up to this step.

        Later ones belong to a training that was given up: they were found damaged.

        Raises:
          UsageError: the disk is full, or not to be written to, or the checkpoint is not whole.
        """
        path = self._path(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._forget(step)
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(path, _named(state))
            if not (path / _MANIFEST).is_file():
                raise ValueError(f"Orbax left it without its {_MANIFEST}")
            write_text(self._seal(step), json.dumps(_checksums(path)))
            kept = [kept for kept in self.steps if kept <= step][:_KEPT]
            for other in set(self.steps) - set(kept):
                self._forget(other)
        except (OSError, ValueError) as error:
            shutil.rmtree(path, ignore_errors=True)
            raise UsageError(
                f"checkpoint {step} cannot be saved in {self.folder}: {error}; the ones before it "
                "are kept, and the same command goes on from there."
            ) from None

    def restore(self, like: Any, *, tidy: bool = True) -> tuple[int, Any] | None:
        """Load the last whole checkpoint; `damaged` then has a sentence for each one passed over.

        Args:
          like: a pytree of arrays, or of their shapes.
          tidy: remove what was never finished; another process may be at work on it.
        """
        if tidy:
            self._forget_unsealed()
        for step in self.steps:
            path = self._path(step)
            if path.is_dir() and _checksums(path) == self._sealed(step):
                # What was sealed may still be none of this state, or of another version of Orbax.
                with contextlib.suppress(KeyError, OSError, TypeError, ValueError):
                    return step, _loaded(path, like)
            self.damaged.append(f"checkpoint {step} in {self.folder} is damaged: passed over.")
        return None

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def _seal(self, step: int) -> Path:
        return self.folder / f"{step:08d}.seal"

    def _sealed(self, step: int) -> Any:
        try:
            return json.loads(self._seal(step).read_text(encoding="utf-8"))
        except ValueError:
            return None

    def _forget_unsealed(self) -> None:
        for path in self.folder.glob("*"):
            if path.is_dir() and not path.with_name(f"{path.name}.seal").exists():
                shutil.rmtree(path, ignore_errors=True)

    def _forget(self, step: int) -> None:
        self._seal(step).unlink(missing_ok=True)
        shutil.rmtree(self._path(step), ignore_errors=True)


def _loaded(path: Path, like: Any) -> Any:
    leaves, structure = jax.tree.flatten(like)
    with ocp.StandardCheckpointer() as checkpointer:
        named = checkpointer.restore(path, _named(jax.tree.map(_shape_of, like)))
    return structure.unflatten([named[_name(i)] for i in range(len(leaves))])


def _named(tree: Any) -> dict[str, Any]:
    return {_name(i): leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _name(index: int) -> str:
    return f"{index:04d}"


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
