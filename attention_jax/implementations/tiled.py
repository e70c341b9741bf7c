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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from attention_jax.base.finite import finite, poison
from attention_jax.base.matmul import times
from attention_jax.base.trees import hoisted, merge_floats, split_floats, varying_like
from attention_jax.implementations import online
from attention_jax.implementations.head import SAVED, Head, Result, kept
from attention_jax.implementations.merging import merge
from attention_jax.implementations.passes import Pass, over_visits
from attention_jax.implementations.tiles import Visits, make_plan, make_visits
from attention_jax.masks import Lengths
from attention_jax.masks.intervals import indices
from attention_jax.normalizers import Elementwise, Exponential, streaming
from attention_jax.scores.composition import identity

Array = jax.Array


class _Functions(NamedTuple):
    """The bound functions of the head; `bias` is None unless it is one."""

    score: Any
    bias: Any
    normalizer: Any


class _Operands(NamedTuple):
    """What the result is differentiated with respect to; of all rows, or of one tile.

    `captured` holds what the user's functions close over.
    """

    query: Array
    key: Array
    value: Array
    bias: Any
    functions: _Functions
    captured: Any


class _Given(NamedTuple):
    """What it is not: the mask, what tiles are where only run time tells, dropout, poison.

    `captured` holds what the mask closes over.
    """

    mask: Any
    captured: Any
    states: Any
    dropout: Any
    query_poison: Array
    key_poison: Array


def tiled(head: Head, query_size: int, key_size: int) -> Result:
    """Attend one head, `query_size` queries by `key_size` keys at a time."""
    query_length, key_length = head.query.shape[0], head.key.shape[0]
    if query_length == 0 or key_length == 0:
        context = jnp.zeros((query_length, head.value.shape[1]), head.value.dtype)
        logsumexp = jnp.full(query_length, -jnp.inf, head.value.dtype)
    else:
        context, logsumexp = _attend(head, query_size, key_size)
    how = _how(head.normalizer)
    if not isinstance(how, Exponential):
        return Result(context, None, None)
    if how.sink is not None:
        sink = jnp.broadcast_to(jnp.asarray(how.sink, logsumexp.dtype), logsumexp.shape)
        context, logsumexp = merge((context, logsumexp), (jnp.zeros_like(context), sink))
    return Result(context, None, logsumexp)


def _attend(head: Head, query_size: int, key_size: int) -> tuple[Array, Array]:
    """Clean, pad and gather what the tiles need, and pass over them."""
    query_length, key_length = head.query.shape[0], head.key.shape[0]
    within = head.mask & Lengths(key_length)
    plan = make_plan(within, query_length, key_length, query_size, key_size)
    mask = within if plan.key_length > key_length else head.mask
    visits = make_visits(plan, query_length, query_size, key_size)
    most_rows = max((one.height for one in visits), default=query_size)

    query = _padded(head.query, -query_length % most_rows)
    key, value = (_padded(x, plan.key_length - key_length) for x in (head.key, head.value))
    bias_is_function = callable(head.bias)
    operands = _Operands(
        query=_mapped(head.score.query_map, query),
        key=_mapped(head.score.key_map, key),
        value=value,
        bias=None if bias_is_function else _padded_bias(head.bias, query, key),
        functions=_Functions(head.score, head.bias if bias_is_function else None, head.normalizer),
        captured={},
    )
    given = _Given(
        mask=mask,
        captured={},
        states=None if plan.is_static else plan.states,
        dropout=head.dropout,
        query_poison=poison(query),
        key_poison=poison(key) + poison(value),
    )
    tiles = _Tiles(key_size, visits)
    kv_idx = indices(key_size)
    logits, captured, allowed, of_mask = {}, {}, {}, {}
    for rows in sorted({one.rows for one in visits}):
        q_idx = indices(rows)
        tile = tiles.of(operands, 0, 0, rows)
        logits[rows], captured[rows] = hoisted(_logits, tile, q_idx, kv_idx)
        if any(one.masked and one.rows == rows for one in visits):
            allowed[rows], of_mask[rows] = hoisted(_allowed, mask, q_idx, kv_idx)
    tiles = dataclasses.replace(tiles, logits=logits, allowed=allowed)
    context, logsumexp = tiles.attend(
        operands._replace(captured=captured), given._replace(captured=of_mask)
    )
    return context[:query_length], logsumexp[:query_length]


def _how(normalizer: Any) -> Exponential | Elementwise:
    how = streaming(normalizer)
    if how is None:
        raise ValueError("tiled: this normalizer needs a whole row of logits; use dense.")
    return how


def _allowed(mask: Any, q_idx: Array, kv_idx: Array) -> Array:
    return mask(q_idx[:, None], kv_idx[None, :])


