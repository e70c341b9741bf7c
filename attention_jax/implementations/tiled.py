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
from jax.custom_derivatives import SymbolicZero

from attention_jax.implementations import online
from attention_jax.implementations.head import Head, Result, finite_rows, kept
from attention_jax.implementations.tiles import Plan, make_plan
from attention_jax.intervals import FULL, PARTIAL, indices
from attention_jax.masks import Lengths
from attention_jax.matmul import times
from attention_jax.normalizers import Elementwise, Exponential, streaming
from attention_jax.trees import merge_floats, split_floats, varying_like

Array = jax.Array

UNROLL = 2
"""Tiles in one turn of the loop, of which XLA's CPU runtime works on two at a time."""


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
    """What it is not: the mask, the plan where it is known only at run time, dropout, poison."""

    mask: Any
    plan: Plan | None
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
        with_sink = jnp.logaddexp(logsumexp, jnp.asarray(how.sink, logsumexp.dtype))
        context = context * jnp.exp(logsumexp - with_sink)[:, None]
        logsumexp = with_sink
    return Result(context, None, logsumexp)


def _attend(head: Head, query_size: int, key_size: int) -> tuple[Array, Array]:
    """Clean, pad and gather what the tiles need, and pass over them."""
    query_length, key_length = head.query.shape[0], head.key.shape[0]
    query, query_poison = finite_rows(head.query)
    key, key_poison = finite_rows(head.key)
    value, value_poison = finite_rows(head.value)
    mask = head.mask & Lengths(key_length) if key_length % key_size else head.mask
    padded_length = key_length + -key_length % key_size
    plan = make_plan(mask, query_length, padded_length, query_size, key_size)

    bias_is_function = callable(head.bias)
    operands = _Operands(
        query=_padded(head.score.query_map(query), query_size),
        key=_padded(head.score.key_map(key), key_size),
        value=_padded(value, key_size),
        bias=None if bias_is_function else _padded_bias(head.bias, query_size, key_size),
        functions=_Functions(head.score, head.bias if bias_is_function else None, head.normalizer),
        captured=[],
    )
    given = _Given(
        mask=mask,
        plan=None if plan.is_static else plan,
        dropout=head.dropout,
        query_poison=_padded(query_poison, query_size),
        key_poison=_padded(key_poison + value_poison, key_size),
    )
    tiles = _Tiles(query_size, key_size, plan)
    logits, captured = jax.closure_convert(
        _logits, tiles.of(operands, 0, 0), indices(query_size), indices(key_size)
    )
    tiles = dataclasses.replace(tiles, logits=logits)
    context, logsumexp = tiles.attend(operands._replace(captured=captured), given)
    return context[:query_length], logsumexp[:query_length]


def _how(normalizer: Any) -> Exponential | Elementwise:
    how = streaming(normalizer)
    if how is None:
        raise ValueError("tiled: this normalizer needs a whole row of logits; use dense.")
    return how


