"""Tiled attention whose normalizer goes along the keys in order.

For each row of tiles a loop over its tiles carries the state and the context, and JAX
differentiates it. A step is computed again for that from its operands and the state before it, so
the state at the edges of tiles is all that is kept: T S / bk numbers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention_jax.base.trees import varying_like
from attention_jax.base.typing import at_least_float32
from attention_jax.implementations.passes import joint
from attention_jax.implementations.tile_passes import Given, Operands, Tiles, streamed
from attention_jax.masks import EMPTY
from attention_jax.normalizers import Ordered

Array = jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Walk:
    """The walk of one head along its keys."""

    tiles: Tiles
    operands: Operands
    given: Given

    def __call__(self) -> Array:
        """Return the context [T, V]."""
        (visits,) = self.tiles.visits
        length = self.operands.query.shape[0]
        starts = np.arange(0, length, visits.rows, dtype=np.int32)
        numbers = [np.flatnonzero(visits.queries == start) for start in starts]
        most = max(map(len, numbers))
        # Of what is beyond the visits of a row, -1.
        table = np.stack([np.pad(x, (0, most - len(x)), constant_values=-1) for x in numbers])
        if self.how.last_first:
            table = table[:, ::-1]
        states = joint(self.given.states.astype(jnp.int32))
        of_row = functools.partial(self.of_row, states)
        where = jnp.asarray(starts), jnp.asarray(table, jnp.int32)
        _, context = lax.scan(of_row, None, where)
        return context.reshape(length, -1)

    @property
    def how(self) -> Ordered:
        """The kind of normalizer."""
        how = streamed(self.operands.functions.normalizer)
        assert isinstance(how, Ordered)
        return how

    def of_row(self, states: Array, _: None, where: tuple[Array, Array]) -> tuple[None, Array]:
        """Walk along a row of tiles."""
        i, numbers = where
        zeros = jnp.zeros(self.tiles.visits[0].rows, at_least_float32(self.operands.value.dtype))
        depth = self.operands.value.shape[1]
        context = jnp.broadcast_to(zeros[:, None], (len(zeros), depth))
        carry = varying_like((self.how.start(zeros), context), self.operands, self.given)
        step = functools.partial(self.step, states, i)
        step = jax.checkpoint(step, prevent_cse=False)
        (_, context), _ = lax.scan(step, carry, numbers)
        return None, context

    def step(self, states: Array, i: Array, carry: Any, number: Array) -> tuple[Any, None]:
        """Visit a tile; one that is EMPTY changes nothing."""
        state, context = carry
        kinds = [functools.partial(self.of_tile, masked) for masked in (None, True, False)]
        kinds = [jax.checkpoint(kind, prevent_cse=False) for kind in kinds]
        kind = jnp.where(number < 0, EMPTY, states[number])
        state, more = lax.switch(kind, kinds, i, number, state)
        return (state, context + more), None

    def of_tile(
        self, masked: bool | None, i: Array, number: Array, state: Any
    ) -> tuple[Any, Array]:
        """Return the state after a tile, and what it adds to the context."""
        (visits,) = self.tiles.visits
        j = jnp.asarray(visits.keys[:, 0])[number]
        here = self.tiles.slice(self.operands, i, j, visits.rows)
        if masked is None:
            dtype = at_least_float32(here.value.dtype)
            none = jnp.zeros((visits.rows, here.value.shape[1]), dtype)
            return state, varying_like(none, here, self.given, state)
        tile = self.tiles.compute(here, self.given, i, j, masked)
        allowed = jnp.ones(tile.logits.shape, bool) if tile.allowed is None else tile.allowed
        poison = tile.query_poison[:, None] + tile.key_poison[None, :]
        weights, state = self.how.step(tile.logits + poison, allowed, state)
        return state, tile.weighted(weights, tile.products)


def attend(tiles: Tiles, operands: Operands, given: Given) -> Array:
    """Return the context [T, V]."""
    return Walk(tiles, operands, given)()