def _logits(tile: _Operands, q_idx: Array, kv_idx: Array) -> Array:
    score, bias, _ = tile.functions
    logits = score.paired(tile.query, tile.key, q_idx, kv_idx)
    if bias is None and tile.bias is None:
        return logits
    added = tile.bias if bias is None else bias(q_idx[:, None], kv_idx[None, :])
    return logits + jnp.asarray(added, logits.dtype)


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """The pass over the tiles and its derivative; holds only what is known while tracing.

    `logits[rows](tile, q_idx, kv_idx, *captured)` is `_logits` for tiles so high, with what the
    user's functions close over made arguments, so that it has gradients too; `allowed[rows](mask,
    q_idx, kv_idx, *captured)` is `_allowed`.
    """

    key_size: int
    visits: list[Visits]
    logits: Any = None
    allowed: Any = None

    def attend(self, operands: _Operands, given: _Given) -> tuple[Array, Array]:
        """Return context [T, V] and log-sum-exp [T]."""

        @jax.custom_jvp
        def attend(floats: list[Array], rest: Any, given: _Given) -> tuple[Array, Array]:
            return self.forward(merge_floats(floats, rest), given)

        @functools.partial(attend.defjvp, symbolic_zeros=True)
        def _(primals: Any, tangents: Any) -> Any:
            floats, rest, given = primals
            found = attend(floats, rest, given)
            context, logsumexp = map(checkpoint_name, found, SAVED)
            operands = merge_floats(floats, rest)
            log_tangent, context_tangent = self.tangent_sums(
                operands, tangents[0], given, logsumexp
            )
            if isinstance(streaming(operands.functions.normalizer), Exponential):
                context_tangent = context_tangent - log_tangent[:, None] * context
            else:
                log_tangent = jnp.zeros_like(log_tangent)
            return (context, logsumexp), (context_tangent, log_tangent)

        return attend(*split_floats(operands), given)

    def forward(self, operands: _Operands, given: _Given) -> tuple[Array, Array]:
        """Let each tile add to the running sums of its query rows."""
        how = _how(operands.functions.normalizer)

        def read(sums: online.Sums, i: Any, rows: int) -> online.Sums:
            return jax.tree.map(lambda x: _rows(x, i, rows), sums)

        def of_tile(masked: bool, here: _Operands, sums: online.Sums, i: Any, j: Any):
            return online.accumulate(how, sums, self.tile(here, given, i, j, masked))

        def nothing(_: Any, sums: online.Sums, *where: Any) -> online.Sums:
            return sums

        def write(sums: online.Sums, i: Any, found: online.Sums) -> online.Sums:
            def put(x: Array, rows: Array) -> Array:
                return lax.dynamic_update_slice_in_dim(x, rows, i, 0, allow_negative_indices=False)

            return jax.tree.map(put, sums, found)

        length, depth = operands.query.shape[0], operands.value.shape[1]
        sums = varying_like(
            online.Sums.start(length, depth, operands.value.dtype), operands, given.query_poison
        )
        what = Pass((operands,), self.of, read, of_tile, nothing, write, is_transposed=False)
        return online.finished(how, over_visits(what, self.visits, given.states, sums))

    def tangent_sums(
        self, operands: _Operands, tangents: list[Any], given: _Given, logsumexp: Array
    ) -> tuple[Array, Array]:
        """Return sum_j w'_ij [T] and sum_j w'_ij v_j + w_ij v'_j [T, V], linear in the tangents.

        Each tile is recomputed where its transposition needs it; nothing of it is stored. What
        has no tangent costs nothing; products with zeros are also what XLA's CPU compiler may
        fuse wrongly.
        """
        base = online.finite_or_zero(logsumexp)
        depth = operands.value.shape[1]
        _, rest = split_floats(operands)
        tangent = merge_floats([_array(x) for x in tangents], rest)
        moves = [not _is_zero(x) for x in tangents]
        value_moves = merge_floats(moves, rest).value
        weights_move = sum(moves) > value_moves

        def of_tile(masked: bool, here: _Operands, change: _Operands, base: Array, i: Any, j: Any):
            floats, rest = split_floats(here)

            def weigh(moved: list[Array]) -> tuple[Array, online.Tile]:
                those = iter(moved)
                leaves = [next(those) if m else x for x, m in zip(floats, moves, strict=True)]
                here = merge_floats(leaves, rest)
                tile = self.tile(here, given, i, j, masked)
                how = _how(here.functions.normalizer)
                return online.weights_given(how, tile, base), tile

            primal, direction = (
                [x for x, m in zip(leaves, moves, strict=True) if m]
                for leaves in (floats, split_floats(change)[0])
            )
            total, context = nothing(here, change, base)
            if weights_move:
                weights, weights_change, tile = _moved(weigh, primal, direction)
                total = jnp.sum(weights_change, axis=1)
                context = times(tile.used(weights_change), tile.value)
            else:
                weights, tile = weigh(primal)
            if value_moves:
                value_change = jnp.where(jnp.isfinite(here.value), change.value, 0.0)
                context = context + times(tile.used(weights), value_change)
            return total, context

        def nothing(here: Any, change: Any, base: Array, *_: Any) -> tuple[Array, Array]:
            zeros = jnp.zeros_like(base)
            return zeros, varying_like(jnp.zeros((base.size, depth), base.dtype), base)

        def read(_: Any, i: Any, rows: int) -> Array:
            return _rows(base, i, rows)

        def write(sums: Any, i: Any, found: Any) -> Any:
            return jax.tree.map(functools.partial(_added, i), sums, found)

        sums = jnp.zeros_like(base), varying_like(jnp.zeros((base.size, depth), base.dtype), base)
        both = operands, tangent
        what = Pass(both, self.of, read, of_tile, nothing, write, is_transposed=True)
        return over_visits(what, self.visits, given.states, sums)

    def tile(self, here: _Operands, given: _Given, i: Any, j: Any, masked: bool) -> online.Tile:
        """Return the tile of the operands `here`, whose first query is i and first key j."""
        rows = here.query.shape[0]
        q_idx = i + indices(rows)
        kv_idx = j + indices(self.key_size)
        pair = q_idx[:, None], kv_idx[None, :]
        allowed = None
        if masked:
            allowed = self.allowed[rows](given.mask, q_idx, kv_idx, *given.captured[rows])
        usable = _usable(here)
        return online.Tile(
            logits=self.logits[rows](
                usable._replace(captured={}), q_idx, kv_idx, *here.captured[rows]
            ),
            value=usable.value,
            allowed=allowed,
            keep=None if given.dropout is None else kept(given.dropout, *pair, here.value.dtype),
            query_poison=_rows(given.query_poison, i, rows),
            key_poison=_rows(given.key_poison, j, self.key_size),
        )

    def of(self, operands: _Operands, i: Any, j: Any, rows: int) -> _Operands:
        """Return the operands of one tile."""
        bias = operands.bias
        if bias is not None:
            bias = bias if bias.shape[0] == 1 else _rows(bias, i, rows)
            bias = bias if bias.shape[1] == 1 else _rows(bias, j, self.key_size, axis=1)
        return operands._replace(
            query=_rows(operands.query, i, rows),
            key=_rows(operands.key, j, self.key_size),
            value=_rows(operands.value, j, self.key_size),
            bias=bias,
        )


