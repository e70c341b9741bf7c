"""Statistics over tiles: sums that grow with the context, and those that need final weights.

In the pass that computes the context the weights of a query are known up to a factor, which changes
with its largest logit; a statistic says what that does to its sums. Given the log-sum-exp L, any
tile of weights can be computed again: so the sums are a function of the operands and L, whose
derivative is one pass over the tiles, linear in the tangents of both. What is not rescaled, or sums
over queries, is computed by such a pass in the first place.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from attention_jax.base.trees import (
    hoisted,
    mesh_axes,
    split_floats,
    varying_like,
    varying_over,
)
from attention_jax.base.typing import at_least_float32
from attention_jax.implementations import online
from attention_jax.implementations.moving import Moving
from attention_jax.implementations.passes import over_visits, tangent_of_tile
from attention_jax.implementations.tile_passes import (
    Forward,
    Given,
    Operands,
    Tangent,
    Tiles,
    one_pass,
    rows_from,
    streamed,
)
from attention_jax.implementations.tiles import Visits
from attention_jax.masks.intervals import indices
from attention_jax.normalizers import LogSum, Streaming
from attention_jax.statistics import Pairs, Statistic
from attention_jax.statistics.protocol import row_maximum

Array = jax.Array


Shape = tuple[int, ...]
ONE_PAIR = (1, 1)


class Asked(NamedTuple):
    """Statistics by name, and what their functions close over by the shape of a tile."""

    statistics: dict[str, Statistic]
    of_tile: dict[Shape, list[Any]]
    moved: dict[Shape, list[Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Measures:
    """How statistics are computed from a tile; holds only what is known while tracing.

    `none(queries, keys)` are pairs of which none may attend; `axes` are those of a mesh that all
    pairs are let vary over, so that what was traced of some serves any.
    `of_tile[shape](statistics, pairs, *captured)` are the sums of a tile of this shape, and
    `moved[shape](statistics, pairs, merged, *captured)` those that have their derivative.
    """

    none: Callable[[int, int], Any]
    axes: frozenset[str]
    of_tile: dict[Shape, Callable[..., Any]]
    moved: dict[Shape, Callable[..., Any]]

    @classmethod
    def traced(
        cls,
        statistics: dict[str, Statistic],
        tiles: AnyTiles,
        none: Callable[[int, int], Any],
        like: Any,
    ) -> tuple[Measures, Asked]:
        """Trace the functions for each shape of a tile, and take out what they close over.

        Numbers of pairs vary over a mesh as those are `like`.
        """
        axes = mesh_axes(like)
        of_tile, moved, captured, of_moved = {}, {}, {}, {}
        for shape in {ONE_PAIR, *((visits.rows, tiles.key_size) for visits in tiles.visits)}:
            pairs = varying_over(axes, none(*shape))
            of_tile[shape], captured[shape] = hoisted(
                functools.partial(_of_tile), statistics, pairs
            )
            merged = of_tile[shape](statistics, pairs, *captured[shape])
            merged = varying_over(axes, merged)
            moved[shape], of_moved[shape] = hoisted(
                functools.partial(_moved), statistics, pairs, merged
            )
        return cls(none, axes, of_tile, moved), Asked(statistics, captured, of_moved)

    def of_no_pairs(self, asked: Asked, queries: int, keys: int) -> Any:
        """Return sums over no pairs, the neutral elements: that of one query or key, repeated."""
        of_one = self.of_pairs(asked, self.none(*ONE_PAIR))
        found = {}
        for name, statistic in asked.statistics.items():
            length = keys if statistic.of == "key" else queries
            found[name] = jax.tree.map(functools.partial(_repeated, length), of_one[name])
        return found

    def of_pairs(self, asked: Asked, pairs: Any) -> Any:
        """Return the sums of a tile, by name."""
        shape = _shape(pairs)
        pairs = varying_over(self.axes, pairs)
        return self.of_tile[shape](asked.statistics, pairs, *asked.of_tile[shape])

    def moving(self, asked: Asked, pairs: Any, merged: Any) -> list[Array]:
        """Return what a tile adds to the derivatives of the floating-point sums."""
        shape = _shape(pairs)
        given = varying_over(self.axes, (pairs, merged))
        return self.moved[shape](asked.statistics, *given, *asked.moved[shape])

    def with_asked(self, asked: Moving, pairs: Any, merged: Any, moved: list[Array]) -> list[Array]:
        """Add the tangents of what a tile adds, as a function of the statistics themselves."""
        if not asked.primal:
            return moved
        of_asked = functools.partial(self._moving_with, asked, pairs, merged)
        more = tangent_of_tile(of_asked, asked.primal, asked.direction)[1]
        return jax.tree.map(jnp.add, moved, more)

    def _moving_with(
        self, asked: Moving, pairs: Any, merged: Any, primal: list[Array]
    ) -> list[Array]:
        return self.moving(asked.moved(primal), pairs, merged)


class AnyTiles(Protocol):
    """Tiles of one head, or of all heads together."""

    @property
    def visits(self) -> list[Visits]: ...

    @property
    def key_size(self) -> int: ...


class Sums(NamedTuple):
    """What grows over the tiles: that of the context, and that of each statistic."""

    context: online.RunningSums
    statistics: Any


@dataclasses.dataclass(frozen=True, eq=False)
class MeasuredForward(Forward):
    """Let each tile add to the running sums of its query rows, and to those of statistics."""

    measures: Measures
    asked: Asked

    def __call__(self) -> tuple[Array, Array, Any]:  # type: ignore[override]
        """Return context [T, V], log-sum-exp [T] as `online.finished_finite` has it, and sums."""
        (operands,) = self.operands
        length, depth = operands.query.shape[0], operands.value.shape[1]
        dtype = at_least_float32(operands.value.dtype)
        start = Sums(
            online.RunningSums.start(length, depth, dtype),
            self.measures.of_no_pairs(self.asked, length, 1),
        )
        sums = varying_like(start, operands, self.given.query_poison)
        sums = over_visits(self, self.tiles.visits, self.given.states, sums)
        how = one_pass(operands.functions.normalizer)
        context, logsumexp = online.finished_finite(how, sums.context)
        measured = sums.statistics
        if isinstance(how, LogSum):
            total = sums.context.total
            last = -jnp.log(jnp.where(total == 0, 1.0, total))
            measured = rescaled(self.asked.statistics, measured, last)
        return context, logsumexp, measured

    def of_tile(  # type: ignore[override]
        self, masked: bool, here: Operands, sums: Sums, i: Any, j: Any
    ) -> Sums:
        tile = self.tiles.compute(here, self.given, i, j, masked)
        how = one_pass(here.functions.normalizer)
        context = online.accumulate(how, sums.context, tile)
        where = self.given.at(i, j, here.query.shape[0], self.tiles.key_size)
        before = sums.statistics
        if isinstance(how, LogSum):
            lowest = jnp.finfo(context.maximum.dtype).min
            log_factor = jnp.maximum(sums.context.maximum - context.maximum, lowest)
            before = rescaled(self.asked.statistics, before, log_factor)
        added = self.measures.of_pairs(
            self.asked, _pairs(tile, _so_far(how, tile, context.maximum), where)
        )
        return Sums(context, merged(self.asked.statistics, before, added))

    def of_empty_tile(self, here: Operands, sums: Any, *where: Any) -> Any:
        return sums


@dataclasses.dataclass(frozen=True, eq=False)
class MeasuredTangent(Tangent):
    """Sum what `Tangent` does, and the tangents of what tiles add to statistics.

    Both with the log-sum-exp held fixed, and the latter with the `merged` sums held fixed too, so
    that a tile is computed once for all of them. `asked_moving` are the statistics that are asked
    for, with the tangents of their parameters and of what their functions close over.
    """

    measures: Measures
    asked: Asked
    asked_moving: Moving
    merged: Any

    def __call__(self) -> tuple[Array, Array, list[Array]]:  # type: ignore[override]
        """Return both sums, and the tangents of the floating-point sums of statistics."""
        moved = [jnp.zeros_like(x) for x in split_floats(self.merged)[0]]
        sums = *self.zeros(self.base), varying_like(moved, self.base)
        return over_visits(self, self.tiles.visits, self.given.states, sums)

    def read(self, sums: Any, i: Any, rows: int) -> Any:
        both = self.base, self.merged
        return jax.tree.map(functools.partial(rows_from, start=i, size=rows), both)

    def of_tile(  # type: ignore[override]
        self, masked: bool, here: Operands, change: Operands, rows: Any, i: Any, j: Any
    ) -> tuple[Array, Array, list[Array]]:
        base, merged = rows
        measure = functools.partial(self.measure, merged=merged, where=(base, i, j), masked=masked)
        (weights, _), changed, (tile, pairs) = self.along(measure, here, change)
        weights_change, moved = changed or (None, self.zeros_of(merged))
        moved = self.measures.with_asked(self.asked_moving, pairs, merged, moved)
        return *self.summed(here, change, weights, weights_change, tile), moved

    def measure(
        self, here: Any, moving: Any, merged: Any, where: Any, masked: bool
    ) -> tuple[tuple[Array, list[Array]], tuple[online.Tile, Pairs]]:
        """Return weights and what they add, the tile and its pairs, as a function of what moves."""
        weights, tile = self.weigh(here, moving, where, masked)
        base, i, j = where
        how = streamed(self.moved(here, moving).functions.normalizer)
        at = self.given.at(i, j, len(weights), self.tiles.key_size)
        pairs = _pairs(tile, (weights, _log_weights(how, tile, weights, base)), at)
        return (weights, self.measures.moving(self.asked, pairs, merged)), (tile, pairs)

    def of_empty_tile(  # type: ignore[override]
        self, here: Operands, change: Operands, rows: Any, *where: Any
    ) -> tuple[Array, Array, list[Array]]:
        base, merged = rows
        return *self.zeros(base), self.zeros_of(merged)

    def zeros_of(self, merged: Any) -> list[Array]:
        """Return no change of the floating-point sums."""
        return [jnp.zeros_like(x) for x in split_floats(merged)[0]]


def changes_with_base(statistics: dict[str, Statistic], sums: Any, change: Array) -> list[Array]:
    """Return the tangents of the floating-point sums when the log-sum-exp changes.

    All weights of a row are multiples of exp(-L), and what a factor does to sums a statistic says.
    """

    def of_factor(log_factor: Array) -> list[Array]:
        return split_floats(rescaled(statistics, sums, log_factor))[0]

    return jax.jvp(of_factor, (jnp.zeros_like(change),), (-change,))[1]


def given_pairs(
    tiles: Tiles,
    here: Operands,
    given: Given,
    base: Any,
    at: tuple[bool, Any, Any],
    queries: int | None = None,
) -> Pairs:
    """Return the pairs of a tile, given the log-sum-exp of its rows, or what else is known of them.

    Rows from `queries` on, if it is given, attend to nothing.
    """
    masked, i, j = at
    tile = tiles.compute(here, given, i, j, masked)
    rows = here.query.shape[0]
    if queries is not None and queries % rows:
        is_query = jnp.broadcast_to((i + indices(rows) < queries)[:, None], tile.logits.shape)
        allowed = is_query if tile.allowed is None else tile.allowed & is_query
        tile = tile._replace(allowed=allowed)
    how = streamed(here.functions.normalizer)
    where = given.at(i, j, rows, tiles.key_size)
    return _pairs(tile, _given(how, tile, base), where)


def merged(statistics: dict[str, Statistic], first: Any, second: Any) -> Any:
    """Join the sums of two sets of keys (or of queries), by name."""
    return {name: each.merge(first[name], second[name]) for name, each in statistics.items()}


def rescaled(statistics: dict[str, Statistic], sums: Any, log_factor: Array) -> Any:
    """Return the sums of weights times exp(log_factor) in each row, by name."""
    return {
        name: sums[name] if each.rescale is None else each.rescale(sums[name], log_factor)
        for name, each in statistics.items()
    }


def _so_far(how: online.OnePass, tile: online.Tile, maximum: Array) -> tuple[Array, Array]:
    """Return the weights of a tile less the largest logit so far, and their logarithms.

    Written as `online.accumulate` does, so that the compiler computes both once.
    """
    if isinstance(how, LogSum):
        logits, base = tile.poisoned(tile.hidden(masked=-jnp.inf), maximum)
        return how.weight(logits, base), how.exponent(logits) - base[:, None]
    return _given(how, tile, maximum)


def _given(how: Streaming, tile: online.Tile, base: Any) -> tuple[Array, Array]:
    """Return the final weights of a tile, and their logarithms."""
    tile = tile._replace(logits=_poisoned(tile))
    weights = how.weight(tile.logits, base)
    if tile.allowed is not None:
        weights = jnp.where(tile.allowed, weights, 0.0)
    return weights, _log_weights(how, tile, weights, base)


def _log_weights(how: Streaming, tile: online.Tile, weights: Array, base: Any) -> Array:
    """Return the logarithms of the weights of a tile, zero where none may attend."""
    if not isinstance(how, LogSum):
        return jnp.log(jnp.where(weights != 0, jnp.abs(weights), 1.0))
    if tile.allowed is None:
        return how.exponent(tile.logits) - base[:, None]
    logits = jnp.where(tile.allowed, tile.logits, 0.0)
    return jnp.where(tile.allowed, how.exponent(logits) - base[:, None], 0.0)


def _poisoned(tile: online.Tile) -> Array:
    """Return the logits of a tile with poison among them, and zero where none may attend."""
    poison = tile.query_poison[:, None] + tile.key_poison[None, :]
    logits = tile.logits + poison
    return logits if tile.allowed is None else jnp.where(tile.allowed, logits, 0.0)


def _pairs(tile: online.Tile, weighed: tuple[Array, Array], where: tuple[Array, Array]) -> Pairs:
    """Return what a statistic is told of a tile."""
    weights, log_weights = weighed
    allowed = jnp.ones(weights.shape, bool) if tile.allowed is None else tile.allowed
    if tile.keep is not None:
        log_weights = log_weights + jnp.log(jnp.where(tile.keep > 0, tile.keep, 1.0))
    return Pairs(
        tile.used(weights),
        jnp.maximum(log_weights, jnp.finfo(weights.dtype).min),
        _poisoned(tile),
        allowed,
        where[0][:, None],
        where[1][None, :],
        row_maximum(tile.hidden(masked=-jnp.inf)) + tile.row_poison(),
    )


def _shape(pairs: Any) -> Shape:
    """Return the numbers of queries and keys."""
    return len(pairs.q_idx), pairs.kv_idx.shape[1]


def _repeated(length: int, sums: Array) -> Array:
    return jnp.broadcast_to(sums[:1], (length, *sums.shape[1:]))


def _of_tile(statistics: dict[str, Statistic], pairs: Pairs) -> Any:
    return {name: statistic.of_tile(pairs) for name, statistic in statistics.items()}


def _moved(statistics: dict[str, Statistic], pairs: Pairs, merged: Any) -> list[Array]:
    """Return what a tile adds to the derivatives, in the order of the floating-point sums."""
    found = {name: statistic.moved(pairs, merged[name]) for name, statistic in statistics.items()}
    found = {
        name: jax.tree.map(jnp.zeros_like, merged[name]) if sums is None else sums
        for name, sums in found.items()
    }
    return split_floats(found)[0]
