"""Count the pairs in live tiles between parts of the queries and parts of the keys, in NumPy."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from attention_jax.base import checks
from attention_jax.masks import EMPTY, Mask, MaskLike, as_mask, batch_axes
from attention_jax.masks.algebra import leading_axes, with_int32
from attention_jax.masks.intervals import Interval, classify

TILE = 128
"""Queries and keys of a tile, unless they are given."""

MOST_TILES = 4096
"""Tiles are larger where a sequence would have more."""

CELLS = 2**22
"""About as many units are classified at a time."""


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """Positions in the order in which they are held, cut into equal parts, and these into tiles.

    A tile is made of units of consecutive positions; the last tile of a part may be smaller.

    Attributes:
      units: the first position of every unit, [parts, units a part].
      unit: positions a unit.
      first: the first unit of each tile of a part.
      sizes: the positions of each tile of a part.
    """

    units: np.ndarray
    unit: int
    first: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, order: np.ndarray, parts: int, size: int) -> Parts:
        """Cut an order into parts, with tiles of a size."""
        share = len(order) // parts
        begin = np.arange(0, share, min(size, share))
        unit = math.gcd(run_of(order, parts), *begin[1:2].tolist())
        units = order[::unit].astype(np.int32).reshape(parts, -1)
        return cls(units, unit, begin // unit, np.diff(begin, append=share))

    def intervals(self, parts: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return the first and the last position of every unit of some parts."""
        low = self.units[parts].ravel()
        return low, low + np.int32(self.unit - 1)

    def tiles(self, live: np.ndarray, axis: int) -> np.ndarray:
        """Tell which tiles of a part are live, from what is known of its units along an axis."""
        if live.shape[axis] == len(self.first):
            return live
        return np.logical_or.reduceat(live, self.first, axis=axis)


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """Counts the pairs in live tiles of masks, of one example and head each."""

    masks: list[Mask]
    lengths: tuple[int, int]
    tile_sizes: tuple[int, int]

    @classmethod
    def of(cls, operation: str, mask: MaskLike, lengths: tuple[int, int], tile_sizes: Any) -> Work:
        """Check the mask and the tiles."""
        if tile_sizes is None:
            tile_sizes = (max(TILE, 2 ** math.ceil(math.log2(max(lengths) / MOST_TILES))),) * 2
        checks.at_least(operation, 1, tile_sizes=np.asarray(tile_sizes))
        return cls(_each(operation, as_mask(mask), lengths), lengths, tuple(tile_sizes))

    def between_blocks(self, blocks: int, devices: int) -> np.ndarray:
        """Return the pairs between blocks of consecutive queries and of consecutive keys.

        A sequence that attends to itself has as many blocks of keys; else each device has one.
        """
        query_length, key_length = self.lengths
        counts = blocks, blocks if query_length == key_length else devices
        parts = (
            Parts.of(np.arange(length), count, size)
            for length, count, size in zip(self.lengths, counts, self.tile_sizes, strict=True)
        )
        return self.between(*parts)

    def between(self, queries: Parts, keys: Parts) -> np.ndarray:
        """Return the pairs in live tiles between parts of queries and of keys."""
        total = np.zeros((len(queries.units), len(keys.units)), np.int64)
        low, high = keys.intervals(slice(None))
        kv_idx = Interval(low[None, :], high[None, :])
        at_once = max(1, CELLS // (queries.units.shape[1] * keys.units.size))
        for begin in range(0, len(total), at_once):
            parts = slice(begin, begin + at_once)
            low, high = queries.intervals(parts)
            q_idx = Interval(low[:, None], high[:, None])
            shape = (-1, queries.units.shape[1], *keys.units.shape)
            for mask in self.masks:
                live = (classify(mask, q_idx, kv_idx) != EMPTY).reshape(shape)
                live = queries.tiles(keys.tiles(live, axis=3), axis=1)
                of_rows = (live * keys.sizes).sum(axis=3)
                total[parts] += (of_rows * queries.sizes[:, None]).sum(axis=1)
        return total


def run_of(order: np.ndarray, parts: int) -> int:
    """Return how many positions follow each other everywhere: parts are made of runs of so many.

    >>> run_of(np.array([4, 5, 0, 1, 2, 3, 6, 7]), parts=2)
    2
    """
    breaks = np.flatnonzero(np.diff(order) != 1) + 1
    return int(np.gcd.reduce(breaks, initial=len(order) // parts))


def _each(operation: str, mask: Mask, lengths: tuple[int, int]) -> list[Mask]:
    """Return the mask of every example and head that differ, as far as it is known by now."""
    mask = with_int32(mask)
    front = [jnp.shape(leaf)[:extra] for leaf, extra in leading_axes(mask)]
    batch, heads = (max([shape[n] for shape in front if len(shape) > n], default=1) for n in (0, 1))
    sizes = {"B": batch, "N": heads, "T": lengths[0], "S": lengths[1]}
    batch_axes.of_mask(operation, mask, sizes)
    return [mask.of(*which).static() for which in np.ndindex(batch, heads)]
