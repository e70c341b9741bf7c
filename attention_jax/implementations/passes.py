"""A pass over tiles: the loop over visits, whatever is computed at each."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.base import placement
from attention_jax.implementations.tiles import Visits
from attention_jax.masks import EMPTY, FULL, PARTIAL
from attention_jax.masks.intervals import indices

Array = jax.Array


class Pass(abc.ABC):
    """What is computed at a visit, and how it is added up.

    `operands` are those of all tiles. A pass that `is_transposed` is a scan of fixed length,
    whatever the tiles, and keeps nothing from inside a step.
    """

    operands: tuple[Any, ...]
    is_transposed: bool

    @abc.abstractmethod
    def slice(self, operands: Any, i: Any, j: Any, rows: int) -> Any:
        """Return the operands of the tile with the queries i to i + rows and the first key j."""

    @abc.abstractmethod
    def read(self, sums: Any, i: Any, rows: int) -> Any:
        """Return what a visit needs of the sums over the rows from query i on."""

    @abc.abstractmethod
    def of_tile(self, masked: bool, *tile: Any) -> Any:
        """Compute a tile, given its operands, what was read, and its first query and key."""

    @abc.abstractmethod
    def of_empty_tile(self, *tile: Any) -> Any:
        """Return the same for a tile that turns out to be EMPTY at run time."""

    @abc.abstractmethod
    def write(self, sums: Any, i: Any, computed: Any) -> Any:
        """Add what was computed of the rows from query i on to the sums."""


def over_visits(each: Pass, groups: list[Visits], states: Array | None, sums: Any) -> Any:
    """Fold a pass over the visits of all groups.

    `states [n]` tells what the tiles are where only run time knows: masked, unmasked and EMPTY
    tiles are then branches, and there is one group, or none.
    """
    if states is None:
        for visits in groups:
            branch = functools.partial(each.of_tile, visits.masked)
            sums = _fold(_Fold(each, visits, functools.partial(_the_only, branch)), None, sums)
        return sums
    branches = [
        jax.checkpoint(branch, prevent_cse=False)
        for branch in (
            each.of_empty_tile,
            functools.partial(each.of_tile, True),
            functools.partial(each.of_tile, False),
        )
    ]
    states = joint(states.astype(jnp.int32))
    for visits in groups:
        fold = _Fold(each, visits, functools.partial(_switch, branches))
        sums = _fold(fold, states, sums)
    return sums


def _the_only(branch: Callable[..., Any], state: None, *tile: Any) -> Any:
    return branch(*tile)


def _switch(branches: list[Callable[..., Any]], state: Array, *tile: Any) -> Any:
    return lax.switch(state, branches, *tile)


def tangent_of_tile(
    compute: Callable[..., Any], primal: Any, direction: Any, has_aux: bool = False
) -> Any:
    """Return what is computed of a tile and its tangent, as `jax.jvp` does.

    Raises:
      TypeError: a derivative that runs backward only.
    """
    try:
        return jax.jvp(compute, (primal,), (direction,), has_aux=has_aux)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            "tiled: a score, bias or normalizer has its derivative from jax.custom_vjp, which runs "
            "backward only, and that of a tile is taken forward and then transposed; define it by "
            "jax.custom_jvp, or use implementation='dense'."
        ) from error


@dataclasses.dataclass(frozen=True)
class _Fold:
    """The visits of one group; `compute(state, *tile)` computes a tile in that state."""

    each: Pass
    visits: Visits
    compute: Callable[..., Any]

    @property
    def lanes(self) -> int:
        """How many independent batches the tiles of a visit are computed in."""
        # Transposed, a tile has operations enough that do not wait for each other.
        return -(-self.visits.lanes // 2) if self.each.is_transposed else self.visits.lanes

    def step(self, sums: Any, where: Any) -> tuple[Any, None]:
        """Make one visit: of one tile, or of several below each other."""
        i, j, state = where
        rows, together = self.visits.rows, self.visits.together
        read = self.each.read(sums, i, self.visits.height)
        if together == 1:
            return self.each.write(sums, i, self.tile(state, read, i, j[0])), None
        many = self.lanes, together // self.lanes
        read = jax.tree.map(lambda x: x.reshape(*many, rows, *x.shape[1:]), read)
        operands = read, (i + rows * indices(together)).reshape(many), j.reshape(many)
        computed = [
            jax.vmap(functools.partial(self.tile, state))(*_nth(operands, lane))
            for lane in range(self.lanes)
        ]
        return self.each.write(sums, i, jax.tree.map(self.stacked, *computed)), None

    def tile(self, state: Any, read: Any, i: Any, j: Any) -> Any:
        """Compute the tile whose first query is i and first key j."""
        tile = (self.each.slice(x, i, j, self.visits.rows) for x in self.each.operands)
        return self.compute(state, *tile, read, i, j)

    def stacked(self, *lanes: Array) -> Array:
        """Put the rows of all tiles below each other."""
        return jnp.concatenate(lanes).reshape(self.visits.height, *lanes[0].shape[2:])


def _fold(fold: _Fold, states: Array | None, sums: Any) -> Any:
    where = *fold.visits.places, states
    step = jax.checkpoint(fold.step, prevent_cse=False)
    if states is None or fold.each.is_transposed:
        return lax.scan(step, sums, where)[0]
    return _over_live(step, sums, where)


def _nth(tree: Any, n: int) -> Any:
    return jax.tree.map(lambda x: x[n], tree)


def _over_live(step: Callable[..., Any], sums: Any, where: Any) -> Any:
    """Fold over the visits whose state is not EMPTY, as many as there are."""
    where = jax.tree.map(jnp.asarray, where)
    is_empty = where[-1] == EMPTY
    order = jnp.argsort(is_empty, stable=True)
    body = functools.partial(_nth_live, step, (order, where))
    return lax.fori_loop(0, jnp.sum(~is_empty), body, sums)


def _nth_live(step: Callable[..., Any], ordered: tuple[Array, Any], n: Any, sums: Any) -> Any:
    order, where = ordered
    at = functools.partial(lax.dynamic_index_in_dim, index=order[n], keepdims=False)
    return step(sums, jax.tree.map(at, where))[0]


@jax.custom_batching.custom_vmap
def joint(states: Array) -> Array:
    """Return what each tile is; in a batch what it is for all, else PARTIAL, which is always right.

    A branch that differs within a batch would be all branches, and could not be transposed.
    """
    return states


@joint.def_vmap
def _(axis_size: int, in_batched: list[bool], states: Array) -> tuple[Array, bool]:
    least, most = jnp.min(states, 0, initial=FULL), jnp.max(states, 0, initial=EMPTY)
    agreed = jnp.where(least == most, least, PARTIAL)
    # What devices have to ask each other for is not worth knowing. A size that is a symbol
    # (`jax.export`) may be more than one.
    if not isinstance(axis_size, int) or axis_size > 1:
        agreed = jnp.where(placement.is_spread(states), PARTIAL, agreed)
    return joint(agreed), False
