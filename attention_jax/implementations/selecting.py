"""Tiled attention over the keys of a row that come first in the order of their logits.

A search as in `searching` finds which those are: two thresholds of each row, and the last key of
those whose logits are equal. Given these, it is softmax over what is kept, as if the rest were
masked: its passes are those of softmax, and tiles in which nothing is kept are skipped.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.base.trees import Rest, merge_floats, split_floats, varying_like
from attention_jax.implementations import online
from attention_jax.implementations.searching import Row, Search, unless_empty
from attention_jax.implementations.tile_passes import (
    Given,
    Operands,
    Tangent,
    Tiles,
    one_pass,
    tangents_of,
    widened,
)
from attention_jax.masks.intervals import indices
from attention_jax.normalizers import Selected, Selection

Array = jax.Array


class Found(NamedTuple):
    """Context [T, V], log-sum-exp [T], what is kept of each row, and what tiles are now."""

    context: Array
    logsumexp: Array
    selection: Selection
    states: Array


class Equals(NamedTuple):
    """How many equal keys were met, and the last one that is kept, [bt] each."""

    number: Array
    last: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Selecting(Search):
    """The search of one head for what is kept; nothing of it is differentiated through.

    The normalizer of the operands is the one of what is kept.
    """

    selected: Selected

    @property
    def how(self) -> Selected:
        return self.selected

    def start(self) -> Found:
        zeros = jnp.zeros(self.length, self.dtype)
        context = jnp.zeros((self.length, self.operands.value.shape[1]), self.dtype)
        last = jnp.zeros(self.length, jnp.int32)
        return Found(context, zeros, Selection(zeros, zeros, last, zeros), self.states)

    def found(self, row: Row, state: Any, states: Array) -> Found:
        """Return what is kept of a row of tiles, its context and log-sum-exp."""
        last = lax.cond(
            jnp.any(state.equal > 0.0),
            functools.partial(self.last_equal, row, states),
            _all_are_kept,
            state,
        )
        selection = Selection(state.low, state.high, last, row.largest)
        depth = self.operands.value.shape[1]
        context = jnp.zeros((len(row.largest), depth), self.dtype)
        sums = varying_like((jnp.zeros_like(row.largest), context), row, selection)
        add = functools.partial(self.kept, row, selection)
        body = functools.partial(unless_empty, add, states)
        total, context = lax.fori_loop(*row.visits, body, sums)
        poison = row.poison + 0.0 * row.largest  # a score may itself return NaN
        sums = online.RunningSums(row.largest, total + poison, context)
        how = one_pass(self.operands.functions.normalizer)
        context, logsumexp = online.finished_finite(how, sums)
        return Found(context, logsumexp, selection, states)

    def keys(self, n: Array) -> Array:
        """Return the numbers of the keys of a visit, [bk]."""
        (visits,) = self.tiles.visits
        return jnp.asarray(visits.keys[:, 0])[n] + indices(self.tiles.key_size)

    def last_equal(self, row: Row, states: Array, state: Any) -> Array:
        """Return the last of the equal keys that is kept, [bt]; tiles are met in their order."""
        start = Equals(jnp.zeros_like(row.largest), jnp.zeros(row.largest.shape, jnp.int32))
        count = functools.partial(unless_empty, functools.partial(self.counted, row, state), states)
        met = lax.fori_loop(*row.visits, count, varying_like(start, row, state))
        return jnp.where(state.equal > 0.0, met.last, _all_are_kept(state))

    def counted(self, row: Row, state: Any, n: Array, met: Equals) -> Equals:
        relative = row.relative(n)
        is_equal = (relative > state.low[:, None]) & (relative <= state.high[:, None])
        number = met.number[:, None] + jnp.cumsum(is_equal, axis=1, dtype=met.number.dtype)
        is_kept = is_equal & (number <= state.equal[:, None])
        last = jnp.max(jnp.where(is_kept, self.keys(n)[None, :], 0), axis=1)
        return Equals(number[:, -1], jnp.maximum(met.last, last))

    def kept(self, row: Row, selection: Selection, n: Array, sums: Any) -> Any:
        """Add the exponentials of what is kept of a tile, and their context."""
        total, context = sums
        logits = row.logits[n - row.visits[0]]
        is_kept = selection.keeps(logits, self.keys(n)) & (logits != -jnp.inf)
        weights = jnp.where(is_kept, jnp.exp(row.relative(n)), 0.0)
        tile = self.tile(n, row.i, False)
        return total + jnp.sum(weights, axis=1), context + tile.weighted(weights, tile.products)


def _all_are_kept(state: Any) -> Array:
    return jnp.full(state.low.shape, jnp.iinfo(jnp.int32).max, jnp.int32)


def search(tiles: Tiles, operands: Operands, given: Given, how: Selected) -> Found:
    """Return what is kept, and what follows from it; the normalizer is the one of what is kept."""
    return Selecting(tiles, *lax.stop_gradient((operands, given)), how)()


def narrowed(found: Found, given: Given) -> Given:
    """Return the masks of the normalizer over what is kept."""
    return given._replace(states=found.states, selection=found.selection)


def attend(tiles: Tiles, operands: Operands, given: Given, how: Selected) -> Array:
    """Return the context [T, V]; the normalizer is the one of what is kept."""
    found = search(tiles, operands, given, how)
    return _attend(tiles, *split_floats(operands), narrowed(found, given), found[:2])[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(
    tiles: Tiles, floats: list[Array], rest: Rest, given: Given, found: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Return context [T, V] and log-sum-exp [T] as they were found: here they have tangents."""
    return found


@functools.partial(_attend.defjvp, symbolic_zeros=True)
def _attend_jvp(tiles: Tiles, primals: Any, tangents: Any) -> Any:
    floats, rest, given, found = primals
    context, logsumexp = _attend(tiles, floats, rest, given, found)
    operands = merge_floats(floats, rest)
    change, moves = tangents_of(tangents[0], rest)
    base = online.finite_or_zero(logsumexp)
    both = operands, widened(change)
    log_tangent, context_tangent = Tangent(tiles, both, given, base, moves)()
    how = one_pass(operands.functions.normalizer)
    return (context, logsumexp), online.changes(how, log_tangent, context_tangent, context)
