"""Normalizers that stream in one pass: softmax and its kin, and sigmoid."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from attention_jax.base.binding import bind, rule
from attention_jax.base.parameters import Parameter
from attention_jax.normalizers.protocol import Elementwise, Exponential

__all__ = [
    "log_normalizer",
    "sigmoid",
    "softmax",
    "softmax_plus_one",
    "softmax_with_sink",
    "stable_logsumexp",
]

Array = jax.Array


def log_normalizer(logits: Array, allowed: Array, sink: Any = None) -> Array:
    """Return log(sum_j exp(logit_ij)) over the allowed keys, [T]; -inf for an empty row.

    >>> log_normalizer(jnp.zeros((1, 4)), jnp.array([[True, True, False, False]]))
    Array([0.693], dtype=float32)
    """
    logits, shown = _with_sink(logits, allowed, sink)
    exponents, shown, largest = _exponents(logits, shown)
    total = jnp.sum(_exponentials(exponents, shown), axis=-1)
    empty = total == 0
    return jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1.0, total)) + largest)


def stable_logsumexp(logits: Array) -> Array:
    """Return log-sum-exp over the last axis, [T, S] -> [T]; where all are -inf, -inf without NaN.

    >>> stable_logsumexp(jnp.array([[1e4, 1e4], [-jnp.inf, -jnp.inf]]))
    Array([10000.693,      -inf], dtype=float32)
    """
    return log_normalizer(logits, jnp.ones(logits.shape, bool))


def softmax(logits: Array, allowed: Array) -> Array:
    r"""Softmax over the allowed keys: w_ij = exp(e_ij) / sum_k exp(e_ik).

    Args:
      logits: [T, S].
      allowed: [T, S], True = may attend.

    Returns:
      Weights [T, S]; a row without allowed keys is zeros.

    >>> softmax(jnp.zeros((1, 4)), jnp.array([[True, True, False, False]]))
    Array([[0.5, 0.5, 0. , 0. ]], dtype=float32)
    """
    return _exponential(logits, allowed, None)


def softmax_with_sink(logits: Array, allowed: Array, sink: Any) -> Array:
    r"""Softmax with one more, valueless key of logit `sink`: w_ij = exp(e_ij) / (exp(sink) + sum).

    Args:
      logits: [T, S].
      allowed: [T, S], True = may attend.
      sink: a number, or a learned scalar.

    Returns:
      Weights [T, S], rows summing to less than one.

    A query can so attend to nothing (Xiao et al. 2024, section 3.1; OpenAI 2025, gpt-oss, learn
    the sink per head).

    >>> softmax_with_sink(jnp.zeros((1, 2)), jnp.ones((1, 2), bool), sink=jnp.log(2.0))
    Array([[0.25, 0.25]], dtype=float32)
    """
    return _exponential(logits, allowed, sink)


def softmax_plus_one(logits: Array, allowed: Array) -> Array:
    r"""Softmax with one added to the denominator: w_ij = exp(e_ij) / (1 + sum_k exp(e_ik)).

    Args:
      logits: [T, S].
      allowed: [T, S], True = may attend.

    Returns:
      Weights [T, S], rows summing to less than one.

    The sink of logit zero (Miller 2023, "Attention is off by one").

    >>> softmax_plus_one(jnp.zeros((1, 3)), jnp.ones((1, 3), bool))
    Array([[0.25, 0.25, 0.25]], dtype=float32)
    """
    return _exponential(logits, allowed, 0.0)


def sigmoid(logits: Array, allowed: Array, shift: Any = 0.0) -> Array:
    r"""Each key by itself: w_ij = 1 / (1 + exp(-(e_ij + shift))); rows do not sum to one.

    Args:
      logits: [T, S].
      allowed: [T, S], True = may attend.
      shift: a number; -log(S) keeps the initial sum of a row near one.

    Returns:
      Weights [T, S].

    Ramapuram et al. 2025, section 3.

    >>> sigmoid(jnp.zeros((1, 2)), jnp.array([[True, False]]))
    Array([[0.5, 0. ]], dtype=float32)
    """
    shown = jnp.where(allowed, logits, 0.0)  # NaN behind a mask would spoil the gradient
    return jnp.where(allowed, _shifted_sigmoid(shown, shift), 0.0)


@rule(softmax, "streaming")
def _() -> Exponential:
    return Exponential()


@rule(softmax_with_sink, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Parameter]:
    """Start from the sink of `softmax_plus_one`, zero."""
    return {"sink": Parameter((), initializers.zeros)}


@rule(softmax_with_sink, "streaming")
def _(sink: Any) -> Exponential:
    return Exponential(sink)


@rule(softmax_plus_one, "streaming")
def _() -> Exponential:
    return Exponential(0.0)


@rule(sigmoid, "streaming")
def _(shift: Any = 0.0) -> Elementwise:
    return Elementwise(bind(_shifted_sigmoid, shift=shift))


def _shifted_sigmoid(logits: Array, shift: Any) -> Array:
    return jax.nn.sigmoid(logits + jnp.asarray(shift, logits.dtype))


def _exponential(logits: Array, allowed: Array, sink: Any) -> Array:
    keys = logits.shape[1]
    logits, shown = _with_sink(logits, allowed, sink)
    # Subtract the largest logit first: rounding would lose small ones next to a large log-sum-exp.
    exponents, shown, _ = _exponents(logits, shown)
    total = jnp.sum(_exponentials(exponents, shown), axis=1, keepdims=True)
    normalizer = jnp.log(jnp.where(total == 0, 1.0, total))
    return _exponentials(exponents - normalizer, shown)[:, :keys]


def _with_sink(logits: Array, allowed: Array, sink: Any) -> tuple[Array, Array]:
    """Return logits and what is allowed, with the sink as a last column."""
    if sink is None:
        return logits, allowed
    column = jnp.broadcast_to(jnp.asarray(sink, logits.dtype), (logits.shape[0], 1))
    allowed = jnp.concatenate([allowed, jnp.ones(column.shape, bool)], axis=1)
    return jnp.concatenate([logits, column], axis=1), allowed


def _exponents(logits: Array, allowed: Array) -> tuple[Array, Array, Array]:
    """Return logits less the largest of their row, which of them count, and the largest.

    A logit of -inf counts like one that is not allowed. Zeros stand for both, so that nothing here
    is infinite unless a logit is (`jax.debug_infs`).
    """
    shown = allowed & (logits != -jnp.inf)
    lowest = jnp.finfo(logits.dtype).min
    hidden = jax.lax.stop_gradient(jnp.where(shown, logits, lowest))
    largest = jnp.max(hidden, axis=-1, keepdims=True, initial=lowest)
    return jnp.where(shown, logits - largest, 0.0), shown, largest[..., 0]


def _exponentials(exponents: Array, shown: Array) -> Array:
    return jnp.where(shown, jnp.exp(exponents), 0.0)
