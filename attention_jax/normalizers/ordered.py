"""Normalizers that go along the keys of a row in order, with a state from key to key."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from attention_jax.base.binding import Sliced, function_of, rule
from attention_jax.base.typing import AnyNormalizer
from attention_jax.normalizers.protocol import Streaming, name_of, streaming

__all__ = ["Carried", "Ordered", "in_any_order", "stick_breaking", "whole_sequences"]

Array = jax.Array

BLOCK = 16
"""Sums of so many neighbours are one small product; a sum along a whole tile would be slow."""

TERMS = {32: 8, 64: 17}
"""How many terms of a series are as exact as numbers of so many bits."""


class Ordered(Streaming):
    """Weights that depend on the keys before them in the order of a pass, through a state.

    Tiles are visited in order. Only the state between tiles is kept, and only for derivatives.
    """

    passes = "one pass, along the keys in order"
    last_first: ClassVar[bool] = False
    """Whether the order is from the last key to the first."""

    def at(self, start: Any, rows: int) -> Ordered:
        """Return the same for so many queries from `start` on, with what it holds of these."""
        return self

    @abc.abstractmethod
    def start(self, zeros: Array) -> Any:
        """Return the state before the first tile, arrays [bt], given zeros of that shape."""

    @abc.abstractmethod
    def step(self, logits: Array, allowed: Array, state: Any) -> tuple[Array, Any]:
        """Return the weights of a tile [bt, bk], zero where not allowed, and the state after it."""

    def factor(self, before: Any, after: Any) -> Array | None:
        """Return what the weights before a tile are to be multiplied by after it, [bt].

        So that a step may return weights relative to its state; None if they are final.
        """
        return None

    def last_factor(self, state: Any) -> Array | None:
        """Return what all weights are to be multiplied by after the last tile, [bt], or None."""
        return None

    def weight(self, logits: Array, statistics: Any) -> Array:
        return self.step(logits, jnp.ones(logits.shape, bool), statistics)[0]


class Carried(Ordered):
    """Weights that depend on those of the query before too.

    A row of tiles follows the one above it, whose last weights it is given. Tiles that nobody may
    attend to are not visited, and weights there are zero.
    """

    passes = "one pass, along the keys in order, a row of tiles after the one above"

    @abc.abstractmethod
    def first_row(self, zeros: Array) -> Array:
        """Return the weights before the first query, [S], given zeros of that shape."""

    @abc.abstractmethod
    def step_below(
        self, logits: Array, allowed: Array, state: Any, above: Array
    ) -> tuple[Array, Any]:
        """Do what `step` does, given the weights of the query above at the keys of the tile, [bk].

        The last row of weights is the row above of the tile below.
        """

    @abc.abstractmethod
    def passed(self, state: Any, above: Array) -> Any:
        """Return the state after keys that are not visited, whose weights above sum to `above`."""

    def step(self, logits: Array, allowed: Array, state: Any) -> tuple[Array, Any]:
        above = self.first_row(jnp.zeros_like(logits[0]))
        return self.step_below(logits, allowed, state, above)


def whole_sequences(operation: str, normalizer: AnyNormalizer) -> None:
    """Refuse a normalizer that needs the weights of the query before, where there are none.

    Raises:
      ValueError: it does.

    >>> whole_sequences("attend_cached", stick_breaking)
    """
    function = function_of(normalizer)
    if isinstance(streaming(function), Carried):
        raise ValueError(
            f"{operation}: {name_of(function)} goes on from the weights of the query before, which "
            "are not known here; give all queries of a sequence to attend at once."
        )


def in_any_order(normalizer: AnyNormalizer | Sliced) -> bool:
    """Tell whether keys may change places; False where the normalizer does not say.

    >>> from attention_jax.normalizers import softmax
    >>> in_any_order(softmax), in_any_order(stick_breaking)
    (True, False)
    """
    how = streaming(function_of(normalizer))
    return how is not None and how.any_order


@dataclasses.dataclass(frozen=True, eq=False)
class StickBreaking(Ordered):
    """How `stick_breaking` streams: the state is the sum of softplus over later keys."""

    last_first = True

    def start(self, zeros: Array) -> Array:
        return zeros

    def step(self, logits: Array, allowed: Array, state: Array) -> tuple[Array, Array]:
        shown = allowed & (logits != -jnp.inf)
        logits = jnp.where(shown, logits, 0.0)
        passed = jnp.where(shown, _softplus(logits), 0.0)
        from_here = sums_from_here(passed)
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


def sums_from_here(x: Array) -> Array:
    """Return the sum of each entry of a row and all after it."""
    rows, keys = x.shape
    if keys % BLOCK:
        return jnp.flip(jnp.cumsum(jnp.flip(x, 1), axis=1), 1)
    blocks = _times_lower(x.reshape(-1, BLOCK), 0).reshape(rows, -1, BLOCK)
    after = _times_lower(blocks[:, :, 0], -1)
    return (blocks + after[:, :, None]).reshape(rows, keys)


def _times_lower(x: Array, diagonal: int) -> Array:
    """Return the sums of the entries of a row from one on, or after it for the diagonal -1."""
    lower = jnp.tril(jnp.ones(2 * x.shape[1:], x.dtype), diagonal)
    return jnp.dot(x, lower, precision="highest")


@jax.custom_jvp
def _softplus(x: Array) -> Array:
    """Return log(1 + exp(x)); `jax.nn.softplus` takes twice as long, its derivative three times.

    With u = exp(-|x|), log(1 + u) = 2 artanh(s) for s = u / (2 + u), which is at most 1/3.
    """
    small = jnp.exp(-jnp.abs(x))
    ratio = small / (2.0 + small)
    square, terms = ratio * ratio, TERMS[64 if x.dtype == jnp.float64 else 32]
    series = jnp.full_like(x, 1.0 / (2 * terms - 1))
    for n in range(terms - 2, -1, -1):
        series = series * square + 1.0 / (2 * n + 1)
    return jnp.maximum(x, 0.0) + 2.0 * ratio * series


@_softplus.defjvp
def _softplus_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (change,) = primals, tangents
    return _softplus(x), jax.nn.sigmoid(x) * change
