"""Normalizers that go along the keys of a row in order, with a state from key to key."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from attention_jax.base.binding import rule
from attention_jax.normalizers.protocol import Streaming

__all__ = ["Ordered", "stick_breaking"]

Array = jax.Array

BLOCK = 32
"""Sums of so many neighbours are one small product; a sum along a whole tile would be slow."""


class Ordered(Streaming):
    """Weights that depend on the keys before them in the order of a pass, through a state.

    Tiles are visited in order. Only the state between tiles is kept, and only for derivatives.
    """

    passes = "one pass, along the keys in order"
    last_first: ClassVar[bool] = False
    """Whether the order is from the last key to the first."""

    @abc.abstractmethod
    def start(self, zeros: Array) -> Any:
        """Return the state before the first tile, arrays [bt], given zeros of that shape."""

    @abc.abstractmethod
    def step(self, logits: Array, allowed: Array, state: Any) -> tuple[Array, Any]:
        """Return the weights of a tile [bt, bk], zero where not allowed, and the state after it."""

    def weight(self, logits: Array, statistics: Any) -> Array:
        return self.step(logits, jnp.ones(logits.shape, bool), statistics)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class StickBreaking(Ordered):
    """How `stick_breaking` streams: the state is the sum of softplus over later keys."""

    last_first = True

    def start(self, zeros: Array) -> Array:
        return zeros

    def step(self, logits: Array, allowed: Array, state: Array) -> tuple[Array, Array]:
        shown = allowed & (logits != -jnp.inf)
        logits = jnp.where(shown, logits, 0.0)
        passed = jnp.where(shown, jax.nn.softplus(logits), 0.0)
        from_here = _sums_from_here(passed)
        taken = jnp.exp(jnp.where(shown, logits - state[:, None] - from_here, 0.0))
        return jnp.where(shown, taken, 0.0), state + from_here[:, 0]


def stick_breaking(logits: Array, allowed: Array) -> Array:
    r"""The last key takes its share of a stick, the one before of the rest, and so on.

    w_ij = sigmoid(e_ij) prod_{k > j} (1 - sigmoid(e_ik)), over allowed keys k. Nearer keys come
    first, so positions need no encoding; what is left of the stick goes to no key.

    Args:
      logits: [T, S].
      allowed: [T, S], True = may attend; the paper leaves the query itself out, `Causal(-1)`.

    Returns:
      Weights [T, S], rows summing to at most one.

    Tan et al. 2025, "Scaling stick-breaking attention", equation 2.

    >>> stick_breaking(jnp.zeros((1, 3)), jnp.array([[True, True, True]]))
    Array([[0.125, 0.25 , 0.5  ]], dtype=float32)
    """
    how = StickBreaking()
    if not logits.shape[1]:
        return jnp.zeros_like(logits)
    return how.step(logits, allowed, jnp.zeros_like(logits[:, 0]))[0]


@rule(stick_breaking, "streaming")
def _() -> StickBreaking:
    return StickBreaking()


def _sums_from_here(x: Array) -> Array:
    """Return the sum of each entry of a row and all after it."""
    rows, keys = x.shape
    if keys % BLOCK:
        return jnp.flip(jnp.cumsum(jnp.flip(x, 1), axis=1), 1)
    later = jnp.tril(jnp.ones((BLOCK, BLOCK), x.dtype))
    blocks = jnp.dot(x.reshape(-1, BLOCK), later, precision="highest").reshape(rows, -1, BLOCK)
    of_blocks = blocks[:, :, 0]
    after = jnp.flip(jnp.cumsum(jnp.flip(of_blocks, 1), axis=1), 1) - of_blocks
    return (blocks + after[:, :, None]).reshape(rows, keys)
