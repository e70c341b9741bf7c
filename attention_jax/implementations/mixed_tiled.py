"""Tiles of all heads, where maps mix heads: exact, in memory linear in the sequence.

Logits are mixed within a tile, [N, bt, bk], and normalized online as those of one head are. A map
of weights is applied in one of two ways, whichever multiplies less:

- to the contexts, where it is linear and the heads that it mixes attend to the same values, as
  those of a differential pair do: sum_m P_mn (w_m v) = (sum_m P_mn w_m) v. One pass.
- to the weights of each tile in a second pass, once the first has found each row's log-sum-exp.
  Statistics are of these weights, and so are computed in the second pass whatever the maps.

Both passes are sums over tiles given the statistics of the rows, so their tangents are linear and
recompute each tile; JAX transposes them into the backward pass.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from attention_jax.base.finite import finite, poison
from attention_jax.base.matmul import Products
from attention_jax.base.trees import Rest, merge_floats, split_floats
from attention_jax.base.typing import at_least_float32
from attention_jax.head_maps import halo_of
from attention_jax.implementations import mixed_measured, online
from attention_jax.implementations.head import SAVED, Attended
from attention_jax.implementations.measured import one_by_one
from attention_jax.implementations.mixed_heads import Heads, OfHeads, repeated
from attention_jax.implementations.mixed_passes import Contexts, Forward, MixedContexts, Sums
from attention_jax.implementations.mixed_tiles import Given, MixedTiles, Operands, widened
from attention_jax.implementations.tile_passes import one_pass, tangents_of
from attention_jax.implementations.tiled import mapped, padded, with_sink
from attention_jax.implementations.tiles import Plan, Visits
from attention_jax.masks import PARTIAL
from attention_jax.normalizers import Elementwise
from attention_jax.scores import Separated

Array = jax.Array


def tiled(
    heads: Heads, plan: Plan, counts: tuple[int, int, int], by_context: bool, products: Products
) -> Attended:
    """Attend with tiles of all heads; context [T, N, V] and log-sum-exp [T, M].

    `counts` are the numbers of heads of queries, between the maps and of the context; `by_context`
    says that the map of weights is applied to contexts.
    """
    length = plan.pairs[0]
    if 0 in (heads.query.shape[1], heads.key.shape[1]):
        return _of_nothing(heads, counts)
    visits = one_by_one(plan) if heads.statistics else plan.visits
    tiles, operands, given = _prepared(heads, plan, visits, products)
    is_twice = bool(heads.statistics) or not (heads.mix_weights is None or by_context)
    contexts = Contexts(tiles, with_values=not is_twice)
    context, logsumexp = _contexts(contexts, counts[1], operands, given)
    statistics = None
    if is_twice:
        around = ((0, 0), tiles.halos[1].queries)
        rows = jnp.pad(online.finite_or_zero(logsumexp), around, mode="edge")
        operands = operands._replace(rows=rows)
        if heads.statistics:
            context, statistics = mixed_measured.measure(tiles, operands, given, heads, counts)
        else:
            context = _mix(MixedContexts(tiles), counts[2], *split_floats(operands), given)
    elif heads.mix_weights is not None:
        context = heads.mix_weights(context)
    context = jnp.moveaxis(context[:, :length], 0, 1)
    return Attended(context, logsumexp=logsumexp[:, :length].T, statistics=statistics)


def _contexts(
    contexts: Contexts, heads: int, operands: Operands, given: Given
) -> tuple[Array, Array]:
    """Return contexts [M, T, V] and the statistics of rows [M, T], the sinks of both among them."""
    normalizer = operands.normalizer
    how = one_pass(normalizer.build(normalizer.leaves))
    if isinstance(how, Elementwise) and not contexts.with_values:  # rows have no statistics
        length = operands.query.shape[1] - sum(contexts.tiles.halo.queries)
        rows = jnp.zeros((heads, length), at_least_float32(operands.value.dtype))
        return rows[..., None], rows
    context, logsumexp = _attend(contexts, heads, *split_floats(operands), given)
    logsumexp = online.with_empty(logsumexp)
    attended = normalizer.map(with_sink, context, logsumexp)
    return attended.context, logsumexp if attended.logsumexp is None else attended.logsumexp


def _of_nothing(heads: Heads, counts: tuple[int, int, int]) -> Attended:
    """Attend where there are no queries or no keys."""
    dtype, length = at_least_float32(heads.value.dtype), heads.query.shape[1]
    none = jnp.zeros((counts[1], length, 0), dtype)
    attended = heads.normalizer.map(with_sink, none, jnp.full(none.shape[:2], -jnp.inf, dtype))
    context = jnp.zeros((length, counts[2], heads.value.shape[2]), dtype)
    logsumexp = attended.logsumexp
    return Attended(
        context,
        logsumexp=None if logsumexp is None else logsumexp.T,
        statistics=mixed_measured.of_no_pairs(heads, counts),
    )


def _prepared(
    heads: Heads, plan: Plan, visits: list[Visits], products: Products
) -> tuple[MixedTiles, Operands, Given]:
    """Clean, map, pad and gather what the tiles need."""
    halos = halo_of(heads.mix_logits), halo_of(heads.mix_weights)
    queries, keys = halos[0] + halos[1]
    query_length, key_length = plan.pairs
    tallest = max((one.height for one in visits), default=plan.tile[0])
    queries = queries[0], queries[1] + -query_length % tallest
    rest = plan.covered - key_length
    keys = keys[0], keys[1] + rest
    key = heads.key
    if heads.score.differs:
        key = repeated(key, len(heads.query) // len(key))
    bias = heads.bias
    if bias is not None and not isinstance(bias, OfHeads):
        for axis, more in ((1, queries), (2, keys)):
            bias = bias if bias.shape[axis] == 1 else _around(bias, more, axis)
    operands = Operands(
        query=_around(heads.score.map(_query_rows, finite(heads.query)), queries),
        key=_around(heads.score.map(_key_rows, finite(key)), keys),
        value=_around(finite(heads.value), (0, rest)),
        bias=bias,
        score=heads.score,
        normalizer=heads.normalizer,
        mix_logits=heads.mix_logits,
        mix_weights=heads.mix_weights,
        captured={},
    )
    tiles = MixedTiles(plan.pairs, plan.tile[1], visits, halos, products)
    given = Given(
        mask=heads.mask.then(plan.within),
        captured={},
        states=_states(heads.mask, plan, tiles.has_halo) if plan.looks_up else None,
        dropout=heads.dropout,
        query_poison=_poison(heads.query, queries),
        key_poison=_poison(heads.key, keys),
        value_poison=_poison(heads.value, (0, rest)),
    )
    return tiles.traced(operands, given)


def _states(mask: OfHeads, plan: Plan, has_halo: bool) -> Array:
    """Return what each tile is for all heads; PARTIAL where they differ, or have neighbours."""
    states = jnp.asarray(mask.map(plan.states_of))
    if mask.differs:
        least, most = jnp.min(states, axis=0), jnp.max(states, axis=0)
        states = jnp.where(least == most, least, jnp.asarray(PARTIAL, states.dtype))
    return jnp.minimum(states, jnp.asarray(PARTIAL, states.dtype)) if has_halo else states


def _query_rows(score: Separated, query: Array) -> Array:
    return mapped(score.query_map, query)


def _key_rows(score: Separated, key: Array) -> Array:
    return mapped(score.key_map, key)


def _poison(rows: Array, more: tuple[int, int]) -> Array:
    found = poison(rows).astype(at_least_float32(rows.dtype))
    return jnp.pad(found, ((0, 0), more))


def _around(rows: Array, more: tuple[int, int], axis: int = 1) -> Array:
    """Repeat the first row before, and the last one after, so that no score sees odd input."""
    before, after = more
    rows = padded(rows, after, axis)
    if not before:
        return rows
    return jnp.pad(rows, [(before * (n == axis), 0) for n in range(rows.ndim)], mode="edge")


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attend(
    contexts: Contexts, heads: int, floats: list[Array], rest: Rest, given: Given
) -> tuple[Array, Array]:
    """Return context [M, T, V] and log-sum-exp [M, T], as `online.finished_finite` has it."""
    return Forward(contexts, (merge_floats(floats, rest),), given)(heads)


@functools.partial(_attend.defjvp, symbolic_zeros=True)
def _attend_jvp(contexts: Contexts, heads: int, primals: Any, tangents: Any) -> Any:
    floats, rest, given = primals
    found = _attend(contexts, heads, floats, rest, given)
    context, logsumexp = map(checkpoint_name, found, SAVED)
    operands = merge_floats(floats, rest)
    change, moves = tangents_of(tangents[0], rest)
    base = online.finite_or_zero(logsumexp)
    both = operands._replace(rows=base), widened(change)._replace(rows=jnp.zeros_like(base))
    sums = Sums(contexts, both, given, [*moves, False])
    total, moved = sums(logsumexp.shape, context.shape)
    changes = operands.normalizer.map(_changes, total, moved, context)
    return (context, logsumexp), changes


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _mix(mixed: MixedContexts, heads: int, floats: list[Array], rest: Rest, given: Given) -> Array:
    """Return the context [N, T, V] of mixed weights, given the statistics of the rows."""
    operands = merge_floats(floats, rest)
    (context,) = Sums(mixed, (operands,), given)(_shape_of_mixed(mixed, heads, operands))
    return context


@functools.partial(_mix.defjvp, symbolic_zeros=True)
def _mix_jvp(mixed: MixedContexts, heads: int, primals: Any, tangents: Any) -> Any:
    floats, rest, given = primals
    context = _mix(mixed, heads, floats, rest, given)
    operands = merge_floats(floats, rest)
    change, moves = tangents_of(tangents[0], rest)
    sums = Sums(mixed, (operands, widened(change)), given, moves)
    return context, sums(context.shape)[0]


def _shape_of_mixed(mixed: MixedContexts, heads: int, operands: Operands) -> tuple[int, int, int]:
    length = operands.query.shape[1] - sum(mixed.tiles.halo.queries)
    return heads, length, operands.value.shape[2]


def _changes(normalizer: Any, total: Array, moved: Array, context: Array) -> tuple[Array, Array]:
    return online.changes(one_pass(normalizer), total, moved, context)
