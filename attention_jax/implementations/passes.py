"""A pass over tiles: how the loop over visits goes, whatever is found at each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.implementations.tiles import Visits
from attention_jax.masks import EMPTY, FULL, PARTIAL
from attention_jax.masks.intervals import indices

Array = jax.Array


class Pass(NamedTuple):
    """What is done at a visit.

    `read(sums, i, rows)` takes what is needed of the rows from query i on, and `write(sums, i,
    found)` puts back what was found. `slice(operands, i, j, rows)` returns the operands of a tile,
    of which `of_tile(masked, *operands, read, i, j)` finds it; `nothing(*operands, read, i, j)`,
    of a tile that turns out to be EMPTY at run time. A pass that `is_transposed` is a scan of
    fixed length, whatever the tiles, and keeps nothing from inside a step.
    """

    operands: tuple[Any, ...]
    slice: Callable[..., Any]
    read: Callable[..., Any]
    of_tile: Callable[..., Any]
    nothing: Callable[..., Any]
    write: Callable[..., Any]
    is_transposed: bool


def over_visits(what: Pass, groups: list[Visits], states: Array | None, sums: Any) -> Any:
    """Fold over the visits of all groups.

    `states [n]` tells what the tiles are where only run time knows: the masked and the unmasked
    visit and the one that finds nothing are then branches, and there is one group, or none.
    """
    masked, unmasked = (functools.partial(what.of_tile, masked) for masked in (True, False))
    if states is None:
        for visits in groups:
            branch = masked if visits.masked else unmasked
            sums = _fold(what, visits, None, lambda _, branch=branch: branch, sums)
        return sums
    branches = [
        jax.checkpoint(branch, prevent_cse=False) for branch in (what.nothing, masked, unmasked)
    ]

    def switch(state: Array) -> Callable[..., Any]:
        return lambda *operands: lax.switch(_joint(state), branches, *operands)

    for visits in groups:
        sums = _fold(what, visits, states.astype(jnp.int32), switch, sums)
    return sums


def _fold(what: Pass, visits: Visits, states: Any, choose: Callable[..., Any], sums: Any) -> Any:
    """Fold over the visits of a group; `choose(state)` is the branch that a tile takes."""
    rows, together = visits.rows, visits.together
    # Transposed, a tile has operations enough that do not wait for each other.
    lanes = -(-visits.lanes // 2) if what.is_transposed else visits.lanes

    def below_each_other(*lanes: Array) -> Array:
        return jnp.concatenate(lanes).reshape(visits.height, *lanes[0].shape[2:])

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(sums: Any, where: Any) -> tuple[Any, None]:
        i, j, state = where

        def visit(read: Any, i: Any, j: Any) -> Any:
            tile = (what.slice(operands, i, j, rows) for operands in what.operands)
            return choose(state)(*tile, read, i, j)

        read = what.read(sums, i, visits.height)
        if together == 1:
            return what.write(sums, i, visit(read, i, j[0])), None
        many = lanes, together // lanes
        read = jax.tree.map(lambda x: x.reshape(*many, rows, *x.shape[1:]), read)
        each = read, (i + rows * indices(together)).reshape(many), j.reshape(many)
        lane = [jax.vmap(visit)(*jax.tree.map(lambda x, n=n: x[n], each)) for n in range(lanes)]
        return what.write(sums, i, jax.tree.map(below_each_other, *lane)), None

    where = visits.queries, visits.keys, states
    if states is None or what.is_transposed:
        return lax.scan(step, sums, where)[0]
    return _over_live(lambda sums, where: step(sums, where)[0], sums, where)


def _over_live(step: Callable[..., Any], sums: Any, where: Any) -> Any:
    """Fold over the visits whose state is not EMPTY, as many as there are."""
    where = jax.tree.map(jnp.asarray, where)
    is_empty = _for_all(where[-1] == EMPTY)
    order = jnp.argsort(is_empty, stable=True)

    def body(n: Any, sums: Any) -> Any:
        at = functools.partial(lax.dynamic_index_in_dim, index=order[n], keepdims=False)
        return step(sums, jax.tree.map(at, where))

    return lax.fori_loop(0, jnp.sum(~is_empty), body, sums)


@jax.custom_batching.custom_vmap
def _for_all(is_empty: Array) -> Array:
    """Return what is empty; for a batch what is for all, so that one loop in one order does."""
    return is_empty


@_for_all.def_vmap
def _(axis_size: int, in_batched: list[bool], is_empty: Array) -> tuple[Array, bool]:
    return _for_all(jnp.all(is_empty, axis=0)), False


@jax.custom_batching.custom_vmap
def _joint(state: Array) -> Array:
    """Return the state; for a batch the one that all share, else PARTIAL, which is right for all.

    A branch that differs within a batch would be all branches, and could not be transposed.
    """
    return state


@_joint.def_vmap
def _(axis_size: int, in_batched: list[bool], state: Array) -> tuple[Array, bool]:
    least, most = jnp.min(state, initial=FULL), jnp.max(state, initial=EMPTY)
    return _joint(jnp.where(least == most, least, PARTIAL)), False
