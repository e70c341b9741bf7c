"""Which cells of a grid over the T x S plane may be live, and the tiles that cover them.

A mask is asked for blocks of many cells first, then for parts of those blocks alone that are
neither EMPTY nor FULL, and then so for cells: the work follows the boundary of the mask, not its
area.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from attention_jax.masks import EMPTY, PARTIAL, Mask, algebra
from attention_jax.masks.intervals import Interval, judge

BLOCK, PART = 32, 4
"""A block has this many rows and this many cells of a row, and a part of a block so many."""

AT_ONCE = 2**20
"""A mask is asked for at most so many cells at once: arrays of more are slow to come by."""


class Runs(NamedTuple):
    """Live cells of a grid whose rows have `cells` cells: in row `row[n]` from `begin` to `end`.

    Ordered by row and cell; runs of a row neither overlap nor touch. The last cell of a run is the
    one before `end`.
    """

    row: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    cells: int


def runs_of(live: np.ndarray) -> Runs:
    """Return the runs of an array of booleans, [rows, cells].

    >>> runs_of(np.array([[True, True, False], [False, False, True]]))[:3]
    (array([0, 1]), array([0, 2]), array([2, 3]))
    """
    rows, cells = live.shape
    apart = np.zeros(1 + rows * (cells + 1), bool)  # with one that is not live between rows
    apart[1:].reshape(rows, cells + 1)[:, :cells] = live
    change = np.flatnonzero(apart[1:] != apart[:-1])
    row, begin = np.divmod(change[::2], cells + 1)
    return Runs(row, begin, change[1::2] - row * (cells + 1), cells)


class Judged(NamedTuple):
    """What the cells of a grid are, as a mask says: a block of [h, w] cells at a time.

    A block with a place in `within [p, h, w]` is told there cell by cell; the place is -1 where
    all cells of a block are what `blocks` says, [rows / h, cells / w]. What `within` says of cells
    beyond the last it says of the last.
    """

    rows: int
    cells: int
    blocks: np.ndarray
    place: np.ndarray
    within: np.ndarray

    @classmethod
    def of(cls, mask: Mask, pairs: tuple[int, int], size: tuple[int, int]) -> Judged:
        """Judge the cells of `size` = [queries, keys] over [T, S] pairs."""
        rows, cells = (-(-length // of) for length, of in zip(pairs, size, strict=True))
        mask = algebra.with_int32(mask)
        row, cell = (np.arange(-(-number // BLOCK)) for number in (rows, cells))
        states = _states(mask, pairs, [of * BLOCK for of in size], row[:, None], cell)
        blocks = np.broadcast_to(states, (len(row), len(cell)))
        place = np.full(blocks.shape, -1)
        if states.ndim == 0:  # the answer is the same wherever it is asked
            return cls(rows, cells, blocks, place, np.zeros((0, BLOCK, BLOCK), np.int8))
        block = np.nonzero(blocks == PARTIAL)
        place[block] = np.arange(len(block[0]))
        many = BLOCK // PART
        parts = _told(mask, pairs, [of * PART for of in size], block, many)
        within = parts.repeat(PART, axis=1).repeat(PART, axis=2)
        which, *inner = np.nonzero(parts == PARTIAL)
        part = [many * of[which] + inside for of, inside in zip(block, inner, strict=True)]
        of_parts = within.reshape(-1, many, PART, many, PART)
        of_parts[which, inner[0], :, inner[1], :] = _told(mask, pairs, size, part, PART)
        return cls(rows, cells, blocks, place, within)

    def joined(self, rows: int, cells: int) -> Judged:
        """Return larger cells, of so many rows and cells each: what all of theirs are, or PARTIAL.

        Blocks stay; they are of powers of two of cells, as `rows` and `cells` are.
        """
        least = most = self.within
        for axis, many in ((1, rows), (2, cells)):
            while many > 1:
                ahead = (slice(None),) * axis
                even, odd = (*ahead, slice(0, None, 2)), (*ahead, slice(1, None, 2))
                least = np.minimum(least[even], least[odd])
                most = np.maximum(most[even], most[odd])
                many //= 2
        within = np.where(least == most, least, np.int8(PARTIAL))
        counts = -(-self.rows // rows), -(-self.cells // cells)
        return Judged(*counts, self.blocks, self.place, within)

    def at(self, row: np.ndarray, cell: np.ndarray) -> np.ndarray:
        """Return what cells are, given in arrays that broadcast; beyond the last they are EMPTY."""
        height, width = self.within.shape[1:]
        inside = np.minimum(cell, self.cells - 1)
        block = row // height * self.blocks.shape[1] + inside // width
        states = self.blocks.ravel().take(block)
        if len(self.within):
            place = self.place.ravel().take(block)
            one = (place * height + row % height) * width + inside % width
            states = np.where(place < 0, states, self.within.ravel().take(one))
        return np.where(cell < self.cells, states, EMPTY)

    @property
    def live(self) -> Runs:
        """The cells that are not EMPTY."""
        height, width = self.within.shape[1:]
        whole = runs_of((self.blocks != EMPTY) & (self.place < 0))
        row = whole.row[:, None] * height + np.arange(height)
        is_row = row < self.rows
        of_whole = [np.broadcast_to(x[:, None] * width, row.shape)[is_row] for x in whole[1:3]]
        part = runs_of((self.within != EMPTY).reshape(-1, width))
        block, low = np.divmod(part.row, height)
        above, left = np.nonzero(self.place >= 0)
        first = height * above[block], width * left[block]
        of_part = first[0] + low, first[1] + part.begin, first[1] + part.end
        is_part = (of_part[0] < self.rows) & (of_part[1] < self.cells)
        of_part = [x[is_part] for x in of_part]
        begin, end = (np.concatenate(x) for x in zip(of_whole, of_part[1:], strict=True))
        row = np.concatenate([row[is_row], of_part[0]])
        return _joined(row, begin, np.minimum(end, self.cells), self.cells)


def _told(mask: Mask, pairs: Any, size: Any, block: Sequence[np.ndarray], many: int) -> np.ndarray:
    """Return what the `many` x `many` cells of blocks are, which are at a row and a column [n]."""
    found = np.zeros((len(block[0]), many, many), np.int8)
    step = AT_ONCE // many**2
    for first in range(0, len(found), step):
        those = slice(first, first + step)
        row, cell = (many * of[those, None] + np.arange(many) for of in block)
        found[those] = _states(mask, pairs, size, row[:, :, None], cell[:, None, :])
    return found


def states_at(
    mask: Mask, pairs: tuple[int, int], size: tuple[int, int], row: Any, cell: Any
) -> np.ndarray:
    """Return what the cells of a grid are, given by their row and place, in arrays that broadcast.

    >>> from attention_jax.masks import Causal
    >>> states_at(Causal(), (4, 4), (2, 2), np.array([0, 1]), np.array([1, 0]))
    array([0, 2], dtype=int8)
    """
    states = _states(algebra.with_int32(mask), pairs, size, row, cell)
    return np.broadcast_to(states, np.broadcast_shapes(np.shape(row), np.shape(cell)))


def _states(mask: Mask, pairs: Any, size: Any, row: Any, cell: Any) -> np.ndarray:
    """Return what cells are; one number if the mask answers the same whatever the indices are."""
    where = []
    for number, of, length in zip((row, cell), size, pairs, strict=True):
        low = np.minimum(number * of, length - 1).astype(np.int32)
        where.append(Interval(low, np.minimum(number * of + of, length).astype(np.int32) - 1))
    return np.asarray(judge(mask, *where).state)


def _joined(row: np.ndarray, begin: np.ndarray, end: np.ndarray, cells: int) -> Runs:
    """Order runs, and join those that touch."""
    order = np.argsort(row * (cells + 1) + begin, kind="stable")
    row, begin, end = row[order], begin[order], end[order]
    touches = (row[1:] == row[:-1]) & (begin[1:] == end[:-1])
    is_first, is_last = np.append(True, ~touches), np.append(~touches, True)
    if not len(row):
        is_first = is_last = np.zeros(0, bool)
    return Runs(row[is_first], begin[is_first], end[is_last], cells)


def cover(runs: Runs, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Cover the live cells of every row by the fewest intervals of one width, none overlapping.

    Returns the row and the first cell of each. The first interval begins at the first live cell,
    the next at the first live cell that is not covered; then those that stick out at the end are
    pushed back, and push back those before them, before the first cell where there is no room.
    """
    wide = runs.cells + width + 1  # so that no place in one row is one in another
    ends = runs.row * wide + runs.end
    run = np.flatnonzero(np.diff(runs.row, prepend=-1))  # where every row is now
    begin = runs.begin[run]
    row_of_run = np.append(runs.row, -1)  # that of no run, after the last
    found = []
    while len(run):
        row, many = runs.row[run], -((begin - runs.end[run]) // width)
        found.append((row, begin, many))
        past = begin + many * width
        run = ends.searchsorted(row * wide + past, side="right")
        goes_on = row_of_run[run] == row
        if not goes_on.all():
            run, past = run[goes_on], past[goes_on]
        begin = np.maximum(past, runs.begin[run])
    if not found:
        return runs.row, runs.begin
    row, begin, many = (np.concatenate(x) for x in zip(*found, strict=True))
    order = np.argsort(row * wide + begin)
    row, begin, many = (x[order] for x in (row, begin, many))
    past = many.cumsum()  # the number of the interval after those of each run
    last = np.flatnonzero(np.diff(row, append=-1))  # the last run of every row
    of_row = np.repeat(past[last], np.diff(last, prepend=-1))
    number = np.arange(past[-1])
    first = begin - width * (past - many)
    begin = np.repeat(first, many) + width * number
    following = np.repeat(of_row, many) - number  # itself and those after it
    return np.repeat(row, many), np.minimum(begin, runs.cells - following * width)
