"""Atomic checkpoints: saved by Orbax, sealed by checksums, verified on load.

Orbax detects a missing file but not a flipped bit. The seal of a checkpoint has the SHA-256 of
its files and is written last: a checkpoint without a seal is unfinished.
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
# Orbax cannot read a checkpoint without this file.
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
        """Save a pytree of arrays, and delete all but the last checkpoints up to this step.

        Later ones were found damaged: training restarted from an earlier one.

        Raises:
          UsageError: the checkpoint cannot be written, or is incomplete.
        """
        path = self._path(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._delete(step)
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(path, _named(state))
            if not (path / _MANIFEST).is_file():
                raise ValueError(f"Orbax left it without its {_MANIFEST}")
            write_text(self._seal(step), json.dumps(_checksums(path)))
            kept = [kept for kept in self.steps if kept <= step][:_KEPT]
            for other in set(self.steps) - set(kept):
                self._delete(other)
        except (OSError, ValueError) as error:
            shutil.rmtree(path, ignore_errors=True)
            raise UsageError(
                f"checkpoint {step} cannot be saved in {self.folder}: {error}; the ones before it "
                "are kept, and the same command goes on from there."
            ) from None

    def restore(self, like: Any, *, tidy: bool = True) -> tuple[int, Any] | None:
        """Load the last valid checkpoint; `damaged` gets a sentence for each one skipped.

        Args:
          like: a pytree of arrays, or of their shapes.
          tidy: remove unfinished checkpoints; not while another process may be writing one.
        """
        if tidy:
            self._delete_unsealed()
        for step in self.steps:
            path = self._path(step)
            if path.is_dir() and _checksums(path) == self._sealed(step):
                # It may have another structure, or be from another version of Orbax.
                with contextlib.suppress(KeyError, OSError, TypeError, ValueError):
                    return step, _loaded(path, like)
            self.damaged.append(f"checkpoint {step} in {self.folder} is damaged: skipped.")
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

    def _delete_unsealed(self) -> None:
        for path in self.folder.glob("*"):
            if path.is_dir() and not path.with_name(f"{path.name}.seal").exists():
                shutil.rmtree(path, ignore_errors=True)

    def _delete(self, step: int) -> None:
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
