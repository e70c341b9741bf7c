"""Contextual position encoding: positions that count what the logits ask to count, then softmax."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import initializers

from attention_jax.base import checks
from attention_jax.base.binding import rule
from attention_jax.base.parameters import Parameter, one_size, require_depths
from attention_jax.normalizers.common import softmax
from attention_jax.normalizers.ordered import Ordered, sums_from_here
from attention_jax.normalizers.protocol import queried

__all__ = ["contextual_positions"]

Array = jax.Array

POSITIONS = 64
"""Positions of a table that a module creates."""


class Counted(NamedTuple):
    """The state after some tiles: gates so far, the largest logit and the sum of exponentials."""

    count: Array
    largest: Array
    total: Array


@dataclasses.dataclass(frozen=True, eq=False)
class ContextualPositions(Ordered):
    """How `contextual_positions` streams: softmax along a running count of gates.

    `of_positions` [T, P] is what each position adds to a logit of each query.
    """

    of_positions: Any = None
    last_first = True

    def at(self, start: Any, rows: int) -> ContextualPositions:
        of_rows = lax.dynamic_slice_in_dim(
            self.of_positions, start, rows, allow_negative_indices=False
        )
        return ContextualPositions(of_rows)

    def start(self, zeros: Array) -> Counted:
        return Counted(zeros, jnp.full_like(zeros, jnp.finfo(zeros.dtype).min), zeros)

    def step(self, logits: Array, allowed: Array, state: Counted) -> tuple[Array, Counted]:
        moved, shown, count = self.moved(logits, allowed, state.count)
        hidden = lax.stop_gradient(jnp.where(shown, moved, jnp.finfo(moved.dtype).min))
        largest = jnp.maximum(state.largest, jnp.max(hidden, axis=1))
        exponents = jnp.where(shown, moved - largest[:, None], 0.0)
        weights = jnp.where(shown, jnp.exp(exponents), 0.0)
        total = state.total * jnp.exp(state.largest - largest) + jnp.sum(weights, axis=1)
        return weights, Counted(count, largest, total)

    def factor(self, before: Counted, after: Counted) -> Array:
        return jnp.exp(before.largest - after.largest)

    def last_factor(self, state: Counted) -> Array:
        empty = state.total == 0
        return jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, state.total))

    def moved(self, logits: Array, allowed: Array, count: Array) -> tuple[Array, Array, Array]:
        """Return logits with what positions add, which are shown, and the gates up to here, [bt].

        Where all queries are at the last position, gates are not looked at.
        """
        shown = allowed & (logits != -jnp.inf)
        logits = jnp.where(shown, logits, 0.0)
        are_far = jnp.all(count >= self.of_positions.shape[1] - 1)
        moved, count = lax.cond(are_far, self.far, self.near, logits, shown, count)
        return moved, shown, count

    def far(self, logits: Array, shown: Array, count: Array) -> tuple[Array, Array]:
        """Return logits with what the last position adds, and the gates, which are enough."""
        return logits + self.of_positions[:, -1:], count

    def near(self, logits: Array, shown: Array, count: Array) -> tuple[Array, Array]:
        """Return logits with what positions add, and the gates up to here."""
        gates = jnp.where(shown, jax.nn.sigmoid(logits), 0.0)
        last = self.of_positions.shape[1] - 1
        counts = count[:, None] + sums_from_here(gates)
        counts = jnp.where(counts >= last, float(last), counts)  # of a NaN, NaN
        return logits + _interpolated(self.of_positions, counts), counts[:, 0]


@queried
def contextual_positions(logits: Array, allowed: Array, table: Any, *, query: Array) -> Array:
    r"""Softmax of logits to which contextual positions are added (CoPE).

    A key is as many positions away as gates are open from it to the last key that is allowed, up
    to the last position of the table; between two positions the logits are interpolated linearly.

        p_ij = min(sum_{k >= j} sigmoid(e_ik), P - 1)
        z_i(p) = q_i . table_p,  for whole p
        w_ij = exp(e_ij + z_i(p_ij)) / sum_k exp(e_ik + z_i(p_ik)),  over allowed keys

    Args:
      logits: [T, S].
      allowed: [T, S], True = may attend; the paper's is causal.
      table: the embeddings of P positions, [P, Hq]; a module creates 64 of them, and others where
        they are declared by `learned`.
      query: [T, Hq], which `attend` gives.

    Returns:
      Weights [T, S], summing to one; a row without allowed keys is zeros.

    Raises:
      ShapeError: query and table do not fit each other.
      ValueError: a table without positions.

    Golovneva, Wang, Weston and Sukhbaatar 2024, equations 3 to 5.

    >>> from attention_jax import attend, bind
    >>> x = jnp.ones((1, 3, 1, 2))
    >>> normalizer = bind(contextual_positions, table=jnp.array([[9.0, 9.0], [0.0, 0.0]]))
    >>> attend(x, x, x, normalizer=normalizer, return_weights=True).weights[0, 0, 0, 2]
    Array(0.944, dtype=float32)
    """
    checks.axes("contextual_positions", logits=(logits, "TS"), query=(query, "TH"))
    how = _of_query(table, query)
    if not logits.shape[1]:
        return jnp.zeros_like(logits)
    moved, shown, _ = how.moved(logits, allowed, jnp.zeros_like(logits[:, 0]))
    return softmax(moved, shown)


@rule(contextual_positions, "streaming")
def _(table: Any, query: Any = None) -> ContextualPositions:
    return ContextualPositions() if query is None else _of_query(table, query)


@rule(contextual_positions, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Parameter]:
    """Start from zeros, as the paper does: from softmax without positions."""
    require_depths("contextual_positions", query_depth=query_depth)
    size = one_size("contextual_positions", attention_size, POSITIONS)
    return {"table": Parameter((size, query_depth), initializers.zeros)}


def _of_query(table: Any, query: Array) -> ContextualPositions:
    sizes = checks.axes("contextual_positions", query=(query, "TH"), table=(table, "PH"))
    checks.at_least("contextual_positions", 1, **{"positions P of table": sizes["P"]})
    return ContextualPositions(query @ jnp.asarray(table, query.dtype).T)


def _interpolated(of_positions: Array, position: Array) -> Array:
    """Return rows [T, P] at positions [T, S] between 0 and P - 1."""
    if of_positions.shape[1] == 1:
        return of_positions
    steps = of_positions[:, 1:] - of_positions[:, :-1]
    pairs = jnp.stack([of_positions[:, :-1], steps], axis=2)
    below = jnp.clip(position.astype(jnp.int32), 0, steps.shape[1] - 1)
    picked = jnp.take_along_axis(pairs, below[:, :, None], axis=1, mode="promise_in_bounds")
    return picked[:, :, 0] + (position - below.astype(position.dtype)) * picked[:, :, 1]
