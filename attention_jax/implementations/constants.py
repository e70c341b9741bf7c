"""NumPy arrays that are static, by value: those from which tiles are planned while tracing."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from attention_jax.masks import Mask, Table, algebra


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Constant:
    """A NumPy array that is static, by its value."""

    dtype: np.dtype
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: Any) -> Constant:
        """Copy an array."""
        return cls(array.dtype, array.shape, array.tobytes())

    @property
    def array(self) -> np.ndarray:
        """The array; it cannot be written to."""
        return np.frombuffer(self.data, self.dtype).reshape(self.shape)


def with_constants(mask: Mask) -> Mask:
    """Return the mask with those NumPy arrays static from which tiles are planned while tracing.

    Tables and arrays with an axis for examples or heads are not; nor are arrays of JAX, which may
    be new at each call, as the positions of a decoder are.
    """
    leaves = [
        Constant.of(leaf) if _plans_tiles(owner, name, leaf) else leaf
        for owner, name, _, leaf in algebra.owners(mask)
    ]
    return jax.tree.structure(mask).unflatten(leaves)


def without_constants(mask: Mask) -> Mask:
    """Return the mask with NumPy arrays again."""
    return jax.tree.map(
        lambda leaf: leaf.array if isinstance(leaf, Constant) else leaf,
        mask,
        is_leaf=lambda part: isinstance(part, Constant),
    )


def _plans_tiles(owner: Mask, name: str, leaf: Any) -> bool:
    if not isinstance(leaf, np.ndarray | np.generic) or isinstance(owner, Table):
        return False
    return np.ndim(leaf) <= owner.example_rank.get(name, 0)