def _added(i: Any, sums: Array, found: Array) -> Array:
    """Add what was found to the rows from query i on.

    As a scatter, whose transposition reads the rows and leaves the sums alone; that of a
    slice that is read, added to and written back would copy all rows at every tile.
    """
    tiles = sums.reshape(len(sums) // len(found), *found.shape)
    which = lax.div(i, jnp.int32(found.shape[0]))
    added = tiles.at[which].add(found, mode="promise_in_bounds", unique_indices=True)
    return added.reshape(sums.shape)


def _moved(weigh: Callable[..., Any], primal: Any, direction: Any) -> Any:
    try:
        return jax.jvp(weigh, (primal,), (direction,), has_aux=True)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            "tiled: a score, bias or normalizer has its derivative from jax.custom_vjp, which runs "
            "backward only, and that of a tile is taken forward and then transposed; define it by "
            "jax.custom_jvp, or use implementation='dense'."
        ) from error


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _array(tangent: Any) -> Array:
    return jnp.zeros(tangent.shape, tangent.dtype) if _is_zero(tangent) else tangent


def _mapped(of_row: Any, x: Array) -> Array:
    """Apply what concerns rows alone; rows that stay as they are are not copied for that."""
    return x if of_row.func is identity.func else of_row(finite(x))


def _usable(tile: _Operands) -> _Operands:
    """Replace NaN and Inf where rows are as they were given; see `poison`."""
    score = tile.functions.score
    return tile._replace(
        query=finite(tile.query) if score.query_map.func is identity.func else tile.query,
        key=finite(tile.key) if score.key_map.func is identity.func else tile.key,
        value=finite(tile.value),
    )


def _rows(x: Array, start: Any, size: int, axis: int = 0) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size, axis, allow_negative_indices=False)


def _padded(x: Array, more: int, axis: int = 0) -> Array:
    """Repeat the last row, so that no score sees odd input where a tile sticks out.

    Written into repeated rows, since XLA's CPU compiler concatenates an element at a time.
    """
    if not more:
        return x
    length = x.shape[axis]
    last = lax.slice_in_dim(x, length - 1, length, axis=axis)
    shape = (*x.shape[:axis], length + more, *x.shape[axis + 1 :])
    return lax.dynamic_update_slice_in_dim(jnp.broadcast_to(last, shape), x, 0, axis)


def _padded_bias(bias: Any, query: Array, key: Array) -> Any:
    if bias is None:
        return None
    for axis, length in enumerate((len(query), len(key))):
        bias = bias if bias.shape[axis] == 1 else _padded(bias, length - bias.shape[axis], axis)
    return bias
