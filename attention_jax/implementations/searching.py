"""Tiled attention whose normalizer needs several passes to know what holds for a whole row.

The logits of one row of tiles are held at a time, [bt, S] for each head, while the passes of the
search go over them. They keep a state of each row and which tiles still matter; a tile that does
not reach the threshold is skipped from then on, by what sums up the context and by the passes of
the derivatives too. A threshold is first looked for among a part of the largest logits, which
leaves one or two passes over all; where some rows need more, these go over those rows alone. What
was found is not differentiated through: with weights w(e, t), and the
threshold t of a row where sum_j w_ij = 1,

    t'_i = - sum_j (dw_ij/de) e'_ij / sum_j dw_ij/dt,
    o'_i = sum_j (dw_ij/de) e'_ij v_j + w_ij v'_j + t'_i sum_j (dw_ij/dt) v_j.

The first sums of both lines are those of `tile_passes.Tangent` with t held fixed, the second a pass
of their own (`Slope`); both are plain loops, which JAX differentiates further.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from attention_jax.base.trees import Rest, merge_floats, split_floats, varying_like
from attention_jax.base.typing import at_least_float32
from attention_jax.implementations import online
from attention_jax.implementations.head import SAVED
from attention_jax.implementations.passes import Pass, over_visits
from attention_jax.implementations.tile_passes import (
    Given,
    Operands,
    Tangent,
    Tiles,
    added,
    put,
    rows_from,
    streamed,
    tangents_of,
    widened,
)
from attention_jax.masks import EMPTY
from attention_jax.masks.intervals import indices
from attention_jax.normalizers import MOST_PASSES, Level, OverThreshold, Searched, Streaming

Array = jax.Array

FEWER = 8
"""A search begins with one of so many logits, the largest of them."""

FEW = 4
"""Passes go over all rows of a tile until one of so many is left, and then over these alone."""


class Found(NamedTuple):
    """What a search found: context [T, V], statistics of each row [T], and what tiles are now."""

    context: Array
    statistics: Level
    states: Array


class Row(NamedTuple):
    """A row of tiles: the first query, which visits, and the logits of each, [tiles, bt, bk].

    A hidden logit is -inf. `tops` [tiles, bt] are the largest logits of each tile, `peaks` [bt, n]
    those of the row with at most one of some keys each, and `largest` [bt] is that of the row.
    `poison` [bt] is NaN where a row attends to NaN or Inf.
    """

    i: Array
    visits: tuple[Array, Array]
    logits: Array
    tops: Array
    peaks: Array
    largest: Array
    poison: Array

    def relative(self, n: Array) -> Array:
        """Return the logits of a visit less the largest of their row, [bt, bk]."""
        return self.logits[n - self.visits[0]] - self.largest[:, None]

    @property
    def levels(self) -> list[Array]:
        """Return fewer and then more of the largest logits, less the largest, [bt, n] each."""
        lowest = jnp.finfo(self.peaks.dtype).min
        shown = jnp.where(self.peaks == lowest, -jnp.inf, self.peaks - self.largest[:, None])
        rows, number = shown.shape[0], shown.shape[1] // FEWER
        if not number:
            return [shown]
        folded = shown[:, : FEWER * number].reshape(rows, FEWER, number)
        return [jnp.max(folded, axis=1), shown]

    def at(self, which: Array) -> Row:
        """Return some of the rows."""
        return self._replace(
            logits=_of(which, self.logits, axis=1),
            tops=_of(which, self.tops, axis=1),
            peaks=_of(which, self.peaks),
            largest=_of(which, self.largest),
            poison=_of(which, self.poison),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Search:
    """The search of one head, a row of tiles after another, whose logits are held meanwhile."""

    tiles: Tiles
    operands: Operands
    given: Given

    def __call__(self) -> Any:
        """Return what was found; nothing of it is differentiated through."""
        (visits,) = self.tiles.visits
        first = np.searchsorted(visits.queries, np.arange(self.length // visits.rows) * visits.rows)
        ends = np.append(first, len(visits.queries)).astype(np.int32)
        found = varying_like(self.start(), self.operands, self.given)
        of_row = functools.partial(self.of_row, jnp.asarray(ends), int(max(np.diff(ends))))
        found = lax.fori_loop(0, len(first), of_row, found)
        return jax.tree.map(functools.partial(checkpoint_name, name=SAVED[1]), found)

    def start(self) -> Any:
        """Return what is known before any row is: zeros, and the states of tiles."""
        row, depth = jnp.zeros(self.length, self.dtype), self.operands.value.shape[1]
        context = jnp.zeros((self.length, depth), self.dtype)
        return Found(context, Level(row, row), self.states)

    @property
    def states(self) -> Array:
        """What tiles are before the search, [n]."""
        return self.given.states.astype(jnp.int32)

    @property
    def how(self) -> Searched:
        """The kind of normalizer."""
        how = streamed(self.operands.functions.normalizer)
        assert isinstance(how, Searched)
        return how

    @property
    def length(self) -> int:
        """Queries, up to the last tile."""
        return self.operands.query.shape[0]

    @property
    def dtype(self) -> Any:
        """The dtype to compute in."""
        return at_least_float32(self.operands.value.dtype)

    def of_row(self, ends: Array, most: int, r: Array, found: Any) -> Any:
        """Search a row of tiles, and write down what was found."""
        rows = self.tiles.visits[0].rows
        row = self.computed(found.states, r * rows, (ends[r], ends[r + 1]), most)
        computed = self.found(row, *self.searched(row, found.states))
        write = functools.partial(put, row.i)
        of_rows = (x._replace(states=None) for x in (found, computed))
        written: Any = jax.tree.map(write, *of_rows)
        return written._replace(states=computed.states)

    def found(self, row: Row, state: Any, states: Array) -> Any:
        """Return what was found of a row of tiles, given the last state and what tiles are."""
        statistics = Level(self.how.level(state), row.largest + row.poison)
        return Found(self.attended(row, states, statistics), statistics, states)

    def computed(self, states: Array, i: Array, visits: tuple[Array, Array], most: int) -> Row:
        """Compute the logits of a row of tiles."""
        rows, columns = self.tiles.visits[0].rows, self.tiles.key_size
        lowest, many = jnp.finfo(self.dtype).min, -(-most // FEWER)
        row = Row(
            i,
            visits,
            logits=jnp.zeros((most, rows, columns), self.dtype),
            tops=jnp.full((most, rows), lowest, self.dtype),
            peaks=jnp.full((rows, many * columns), lowest, self.dtype),
            largest=jnp.full(rows, lowest, self.dtype),
            poison=jnp.zeros(rows, self.dtype),
        )
        row = varying_like(row, self.operands, self.given, states)

        return lax.fori_loop(*visits, functools.partial(self.with_tile, states), row)

    def with_tile(self, states: Array, n: Array, row: Row) -> Row:
        """Return a row with the logits of one more visit."""
        kinds = [functools.partial(self.of_tile, masked) for masked in (None, True, False)]
        logits, poison = lax.switch(states[n], kinds, n, row.i)
        columns = self.tiles.key_size
        m, top = n - row.visits[0], jnp.max(logits, axis=1)
        start = m * columns % row.peaks.shape[1]
        peaks = lax.dynamic_slice_in_dim(row.peaks, start, columns, 1)
        peaks = jnp.maximum(peaks, logits)
        return row._replace(
            logits=lax.dynamic_update_index_in_dim(row.logits, logits, m, 0),
            tops=lax.dynamic_update_index_in_dim(row.tops, top, m, 0),
            peaks=lax.dynamic_update_slice_in_dim(row.peaks, peaks, start, 1),
            largest=jnp.maximum(row.largest, top),
            poison=row.poison + poison,
        )

    def of_tile(self, masked: bool | None, n: Array, i: Array) -> tuple[Array, Array]:
        """Return the logits of a tile, and the poison of its rows; None for an EMPTY one."""
        tile = self.tile(n, i, bool(masked))
        logits, poison = tile.logits, tile.row_poison()
        if masked is None:
            return jnp.full_like(logits, -jnp.inf), jnp.zeros_like(poison)
        if tile.allowed is not None:
            logits = jnp.where(tile.allowed, logits, -jnp.inf)
            of_pairs = tile.query_poison[:, None] + tile.key_poison[None, :]
            poison = jnp.sum(jnp.where(tile.allowed, of_pairs, 0.0), axis=1)
        return logits, poison

    def tile(self, n: Array, i: Array, masked: bool) -> online.Tile:
        """Return the tile of a visit."""
        (visits,) = self.tiles.visits
        j = jnp.asarray(visits.keys[:, 0])[n]
        here = self.tiles.slice(self.operands, i, j, visits.rows)
        return self.tiles.compute(here, self.given, i, j, masked)

    def searched(self, row: Row, states: Array) -> tuple[Any, Array]:
        """Return the last state of the rows, and what tiles are: EMPTY those that do not matter."""
        how, state = self.how, varying_like(self.how.start(row.largest), row)
        if isinstance(how, OverThreshold):
            for level in row.levels:
                state = how.resumed(how.settled(level, state))
        rows = len(row.largest)
        few = -(-rows // FEW)
        number, state, states = self.passes(row, (jnp.int32(0), state, states), few)
        if few < rows:
            which = jnp.argsort(how.is_done(state))[:few]
            carry = number, jax.tree.map(functools.partial(_of, which), state), states
            _, of_few, _ = self.passes(row.at(which), carry, 0)
            state = jax.tree.map(lambda x, new: x.at[which].set(new), state, of_few)
        return state, self.marked(row, state, states)

    def passes(self, row: Row, carry: tuple[Array, Any, Array], few: int) -> Any:
        """Make passes over the tiles of a row until no more than a few rows are left."""

        def goes_on(carry: tuple[Array, Any, Array]) -> Array:
            number, state, _ = carry
            left = jnp.sum(~self.how.is_done(state), dtype=jnp.int32)
            return (number < MOST_PASSES) & (left > few)

        return lax.while_loop(goes_on, functools.partial(self.one_pass, row), carry)

    def marked(self, row: Row, state: Any, states: Array) -> Array:
        """Return what the tiles are, EMPTY those that do not matter."""
        first, end = row.visits
        n = first + indices(len(row.tops))
        matters = jax.vmap(functools.partial(self.any_matters, row, state))
        stays = matters(row.tops) | (n >= end)
        which = jnp.where(stays, len(states), n)
        return varying_like(states, row, state).at[which].set(EMPTY, mode="drop")

    def any_matters(self, row: Row, state: Any, top: Array) -> Array:
        """Tell whether a tile matters to any row, given its largest logits, [bt]."""
        top = (top - row.largest)[:, None]
        return jnp.any(self.how.matters(top, state, self.how.contribution(top, state)))

    def one_pass(self, row: Row, carry: tuple[Array, Any, Array]) -> tuple[Array, Any, Array]:
        """Sum over the tiles of a row that matter, and update the state."""
        number, state, states = carry
        states = self.marked(row, state, states)
        shapes = jax.eval_shape(self.how.contribution, row.logits[0], state)
        sums = self.how.nothing(shapes)
        add = functools.partial(unless_empty, functools.partial(self.add, row, state), states)
        sums = lax.fori_loop(*row.visits, add, varying_like(sums, row, states))
        return number + 1, self.how.update(state, sums), states

    def add(self, row: Row, state: Any, n: Array, sums: Any) -> Any:
        """Add what a tile contributes."""
        return self.how.joined(sums, self.how.contribution(row.relative(n), state))

    def attended(self, row: Row, states: Array, statistics: Level) -> Array:
        """Return the context of a row of tiles."""
        zeros = jnp.zeros((len(row.largest), self.operands.value.shape[1]), self.dtype)
        add = functools.partial(self.more, row, statistics)
        body = functools.partial(unless_empty, add, states)
        return lax.fori_loop(*row.visits, body, varying_like(zeros, row, statistics))

    def more(self, row: Row, statistics: Level, n: Array, context: Array) -> Array:
        tile, logits = self.tile(n, row.i, False), row.logits[n - row.visits[0]]
        weights = jnp.where(logits == -jnp.inf, 0.0, self.how.weight(logits, statistics))
        return context + tile.weighted(weights, tile.products)


def unless_empty(add: Callable[..., Any], states: Array, n: Array, sums: Any) -> Any:
    """Return `add(n, sums)`, or the sums as they are where the tile of a visit is EMPTY."""
    return lax.cond(states[n] == EMPTY, _as_is, functools.partial(add, n), sums)


def _of(which: Array, x: Array, axis: int = 0) -> Array:
    """Return some rows of an array."""
    index = (slice(None),) * axis
    return x.at[*index, which].get(mode="promise_in_bounds")


def _as_is(x: Any) -> Any:
    return x


def attend(tiles: Tiles, operands: Operands, given: Given) -> tuple[Array, Level]:
    """Return the context [T, V], and the statistics of each row [T]."""
    found = Search(tiles, *lax.stop_gradient((operands, given)))()
    given = given._replace(states=found.states)
    floats, rest = split_floats(operands)
    context, level = _attend(tiles, floats, rest, given, found[:2])
    return context, found.statistics._replace(level=level)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(
    tiles: Tiles, floats: list[Array], rest: Rest, given: Given, found: tuple[Array, Level]
) -> tuple[Array, Array]:
    """Return context [T, V] and level [T] as they were found: here they have tangents."""
    context, statistics = found
    return context, statistics.level


@functools.partial(_attend.defjvp, symbolic_zeros=True)
def _attend_jvp(tiles: Tiles, primals: Any, tangents: Any) -> Any:
    floats, rest, given, found = primals
    context, level = _attend(tiles, floats, rest, given, found)
    statistics = found[1]._replace(level=level)
    operands = merge_floats(floats, rest)
    change, moves = tangents_of(tangents[0], rest)
    both = operands, widened(change)
    total, along = Tangent(tiles, both, given, statistics, moves)()
    slope, direction = Slope(tiles, (operands,), given, statistics)()
    level_change = -total / jnp.where(slope == 0.0, 1.0, slope)
    return (context, level), (along + level_change[:, None] * direction, level_change)


@dataclasses.dataclass(frozen=True, eq=False)
class Slope(Pass):
    """Sum_j dw_ij/dt and sum_j (dw_ij/dt) v_j, with t the level of a row."""

    tiles: Tiles
    operands: tuple[Operands]
    given: Given
    statistics: Level
    is_transposed = True

    def __call__(self) -> tuple[Array, Array]:
        """Return both sums, [T] and [T, V]."""
        sums = _zeros(self.statistics, self.operands[0].value)
        sums = varying_like(sums, self.operands, self.statistics)
        return over_visits(self, self.tiles.visits, self.given.states, sums)

    def slice(self, operands: Operands, i: Any, j: Any, rows: int) -> Operands:
        return self.tiles.slice(operands, i, j, rows)

    def read(self, sums: Any, i: Any, rows: int) -> Any:
        return jax.tree.map(functools.partial(rows_from, start=i, size=rows), self.statistics)

    def of_tile(
        self, masked: bool, here: Operands, statistics: Level, i: Any, j: Any
    ) -> tuple[Array, Array]:
        tile = self.tiles.compute(here, self.given, i, j, masked)
        weigh = functools.partial(_weights, streamed(here.functions.normalizer), tile, statistics)
        level = statistics.level
        _, slope = jax.jvp(weigh, (level,), (jnp.ones_like(level),))
        products = self.tiles.products.of_derivatives
        return jnp.sum(slope, axis=1), tile.weighted(slope, products)

    def of_empty_tile(self, here: Operands, statistics: Level, *where: Any) -> Any:
        return _zeros(statistics, here.value)

    def write(self, sums: Any, i: Any, computed: Any) -> Any:
        return jax.tree.map(functools.partial(added, i), sums, computed)


def _zeros(statistics: Level, value: Array) -> tuple[Array, Array]:
    zeros = jnp.zeros_like(statistics.level)
    return zeros, jnp.broadcast_to(zeros[:, None], (len(zeros), value.shape[1]))


def _weights(how: Streaming, tile: online.Tile, statistics: Level, level: Array) -> Array:
    return online.weights_given(how, tile, statistics._replace(level=level))
