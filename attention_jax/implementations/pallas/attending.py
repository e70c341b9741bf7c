"""Attention of one head by generated kernels, with every derivative.

The forward pass is a kernel. Its tangent is the linear pass of `tiled`, whose transposition, the
backward pass, is one kernel or two. What is differentiated further is the linear pass again.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from attention_jax.base.later import later
from attention_jax.base.matmul import PLAIN, Products
from attention_jax.base.transposition import linear_call
from attention_jax.base.trees import Rest, merge_floats, split_floats, varying_like
from attention_jax.base.typing import at_least_float32
from attention_jax.implementations import online
from attention_jax.implementations.head import SAVED, Attended, Head
from attention_jax.implementations.pallas import backward, forward, parts
from attention_jax.implementations.pallas.rows import with_rows_mapped
from attention_jax.implementations.pallas.splitting import Looked, Split
from attention_jax.implementations.tile_passes import (
    Given,
    Operands,
    Tangent,
    Tiles,
    one_pass,
)
from attention_jax.implementations.tiled import prepared, with_sink
from attention_jax.implementations.tiles import LatePlan, Plan, Visits, group

Array = jax.Array


def pallas(
    head: Head,
    plan: Plan | LatePlan,
    products: Products = PLAIN,
    shares_keys: bool = False,
    only_on: str | None = None,
) -> Attended:
    """Attend one head by kernels, whose tiles begin at multiples of their size.

    The context is in the dtype of the values, the log-sum-exp in float32. `shares_keys` tells that
    other heads have the same keys and values, and `only_on` names the platform whose branch of a
    program this is. The tiles of a `LatePlan` are found when the kernels are lowered.
    """
    dtype = at_least_float32(head.value.dtype)
    head = with_rows_mapped(head, products)
    late, plan = (plan, plan.outline) if isinstance(plan, LatePlan) else (None, plan)
    if not (len(head.query) and len(head.key) and (late or len(plan.starts))):
        context = jnp.zeros((len(head.query), head.value.shape[1]), head.value.dtype)
        logsumexp = jnp.full(len(head.query), -jnp.inf, dtype)
        context, logsumexp = varying_like((context, logsumexp), head)
        return with_sink(head.normalizer, context, logsumexp)
    tiles, operands, given = prepared(head, plan, _visits(plan, late is not None), products)
    static = _Static(tiles, late or plan, shares_keys, only_on)
    context, logsumexp = _attend(static, *split_floats(operands), given)
    length = plan.pairs[0]
    context, logsumexp = context[:length], online.with_empty(logsumexp[:length])
    if getattr(one_pass(head.normalizer), "sink", None) is not None:
        context = context.astype(dtype)
    return with_sink(head.normalizer, context, logsumexp)


def _visits(plan: Plan, is_outline: bool = False) -> list[Visits]:
    """Return the visits of a plan; of an outline one that stands for all."""
    if is_outline:
        return [Visits(True, plan.tile[0], 1, plan.starts[:, 0], plan.starts[:, 1:])]
    return group(plan, tall=1, together=1) if plan.is_static else plan.visits


@dataclasses.dataclass(frozen=True, eq=False)
class _Static:
    """What is known while tracing: how tiles are computed, and which there are."""

    outlined: Tiles
    planned: Plan | LatePlan
    shares_keys: bool
    only_on: str | None

    @functools.cached_property
    def plan(self) -> Plan:
        """The tiles to visit."""
        return self.planned.whole if isinstance(self.planned, LatePlan) else self.planned

    @functools.cached_property
    def tiles(self) -> Tiles:
        """How they are computed."""
        if not isinstance(self.planned, LatePlan):
            return self.outlined
        visits = _visits(self.plan)
        is_masked = any(each.masked for each in visits)
        allowed = self.outlined.allowed if is_masked else {}
        return dataclasses.replace(self.outlined, visits=visits, allowed=allowed)

    def given(self, given: Given) -> Given:
        """Add what the tiles are, where only run time knows."""
        if not isinstance(self.planned, LatePlan) or not self.plan.looks_up:
            return given
        return given._replace(states=jnp.asarray(self.plan.states_of(given.mask)))

    def head(self, operands: Operands, given: Given) -> parts.Head:
        """Trace the functions of a head."""
        given = self.given(given)
        return parts.Head.of(self.tiles, operands, given, self.shares_keys, self.only_on)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(static: _Static, floats: list[Array], rest: Rest, given: Given) -> tuple[Array, Array]:
    """Return context [T, V] and log-sum-exp [T], as `online.finished_finite` has it."""
    leaves, structure = jax.tree.flatten((floats, rest, given))
    operands = merge_floats(floats, rest)
    dtype = at_least_float32(operands.value.dtype)
    rows = len(operands.query)
    shapes = [
        jax.ShapeDtypeStruct((rows, operands.value.shape[1]), operands.value.dtype),
        jax.ShapeDtypeStruct((rows,), dtype),
    ]
    context, logsumexp = later(functools.partial(_by_kernel, static, structure), shapes, *leaves)
    return context, logsumexp


def _by_kernel(static: _Static, structure: Any, *leaves: Array) -> tuple[Array, Array]:
    floats, rest, given = jax.tree.unflatten(structure, leaves)
    return forward.attend(static.head(merge_floats(floats, rest), given), static.plan)


@functools.partial(_attend.defjvp, symbolic_zeros=True)
def _attend_jvp(static: _Static, primals: Any, tangents: Any) -> Any:
    floats, rest, given = primals
    context, logsumexp = map(checkpoint_name, _attend(static, floats, rest, given), SAVED)
    moves = tuple(not _is_zero(x) for x in tangents[0])
    # In half precision the sums of the backward pass over tiles would be, too.
    change = [x.astype(at_least_float32(x.dtype)) for x in tangents[0] if not _is_zero(x)]
    leaves, structure = jax.tree.flatten((floats, rest, given, online.finite_or_zero(logsumexp)))
    sums = _Sums(static, structure, moves)
    wide = context.astype(logsumexp.dtype)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (logsumexp, wide)]
    log_tangent, context_tangent = linear_call(
        sums.tangent, sums.transposed, leaves, change, tuple(shapes)
    )
    how = one_pass(merge_floats(floats, rest).functions.normalizer)
    change, log_change = online.changes(how, log_tangent, context_tangent, wide)
    return (context, logsumexp), (change.astype(context.dtype), log_change)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


@dataclasses.dataclass(frozen=True, eq=False)
class _Sums:
    """The sums of `tile_passes.Tangent`, as functions of flat arguments.

    `structure` is that of (floats, rest, given, base), and `moves` says which floats have a
    tangent.
    """

    static: _Static
    structure: Any
    moves: tuple[bool, ...]

    def tangent(self, leaves: list[Array], change: list[Array]) -> tuple[Array, Array]:
        """Return both sums, [T] and [T, V], linear in the tangents of the floats that move."""
        floats, rest, given, base = jax.tree.unflatten(self.structure, leaves)
        those = iter(change)
        change = [
            next(those) if move else jnp.zeros_like(x)
            for x, move in zip(floats, self.moves, strict=True)
        ]
        operands = merge_floats(floats, rest), merge_floats(change, rest)
        given = self.static.given(given)
        return Tangent(self.static.tiles, operands, given, base, list(self.moves))()

    def transposed(self, leaves: list[Array], cotangents: tuple[Array, Array]) -> list[Array]:
        """Return the cotangents of the floats that move, given those of the two sums."""
        return _pull_back(self, leaves, list(cotangents))

    def plainly_transposed(self, leaves: list[Array], cotangents: list[Array]) -> list[Array]:
        """Return the same by JAX's own transposition of the linear pass."""
        floats = jax.tree.unflatten(self.structure, leaves)[0]
        change = [x for x, move in zip(floats, self.moves, strict=True) if move]
        transpose = jax.linear_transpose(
            functools.partial(self.tangent, leaves), [_shaped(x) for x in change]
        )
        return transpose(tuple(cotangents))[0]

    def by_kernels(self, leaves: list[Array], cotangents: list[Array]) -> list[Array]:
        """Return the same by kernels."""
        floats, rest, given, base = jax.tree.unflatten(self.structure, leaves)
        head = self.static.head(merge_floats(floats, rest), given)
        those = iter(self.moves)
        moves = [is_float and next(those) for is_float in rest.is_float]
        number = 4 if head.moving.bias else 3
        of_data, of_leaves = moves[:number], moves[number:]
        flags = [
            *_moving(head.logits, head.moving.logits, of_leaves),
            *_moving(head.weights, head.moving.weights, of_leaves),
        ]
        total, context = cotangents
        rows = backward.Rows(base, total, context.astype(head.operands.value.dtype))
        found = backward.pull_back(head, self.static.plan, rows, [*of_data, *flags])
        of_functions = _through_look_up(head, of_leaves, found[number:])
        of_rows = [x.astype(at_least_float32(x.dtype)) for x in found[:number] if x is not None]
        return of_rows + of_functions


