"""What a device has at each step of attention: positions, tiles, masks, and keys that arrived.

A step brings a chunk of the keys and values of another device, or those of all devices at once.
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

from attention_jax.base.finite import poison
from attention_jax.base.placement import Where
from attention_jax.base.trees import varying_like
from attention_jax.implementations import online
from attention_jax.implementations.lifting import Elsewhere, lift
from attention_jax.implementations.tile_passes import Given, Operands, Tiles
from attention_jax.implementations.tiled import padded
from attention_jax.implementations.tiles import Visits
from attention_jax.parallel.placement import Placement
from attention_jax.parallel.plan import Chain, Plan

Array = jax.Array

Turn = tuple[Any, Any]
"""The number of a chunk of the keys, and of a step."""


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

    `orders` are those of queries and keys, or None. `states` says for the steps of each chain what
    their tiles are, where only run time knows: asked before, since a mask may close over anything.
    """

    mask: Any
    captured: Any
    dropout: Any
    query_poison: Array
    orders: tuple[Any, Any]
    states: list[Any] | None = None


class At(NamedTuple):
    """Where the tiles of a turn lie and what they are: positions of rows, and first rows.

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
      plan: the chains and their tiles.
      placement: who holds which positions; its orders are None where only run time knows.
      letters: of the leaves.
      heads: "KG" or "K".
      platform: the one that the program is for; None for any.
      elsewhere: how heads are mapped where that is no CPU.
      travels: the dtype in which keys and in which values travel.
      tiles: how a tile is computed.
    """

    plan: Plan
    placement: Placement
    letters: Letters
    heads: str
    platform: str | None
    elsewhere: Elsewhere
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
        chain = self.plan.chains[0]
        keys = self.arrived(chain, self.chunk(self.travelling(operands), 0))
        operands, given, _ = self.here(chain, (0, 0), operands, local, keys)
        trace = functools.partial(_trace, self.tiles, found)
        return self.over_heads(trace, "B" + self.heads)(operands, given)

    def at(self, chain: Chain, turn: Turn, local: Local) -> At:
        """Return where the tiles of a turn lie on this device."""
        axis = self.placement.axis
        device = lax.axis_index(axis.name)
        known = dataclasses.replace(self.placement, orders=local.orders)
        queries = known.positions(0, device)
        if chain.first is None:
            keys = known.all_positions(1)
        else:
            chunk, step = turn
            shift = chain.first + chain.stride % axis.devices * step
            keys = self.chunk(known.positions(1, (device + shift) % axis.devices), chunk, axis=0)
        beyond = jnp.full(self.plan.covered - len(keys), self.placement.lengths[1], jnp.int32)
        more = -len(queries) % self.plan.tile[0]
        keys, beyond = varying_like((keys, beyond), queries)
        at = At(
            (queries, keys),
            (padded(queries, more), jnp.concatenate([keys, beyond])),
            _entry(chain.starts, *turn, device),
            self.states(chain, turn, local),
        )
        return varying_like(at, queries)

    def states(self, chain: Chain, turn: Turn, local: Local) -> Any:
        """Return what the tiles of a turn are, of all heads."""
        if chain.states is not None:
            return _entry(chain.states, *turn, lax.axis_index(self.placement.axis.name))
        if local.states is None:
            return None
        return _entry(local.states[self.plan.chains.index(chain)], *turn)

    def asked(self, local: Local) -> Local:
        """Ask the mask what the tiles are, where only run time knows."""
        if self.plan.chains[0].states is not None:
            return local
        return local._replace(states=[self.asked_of(chain, local) for chain in self.plan.chains])

    def asked_of(self, chain: Chain, local: Local) -> Array:
        """Ask the mask what the tiles of a chain are, [C, steps, ...]."""
        chunks, steps = chain.starts.shape[:2]
        number = np.arange(chunks * steps, dtype=np.int32)
        turns = number // np.int32(steps), number % np.int32(steps)
        asked = lax.map(functools.partial(self.asked_at, chain, local), turns)
        return asked.reshape(chunks, steps, *asked.shape[1:])

    def asked_at(self, chain: Chain, local: Local, turn: Turn) -> Array:
        """Ask the mask what the tiles of a turn are."""
        leaves, structure = jax.tree.flatten(local.mask)
        letters = self.letters.states
        ask = functools.partial(_states, self.plan, structure)
        asked = lift(ask, ["", "", "", *self.letters.mask], letters, letters) if letters else ask
        at = self.at(chain, turn, local)
        return asked(at.starts, *at.rows, *leaves)

    def given(self, operands: Operands, local: Local, at: At) -> Given:
        """Return what the tiles of a turn need besides operands, of all heads."""
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

    def here(
        self, chain: Chain, turn: Turn, operands: Operands, local: Local, arrived: tuple[Any, Any]
    ) -> tuple[Operands, Given, At]:
        """Return what the tiles of a turn are computed from, with the keys that arrived."""
        at = self.at(chain, turn, local)
        operands = self.with_keys(operands, at, arrived)
        return operands, self.given(operands, local, at), at._replace(states=None)

    def with_keys(self, operands: Operands, at: At, arrived: tuple[Any, ...]) -> Operands:
        """Put keys, values and columns of a bias in place; linear in them, and None is zero."""
        key, value = (
            self.placed(x, own)
            for x, own in zip(arrived, (operands.key, operands.value), strict=True)
        )
        bias = None if operands.bias is None else _columns(at.padded[1], operands.bias)
        return operands._replace(key=key, value=value, bias=bias)

    def placed(self, x: Array | None, own: Array) -> Array:
        """Repeat the last of the rows [B, S, ...] that arrived up to a tile."""
        if x is None:
            shape = own.shape[0], self.plan.covered, *own.shape[2:]
            return varying_like(jnp.zeros(shape, own.dtype), own)
        return padded(x.astype(own.dtype), self.plan.covered - x.shape[1], axis=1)

    def travelling(self, operands: Operands) -> tuple[Array, Array]:
        """Return the keys and values of this device in the dtypes in which they travel."""
        return operands.key.astype(self.travels[0]), operands.value.astype(self.travels[1])

    def chunk(self, arrays: Any, number: Any, axis: int = 1) -> Any:
        """Take a chunk of arrays [B, S, ...], one entry for each key that a device holds."""
        if self.plan.chunks == 1:
            return arrays
        return jax.tree.map(functools.partial(self.chunk_of, number, axis), arrays)

    def chunk_of(self, number: Any, axis: int, x: Array) -> Array:
        """Take a chunk of an array; see `Plan`."""
        parted = x.reshape(self.parted(x.shape, axis))
        found = lax.dynamic_index_in_dim(
            parted, number, axis + 1, keepdims=False, allow_negative_indices=False
        )
        return found.reshape(*x.shape[:axis], self.plan.received, *x.shape[axis + 1 :])

    def parted(self, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
        """Return the shape of an array whose keys are parted into chunks."""
        chunks, size = self.plan.chunks, self.plan.tile[1]
        return *shape[:axis], shape[axis] // (chunks * size), chunks, size, *shape[axis + 1 :]

    def with_chunk(self, arrays: Any, number: Any, more: Any) -> Any:
        """Add to a chunk of arrays [B, S, ...]."""
        if self.plan.chunks == 1:
            return jax.tree.map(jnp.add, arrays, more)
        return jax.tree.map(functools.partial(self.with_chunk_of, number), arrays, more)

    def with_chunk_of(self, number: Any, x: Array, more: Array) -> Array:
        """Add to a chunk of an array."""
        parted = x.reshape(self.parted(x.shape, 1))
        added = self.chunk_of(number, 1, x) + more
        added = added.reshape(*parted.shape[:2], 1, *parted.shape[3:])
        return lax.dynamic_update_slice_in_dim(
            parted, added, number, 2, allow_negative_indices=False
        ).reshape(x.shape)

    def arrived(self, chain: Chain, arrays: Any) -> Any:
        """Bring arrays [B, S, ...], one for each key, to the first step of a chain."""
        if chain.first is None:
            gather = functools.partial(lax.all_gather, axis_name=self.placement.axis.name, axis=1)
            return jax.tree.map(functools.partial(gather, tiled=True), arrays)
        return self.moved(arrays, chain.pairs) if chain.first else arrays

    def moved(self, arrays: Any, pairs: Any) -> Any:
        """Move arrays between devices; zeros arrive where no pair leads."""
        move = functools.partial(lax.ppermute, axis_name=self.placement.axis.name, perm=pairs)
        return jax.tree.map(move, arrays)

    def on_with(self, chain: Chain, arrays: Any) -> Any:
        """Move what was summed up for the keys of a step, to where these are at the next."""
        return self.moved(arrays, _shifted(self.placement.axis.devices, chain.stride))

    def home(self, chain: Chain, arrays: Any) -> Any:
        """Move what was summed up for the keys of the last step, to the devices that hold these."""
        if chain.first is None:
            axis = self.placement.axis.name
            gather = functools.partial(lax.psum_scatter, axis_name=axis, scatter_dimension=1)
            return jax.tree.map(functools.partial(gather, tiled=True), arrays)
        if not chain.first:
            return arrays
        pairs = tuple((to, source) for source, to in chain.pairs)
        if chain.steps > 1:
            shift = chain.first + (chain.steps - 1) * chain.stride
            pairs = tuple((to, at) for at, to in _shifted(self.placement.axis.devices, shift))
        return self.moved(arrays, pairs)

    def over_heads(
        self, function: Callable[..., Any], result: Any, replaced: bool = False
    ) -> Callable[..., Any]:
        """Map a function of one head: operands, given, places and any sums, which have letters.

        The results may be the sums with more added to them, and take their place.
        """
        return _OverHeads(self, function, result, replaced)

    def visits(self, given: Given, at: At) -> tuple[list[Visits], Array]:
        """Return the visits of one head, and what their tiles are."""
        starts = at.starts
        return [Visits(True, self.plan.tile[0], 1, starts[:, 0], starts[:, 1:])], given.states


class _OverHeads(NamedTuple):
    """See `Rounds.over_heads`."""

    rounds: Rounds
    function: Callable[..., Any]
    result: Any
    replaced: bool

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
        replaced = len(jax.tree.leaves(sums[-1])) if self.replaced else 0
        return lift(
            one,
            axes,
            self.result,
            rounds.order,
            sequential=rounds.order,
            where=Where(platform=rounds.platform),
            elsewhere=rounds.elsewhere,
            replaced=replaced,
        )(*leaves)

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


def _states(
    plan: Plan, structure: Any, starts: Any, queries: Array, keys: Array, *mask: Any
) -> Array:
    return jnp.asarray(plan.states(jax.tree.unflatten(structure, mask), queries, keys, starts))


def _trace(tiles: Tiles, found: list[Any], operands: Operands, given: Given) -> Array:
    tiles, operands, given = tiles.traced(operands, given)
    found.append((tiles, operands.captured, given.captured))
    return jnp.zeros(())


def _shifted(devices: int, shift: int) -> tuple[tuple[int, int], ...]:
    """Return the moves to every device d from device d + shift."""
    return tuple(((d + shift) % devices, d) for d in range(devices))


def _columns(positions: Array, bias: Array) -> Array:
    """Return the columns of a bias [..., T, S] at the positions of keys."""
    bias = varying_like(bias, positions)
    if bias.shape[-1] == 1:
        return bias
    return jnp.take(bias, positions, axis=-1, mode="clip")


def _entry(table: Any, *where: Any) -> Any:
    """Return an entry of a table; along an axis of one entry, the one for all."""
    for which in where:
        if len(table) == 1 or isinstance(which, int):
            table = table[0 if len(table) == 1 else which]
        else:
            table = lax.dynamic_index_in_dim(
                jnp.asarray(table), which, keepdims=False, allow_negative_indices=False
            )
    return table
