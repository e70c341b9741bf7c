"""Tiled attention with statistics, and the derivatives of these."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from attention_jax.base.trees import Rest, merge_floats, split_floats, varying_like
from attention_jax.base.typing import at_least_float32
from attention_jax.implementations import online
from attention_jax.implementations.head import SAVED, Head
from attention_jax.implementations.moving import Moving, is_symbolic_zero
from attention_jax.implementations.passes import Pass, over_visits
from attention_jax.implementations.tile_passes import (
    Given,
    Operands,
    Tangent,
    Tiles,
    arrays_of,
    one_pass,
    rows_from,
    tangents_of,
    widened,
)
from attention_jax.implementations.tile_statistics import (
    Asked,
    MeasuredForward,
    MeasuredTangent,
    Measures,
    changes_with_base,
    given_pairs,
    merged,
    rescaled,
)
from attention_jax.implementations.tiles import Plan, Visits
from attention_jax.masks import FULL
from attention_jax.normalizers import LogSum
from attention_jax.statistics import Pairs, Statistic

Array = jax.Array


Prepare = Callable[[list[Visits]], tuple[Tiles, Operands, Given]]
"""What the tiles of some visits need."""


def of_no_pairs(head: Head) -> dict[str, Any] | None:
    """Return the statistics of a head without queries or without keys."""
    if head.statistics is None:
        return None
    pairs = Pairs.none(len(head.query), len(head.key), at_least_float32(head.value.dtype))
    return {name: each.of_pairs(pairs) for name, each in head.statistics.items()}


class Measured(NamedTuple):
    """A head in tiles, with statistics; `prepare(visits)` is what the tiles of visits need."""

    head: Head
    plan: Plan
    prepare: Prepare

    @property
    def streaming(self) -> dict[str, Statistic]:
        """The statistics that are computed with the context."""
        return {name: each for name, each in self.statistics.items() if each.streams}

    @property
    def statistics(self) -> dict[str, Statistic]:
        """All statistics."""
        return dict(self.head.statistics or {})

    def with_context(self) -> tuple[Array, Array, dict[str, Any]]:
        """Return context [T, V], log-sum-exp [T], and the sums of the statistics that stream."""
        how, operands, given, asked = self.traced(self.plan.visits, self.streaming)
        found = _with_context(how, *split_floats(operands), given, asked)
        context, logsumexp, sums = jax.tree.map(lambda x: x[: self.plan.pairs[0]], found)
        return context, online.with_empty(logsumexp), sums

    def finished(
        self, sums: dict[str, Any], of_keys: Array, of_all: Array | None
    ) -> dict[str, Any]:
        """Return the statistics, given the sums of those that stream; compute those of the others.

        `of_keys` is the log-sum-exp over the keys, [T], and `of_all` that with the sink of the
        normalizer; None if it has no log-sum-exp.
        """
        streaming, base = self.streaming, jnp.zeros_like(of_keys)
        if of_all is not None:
            base = online.finite_or_zero(of_all)
            share = jnp.where(of_keys == -jnp.inf, 0.0, online.finite_or_zero(of_keys) - base)
            sums = rescaled(streaming, sums, share)
        rest = {name: each for name, each in self.statistics.items() if name not in streaming}
        if rest:
            sums = sums | self.with_final_weights(rest, base)
        return {name: each.finish(sums[name]) for name, each in self.statistics.items()}

    def after_search(self, of_rows: Any) -> dict[str, Any]:
        """Return the statistics, given what a normalizer of several passes knows of each row."""
        # A row without keys has the smallest number as its largest logit; what is less overflows.
        base = jax.tree.map(lambda x: jnp.where(x == jnp.finfo(x.dtype).min, 0.0, x), of_rows)
        sums = self.with_final_weights(self.statistics, base)
        return {name: each.finish(sums[name]) for name, each in self.statistics.items()}

    def with_final_weights(self, statistics: dict[str, Statistic], base: Any) -> dict[str, Any]:
        """Return the sums of statistics, given what is known of each row; visit tiles one by one.

        That is the log-sum-exp [T], or what else the weights of the normalizer depend on.
        """
        how, operands, given, asked = self.traced(one_by_one(self.plan), statistics)
        more = len(operands.query) - self.plan.pairs[0]
        base = jax.tree.map(lambda x: jnp.pad(x, (0, more)), base)
        how = *how, self.plan.pairs[0]
        sums = _with_final_weights(how, *split_floats(operands), given, asked, base)
        return without_padding(statistics, sums, self.plan.pairs)

    def traced(
        self, visits: list[Visits], statistics: dict[str, Statistic]
    ) -> tuple[tuple[Tiles, Measures], Operands, Given, Asked]:
        """Trace the functions of a tile and those of statistics, for these visits."""
        tiles, operands, given = self.prepare(visits)
        dtype = at_least_float32(operands.value.dtype)
        none = functools.partial(Pairs.none, dtype=dtype)
        measures, asked = Measures.traced(statistics, tiles, none, (operands, given.query_poison))
        return (tiles, measures), operands, given, asked


def one_by_one(plan: Plan) -> list[Visits]:
    """Return visits of single tiles: those of several at once may sum over the same queries."""
    if plan.looks_up:
        return plan.visits
    is_full = plan.states == FULL
    return [
        Visits(masked, plan.tile[0], 1, plan.starts[of, 0], plan.starts[of, 1:])
        for masked, of in ((False, is_full), (True, ~is_full))
        if of.any()
    ]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_context(
    how: tuple[Tiles, Measures], floats: list[Array], rest: Rest, given: Given, asked: Asked
) -> tuple[Array, Array, Any]:
    tiles, measures = how
    return MeasuredForward(tiles, (merge_floats(floats, rest),), given, measures, asked)()


@functools.partial(_with_context.defjvp, symbolic_zeros=True)
def _with_context_jvp(how: tuple[Tiles, Measures], primals: Any, tangents: Any) -> Any:
    (tiles, measures), (floats, rest, given, asked) = how, primals
    context, logsumexp, sums = _with_context(how, floats, rest, given, asked)
    context, logsumexp = map(checkpoint_name, (context, logsumexp), SAVED)
    sums = jax.tree.map(functools.partial(checkpoint_name, name=SAVED[2]), sums)
    operands = merge_floats(floats, rest)
    change, moves = tangents_of(tangents[0], rest)
    change = widened(change)
    base, normalizer = online.finite_or_zero(logsumexp), one_pass(operands.functions.normalizer)
    both = operands, change
    asked_moving = Moving.of(asked, tangents[3])
    tangent = MeasuredTangent(tiles, both, given, base, moves, measures, asked, asked_moving, sums)
    log_change, context_change, moved = tangent()
    changes = online.changes(normalizer, log_change, context_change, context)
    if isinstance(normalizer, LogSum):
        with_base = changes_with_base(asked.statistics, sums, changes[1])
        moved = jax.tree.map(jnp.add, moved, with_base)
    return (context, logsumexp, sums), (*changes, with_integers(moved, sums))


@dataclasses.dataclass(frozen=True, eq=False)
class Final(Pass):
    """Join what tiles of final weights add, for each of their queries or keys."""

    tiles: Tiles
    operands: tuple[Operands]
    given: Given
    base: Any
    measures: Measures
    asked: Asked
    queries: int
    is_transposed = False

    def __call__(self) -> Any:
        """Return the sums, by name."""
        (operands,) = self.operands
        sums = self.measures.of_no_pairs(self.asked, len(operands.query), len(operands.key))
        sums = varying_like(sums, operands, self.base)
        return over_visits(self, self.tiles.visits, self.given.states, sums)

    def slice(self, operands: Operands, i: Any, j: Any, rows: int) -> Operands:
        return self.tiles.slice(operands, i, j, rows)

    def read(self, sums: Any, i: Any, rows: int) -> Any:
        return jax.tree.map(functools.partial(rows_from, start=i, size=rows), self.base)

    def of_tile(self, masked: bool, here: Operands, base: Any, i: Any, j: Any) -> Any:
        pairs = given_pairs(self.tiles, here, self.given, base, (masked, i, j), self.queries)
        return j, self.measures.of_pairs(self.asked, pairs)

    def of_empty_tile(self, here: Operands, base: Any, i: Any, j: Any) -> Any:
        return j, self.measures.of_no_pairs(self.asked, len(here.query), len(here.key))

    def write(self, sums: Any, i: Any, computed: Any) -> Any:
        j, added = computed
        return joined(self.asked, sums, added, i, j)


@dataclasses.dataclass(frozen=True, eq=False)
class FinalTangent(Tangent):
    """The tangents of what `Final` returns, linear in those of the operands and of `base`."""

    base_change: Any
    measures: Measures
    asked: Asked
    asked_moving: Moving
    merged: Any
    queries: int

    def __call__(self) -> list[Array]:  # type: ignore[override]
        """Return the tangents of the floating-point sums, in their order."""
        sums = [jnp.zeros_like(x) for x in split_floats(self.merged)[0]]
        sums = varying_like(sums, self.base)
        return over_visits(self, self.tiles.visits, self.given.states, sums)

    def read(self, sums: Any, i: Any, rows: int) -> Any:
        both = self.base, self.base_change
        return jax.tree.map(functools.partial(rows_from, start=i, size=rows), both)

    def of_tile(  # type: ignore[override]
        self, masked: bool, here: Operands, change: Operands, rows: Any, i: Any, j: Any
    ) -> Any:
        floats, rest = split_floats(widened(here))
        base, base_change = rows
        primal, direction = (
            [x for x, moves in zip(leaves, self.moves, strict=True) if moves]
            for leaves in (floats, split_floats(change)[0])
        )
        measure = functools.partial(self.measure, (floats, rest), (masked, i, j))
        asked = self.asked_moving
        moving = primal, base, asked.primal
        return j, jax.jvp(measure, moving, (direction, base_change, asked.direction))[1]

    def measure(
        self, here: Any, where: Any, moving: Any, base: Any, asked_moving: Any
    ) -> list[Array]:
        """Return what a tile adds, as a function of what moves, with the merged sums held fixed."""
        operands, (_, i, j) = self.moved(here, moving), where
        pairs = given_pairs(self.tiles, operands, self.given, base, where, self.queries)
        merged = self.part(operands, i, j)
        return self.measures.moving(self.asked_moving.moved(asked_moving), pairs, merged)

    def of_empty_tile(  # type: ignore[override]
        self, here: Operands, change: Operands, rows: Any, i: Any, j: Any
    ) -> Any:
        return j, [jnp.zeros_like(x) for x in split_floats(self.part(here, i, j))[0]]

    def part(self, here: Operands, i: Any, j: Any) -> Any:
        """Return the merged sums of the queries, or of the keys, of a tile."""
        like = self.measures.of_no_pairs(self.asked, len(here.query), len(here.key))
        return part_of(self.asked, self.merged, i, j, like)

    def write(self, sums: Any, i: Any, computed: Any) -> Any:
        j, added = computed
        return moved_by(self.asked, self.merged, (sums, added), i, j)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_final_weights(
    how: tuple[Tiles, Measures, int],
    floats: list[Array],
    rest: Rest,
    given: Given,
    asked: Asked,
    base: Any,
) -> Any:
    tiles, measures, queries = how
    operands = merge_floats(floats, rest)
    return Final(tiles, (operands,), given, base, measures, asked, queries)()


@functools.partial(_with_final_weights.defjvp, symbolic_zeros=True)
def _with_final_weights_jvp(how: tuple[Tiles, Measures, int], primals: Any, tangents: Any) -> Any:
    (tiles, measures, queries), (floats, rest, given, asked, base) = how, primals
    sums = _with_final_weights(how, *primals)
    sums = jax.tree.map(functools.partial(checkpoint_name, name=SAVED[2]), sums)
    change, moves = tangents_of(tangents[0], rest)
    change = widened(change)
    both = merge_floats(floats, rest), change
    of_base, structure = jax.tree.flatten(tangents[4], is_leaf=is_symbolic_zero)
    base_change = structure.unflatten(arrays_of(of_base)[0])
    of_asked = measures, asked, Moving.of(asked, tangents[3])
    moved = FinalTangent(tiles, both, given, base, moves, base_change, *of_asked, sums, queries)()
    return sums, with_integers(moved, sums)


def without_padding(
    statistics: dict[str, Statistic], sums: Any, pairs: tuple[int, int]
) -> dict[str, Any]:
    """Return the sums of so many queries or keys."""
    found = {}
    for name, each in statistics.items():
        length = pairs[each.of == "key"]
        found[name] = jax.tree.map(functools.partial(_first, length), sums[name])
    return found


def joined(asked: Asked, sums: Any, added: Any, i: Any, j: Any) -> Any:
    """Join what a tile adds to the sums from query i, or from key j, on."""
    before = part_of(asked, sums, i, j, added)
    after, found = merged(asked.statistics, before, added), {}
    for name, each in asked.statistics.items():
        put = functools.partial(_put, start=j if each.of == "key" else i)
        found[name] = jax.tree.map(put, sums[name], after[name])
    return found


def moved_by(
    asked: Asked, like: Any, both: tuple[list[Array], list[Array]], i: Any, j: Any
) -> list[Array]:
    """Add to the tangents of the floating-point sums those of a tile; the sums are `like` these."""
    starts = [
        j if asked.statistics[name].of == "key" else i
        for name in sorted(like)
        for _ in split_floats(like[name])[0]
    ]
    return [_added(*each) for each in zip(*both, starts, strict=True)]


def part_of(asked: Asked, sums: Any, i: Any, j: Any, like: Any) -> Any:
    """Return the sums from query i, or from key j, on: as many as those they are like."""
    found = {}
    for name, each in asked.statistics.items():
        start = j if each.of == "key" else i
        found[name] = jax.tree.map(functools.partial(_taken, start=start), sums[name], like[name])
    return found


def _first(length: int, x: Array) -> Array:
    return x[:length]


def _taken(x: Array, like: Array, start: Any) -> Array:
    return rows_from(x, start, len(like))


def _put(x: Array, rows: Array, start: Any) -> Array:
    return lax.dynamic_update_slice_in_dim(x, rows, start, 0, allow_negative_indices=False)


def _added(x: Array, rows: Array, start: Any) -> Array:
    """Add rows as a scatter, whose transposition reads the rows and leaves the rest alone."""
    where = start + jnp.arange(len(rows), dtype=jnp.int32)
    return x.at[where].add(
        rows, mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True
    )


def with_integers(moved: list[Array], sums: Any) -> Any:
    """Return tangents of all sums, those of integers among them."""
    rest = iter(moved)
    return jax.tree.map(
        lambda x: (
            next(rest)
            if jnp.issubdtype(x.dtype, jnp.floating)
            else SymbolicZero(jax.typeof(x).to_tangent_aval())
        ),
        sums,
    )