def _shaped(x: Array) -> Any:
    return jnp.zeros(x.shape, at_least_float32(x.dtype))


def _moving(function: Split, looked: Looked, of_leaves: list[bool]) -> list[bool]:
    """Tell for each array that was looked up whether it may move, given which leaves do."""
    of_whole = [n < len(of_leaves) and of_leaves[n] for n in function.reads]
    others = jax.tree.leaves(looked)[len(of_whole) :]
    any_moves = any(of_leaves)
    return of_whole + [any_moves and jnp.issubdtype(x.dtype, jnp.floating) for x in others]


def _through_look_up(
    head: parts.Head, moves: list[bool], cotangents: list[Array | None]
) -> list[Array]:
    """Return the cotangents of the leaves that move, given those of what was looked up."""
    if not any(moves):
        return []
    wanted = [x is not None for x in cotangents]
    look_up = functools.partial(_looked_up, head, moves, wanted)
    moving = [x for x, move in zip(head.leaves, moves, strict=True) if move]
    found, pull = jax.vjp(look_up, moving)
    given = [x for x in cotangents if x is not None]
    return pull([x.astype(y.dtype) for x, y in zip(given, found, strict=True)])[0]


def _looked_up(
    head: parts.Head, moves: list[bool], wanted: list[bool], moving: list[Array]
) -> list[Array]:
    those = iter(moving)
    leaves = [next(those) if move else x for x, move in zip(head.leaves, moves, strict=True)]
    every = jax.tree.leaves(head.looked_up(leaves))
    return [x for x, is_wanted in zip(every, wanted, strict=True) if is_wanted]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _pull_back(sums: _Sums, leaves: list[Array], cotangents: list[Array]) -> list[Array]:
    return sums.by_kernels(leaves, cotangents)


@functools.partial(_pull_back.defjvp, symbolic_zeros=True)
def _pull_back_jvp(sums: _Sums, primals: Any, tangents: Any) -> Any:
    flat, structure = jax.tree.flatten(primals)
    directions = jax.tree.leaves(tangents, is_leaf=_is_zero)
    moves = [not _is_zero(x) for x in directions]
    function = functools.partial(_plain, (sums, structure), flat, moves)
    moving = [x for x, move in zip(flat, moves, strict=True) if move]
    along = [x for x, move in zip(directions, moves, strict=True) if move]
    return _pull_back(sums, *primals), jax.jvp(function, moving, along)[1]


def _plain(static: Any, flat: list[Array], moves: list[bool], *moving: Array) -> list[Array]:
    sums, structure = static
    those = iter(moving)
    leaves = [next(those) if move else x for x, move in zip(flat, moves, strict=True)]
    return sums.plainly_transposed(*jax.tree.unflatten(structure, leaves))
