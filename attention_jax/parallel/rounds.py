"""Attention of local queries over keys that arrive step by step, with every derivative.

A step brings the keys and values of another device, or those of all devices at once; the running
sums of an online softmax go on from step to step, as if all keys had been there. So what was said
in `implementations.tiled` of tiles holds for steps: with the log-sum-exp L over all of them,

    w_ij = exp(e_ij - L_i),        o'_i = sum_j w_ij (e'_ij v_j + v'_j) - L'_i o_i,

a step of the tangent is linear, and JAX transposes it: gradients of keys and values travel back the
way that these came. Keys are sent for again there: a device keeps what it holds itself, its context
and L, whatever the number of steps.

Every transfer starts from what the device holds, none from another transfer, so a transfer can run
while the tiles of the step before it are computed. `_after` asks the compiler to let it wait for
the tiles of the step before that one. A compiler that drops the barrier, as that for CPU does, and
the backward pass, whose steps nothing orders, may hold the received keys of all steps at once.
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
from jax.custom_derivatives import SymbolicZero

from attention_jax.base.finite import poison
from attention_jax.base.trees import Rest, merge_floats, split_floats, varying_like
from attention_jax.implementations import online
from attention_jax.implementations.head import SAVED
from attention_jax.implementations.lifting import lift
from attention_jax.implementations.passes import over_visits
from attention_jax.implementations.tile_passes import (
    Forward,
    Given,
    Operands,
    Tangent,
    Tiles,
    one_pass,
)
from attention_jax.implementations.tiled import padded
from attention_jax.implementations.tiles import Visits
from attention_jax.parallel.placement import Placement
from attention_jax.parallel.plan import Plan, Step

Array = jax.Array


class Letters(NamedTuple):
    """The letters of the mapped axes of each leaf of `Operands`, and of mask and dropout."""

    operands: list[str]
    mask: list[str]
    dropout: list[str]

    @property
    def states(self) -> str:
        """The letters of the axes along which the mask differs, and what tiles are with it."""
        return "".join(letter for letter in "BKG" if any(letter in one for one in self.mask))


class Local(NamedTuple):
    """What a device holds and the result is not differentiated with respect to.

    `orders` are those of queries and keys, or None. `states` says for each step what its tiles are,
    where only run time knows: asked before, since a mask may close over anything.
    """

    mask: Any
    captured: Any
    dropout: Any
    query_poison: Array
    orders: tuple[Any, Any]
    states: list[Any] | None = None


class At(NamedTuple):
    """Where the tiles of a step lie and what they are: positions of rows, and first rows.

    `rows` are the positions of queries and keys as they are, `padded` up to the last tile.
    """

    rows: tuple[Array, Array]
    padded: tuple[Array, Array]
    starts: Any
    states: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Rounds:
    """How a device attends to all keys; holds only what is known while tracing.

    Attributes:
      plan: the steps and their tiles.
      placement: who holds which positions; its orders are None where only run time knows.
      letters: of the leaves.
      heads: "KG" or "K".
      sequential: the letters that are looped over.
      travels: the dtype in which keys and in which values travel.
      tiles: how a tile is computed.
    """

    plan: Plan
    placement: Placement
    letters: Letters
    heads: str
    sequential: str
    travels: tuple[Any, Any]
    tiles: Tiles

    @property
    def order(self) -> str:
        """The letters that are mapped, outermost first."""
        return f"B{self.heads}"

    def traced(self, operands: Operands, local: Local) -> tuple[Rounds, Operands, Local]:
        """Trace logits and mask of a tile, and take out what score, bias and mask close over."""
        found: list[Any] = []
        jax.eval_shape(functools.partial(self._traced, found), operands, local)
        ((tiles, captured, of_mask),) = found
        letters = [*self.letters.operands, *[""] * len(jax.tree.leaves(captured))]
        return (
            dataclasses.replace(self, tiles=tiles, letters=self.letters._replace(operands=letters)),
            operands._replace(captured=captured),
            local._replace(captured=of_mask),
        )

    def _traced(self, found: list[Any], operands: Operands, local: Local) -> Array:
        step = self.plan.steps[0]
        at = self.at(step, local)
        operands = self.received(step, operands, at, {"key", "value", "bias"})
        trace = functools.partial(_trace, self.tiles, found)
        return self.over_heads(trace, "B" + self.heads)(operands, self.given(operands, local, at))

    def at(self, step: Step, local: Local) -> At:
        """Return where the tiles of a step lie on this device."""
        axis = self.placement.axis
        device = lax.axis_index(axis.name)
        known = dataclasses.replace(self.placement, orders=local.orders)
        queries = known.positions(0, device)
        if step.shift is None:
            keys = known.all_positions(1)
        else:
            keys = known.positions(1, (device + step.shift) % axis.devices)
        beyond = jnp.full(self.plan.covered - len(keys), self.placement.lengths[1], jnp.int32)
        more = -len(queries) % self.plan.tile[0]
        keys, beyond = varying_like((keys, beyond), queries)
        at = At(
            (queries, keys),
            (padded(queries, more), jnp.concatenate([keys, beyond])),
            _row_of(device, step.starts),
            self.states(step, local, device),
        )
        return varying_like(at, queries)

    def states(self, step: Step, local: Local, device: Array) -> Any:
        """Return what the tiles of a step are, of all heads."""
        if step.states is not None:
            return _row_of(device, step.states)
        return None if local.states is None else local.states[self.plan.steps.index(step)]

    def asked(self, local: Local) -> Local:
        """Ask the mask what the tiles are, where only run time knows."""
        if self.plan.steps[0].states is not None:
            return local
        leaves, structure = jax.tree.flatten(local.mask)
        letters = self.letters.states
        states = []
        for step in self.plan.steps:
            ask = functools.partial(_states, self.plan, structure, step.starts[0])
            axes = ["", "", *self.letters.mask]
            asked = lift(ask, axes, letters, letters) if letters else ask
            states.append(asked(*self.at(step, local).rows, *leaves))
        return local._replace(states=states)

    def given(self, operands: Operands, local: Local, at: At) -> Given:
        """Return what the tiles of a step need besides operands, of all heads."""
        key_poison = poison(operands.key)
        value_poison = poison(operands.value)
        grouped = (1,) * (key_poison.ndim - value_poison.ndim)
        return Given(
            mask=local.mask,
            captured=local.captured,
            states=at.states,
            dropout=local.dropout,
            query_poison=local.query_poison,
            key_poison=key_poison + value_poison.reshape(*value_poison.shape, *grouped),
            positions=at.padded,
        )

    def received(self, step: Step, operands: Operands, at: At, moving: set[str]) -> Operands:
        """Bring the keys of a step, their values and columns of a bias; linear in all of them.

        What is not `moving` is zero, and so it is where it arrives.
        """

        def bring(name: str, function: Callable[[Array], Array]) -> Any:
            x = getattr(operands, name)
            if x is None or name in moving:
                return None if x is None else function(x)
            shape = jax.eval_shape(function, x)
            return varying_like(jnp.zeros(shape.shape, shape.dtype), x)

        key, value = (
            bring(name, functools.partial(self.brought, step, dtype))
            for name, dtype in zip(("key", "value"), self.travels, strict=True)
        )
        bias = bring("bias", functools.partial(_columns, at.padded[1]))
        return operands._replace(key=key, value=value, bias=bias)

    def brought(self, step: Step, dtype: Any, x: Array) -> Array:
        """Bring rows [B, S, ...] that other devices hold, and repeat the last up to a tile."""
        name = self.placement.axis.name
        if step.shift is None:
            moved = lax.all_gather(x.astype(dtype), name, axis=1, tiled=True).astype(x.dtype)
        elif step.shift:
            moved = lax.ppermute(x.astype(dtype), name, step.pairs).astype(x.dtype)
        else:
            moved = x
        return padded(moved, self.plan.covered - moved.shape[1], axis=1)

    def over_heads(self, function: Callable[..., Any], result: Any) -> Callable[..., Any]:
        """Map a function of one head: operands, given and any sums, all of which have letters."""
        return _OverHeads(self, function, result)

    def forward(self, step: Step, operands: Operands, local: Local) -> tuple[Any, ...]:
        """Return what the tiles of a step are computed from."""
        at = self.at(step, local)
        operands = self.received(step, operands, at, {"key", "value", "bias"})
        given = self.given(operands, local, at)
        return operands, given, at._replace(states=None)

    def visits(self, given: Given, at: At) -> tuple[list[Visits], Array]:
        """Return the visits of one head, and what their tiles are."""
        starts = at.starts
        return [Visits(True, self.plan.tile[0], 1, starts[:, 0], starts[:, 1:])], given.states


class _OverHeads(NamedTuple):
    """See `Rounds.over_heads`."""

    rounds: Rounds
    function: Callable[..., Any]
    result: Any

    def __call__(self, operands: Operands, given: Given, *sums: Any) -> Any:
        rounds, heads = self.rounds, self.rounds.heads
        rows = f"BT{heads}"
        axes = [
            *rounds.letters.operands,
            *rounds.letters.mask,
            *[""] * len(jax.tree.leaves(given.captured)),
            *[self.letters_of_states(given)] * len(jax.tree.leaves(given.states)),
            *rounds.letters.dropout,
            rows,
            "BS" + heads[: given.key_poison.ndim - 2],
            "",
            "",
        ]
        for more in sums:
            leaves = jax.tree.leaves(more)
            is_change = isinstance(more, list)  # of the floating-point operands
            axes += (
                self.of_floats(operands)
                if is_change
                else [rows if isinstance(more, online.RunningSums | Array) else "" for _ in leaves]
            )
        everything = operands, given, *sums
        leaves, structure = jax.tree.flatten(everything)
        one = functools.partial(_of_leaves, self.function, structure)
        return lift(one, axes, self.result, rounds.order, rounds.sequential)(*leaves)

    def letters_of_states(self, given: Given) -> str:
        """Return the letters of what tiles are; none where all heads have the same."""
        return self.rounds.letters.states if jnp.ndim(given.states) > 1 else ""

    def of_floats(self, operands: Operands) -> list[str]:
        """Return the letters of the floating-point operands."""
        leaves = jax.tree.leaves(operands)
        return [
            letters
            for letters, leaf in zip(self.rounds.letters.operands, leaves, strict=True)
            if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        ]


def _of_leaves(function: Callable[..., Any], structure: Any, *leaves: Any) -> Any:
    return function(*jax.tree.unflatten(structure, leaves))


def attend(rounds: Rounds, operands: Operands, local: Local) -> tuple[Array, Array]:
    """Return context [B, T, K, G, V] and log-sum-exp [B, T, K, G] of the queries of this device."""
    if not rounds.plan.steps:
        sums = _start(operands, local)
        return online.finished(one_pass(operands.functions.normalizer), sums)
    operands, local = varying_like((operands, rounds.asked(local)), operands, local)
    rounds, operands, local = rounds.traced(operands, local)
    context, logsumexp = _attend(rounds, *split_floats(operands), local)
    return context, online.with_empty(logsumexp)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(rounds: Rounds, floats: list[Array], rest: Rest, local: Local) -> tuple[Array, Array]:
    """Return context and log-sum-exp, as `online.finished_finite` has it."""
    operands = merge_floats(floats, rest)
    sums = _start(operands, local)
    steps = rounds.plan.steps
    rows = f"BT{rounds.heads}"
    letters: Any = [rows] * 3
    letters = online.RunningSums(*letters)
    coming = rounds.forward(steps[0], operands, local)
    for number in range(len(steps)):
        here = coming
        if number + 1 < len(steps):
            operands, sums = _after(operands, sums)
            coming = rounds.forward(steps[number + 1], operands, local)
        add = functools.partial(_add, rounds)
        sums = rounds.over_heads(add, letters)(*here, sums)
    return online.finished_finite(one_pass(operands.functions.normalizer), sums)


def _after(operands: Operands, sums: Any) -> tuple[Operands, Any]:
    """Let the next transfer wait for sums."""
    key, value, sums = lax.optimization_barrier((operands.key, operands.value, sums))
    return operands._replace(key=key, value=value), sums


def _start(operands: Operands, local: Local) -> online.RunningSums:
    zeros = jnp.zeros_like(local.query_poison)
    depth = operands.value.shape[-1]
    context = jnp.broadcast_to(zeros[..., None], (*zeros.shape, depth))
    lowest = jnp.full_like(zeros, jnp.finfo(zeros.dtype).min)  # as `RunningSums.start`
    return varying_like(online.RunningSums(lowest, zeros, context), operands, local)


def _states(
    plan: Plan, structure: Any, starts: Any, queries: Array, keys: Array, *mask: Any
) -> Array:
    return jnp.asarray(plan.states(jax.tree.unflatten(structure, mask), queries, keys, starts))


def _trace(tiles: Tiles, found: list[Any], operands: Operands, given: Given) -> Array:
    tiles, operands, given = tiles.traced(operands, given)
    found.append((tiles, operands.captured, given.captured))
    return jnp.zeros(())


def _add(rounds: Rounds, operands: Operands, given: Given, at: At, sums: Any) -> online.RunningSums:
    """Add the tiles of a step to the running sums of one head."""
    return over_visits(Forward(rounds.tiles, (operands,), given), *rounds.visits(given, at), sums)


@functools.partial(_attend.defjvp, symbolic_zeros=True)
def _attend_jvp(rounds: Rounds, primals: Any, tangents: Any) -> Any:
    floats, rest, local = primals
    context, logsumexp = map(checkpoint_name, _attend(rounds, floats, rest, local), SAVED)
    moves = [not isinstance(x, SymbolicZero) for x in tangents[0]]
    _check_captured(merge_floats(moves, rest).captured, merge_floats(floats, rest))
    change = [
        x if m else jnp.zeros(x.shape, x.dtype) for x, m in zip(tangents[0], moves, strict=True)
    ]
    base = online.finite_or_zero(logsumexp)
    log_tangent, context_tangent = jnp.zeros_like(logsumexp), jnp.zeros_like(context)
    for step in rounds.plan.steps:
        changed = jax.checkpoint(functools.partial(_change, rounds, step, moves))
        log_more, context_more = changed(floats, change, rest, local, base)
        log_tangent, context_tangent = log_tangent + log_more, context_tangent + context_more
    normalizer = merge_floats(floats, rest).functions.normalizer
    changed = online.changes(one_pass(normalizer), log_tangent, context_tangent, context)
    return (context, logsumexp), changed


def _check_captured(moves: Any, operands: Operands) -> None:
    """Refuse gradients that devices would have to sum up in branches that only some of them take.

    They do within a `shard_map` that checks what varies. What is bound to a function is made to
    vary before it is used, which what a function closes over cannot be.
    """
    query = jax.typeof(operands.query).manual_axis_type.varying
    for moved, value in zip(*map(jax.tree.leaves, (moves, operands.captured)), strict=True):
        if moved is True and query - jax.typeof(value).manual_axis_type.varying:
            raise ValueError(
                "parallel.attend: within shard_map, a score or bias may not close over values "
                "under differentiation; give them with attention_jax.bind, or call it outside."
            )


def _change(
    rounds: Rounds,
    step: Step,
    moves: list[bool],
    floats: list[Array],
    change: list[Array],
    rest: Rest,
    local: Local,
    base: Array,
) -> tuple[Array, Array]:
    """Return the sums of the tangent over the tiles of a step, all heads."""
    at = rounds.at(step, local)
    operands = merge_floats(floats, rest)
    moving = {name for name in ("key", "value", "bias") if getattr(merge_floats(moves, rest), name)}
    here = rounds.received(step, operands, at, {"key", "value", "bias"})
    there = rounds.received(step, merge_floats(change, rest), at, moving)
    of_head = functools.partial(_change_of_head, rounds, moves)
    rows = f"BT{rounds.heads}"
    return rounds.over_heads(of_head, (rows, rows))(
        here, rounds.given(here, local, at), at._replace(states=None), split_floats(there)[0], base
    )


def _change_of_head(
    rounds: Rounds,
    moves: list[bool],
    operands: Operands,
    given: Given,
    at: At,
    change: list[Array],
    base: Array,
) -> tuple[Array, Array]:
    both = operands, merge_floats(change, split_floats(operands)[1])
    tangent = Tangent(rounds.tiles, both, given, base, moves)
    return over_visits(tangent, *rounds.visits(given, at), tangent.zeros(base))


def _columns(positions: Array, bias: Array) -> Array:
    """Return the columns of a bias [..., T, S] at the positions of keys."""
    bias = varying_like(bias, positions)
    if bias.shape[-1] == 1:
        return bias
    return jnp.take(bias, positions, axis=-1, mode="clip")


def _row_of(device: Any, table: np.ndarray) -> Any:
    """Return the entry of a table for this device; of one entry, the one for all."""
    if len(table) == 1:
        return jnp.asarray(table[0])
    return lax.dynamic_index_in_dim(jnp.asarray(table), device, keepdims=False)
