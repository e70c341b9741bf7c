"""Count the pairs in live tiles between parts of the queries and parts of the keys, in NumPy."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from attention_jax.base import checks
from attention_jax.implementations.covering import states_at
from attention_jax.masks import EMPTY, PARTIAL, Mask, MaskLike, as_mask, batch_axes
from attention_jax.masks.algebra import leading_axes, with_int32
from attention_jax.masks.intervals import Interval, classify

TILE = 128
"""Queries and keys of a tile, unless they are given."""

MOST_TILES = 4096
"""Tiles are larger where a sequence would have more."""

CELLS = 2**22
"""About as many pairs of runs are classified at a time."""

SMALLER = 2
"""Cells that all orders share are asked where they are at most so many times as many as runs."""


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """Positions in the order in which they are held, cut into equal parts, and these into tiles.

    A tile is made of runs of consecutive positions; the last tile of a part may be smaller.

    Attributes:
      low, high: the first and the last position of every run, [runs].
      first_run: the first run of each tile, [tiles].
      sizes: the positions of each tile, [tiles].
      part: the part of each tile, [tiles].
      count: how many parts there are.
    """

    low: np.ndarray
    high: np.ndarray
    first_run: np.ndarray
    sizes: np.ndarray
    part: np.ndarray
    count: int

    @classmethod
    def of(cls, order: np.ndarray, count: int, size: int, spans: bool = True) -> Parts:
        """Cut an order into parts, with tiles of a size that span runs, or end where these do."""
        length = len(order)
        begins = np.arange(0, length, length // count)  # of the parts
        breaks = np.flatnonzero(np.diff(order) != 1) + 1
        pieces = begins if spans else np.union1d(begins, breaks)
        many = -(-np.diff(pieces, append=length) // size)
        number = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
        tiles = np.repeat(pieces, many) + number * size
        runs = np.union1d(tiles, breaks) if len(breaks) else tiles
        low = order[runs].astype(np.int32)
        high = low + np.diff(runs, append=length).astype(np.int32) - np.int32(1)
        sizes = np.diff(tiles, append=length)
        return cls(
            low, high, np.searchsorted(runs, tiles), sizes, tiles // (length // count), count
        )

    def of_tiles(self, reduce: np.ufunc, x: np.ndarray, axis: int) -> np.ndarray:
        """Reduce what is known of the runs to the tiles, along an axis."""
        if x.shape[axis] == len(self.first_run):
            return x
        return reduce.reduceat(x, self.first_run, axis=axis)

    @functools.cached_property
    def step(self) -> int:
        """The largest size of cells that all runs are made of."""
        return int(np.gcd(np.gcd.reduce(self.low), np.gcd.reduce(self.high + 1)))

    def any_of(self, live: np.ndarray) -> np.ndarray:
        """Tell of each tile whether one of its cells is live, given those in order of positions."""
        many = (self.high + 1 - self.low) // self.step
        before = np.cumsum(many) - many
        cell = np.arange(many.sum()) + np.repeat(self.low // self.step - before, many)
        return np.logical_or.reduceat(live[cell], before[self.first_run], axis=0)

    def tiles(self, which: slice) -> Parts:
        """Return some of the tiles."""
        runs = slice(*np.append(self.first_run, len(self.low))[[which.start, which.stop]])
        first = self.first_run[which] - runs.start
        sizes, part = self.sizes[which], self.part[which]
        return Parts(self.low[runs], self.high[runs], first, sizes, part, self.count)


def states_between(mask: Mask, queries: Parts, keys: Parts) -> np.ndarray:
    """Return what tiles are, [tiles of queries, tiles of keys].

    What all pairs of the runs are that they are made of, and PARTIAL where these differ.
    """
    q_idx = Interval(queries.low[:, None], queries.high[:, None])
    kv_idx = Interval(keys.low[None, :], keys.high[None, :])
    states = np.asarray(classify(mask, q_idx, kv_idx))
    states = np.broadcast_to(states, (len(queries.low), len(keys.low)))
    least, most = (
        queries.of_tiles(reduce, keys.of_tiles(reduce, states, 1), 0)
        for reduce in (np.minimum, np.maximum)
    )
    return np.where(least == most, least, np.int8(PARTIAL))


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """Counts the pairs in live tiles of masks, of one example and head each.

    `asked` says what cells are, [mask][rows, columns], by their size [queries, keys]: orders that
    are made of the same blocks have the same cells, in another order.
    """

    masks: list[Mask]
    lengths: tuple[int, int]
    tile_sizes: tuple[int, int]
    asked: dict[tuple[int, int], list[np.ndarray]] = dataclasses.field(default_factory=dict)

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

    def of_blocks(self, blocks: int) -> np.ndarray:
        """Return the pairs of blocks of consecutive queries with all keys, [blocks]."""
        queries, keys = map(np.arange, self.lengths)
        of_queries = Parts.of(queries, blocks, self.tile_sizes[0])
        return self.between(of_queries, Parts.of(keys, 1, self.tile_sizes[1]))[:, 0]

    def between(self, queries: Parts, keys: Parts) -> np.ndarray:
        """Return the pairs in live tiles between parts of queries and of keys."""
        total = np.zeros((queries.count, keys.count), np.int64)
        first = np.searchsorted(keys.part, np.arange(keys.count))
        size = queries.step, keys.step
        cells = math.prod(n // of for n, of in zip(self.lengths, size, strict=True))
        if cells <= SMALLER * len(queries.low) * len(keys.low):
            for states in self.cells(size):
                live = queries.any_of(keys.any_of((states != EMPTY).T).T)
                of_rows = np.add.reduceat(live * keys.sizes, first, axis=1)
                np.add.at(total, queries.part, of_rows * queries.sizes[:, None])
            return total
        at_once = max(1, CELLS * len(queries.sizes) // (len(queries.low) * len(keys.low)))
        for begin in range(0, len(queries.sizes), at_once):
            some = queries.tiles(slice(begin, min(begin + at_once, len(queries.sizes))))
            for mask in self.masks:
                live = states_between(mask, some, keys) != EMPTY
                of_rows = np.add.reduceat(live * keys.sizes, first, axis=1)
                np.add.at(total, some.part, of_rows * some.sizes[:, None])
        return total

    def cells(self, size: tuple[int, int]) -> list[np.ndarray]:
        """Return what the cells of a size are under every mask; each mask is asked once."""
        if size not in self.asked:
            larger = [of for of in self.asked if of[0] % size[0] == 0 and of[1] % size[1] == 0]
            if larger:
                of = min(larger, key=math.prod)
                parts = of[0] // size[0], of[1] // size[1]
                found = [
                    _parted(mask, size, states, parts)
                    for mask, states in zip(self.masks, self.asked[of], strict=True)
                ]
            else:
                queries, keys = (
                    Parts.of(np.arange(length), 1, of)
                    for length, of in zip(self.lengths, size, strict=True)
                )
                found = [states_between(mask, queries, keys) for mask in self.masks]
            self.asked[size] = found
        return self.asked[size]


def _parted(
    mask: Mask, size: tuple[int, int], states: np.ndarray, parts: tuple[int, int]
) -> np.ndarray:
    """Return what cells of a size are, asked only about those of larger PARTIAL ones.

    Each of the larger cells, whose states are given, is made of so many `parts`.
    """
    rows, columns = parts
    row, column = np.nonzero(states == PARTIAL)
    row = row[:, None, None] * rows + np.arange(rows)[:, None]
    column = column[:, None, None] * columns + np.arange(columns)
    found = states.repeat(rows, axis=0).repeat(columns, axis=1)
    lengths = found.shape[0] * size[0], found.shape[1] * size[1]
    found[row, column] = states_at(mask, lengths, size, row, column)
    return found


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
