"""Monotonic attention: each query goes on along the keys from where the one before it stopped."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.base.binding import rule
from attention_jax.base.trees import varying_like
from attention_jax.normalizers.ordered import Carried

__all__ = ["hard_monotonic", "monotonic"]

Array = jax.Array

UNROLLED = 4
"""Steps of the recurrence that are one step of a loop."""


@dataclasses.dataclass(frozen=True, eq=False)
class Monotonic(Carried):
    """How `monotonic` streams: the state is the probability of going on past the keys so far."""

    is_hard: bool = False

    def start(self, zeros: Array) -> Array:
        return zeros

    def first_row(self, zeros: Array) -> Array:
        return zeros.at[:1].set(1.0)

    def passed(self, state: Array, above: Array) -> Array:
        return state.at[0].add(above)

    def step_below(
        self, logits: Array, allowed: Array, state: Array, above: Array
    ) -> tuple[Array, Array]:
        shown = allowed & (logits != -jnp.inf)
        hidden = jnp.where(shown, logits, 0.0)
        stop = jax.nn.sigmoid(hidden)
        if self.is_hard:
            is_nan = jnp.where(jnp.isnan(hidden), hidden, 0.0)
            stop = (hidden > 0.0).astype(logits.dtype) + lax.stop_gradient(is_nan)
        return _stopped(jnp.where(shown, stop, 0.0), state, above)


def monotonic(logits: Array, allowed: Array) -> Array:
    r"""Where a query stops that goes on from where the one before it stopped, in expectation.

    With p_ij = sigmoid(e_ij), the probability of stopping at a key that is reached, and 0 where j
    is not allowed,

        w_ij = p_ij q_ij,    q_ij = (1 - p_i,j-1) q_i,j-1 + w_i-1,j,

    where w_0j is 1 for the first key and 0 for the others. What goes past the last key is lost, for
    the queries that follow too. So the queries of a head are one sequence, in order and whole.

    Args:
      logits: [T, S].
      allowed: [T, S], True = may attend.

    Returns:
      Weights [T, S], rows summing to at most one, each to at most the sum of the one before.

    Raffel et al. 2017, equations 9 to 12; they begin with logits below zero, as by the `offset` of
    `scores.normalized_additive`.

    >>> monotonic(jnp.zeros((2, 2)), jnp.ones((2, 2), bool))
    Array([[0.5 , 0.25],
           [0.25, 0.25]], dtype=float32)
    """
    return _over_plane(Monotonic(), logits, allowed)


def hard_monotonic(logits: Array, allowed: Array) -> Array:
    r"""The first key, from where the query before stopped, whose logit is above zero.

    `monotonic` with p_ij = 1 where e_ij > 0, else 0, as it is used once trained: a weight of one,
    or none for this query and all that follow. Its gradient is zero.

    Args:
      logits: [T, S].
      allowed: [T, S], True = may attend.

    Returns:
      Weights [T, S], at most a one in each row.

    Raffel et al. 2017, section 2.2 and algorithm 1.

    >>> hard_monotonic(jnp.array([[-1.0, 1.0, 1.0], [1.0, -1.0, 1.0]]), jnp.ones((2, 3), bool))
    Array([[0., 1., 0.],
           [0., 0., 1.]], dtype=float32)
    """
    return _over_plane(Monotonic(is_hard=True), logits, allowed)


@rule(monotonic, "streaming")
def _() -> Monotonic:
    return Monotonic()


@rule(hard_monotonic, "streaming")
def _() -> Monotonic:
    return Monotonic(is_hard=True)


def _over_plane(how: Monotonic, logits: Array, allowed: Array) -> Array:
    if not logits.size:
        return jnp.zeros_like(logits)
    above = how.first_row(jnp.zeros_like(logits[0]))
    return how.step_below(logits, allowed, jnp.zeros_like(logits[:, 0]), above)[0]


def _stopped(stop: Array, state: Array, above: Array) -> tuple[Array, Array]:
    """Return the weights of a tile [T, S], and how much of each query goes on past it, [T].

    A weight depends on those to its left and above it. So one diagonal after another is computed:
    step s is key s - i of query i.
    """
    rows, keys = stop.shape
    steps = rows + keys - 1
    skewed = jnp.pad(stop, ((0, 0), (0, rows))).ravel()[: rows * steps].reshape(rows, steps)
    entering = jnp.pad(above, (0, rows - 1))
    start = varying_like((state, jnp.zeros_like(state)), stop, state, above)
    (state, _), weights = lax.scan(_diagonal, start, (skewed.T, entering), unroll=UNROLLED)
    flat = jnp.pad(weights.T.ravel(), (0, rows))
    return flat.reshape(rows, steps + 1)[:, :keys], state


def _diagonal(
    carry: tuple[Array, Array], inputs: tuple[Array, Array]
) -> tuple[tuple[Array, Array], Array]:
    past, before = carry
    stop, above = inputs
    reached = past + jnp.concatenate([above[None], before[:-1]])
    weights = stop * reached
    return (reached - weights, weights), weights
