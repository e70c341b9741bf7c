"""Which tiles of the T x S plane are visited, and in what order.

The mask, evaluated on intervals of indices, says what each tile is: EMPTY tiles are never visited,
FULL tiles are visited without the mask (but for those that `group` joins to a PARTIAL one), PARTIAL
ones with it. What is known while tracing shapes the program itself; what is known only inside `jit`
(segments, lengths) decides at run time, in the same program.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.implementations import machine
from attention_jax.implementations.covering import Judged, cover
from attention_jax.implementations.progressions import Way, computed, shortest
from attention_jax.masks import FULL, PARTIAL, Lengths, Mask, algebra
from attention_jax.masks.intervals import Unknown, classify, tile_intervals

LARGE_PAIRS = 2**18
"""Tiles of this many pairs or more are joined only with those below them of the same keys."""

MOST_TOGETHER = 8
"""At most this many rows of tiles are visited together."""

LANES = 4
"""Low tiles that are visited together are computed as this many independent batches.

XLA's CPU runtime computes a batch of products of few rows on one core, but several batches at
once; another core helps only where many operations are ready.
"""

LOW_ROWS, LOW_PAIRS = 256, 2**14
"""Tiles of fewer rows are low; tiles of fewer pairs are computed as one batch."""

FRACTIONS = (3, 4)
"""A tile begins at a multiple of its width divided by the first of these that divides it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Visits:
    """Tiles that a loop visits `together` at a time, each `rows` queries high.

    `queries [n]` is the first query of a visit; the tiles of a visit lie below each other, and
    `keys [n, together]` are their first keys. They are computed as `lanes` batches.
    """

    masked: bool
    rows: int
    together: int
    queries: np.ndarray
    keys: np.ndarray
    lanes: int = 1

    @property
    def height(self) -> int:
        """Queries of a visit."""
        return self.rows * self.together

    @property
    def places(self) -> tuple[Any, Any]:
        """`queries` and `keys`, as a program computes them.

        On a mesh they may be arrays of JAX, each device's own.
        """
        if not isinstance(self.keys, np.ndarray):
            return self.queries, self.keys
        table = self._table()
        return table[:, 0], table[:, 1:]

    @functools.cached_property
    def _table(self) -> Way:
        """How the places are computed, found once for all passes."""
        return shortest(np.concatenate([self.queries[:, None], self.keys], axis=1))


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The tiles to visit, each `tile` = [bt, bk] queries by keys.

    Attributes:
      pairs: the numbers of queries and keys, [T, S].
      tile: [bt, bk].
      unit: the first key of a tile is a multiple of this.
      starts: [n, 2], the first query and the first key of every tile that may be live, by row.
      states: [n], what each tile is, as far as that is known while tracing.
      covered: the tiles reach up to this key, beyond the last where S is no multiple of `unit`.
      is_static: whether `states` is the whole truth; if not, the mask is asked at run time.
      platform: the one that the visits are for; None for that of the process.
      heads: a tile is of so many heads, which maps mix.
      apart: whether every tile is a visit of its own, for what goes over the tiles of a row.
    """

    pairs: tuple[int, int]
    tile: tuple[int, int]
    unit: int
    starts: np.ndarray
    states: np.ndarray
    covered: int
    is_static: bool
    platform: str | None = None
    heads: int = 1
    apart: bool = False

    @property
    def looks_up(self) -> bool:
        """Whether a visit looks up what its tile is, because it cannot say so of all its tiles."""
        return self.apart or not self.is_static

    def within(self, mask: Mask) -> Mask:
        """Return the mask without keys beyond the last."""
        return mask & Lengths(self.pairs[1]) if self.covered > self.pairs[1] else mask

    def states_of(self, mask: Mask) -> Any:
        """Return what each tile is, [n], as arrays where the program has to look it up."""
        if self.is_static:
            return computed(self.states[:, None].astype(np.int32))[:, 0].astype(self.states.dtype)
        per_tile = self.tile[1] // self.unit
        on_grid = not (self.starts[:, 1] % self.tile[1]).any()
        width = self.tile[1] if on_grid else self.unit
        queries = tile_intervals(self.pairs[0], self.tile[0], axis=0, computed=True)
        keys = tile_intervals(self.covered, width, axis=1, computed=True)
        states = jnp.asarray(classify(algebra.with_int32(self.within(mask)), queries, keys))
        if on_grid and len(self.starts) == states.size:  # every tile, row by row
            return states.reshape(-1)
        places = self.starts // np.array([self.tile[0], self.unit], np.int32)
        rows, units = jnp.asarray(computed(places)).T
        if on_grid:
            return states[rows, units // per_tile]
        return joined(states, rows, units, per_tile)

    @functools.cached_property
    def visits(self) -> list[Visits]:
        """The groups in which the tiles are visited."""
        if self.looks_up:
            visits = Visits(True, self.tile[0], 1, self.starts[:, 0], self.starts[:, 1:])
            return [visits] if len(self.starts) else []
        pairs = self.heads * self.tile[0] * self.tile[1]
        rows = -(-self.pairs[0] // self.tile[0])
        many = min(
            pairs_together(self.platform or jax.default_backend()) / pairs,
            rows,
            MOST_TOGETHER,
        )
        tall = 2 ** int(np.log2(max(1, many)))
        alone = pairs >= LARGE_PAIRS or self.heads > 1
        groups = group(self, tall, 1 if alone else tall)
        if self.heads > 1 or self.tile[0] >= LOW_ROWS or pairs < LOW_PAIRS:
            return groups
        return [dataclasses.replace(visits, lanes=min(LANES, visits.together)) for visits in groups]

    @property
    def largest_visit(self) -> int:
        """How many queries are visited at once at most."""
        return max((visits.height for visits in self.visits), default=self.tile[0])


def pairs_together(platform: str) -> int:
    """Return about how many pairs tiles have that are visited together; 0 if none are."""
    return machine.pairs_of_cpu() if platform == "cpu" else 0


@dataclasses.dataclass(frozen=True, eq=False)
class LatePlan:
    """The tiles of a grid, of a mask that says the same at any time, found when first asked for.

    Kernels for an accelerator may be a branch of a program that is never lowered, and of small
    tiles there are more than of those that run instead.
    """

    mask: Mask
    pairs: tuple[int, int]
    tile: tuple[int, int]
    is_static: bool

    @property
    def outline(self) -> Plan:
        """The plan without its tiles."""
        covered = -(-self.pairs[1] // self.tile[1]) * self.tile[1]
        nothing = np.zeros((0, 2), np.int32), np.zeros(0, np.int8)
        return Plan(self.pairs, self.tile, self.tile[1], *nothing, covered, is_static=True)

    @functools.cached_property
    def whole(self) -> Plan:
        """The plan."""
        return make_plan(self.mask, self.pairs, self.tile, self.is_static, on_grid=True)


class AllVisits(NamedTuple):
    """Every tile of a plane whose sizes may be symbols of `jax.export`, row by row, as `Visits`.

    There are `counts` = [rows, columns] of tiles, each `rows` queries by `width` keys.
    """

    rows: int
    width: int
    counts: tuple[Any, Any]
    masked = True
    together = 1
    lanes = 1

    @property
    def height(self) -> int:
        """Queries of a visit."""
        return self.rows

    @property
    def places(self) -> tuple[Any, Any]:
        """The first query [n] and the first key [n, 1] of each."""
        number = jnp.arange(math.prod(self.counts), dtype=jnp.int32)
        columns = jnp.asarray(self.counts[1], jnp.int32)
        return number // columns * self.rows, (number % columns * self.width)[:, None]


@dataclasses.dataclass(frozen=True, eq=False)
class PlanOfAnyLength(Plan):
    """The tiles of a plane whose sizes are symbols; which of them are EMPTY only run time knows."""

    @property
    def counts(self) -> tuple[Any, Any]:
        """Rows and columns of tiles."""
        return -(-self.pairs[0] // self.tile[0]), -(-self.pairs[1] // self.tile[1])

    @property
    def visits(self) -> list[Any]:
        """One group, of all tiles."""
        return [AllVisits(*self.tile, self.counts)]

    def within(self, mask: Mask) -> Mask:
        """Return the mask without keys beyond the last."""
        return mask & Lengths(jnp.asarray(self.pairs[1], jnp.int32))

    def states_of(self, mask: Mask) -> Any:
        """Return what each tile is, [n]; PARTIAL where that depends on arrays as long as it."""
        known = jax.tree.map(_unless_of_any_length, mask)
        states = self.within(known).tiles(self.pairs[0], self.covered, *self.tile)
        return jnp.broadcast_to(jnp.asarray(states), self.counts).reshape(-1)


def _unless_of_any_length(leaf: Any) -> Any:
    return leaf if all(isinstance(n, int) for n in np.shape(leaf)) else Unknown()


def plan_of_any_length(
    pairs: tuple[Any, Any], tile: tuple[int, int], platform: str
) -> PlanOfAnyLength:
    """Plan for lengths of which one at least is a symbol of `jax.export`."""
    rows, width = (
        min(size, length) if isinstance(length, int) else size
        for size, length in zip(tile, pairs, strict=True)
    )
    nothing = np.zeros((0, 2), np.int32), np.zeros(0, np.int8)
    covered = -(-pairs[1] // width) * width
    return PlanOfAnyLength(pairs, (rows, width), width, *nothing, covered, False, platform)


def make_plan(
    mask: Mask,
    pairs: tuple[int, int],
    tile: tuple[int, int],
    is_static: bool = True,
    on_grid: bool = False,
    judged: Judged | None = None,
) -> Plan:
    """Cover what may be live of each row of tiles by as few tiles as possible.

    Rows of tiles lie on a grid; within a row a tile begins where it is needed, to a fraction of
    its width, so that a band of keys is covered by one tile and not by the two that it touches.

    Args:
      mask: as far as it is known while tracing (`Mask.static`).
      pairs: the numbers of queries and keys, [T, S].
      tile: queries and keys of a tile, [bt, bk].
      is_static: whether the whole mask is known while tracing.
      on_grid: whether tiles begin at multiples of their width alone, as those of kernels do.
      judged: what the units of tiles are, if that is known.
    """
    per_tile = 1 if on_grid else units_of(tile[1])
    unit = tile[1] // per_tile
    judged = judged or Judged.of(mask, pairs, (tile[0], unit))
    runs = judged.live
    rows, units = cover(runs, per_tile)
    if units.min(initial=0) < 0:  # whole tiles do not fit
        runs = runs._replace(cells=runs.cells + -runs.cells % per_tile)
        rows, units = cover(runs, per_tile)
    starts = np.stack([rows * tile[0], units * unit], axis=1).astype(np.int32)
    covered = runs.cells * unit
    of_tile = units[:, None] + np.arange(per_tile)
    states = judged.at(rows[:, None], of_tile)
    # Beyond the last key none may attend.
    states = np.where((of_tile + 1) * unit > pairs[1], np.minimum(states, PARTIAL), states)
    return Plan(pairs, tile, unit, starts, of_units(states), covered, is_static)


def units_of(width: int) -> int:
    """Return into how many units a tile of so many keys is divided: it begins at any of them."""
    return next((parts for parts in FRACTIONS if width % parts == 0), 1)


def joined(states: Any, rows: Any, units: Any, per_tile: int) -> Any:
    """Return what tiles are, [n], from units [rows, units]: what all theirs are, else PARTIAL."""
    of_tile = units[:, None] + np.arange(per_tile, dtype=np.int32)[None, :]
    return of_units(states[rows[:, None], of_tile])


def of_units(states: Any) -> Any:
    """Return what tiles are, [n], from what their units are, [n, units of a tile]."""
    module = np if isinstance(states, np.ndarray) else jnp
    least, most = states.min(axis=1), states.max(axis=1)
    return module.where(least == most, least, module.asarray(PARTIAL, states.dtype))


class _Tiles(NamedTuple):
    """Tiles by their row, their first key, and whether they are FULL, [n] each."""

    row: np.ndarray
    key: np.ndarray
    full: np.ndarray


def group(plan: Plan, tall: int, together: int) -> list[Visits]:
    """Make few large visits of many small tiles, for a plan that is known while tracing.

    Tiles below each other in `tall` rows of tiles become one where one of them is FULL, with the
    mask if one is PARTIAL: on a FULL tile it costs less than a visit of its own. Of what is left,
    as many tiles of one kind as all of `together` rows have are visited at once, with keys of
    their own.
    """
    rows = plan.tile[0]
    tiles = _Tiles(plan.starts[:, 0] // rows, plan.starts[:, 1], plan.states == FULL)
    masked, unmasked, rest = _columns(tiles, tall)
    at_once, keys, alone = _side_by_side(rest, together)
    masks = (False, True)
    groups = [
        *(
            Visits(mask, tall * rows, 1, of.row * tall, of.key)
            for mask, of in zip(masks, (unmasked, masked), strict=True)
        ),
        *(
            Visits(mask, rows, together, at_once.row[of] * together, keys[of])
            for mask, of in zip(masks, (at_once.full, ~at_once.full), strict=True)
        ),
        *(
            Visits(mask, rows, 1, alone.row[of], alone.key[of])
            for mask, of in zip(masks, (alone.full, ~alone.full), strict=True)
        ),
    ]
    return [
        dataclasses.replace(
            visits,
            queries=(visits.queries * rows).astype(np.int32),
            keys=visits.keys.astype(np.int32).reshape(-1, visits.together),
        )
        for visits in groups
        if len(visits.queries)
    ]


def _columns(tiles: _Tiles, tall: int) -> tuple[_Tiles, _Tiles, _Tiles]:
    """Join the tiles of `tall` rows that have the same keys, if all are there and one is FULL.

    Returns those with a PARTIAL one among them, those without, both by rows of columns; and what
    is left.
    """
    wide = np.max(tiles.key, initial=0) + 1
    column, inverse, height = np.unique(
        tiles.row // tall * wide + tiles.key, return_inverse=True, return_counts=True
    )
    of_full = np.bincount(inverse, tiles.full, len(column))
    is_column = (height == tall) & (of_full > 0)
    joined = _Tiles(column // wide, column % wide, of_full == tall)
    return (
        _Tiles(*(x[is_column & ~joined.full] for x in joined)),
        _Tiles(*(x[is_column & joined.full] for x in joined)),
        _Tiles(*(x[~is_column[inverse]] for x in tiles)),
    )


def _side_by_side(tiles: _Tiles, together: int) -> tuple[_Tiles, np.ndarray, _Tiles]:
    """Visit the n-th FULL tiles of `together` rows at once, and so the n-th PARTIAL ones.

    Returns the visits (by rows of visits) with their keys [n, together], and what is left.
    """
    wide = np.max(tiles.key, initial=0) + 1
    order = np.lexsort((tiles.full, tiles.row))
    row, key, full = (x[order] for x in tiles)
    number = np.arange(len(row)) - np.searchsorted(2 * row + full, 2 * row + full)
    visit, place, many = np.unique(
        (row // together * 2 + full) * wide + number, return_inverse=True, return_counts=True
    )
    keys = np.zeros((len(visit), together), int)
    keys[place, row % together] = key
    at_once, alone = many == together, many[place] < together
    visits = _Tiles(visit // wide // 2, keys[:, 0], visit // wide % 2 == 1)
    return (
        _Tiles(*(x[at_once] for x in visits)),
        keys[at_once],
        _Tiles(*(x[alone] for x in (row, key, full))),
    )
