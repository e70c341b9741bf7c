"""Exact attention in memory linear in the sequence: online softmax over tiles, in plain JAX.

The forward pass visits the live key tiles of each query tile, keeping a running maximum, sum and
context (Milakov and Gimelshein 2018; Rabe and Staats 2021; Dao et al. 2022), and returns the
log-sum-exp L_i of each query. Given L, a weight is a function of its own pair alone,

    w_ij = exp(e_ij - L_i),

so the derivative needs no weight kept: with e' the tangent of the logits,

    L'_i = sum_j w_ij e'_ij,        o'_i = sum_j w_ij (e'_ij v_j + v'_j) - L'_i o_i.

That sum over tiles is linear in the tangents and recomputes each tile; JAX transposes it into the
backward pass. Forward mode, higher derivatives and `vmap` follow from the same few lines.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from attention_jax.base.binding import bind
from attention_jax.base.finite import finite, poison
from attention_jax.base.matmul import PLAIN, Products
from attention_jax.base.trees import Rest, merge_floats, split_floats
from attention_jax.base.typing import AnyNormalizer, at_least_float32
from attention_jax.implementations import measured, online, ordered, searching, selecting
from attention_jax.implementations.head import SAVED, Attended, Head
from attention_jax.implementations.merging import merge
from attention_jax.implementations.tile_passes import (
    Forward,
    Functions,
    Given,
    Operands,
    Tangent,
    Tiles,
    by_query_head,
    one_pass,
    tangents_of,
    widened,
)
from attention_jax.implementations.tiles import Plan, Visits
from attention_jax.normalizers import (
    LogSum,
    Ordered,
    Searched,
    Selected,
    is_queried,
    streaming,
    with_query,
)
from attention_jax.scores.composition import identity

Array = jax.Array


def tiled(head: Head, plan: Plan, products: Products = PLAIN, apart: bool = False) -> Attended:
    """Attend one head, a tile of queries and keys at a time; results are float32 or better.

    `apart` adds up the gradients of keys and values for each query head; see `by_query_head`.
    """
    query_length, key_length = head.query.shape[0], head.key.shape[0]
    if query_length == 0 or key_length == 0:
        dtype = at_least_float32(head.value.dtype)
        context = jnp.zeros((query_length, head.value.shape[1]), dtype)
        logsumexp = jnp.full(query_length, -jnp.inf, dtype)
        attended = with_sink(head.normalizer, context, logsumexp)
        return attended._replace(statistics=measured.of_no_pairs(head))
    if isinstance(streaming(head.normalizer), Searched | Ordered):
        return _row_by_row(head, plan, products)
    if head.statistics is not None:
        return _measured(head, plan, functools.partial(prepared, head, plan, products=products))
    return with_sink(head.normalizer, *_over_tiles(head, plan, products, apart))


def _measured(head: Head, plan: Plan, prepare: measured.Prepare) -> Attended:
    """Attend and compute statistics: those that stream along with the context, then the others."""
    each = measured.Measured(head, plan, prepare)
    context, of_keys, sums = each.with_context()
    attended = with_sink(head.normalizer, context, of_keys)
    return attended._replace(statistics=each.finished(sums, of_keys, attended.logsumexp))


def with_sink(normalizer: AnyNormalizer, context: Array, logsumexp: Array) -> Attended:
    """Add the sink of a normalizer to attention over all keys, if it has one."""
    how = streaming(normalizer)
    if not isinstance(how, LogSum):
        return Attended(context)
    attended = Attended(context, logsumexp=logsumexp)
    if how.sink is None:
        return attended
    sink = jnp.broadcast_to(jnp.asarray(how.sink, logsumexp.dtype), logsumexp.shape)
    return merge(attended, Attended(jnp.zeros_like(context), logsumexp=sink))


def _over_tiles(head: Head, plan: Plan, products: Products, apart: bool) -> tuple[Array, Array]:
    """Pass over the tiles; return context [T, V] and log-sum-exp [T]."""
    tiles, operands, given = prepared(head, plan, plan.visits, products)
    tiles = dataclasses.replace(tiles, apart=apart)
    context, logsumexp = _attend(tiles, *split_floats(operands), given)
    length = plan.pairs[0]
    return context[:length], online.with_empty(logsumexp[:length])


def _row_by_row(head: Head, plan: Plan, products: Products) -> Attended:
    """Attend where a normalizer goes over a row of tiles, each visited alone."""
    apart = dataclasses.replace(plan, apart=True)
    if not apart.visits:
        dtype = at_least_float32(head.value.dtype)
        context = jnp.zeros((plan.pairs[0], head.value.shape[1]), dtype)
        return Attended(context, statistics=measured.of_no_pairs(head))
    length, how = plan.pairs[0], streaming(head.normalizer)
    if isinstance(how, Selected):
        of_kept = head._replace(normalizer=bind(how.of_kept))
        return _selected(of_kept, apart, products, how)
    operands = prepared(head, apart, apart.visits, products)
    if isinstance(how, Ordered):
        return Attended(ordered.attend(*operands)[:length])
    context, of_rows = searching.attend(*operands)
    if head.statistics is None:
        return Attended(context[:length])
    prepare = functools.partial(prepared, head, plan, products=products)
    each = measured.Measured(head, plan, prepare)
    found = each.after_search(jax.tree.map(lambda x: x[:length], of_rows))
    return Attended(context[:length], statistics=found)


def _selected(head: Head, plan: Plan, products: Products, how: Selected) -> Attended:
    """Attend to the keys that a normalizer keeps of each row; that of the head is over these."""
    operands = prepared(head, plan, plan.visits, products)
    if head.statistics is None:
        return Attended(selecting.attend(*operands, how)[: plan.pairs[0]])
    found = selecting.search(*operands, how)
    prepare = functools.partial(_narrowed, head, plan, found, products=products)
    return _measured(head, plan, prepare)._replace(logsumexp=None)


def _narrowed(
    head: Head, plan: Plan, found: selecting.Found, visits: list[Visits], products: Products
) -> tuple[Tiles, Operands, Given]:
    """Return what the tiles need where only some keys of each row are kept."""
    tiles, operands, given = prepared(head, plan, visits, products)
    return tiles, operands, selecting.narrowed(found, given)


def prepared(
    head: Head, plan: Plan, visits: list[Visits], products: Products
) -> tuple[Tiles, Operands, Given]:
    """Clean, pad and gather what the tiles need."""
    query_length, key_length = plan.pairs
    tallest = max((one.height for one in visits), default=plan.tile[0])
    # What is left over, so written that a symbol of `jax.export` cancels.
    query = padded(head.query, -(-query_length // tallest) * tallest - query_length)
    key, value = (padded(x, plan.covered - key_length) for x in (head.key, head.value))
    normalizer = head.normalizer
    if is_queried(normalizer):
        normalizer = with_query(normalizer, finite(query.astype(at_least_float32(query.dtype))))
    bias_of_pairs, bias = (head.bias, None) if callable(head.bias) else (None, head.bias)
    operands = Operands(
        query=mapped(head.score.query_map, query),
        key=mapped(head.score.key_map, key),
        value=value,
        bias=_padded_bias(bias, query, key),
        functions=Functions(head.score.multiplied(products), bias_of_pairs, normalizer),
        captured={},
    )
    given = Given(
        mask=plan.within(head.mask),
        captured={},
        states=jnp.asarray(plan.states_of(head.mask)) if plan.looks_up else None,
        dropout=head.dropout,
        query_poison=_poison(query),
        key_poison=_poison(key) + _poison(value),
    )
    return Tiles(plan.tile[1], visits, products).traced(operands, given)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(tiles: Tiles, floats: list[Array], rest: Rest, given: Given) -> tuple[Array, Array]:
    """Return context [T, V] and log-sum-exp [T], as `online.finished_finite` has it."""
    return Forward(tiles, (merge_floats(floats, rest),), given)()


@functools.partial(_attend.defjvp, symbolic_zeros=True)
def _attend_jvp(tiles: Tiles, primals: Any, tangents: Any) -> Any:
    floats, rest, given = primals
    context, logsumexp = map(checkpoint_name, _attend(tiles, floats, rest, given), SAVED)
    operands = merge_floats(floats, rest)
    # In half precision the sums of the backward pass over tiles would be, too.
    change, moves = tangents_of(tangents[0], rest)
    change = widened(change)
    base = online.finite_or_zero(logsumexp)
    change = by_query_head(change, base) if tiles.apart else change
    log_tangent, context_tangent = Tangent(tiles, (operands, change), given, base, moves)()
    how = one_pass(operands.functions.normalizer)
    return (context, logsumexp), online.changes(how, log_tangent, context_tangent, context)


def mapped(of_row: Any, x: Array) -> Array:
    """Apply a score's map of rows to finite numbers; without a map, tiles clean their own rows."""
    if of_row.func is identity.func:
        return x
    return of_row(finite(x.astype(at_least_float32(x.dtype))))


def _poison(x: Array) -> Array:
    return poison(x).astype(at_least_float32(x.dtype))


def padded(x: Array, more: int, axis: int = 0) -> Array:
    """Repeat the last row, so that no score sees odd input where a tile sticks out.

    Written into repeated rows, since XLA's CPU compiler concatenates an element at a time.
    """
    if isinstance(more, int) and not more:
        return x
    length = x.shape[axis]
    last = lax.slice_in_dim(x, length - 1, length, axis=axis)
    shape = (*x.shape[:axis], length + more, *x.shape[axis + 1 :])
    return lax.dynamic_update_slice_in_dim(jnp.broadcast_to(last, shape), x, 0, axis)


def _padded_bias(bias: Array | None, query: Array, key: Array) -> Array | None:
    if bias is None:
        return None
    for axis, length in enumerate((query.shape[0], key.shape[0])):
        bias = bias if bias.shape[axis] == 1 else padded(bias, length - bias.shape[axis], axis)
    return bias
