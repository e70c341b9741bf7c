"""Attention of local queries over keys that arrive step by step, with every derivative.

The running sums of an online softmax go on from step to step, as if all keys had been there. So
what is said in `implementations.tiled` of tiles holds for steps: with the log-sum-exp L over all,

    w_ij = exp(e_ij - L_i),        o'_i = sum_j w_ij (e'_ij v_j + v'_j) - L'_i o_i,

a step of the tangent is linear in the changes, those of keys and values travel with these, and
nothing but context and L is kept for it.

Keys travel in chunks, one after the other through all steps of a chain: a loop over chunks, and
within it one over steps. So a device holds two chunks at a time, whatever the number of devices:
the one it attends to, and the one that comes meanwhile. JAX would transpose the loop of the tangent
by keeping the keys of all steps. Its transposition is therefore a loop of its own: keys travel
again as they did forward, and the gradients of keys and values travel with them, each device adding
its part, until the last sends them home.
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

from attention_jax.base.transposition import linear_call
from attention_jax.base.trees import Rest, merge_floats, split_floats, varying_like
from attention_jax.implementations import online
from attention_jax.implementations.head import SAVED
from attention_jax.implementations.passes import over_visits
from attention_jax.implementations.tile_passes import (
    Forward,
    Given,
    Operands,
    Tangent,
    by_query_head,
    one_pass,
)
from attention_jax.parallel.plan import Chain
from attention_jax.parallel.rounds import At, Local, Rounds, Turn

Array = jax.Array


def attend(rounds: Rounds, operands: Operands, local: Local) -> tuple[Array, Array]:
    """Return context [B, T, K, G, V] and log-sum-exp [B, T, K, G] of the queries of this device."""
    if not rounds.plan.chains:
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
    chains = rounds.plan.chains
    keys = rounds.travelling(operands)
    coming = _first(rounds, chains[0], keys)
    for number, chain in enumerate(chains):
        here = coming
        if number + 1 < len(chains):
            # The first keys of the next chain come meanwhile; they may wait for the chain before.
            keys, sums = lax.optimization_barrier((keys, sums))
            coming = _first(rounds, chains[number + 1], keys)
        visit = functools.partial(_added, rounds, chain, operands, local)
        sums, _ = _along(_Way(rounds, chain, visit), keys, here, (sums, ()))
    return online.finished_finite(one_pass(operands.functions.normalizer), sums)


def _start(operands: Operands, local: Local) -> online.RunningSums:
    zeros = jnp.zeros_like(local.query_poison)
    depth = operands.value.shape[-1]
    context = jnp.broadcast_to(zeros[..., None], (*zeros.shape, depth))
    lowest = jnp.full_like(zeros, jnp.finfo(zeros.dtype).min)  # as `RunningSums.start`
    return varying_like(online.RunningSums(lowest, zeros, context), operands, local)


class _Way(NamedTuple):
    """A chain, and what is done at a turn: visit(turn, travelling, sums) -> (sums, more).

    `more` is added up for the keys of the turn, and travels with them.
    """

    rounds: Rounds
    chain: Chain
    visit: Callable[..., tuple[Any, Any]]


def _first(rounds: Rounds, chain: Chain, keys: Any) -> Any:
    """Bring the first chunk to the first step of a chain."""
    return rounds.arrived(chain, rounds.chunk(keys, 0))


def _along(way: _Way, keys: Any, coming: Any, sums: Any) -> Any:
    """Visit the chunks of a chain, of which the first is `coming`.

    `sums` are those of the queries, and what is summed up for the keys of this device.
    """
    rounds, chain, _ = way
    last = rounds.plan.chunks - 1
    if not last:
        return _of_chunk(way, 0, coming, sums)
    chunk = functools.partial(_chunk, way, keys)
    coming = coming if chain.first else ()  # keys that are there need not come
    if chain.steps > 1 or not chain.first:
        # One program for all chunks; for nothing the first of them comes a second time.
        numbers: Any = np.arange(last + 1, dtype=np.int32)
        return lax.scan(chunk, (coming, sums), numbers)[0][1]
    numbers = np.arange(last, dtype=np.int32)
    coming, sums = lax.scan(chunk, (coming, sums), numbers)[0]
    return _of_chunk(way, last, coming, sums)


def _chunk(way: _Way, keys: Any, carry: Any, number: Array) -> tuple[Any, None]:
    """Visit all steps with a chunk, while the next one comes."""
    rounds, chain, _ = way
    here, sums = carry
    if chain.first:
        following = lax.rem(number + 1, jnp.int32(rounds.plan.chunks))
        coming = rounds.arrived(chain, rounds.chunk(keys, following))
    else:
        here, coming = rounds.chunk(keys, number), ()
    return (coming, _of_chunk(way, number, here, sums)), None


def _of_chunk(way: _Way, number: Any, travelling: Any, sums: Any) -> Any:
    """Visit all steps with a chunk."""
    rounds, chain, visit = way
    sums, home = sums
    back = varying_like(_zeros_like(travelling, home), home)
    if chain.steps > 1:
        steps: Any = np.arange(chain.steps - 1, dtype=np.int32)
        start = travelling, back, sums
        turn = functools.partial(_turn, way, number)
        travelling, back, sums = lax.scan(turn, start, steps)[0]
        back = rounds.on_with(chain, back)
    sums, more = visit((number, chain.steps - 1), travelling, sums)
    back = rounds.home(chain, _plus(back, more))
    return sums, rounds.with_chunk(home, number, back)


def _turn(way: _Way, number: Any, carry: Any, step: Array) -> tuple[Any, None]:
    """Visit a step, while the keys of the next one come, and what was added up for these."""
    rounds, chain, visit = way
    travelling, back, sums = carry
    coming = rounds.moved(travelling, chain.onward)
    back = rounds.on_with(chain, back)
    sums, more = visit((number, step), travelling, sums)
    return (coming, _plus(back, more), sums), None


def _zeros_like(travelling: Any, home: Any) -> Any:
    """Return zeros for each key that a device has at a step, in the dtypes of `home`."""
    pairs = zip(travelling, home, strict=False)
    return tuple(None if of is None else jnp.zeros_like(x, of.dtype) for x, of in pairs)


def _plus(first: Any, second: Any) -> Any:
    return jax.tree.map(jnp.add, first, second)


def _added(
    rounds: Rounds,
    chain: Chain,
    operands: Operands,
    local: Local,
    turn: Turn,
    keys: tuple[Array, Array],
    sums: online.RunningSums,
) -> tuple[online.RunningSums, tuple[()]]:
    """Add the tiles of a turn to the running sums."""
    letters: Any = [f"BT{rounds.heads}"] * 3
    add = functools.partial(_add, rounds)
    add = rounds.over_heads(add, online.RunningSums(*letters), replaced=True)
    return add(*rounds.here(chain, turn, operands, local, keys), sums), ()


def _add(rounds: Rounds, operands: Operands, given: Given, at: At, sums: Any) -> online.RunningSums:
    """Add the tiles of a turn to the running sums of one head."""
    return over_visits(Forward(rounds.tiles, (operands,), given), *rounds.visits(given, at), sums)


class _Fixed(NamedTuple):
    """What the tangent of attention is not linear in."""

    floats: list[Array]
    rest: Rest
    local: Local
    base: Array

    @property
    def operands(self) -> Operands:
        """The operands."""
        return merge_floats(self.floats, self.rest)


@functools.partial(_attend.defjvp, symbolic_zeros=True)
def _attend_jvp(rounds: Rounds, primals: Any, tangents: Any) -> Any:
    floats, rest, local = primals
    context, logsumexp = map(checkpoint_name, _attend(rounds, floats, rest, local), SAVED)
    moves = [not isinstance(x, SymbolicZero) for x in tangents[0]]
    _check_captured(merge_floats(moves, rest).captured, merge_floats(floats, rest))
    fixed = _Fixed(floats, rest, local, online.finite_or_zero(logsumexp))
    tangent = _OfChanges(rounds, moves, rest)
    change = _Changes.of(tangent, [x for x, m in zip(tangents[0], moves, strict=True) if m])
    log_tangent, context_tangent = linear_call(
        tangent.of_results, tangent.of_operands, fixed, change
    )
    how = one_pass(fixed.operands.functions.normalizer)
    changes = online.changes(how, log_tangent, context_tangent, context)
    return (context, logsumexp), changes


class _Changes(NamedTuple):
    """Changes of what moves: keys and values, which travel, None where they do not move; others."""

    keys: tuple[Array | None, ...]
    others: list[Array]

    @classmethod
    def of(cls, tangent: _OfChanges, moving: list[Array]) -> _Changes:
        """Part the changes of those floats that move."""
        those = iter(moving)
        every = [next(those) if m else None for m in tangent.moves]
        keys = tuple(every[n] for n in tangent.places)
        others = [x for n, x in enumerate(every) if x is not None and n not in tangent.places]
        return cls(keys, others)


@dataclasses.dataclass(frozen=True, eq=False)
class _OfChanges:
    """The tangent of attention, linear in the changes, and its transposition.

    Attributes:
      rounds: how a device attends.
      moves: which of the floats change.
      rest: says which floats there are.
    """

    rounds: Rounds
    moves: list[bool]
    rest: Rest

    @functools.cached_property
    def places(self) -> tuple[int, int]:
        """The numbers of key and value among the floats."""
        numbers = merge_floats(list(range(len(self.moves))), self.rest)
        return numbers.key, numbers.value

    def of_results(self, fixed: _Fixed, change: _Changes) -> tuple[Array, Array]:
        """Return the sums of the tangent over all tiles, [B, T, K, G] and [B, T, K, G, V]."""
        rounds, operands = self.rounds, fixed.operands
        zeros = jnp.zeros_like(fixed.base)
        shape = *zeros.shape, operands.value.shape[-1]
        sums = varying_like((zeros, jnp.broadcast_to(zeros[..., None], shape)), fixed)
        travelling = rounds.travelling(operands), change.keys
        for chain in rounds.plan.chains:
            visit = functools.partial(self.changed, chain, fixed, change.others)
            coming = _first(rounds, chain, travelling)
            sums, _ = _along(_Way(rounds, chain, visit), travelling, coming, (sums, ()))
        return sums

    def changed(
        self,
        chain: Chain,
        fixed: _Fixed,
        others: list[Array],
        turn: Turn,
        travelling: Any,
        sums: tuple[Array, Array],
    ) -> tuple[tuple[Array, Array], tuple[()]]:
        """Add the tiles of a turn to the sums of the tangent."""
        keys, keys_change = travelling
        of_turn = jax.checkpoint(functools.partial(self.of_turn, chain, turn))
        return _plus(sums, of_turn(fixed, keys, _Changes(keys_change, others))), ()

    def of_operands(self, fixed: _Fixed, results: tuple[Array, Array]) -> _Changes:
        """Return the gradients of what moves."""
        rounds, operands = self.rounds, fixed.operands
        zeros = [jnp.zeros_like(x) for x, m in zip(fixed.floats, self.moves, strict=True) if m]
        own, others = varying_like(_Changes.of(self, zeros), fixed)
        keys = rounds.travelling(operands)
        for chain in rounds.plan.chains:
            visit = functools.partial(self.pulled, chain, fixed, results)
            coming = _first(rounds, chain, keys)
            others, own = _along(_Way(rounds, chain, visit), keys, coming, (others, own))
        return _Changes(own, others)

    def pulled(
        self,
        chain: Chain,
        fixed: _Fixed,
        results: tuple[Array, Array],
        turn: Turn,
        keys: tuple[Array, Array],
        others: list[Array],
    ) -> tuple[list[Array], Any]:
        """Add up the gradients of a turn; those of its keys and values are returned."""
        like = tuple(
            x.astype(self.dtypes(fixed)[n]) if self.moves[self.places[n]] else None
            for n, x in enumerate(keys)
        )
        zeros = jax.tree.map(jnp.zeros_like, _Changes(like, others))
        of_turn = functools.partial(self.of_turn, chain, turn, fixed, keys)
        _, pull = jax.vjp(of_turn, varying_like(zeros, fixed))
        (found,) = pull(results)
        return _plus(others, found.others), found.keys

    def dtypes(self, fixed: _Fixed) -> tuple[Any, Any]:
        """The dtypes in which changes of keys and of values are computed."""
        return fixed.operands.key.dtype, fixed.operands.value.dtype

    def of_turn(
        self, chain: Chain, turn: Turn, fixed: _Fixed, keys: tuple[Array, Array], change: _Changes
    ) -> tuple[Array, Array]:
        """Return the sums of the tangent over the tiles of a turn, all heads."""
        rounds, operands = self.rounds, fixed.operands
        here, given, at = rounds.here(chain, turn, operands, fixed.local, keys)
        others = iter(change.others)
        every = [
            next(others) if m and n not in self.places else jnp.zeros(x.shape, x.dtype)
            for n, (x, m) in enumerate(zip(fixed.floats, self.moves, strict=True))
        ]
        there = rounds.with_keys(merge_floats(every, fixed.rest), at, change.keys)
        of_head = functools.partial(_change_of_head, rounds, self.moves)
        rows = f"BT{rounds.heads}"
        return rounds.over_heads(of_head, (rows, rows))(
            here, given, at, split_floats(there)[0], fixed.base
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
    there = merge_floats(change, split_floats(operands)[1])
    both = operands, by_query_head(there, base) if rounds.tiles.apart else there
    tangent = Tangent(rounds.tiles, both, given, base, moves)
    return over_visits(tangent, *rounds.visits(given, at), tangent.zeros(base))


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