def _logits(tile: _Operands, q_idx: Array, kv_idx: Array) -> Array:
    score, bias, _ = tile.functions
    logits = score.paired(tile.query, tile.key, q_idx, kv_idx)
    if bias is not None:
        return logits + jnp.asarray(bias(q_idx[:, None], kv_idx[None, :]), logits.dtype)
    return logits if tile.bias is None else logits + tile.bias


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """The pass over the tiles and its derivative; holds only what is known while tracing.

    `logits(tile, q_idx, kv_idx, *captured)` is `_logits` with what the user's functions close over
    made arguments, so that it has gradients too.
    """

    query_size: int
    key_size: int
    plan: Plan
    logits: Any = None

    def attend(self, operands: _Operands, given: _Given) -> tuple[Array, Array]:
        """Return context [T, V] and log-sum-exp [T]."""

        @jax.custom_jvp
        def attend(floats: list[Array], rest: Any, given: _Given) -> tuple[Array, Array]:
            return self.forward(merge_floats(floats, rest), given)

        @functools.partial(attend.defjvp, symbolic_zeros=True)
        def _(primals: Any, tangents: Any) -> Any:
            floats, rest, given = primals
            context, logsumexp = attend(floats, rest, given)
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

        def of_tile(masked: bool, rows: online.Sums, i: Any, j: Any) -> online.Sums:
            tile = self.tile(self.of(operands, i, j), given, i, j, masked)
            return online.accumulate(how, rows, tile)

        def step(sums: online.Sums, i: Any, j: Any, visit: Callable[..., Any]) -> online.Sums:
            rows = jax.tree.map(lambda x: _rows(x, i, self.query_size), sums)
            return jax.tree.map(
                lambda x, row: lax.dynamic_update_slice_in_dim(x, row, i, 0),
                sums,
                visit(rows, i, j),
            )

        length, depth = operands.query.shape[0], operands.value.shape[1]
        sums = varying_like(
            online.Sums.start(length, depth, operands.value.dtype), operands, given.query_poison
        )
        return online.finished(
            how, self.over_tiles(given, step, of_tile, lambda rows, *_: rows, sums)
        )

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
            total, context = nothing()
            if weights_move:
                weights, weights_change, tile = jax.jvp(
                    weigh, (primal,), (direction,), has_aux=True
                )
                total = jnp.sum(weights_change, axis=1)
                context = times(tile.used(weights_change), here.value)
            else:
                weights, tile = weigh(primal)
            if value_moves:
                context = context + times(tile.used(weights), change.value)
            return total, context

        def nothing(*_: Any) -> tuple[Array, Array]:
            zeros = varying_like(jnp.zeros((self.query_size, depth), base.dtype), base)
            return zeros[:, 0], zeros

        def step(sums: Any, i: Any, j: Any, visit: Callable[..., Any]) -> Any:
            rows = _rows(base, i, self.query_size)
            found = visit(self.of(operands, i, j), self.of(tangent, i, j), rows, i, j)
            return jax.tree.map(functools.partial(self.added, i), sums, found)

        sums = jnp.zeros_like(base), varying_like(jnp.zeros((base.size, depth), base.dtype), base)
        return self.over_tiles(given, step, of_tile, nothing, sums)

    def over_tiles(
        self,
        given: _Given,
        step: Callable[..., Any],
        of_tile: Callable[..., Any],
        nothing: Callable[..., Any],
        sums: Any,
    ) -> Any:
        """Fold `step(sums, i, j, visit)` over the live tiles; i is their first query, j first key.

        `visit` is `of_tile` with the mask or without, or `nothing` for a tile that turns out to
        be EMPTY at run time. A scan of fixed length, whatever the plan, so that it can be
        transposed; nothing inside a step is kept for that.
        """
        masked, unmasked = (functools.partial(of_tile, masked) for masked in (True, False))

        def fold(starts: Any, states: Any, visit: Callable[[Any], Callable[..., Any]], sums: Any):
            @jax.checkpoint
            def body(sums: Any, tile: Any) -> tuple[Any, None]:
                i, j, state = tile
                return step(sums, i, j, visit(state)), None

            unroll = UNROLL if states is None else 1
            return lax.scan(body, sums, (*starts.T, states), unroll=unroll)[0]

        if given.plan is not None:
            branches = [jax.checkpoint(branch) for branch in (nothing, masked, unmasked)]

            def switch(state: Array) -> Callable[..., Any]:
                return lambda *operands: lax.switch(state, branches, *operands)

            return fold(self.plan.starts, given.plan.states.astype(jnp.int32), switch, sums)
        for state, visit in ((FULL, unmasked), (PARTIAL, masked)):
            starts = self.plan.starts[self.plan.states == state]
            if len(starts):
                sums = fold(starts, None, lambda _, visit=visit: visit, sums)
        return sums

    def tile(self, here: _Operands, given: _Given, i: Any, j: Any, masked: bool) -> online.Tile:
        """Return the tile of the operands `here`, whose first query is i and first key j."""
        q_idx = i + indices(self.query_size)
        kv_idx = j + indices(self.key_size)
        pair = q_idx[:, None], kv_idx[None, :]
        allowed = given.mask(*pair) if masked else None
        return online.Tile(
            logits=self.logits(here._replace(captured=[]), q_idx, kv_idx, *here.captured),
            value=here.value,
            allowed=allowed,
            keep=None if given.dropout is None else kept(given.dropout, *pair, here.value.dtype),
            query_poison=_rows(given.query_poison, i, self.query_size),
            key_poison=_rows(given.key_poison, j, self.key_size),
        )

    def of(self, operands: _Operands, i: Any, j: Any) -> _Operands:
        """Return the operands of one tile."""
        bias = operands.bias
        if bias is not None:
            bias = bias if bias.shape[0] == 1 else _rows(bias, i, self.query_size)
            bias = bias if bias.shape[1] == 1 else _rows(bias, j, self.key_size, axis=1)
        return operands._replace(
            query=_rows(operands.query, i, self.query_size),
            key=_rows(operands.key, j, self.key_size),
            value=_rows(operands.value, j, self.key_size),
            bias=bias,
        )

    def added(self, i: Any, sums: Array, found: Array) -> Array:
        """Add what was found to the rows of one query tile, the first of which is i.

        As a scatter, whose transposition reads the rows and leaves the sums alone; that of a
        slice that is read, added to and written back would copy all rows at every tile.
        """
        tiles = sums.reshape(-1, *found.shape)
        added = tiles.at[i // self.query_size].add(
            found, mode="promise_in_bounds", unique_indices=True
        )
        return added.reshape(sums.shape)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _array(tangent: Any) -> Array:
    return jnp.zeros(tangent.shape, tangent.dtype) if _is_zero(tangent) else tangent


def _rows(x: Array, start: Any, size: int, axis: int = 0) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def _padded(x: Array, size: int, axis: int = 0) -> Array:
    """Repeat the last row until the length is a multiple of the tile: no score sees odd input."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, widths, mode="edge")


def _padded_bias(bias: Any, query_size: int, key_size: int) -> Any:
    if bias is None:
        return None
    for axis, size in enumerate((query_size, key_size)):
        bias = bias if bias.shape[axis] == 1 else _padded(bias, size, axis)
    return bias
