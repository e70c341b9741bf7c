"""Tiled attention whose normalizer goes along the keys in order.

For each row of tiles a loop over its tiles carries the state and the context, and JAX
differentiates it. A step is computed again for that from its operands and the state before it, so
the state at the edges of tiles is all that is kept: T S / bk numbers of each head.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from attention_jax.base.trees import varying_like
from attention_jax.base.typing import at_least_float32
from attention_jax.implementations import online
from attention_jax.implementations.head import SAVED
from attention_jax.implementations.passes import joint
from attention_jax.implementations.tile_passes import Given, Operands, Tiles, rows_from, streamed
from attention_jax.masks import EMPTY
from attention_jax.masks.intervals import indices
from attention_jax.normalizers import Carried, Ordered

Array = jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Walk:
    """The walk of one head along its keys."""

    tiles: Tiles
    operands: Operands
    given: Given
    how: Ordered

    def __call__(self) -> Array:
        """Return the context [T, V]."""
        starts, table = self.places
        states = joint(self.given.states.astype(jnp.int32))
        of_row = functools.partial(self.of_row, states)
        where = jnp.asarray(starts), jnp.asarray(table, jnp.int32)
        _, context = lax.scan(of_row, None, where)
        return context.reshape(self.operands.query.shape[0], -1)

    @property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """The first queries of rows of tiles, and their visits in order, [rows, most]."""
        (visits,) = self.tiles.visits
        length = self.operands.query.shape[0]
        starts = np.arange(0, length, visits.rows, dtype=np.int32)
        numbers = [np.flatnonzero(visits.queries == start) for start in starts]
        most = max(map(len, numbers))
        # Of what is beyond the visits of a row, -1.
        table = np.stack([np.pad(x, (0, most - len(x)), constant_values=-1) for x in numbers])
        if self.how.last_first:
            table = table[:, ::-1]
        return starts, table

    def of_row(self, states: Array, _: None, where: tuple[Array, Array]) -> tuple[None, Array]:
        """Walk along a row of tiles."""
        i, numbers = where
        how = self.how.at(i, self.tiles.visits[0].rows)
        row = dataclasses.replace(self, how=how)
        zeros = jnp.zeros(self.tiles.visits[0].rows, at_least_float32(self.operands.value.dtype))
        depth = self.operands.value.shape[1]
        context = jnp.broadcast_to(zeros[:, None], (len(zeros), depth))
        carry = varying_like((how.start(zeros), context), self.operands, self.given)
        step = functools.partial(row.step, states, i)
        step = jax.checkpoint(step, prevent_cse=False)
        (state, context), _ = lax.scan(functools.partial(_kept, step), carry, numbers)
        return None, multiplied(context, how.last_factor(state))

    def step(self, states: Array, i: Array, carry: Any, number: Array) -> tuple[Any, None]:
        """Visit a tile; one that is EMPTY changes nothing."""
        before, context = carry
        kinds = [functools.partial(self.of_tile, masked) for masked in (None, True, False)]
        kinds = [jax.checkpoint(kind, prevent_cse=False) for kind in kinds]
        kind = jnp.where(number < 0, EMPTY, states[number])
        state, more = lax.switch(kind, kinds, *self.at(i, number), before)
        return (state, multiplied(context, self.how.factor(before, state)) + more), None

    def of_tile(
        self, masked: bool | None, here: Operands, i: Array, j: Array, state: Any
    ) -> tuple[Any, Array]:
        """Return the state after a tile, and what it adds to the context."""
        if masked is None:
            return state, varying_like(self.none, self.operands, self.given, state)
        tile, logits, allowed = self.tile(masked, here, i, j)
        weights, state = self.how.step(logits, allowed, state)
        return state, tile.weighted(weights, tile.products)

    @property
    def none(self) -> Array:
        """What a tile without weights adds to the context."""
        value = self.operands.value
        rows = self.tiles.visits[0].rows
        return jnp.zeros((rows, value.shape[1]), at_least_float32(value.dtype))

    def at(self, i: Array, number: Array) -> tuple[Operands, Array, Array]:
        """Return the operands of a visit, and its first query and key."""
        (visits,) = self.tiles.visits
        j = jnp.asarray(visits.keys[:, 0])[number]
        return self.tiles.slice(self.operands, i, j, visits.rows), i, j

    def tile(
        self, masked: bool, here: Operands, i: Array, j: Array
    ) -> tuple[online.Tile, Array, Array]:
        """Return a tile, with poison among its logits, and which pairs may attend."""
        tile = self.tiles.compute(here, self.given, i, j, masked)
        allowed = jnp.ones(tile.logits.shape, bool) if tile.allowed is None else tile.allowed
        poison = tile.query_poison[:, None] + tile.key_poison[None, :]
        return tile, tile.logits + poison, allowed


def multiplied(context: Array, factor: Array | None) -> Array:
    """Multiply a context [bt, V] by a factor [bt]; None is one."""
    return context if factor is None else context * factor[:, None]


def _kept(step: Callable[..., Any], carry: Any, number: Array) -> tuple[Any, None]:
    """Make a step, and keep the state after it for the backward pass."""
    (state, context), _ = step(carry, number)
    return (jax.tree.map(functools.partial(checkpoint_name, name=SAVED[1]), state), context), None


class RowAbove(NamedTuple):
    """The weights of the query above a row of tiles [S], and their sums before each key [S + 1]."""

    weights: Array
    sums: Array

    @classmethod
    def of(cls, weights: Array) -> RowAbove:
        """Sum the weights."""
        return cls(weights, jnp.pad(jnp.cumsum(weights), (1, 0)))

    def between(self, start: Array, end: Array) -> Array:
        """Return the sum of the weights from one key on, before another; 0 where they are one."""
        return self.sums[end] - self.sums[start]


@dataclasses.dataclass(frozen=True, eq=False)
class Descent(Walk):
    """The walk of one head along its keys, one row of tiles after the one above it.

    Only the weights between some rows of tiles are kept for derivatives: of every group of rows,
    and those within one group while it is differentiated.
    """

    how: Carried

    def __call__(self) -> Array:
        """Return the context [T, V]."""
        starts, table = self.places
        rows, length = len(starts), self.operands.query.shape[0]
        size = math.isqrt(rows - 1) + 1
        more = -rows % size  # rows of tiles that visit nothing, after the last
        where = np.pad(starts, (0, more)), np.pad(table, ((0, more), (0, 0)), constant_values=-1)
        groups = [jnp.asarray(x.reshape(-1, size, *x.shape[1:]), jnp.int32) for x in where]
        zeros = jnp.zeros(self.operands.key.shape[0], self.none.dtype)
        first = varying_like(self.how.first_row(zeros), self.operands, self.given)
        states = joint(self.given.states.astype(jnp.int32))
        of_row = jax.checkpoint(functools.partial(self.below, states), prevent_cse=False)
        of_group = jax.checkpoint(functools.partial(lax.scan, of_row), prevent_cse=False)
        _, context = lax.scan(of_group, first, groups)
        return context.reshape(-1, context.shape[-1])[:length]

    def below(self, states: Array, above: Array, where: tuple[Array, Array]) -> tuple[Array, Array]:
        """Walk along a row of tiles, given the weights above; return its last ones and context."""
        i, numbers = where
        how = self.how.at(i, self.tiles.visits[0].rows)
        start = how.start(jnp.zeros_like(self.none[:, 0]))
        carry = start, self.none, jnp.int32(0)
        carry = varying_like(carry, self.operands, self.given, above)
        row = dataclasses.replace(self, how=how)
        step = functools.partial(row.down, states, i, RowAbove.of(above))
        step = jax.checkpoint(step, prevent_cse=False)
        (_, context, _), (keys, last) = lax.scan(step, carry, numbers)
        keys = keys[:, None] + indices(self.tiles.key_size)[None, :]
        return jnp.zeros_like(above).at[keys].add(last, mode="promise_in_bounds"), context

    def down(
        self, states: Array, i: Array, above: RowAbove, carry: Any, number: Array
    ) -> tuple[Any, tuple[Array, Array]]:
        """Visit a tile, and return its first key and last row of weights."""
        state, context, end = carry
        here, _, j = self.at(i, number)
        kind = jnp.where(number < 0, EMPTY, states[number])
        kinds = [functools.partial(self.of_tile_below, masked) for masked in (None, True, False)]
        kinds = [jax.checkpoint(each, prevent_cse=False) for each in kinds]
        state, more, last = lax.switch(kind, kinds, here, (i, j), state, above, end)
        end = jnp.where(kind == EMPTY, end, j + self.tiles.key_size)
        return (state, context + more, end), (j, last)

    def of_tile_below(
        self,
        masked: bool | None,
        here: Operands,
        where: tuple[Array, Array],
        state: Any,
        above: RowAbove,
        end: Array,
    ) -> tuple[Any, Array, Array]:
        """Return the state after a tile, what it adds to the context, and its last weights."""
        i, j = where
        weights_above = rows_from(above.weights, j, self.tiles.key_size)
        if masked is None:
            nothing = varying_like(self.none, self.operands, self.given, state)
            return state, nothing, jnp.zeros_like(weights_above)
        tile, logits, allowed = self.tile(masked, here, i, j)
        state = self.how.passed(state, above.between(end, j))
        weights, state = self.how.step_below(logits, allowed, state, weights_above)
        return state, tile.weighted(weights, tile.products), weights[-1]


def attend(tiles: Tiles, operands: Operands, given: Given) -> Array:
    """Return the context [T, V]."""
    how = streamed(operands.functions.normalizer)
    assert isinstance(how, Ordered)
    if isinstance(how, Carried):
        return Descent(tiles, operands, given, how)()
    return Walk(tiles, operands, given, how)()
