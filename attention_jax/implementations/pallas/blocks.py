"""What a kernel is made of: blocks of its operands and results, and what it does with a tile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.base.trees import varying_like
from attention_jax.implementations.tiles import Plan
from attention_jax.masks import EMPTY

Array = jax.Array


class Block(NamedTuple):
    """The part of an array that one tile reads or writes.

    `places` has a letter for each axis: q if it is cut along the queries, k along the keys, else a
    dot. `shape` is that of the part.
    """

    shape: tuple[int, ...]
    places: str


class Level(NamedTuple):
    """One vectorised axis of a kernel: where operands have it, None where they lack it.

    Levels are listed from the innermost on, and positions count the axes of inner levels.
    """

    operands: tuple[int | None, ...]
    results: tuple[int, ...]


def sizes_of(levels: Sequence[Level], arrays: Sequence[Any]) -> list[int]:
    """Return the size of each level."""
    found, shapes = [], [list(x.shape) for x in arrays]
    for level in reversed(levels):
        pairs = zip(shapes, level.operands, strict=True)
        (size,) = {shape.pop(axis) for shape, axis in pairs if axis is not None}
        found.append(size)
    return found[::-1]


def layout(axes: Sequence[Any], positions: Sequence[int | None]) -> list[Any]:
    """Insert the number of each level among the axes of an array, at its position.

    >>> layout("q.", [1, 0, None])
    [1, 'q', 0, '.']
    """
    axes = list(axes)
    for level, position in enumerate(positions):
        if position is not None:
            axes.insert(position, level)
    return axes


class Live(NamedTuple):
    """The tiles to visit, row by row of tiles of one side; every row has one at least, [n] each.

    `first` and `last` are 1 where a row begins and ends, `opens` and `closes` where a column does.
    `number` is that of the tile in the plan, -1 where a row, or a column, has none. `state` says
    what it is, as far as that is known while tracing.
    """

    row: np.ndarray
    column: np.ndarray
    first: np.ndarray
    last: np.ndarray
    opens: np.ndarray
    closes: np.ndarray
    state: np.ndarray
    number: np.ndarray

    @classmethod
    def of(cls, plan: Plan, counts: tuple[int, int], by: str, columns: bool = False) -> Live:
        """Order the tiles of a plan by the rows of queries, or by those of keys.

        With `columns`, every column has a tile too.
        """
        side = "qk".index(by)
        places = plan.starts // plan.tile
        missing = np.zeros((0, 2), np.int32)
        for axis in (side, 1 - side) if columns else (side,):
            absent = np.setdiff1d(np.arange(counts[axis]), [*places[:, axis], *missing[:, axis]])
            added = np.zeros((len(absent), 2), np.int32)
            added[:, axis] = absent
            missing = np.concatenate([missing, added])
        row, column = np.concatenate([places, missing])[:, [side, 1 - side]].T
        number = np.concatenate([np.arange(len(places)), np.full(len(missing), -1)])
        state = np.concatenate([plan.states, np.full(len(missing), EMPTY)])
        order = np.lexsort((column, row))
        row, column, number, state = (
            x[order].astype(np.int32) for x in (row, column, number, state)
        )
        changes = row[1:] != row[:-1]
        opens, closes = np.zeros_like(row), np.zeros_like(row)
        opens[np.unique(column, return_index=True)[1]] = 1
        closes[len(row) - 1 - np.unique(column[::-1], return_index=True)[1]] = 1
        first, last = (
            ends.astype(np.int32) for ends in (np.append(True, changes), np.append(changes, True))
        )
        return cls(row, column, first, last, opens, closes, state, number)


class Sum(NamedTuple):
    """What is added up over the tiles of a row: its shape, and the number it starts from.

    What `is_of_rows` is a number for each row, [n, 1] or as many equal columns as a platform likes.
    """

    shape: tuple[int, ...]
    start: float
    is_of_rows: bool = False


def across(of_rows: Array, columns: int) -> Array:
    """Return a number for each row as what broadcasts to [n, columns].

    It is given as [n, 1], or in equal columns.
    """
    lanes = of_rows.shape[1]
    if lanes == 1:
        return of_rows
    if columns <= lanes:
        return of_rows[:, :columns]
    return jnp.concatenate([of_rows] * (columns // lanes), axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """What is done with each tile, whatever the platform.

    Attributes:
      by: "q" if the tiles of a row of queries follow each other, "k" if those of keys.
      live: the tiles.
      blocks: of each operand.
      results: block and dtype of each result: of rows, of columns, and last those of pairs, which
        are cut along both sides.
      counts: how many tiles there are along queries and along keys.
      sums: float32 numbers that are kept from tile to tile of a row; the last `of_columns` of them
        are kept for each column from its first tile to its last, in whatever row.
      step: (masked, poisoned, sums, blocks of the operands, i, j) -> (sums, results of the pairs),
        where i is the first query of the tile and j its first key; it is `masked` where the mask
        has to be read, and `poisoned` where operands may hold NaN or Inf.
      finish: (sums, blocks of the operands) -> results of the row; of operands cut along the other
        side it must read nothing.
      finish_column: the same of a column.
      states: the number of the operand [1, n] that says what each tile is, where only run time
        knows.
      is_poisoned: blocks of the operands -> whether NaN or Inf is among those of a column; None if
        it makes no difference.
      is_row_poisoned: the same of a row; None if it makes none.
      apart: kernels that compute the same one after the other, where a platform keeps no columns.
      only_on: the platform whose branch of a program the kernel is in; None if it is in no branch.
    """

    by: str
    live: Live
    blocks: Sequence[Block]
    results: Sequence[tuple[Block, Any]]
    counts: tuple[int, int]
    tile: tuple[int, int]
    sums: Sequence[Sum]
    step: Callable[..., tuple[list[Array], list[Array]]]
    finish: Callable[..., list[Array]]
    states: int | None = None
    is_poisoned: Callable[..., Array] | None = None
    is_row_poisoned: Callable[..., Array] | None = None
    only_on: str | None = None
    of_columns: int = 0
    finish_column: Callable[..., list[Array]] | None = None
    apart: Sequence[Part] = ()

    def shapes(self, levels: Sequence[Level], *arrays: Any) -> list[jax.ShapeDtypeStruct]:
        """Return the results as whole arrays, given the operands."""
        sizes = dict(enumerate(sizes_of(levels, arrays)))
        found = []
        for n, (block, dtype) in enumerate(self.results):
            axes = layout(
                [(size,) for size in self.whole(block)], [level.results[n] for level in levels]
            )
            shape = [axis[0] if isinstance(axis, tuple) else sizes[axis] for axis in axes]
            found.append(jax.ShapeDtypeStruct(tuple(shape), dtype))
        return found

    def shapes_like(self, levels: Sequence[Level], *arrays: Array) -> list[Any]:
        """Return the results as whole arrays that vary over a mesh as the operands do."""
        zeros = [jnp.zeros(one.shape, one.dtype) for one in self.shapes(levels, *arrays)]
        return jax.tree.map(jax.typeof, varying_like(zeros, *arrays))

    def whole(self, block: Block) -> tuple[int, ...]:
        """Return the shape of the array that is cut into these blocks."""
        many = {"q": self.counts[0], "k": self.counts[1], ".": 1}
        return tuple(
            size * many[place] for size, place in zip(block.shape, block.places, strict=True)
        )

    def is_of_pairs(self, block: Block) -> bool:
        """Tell whether a block is cut along both sides."""
        return "q" in block.places and "k" in block.places

    def is_of_column(self, block: Block) -> bool:
        """Tell whether a block is cut along the columns alone."""
        return self.by not in block.places and block.places.strip(".") != ""


class Part(NamedTuple):
    """A kernel that computes some results of another, by their numbers, of some of its operands."""

    kernel: Kernel
    operands: Sequence[int]
    results: Sequence[int]
