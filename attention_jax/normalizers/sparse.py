"""Normalizers with exact zeros: sparsemax and 1.5-entmax.

Each needs a whole row of logits, and so carries no rule for tiles. The threshold of a row is
found by sorting; given which keys are above it, threshold and weights are smooth functions of
the logits, and that is what JAX differentiates.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["entmax15", "sparsemax"]

Array = jax.Array

FLOOR = -2.0
"""Below every threshold, where the largest logit of a row is 0: a threshold is at least -1."""


def sparsemax(logits: Array, allowed: Array) -> Array:
    r"""Euclidean projection onto the simplex: w_ij = max(e_ij - tau_i, 0), summing to one.

    Args:
      logits: [T, S].
      allowed: [T, S], True = may attend.

    Returns:
      Weights [T, S], most of them zero; a row without allowed keys is zeros.

    Martins and Astudillo 2016, equation 2 and algorithm 1.

    >>> sparsemax(jnp.array([[1.0, 0.5, -1.0]]), jnp.ones((1, 3), bool))
    Array([[0.75, 0.25, 0.  ]], dtype=float32)
    """
    logits, shown = _shifted(logits, allowed)
    ranked = _descending(logits)
    above = 1.0 + _ranks(ranked) * ranked > jnp.cumsum(ranked, axis=1)
    support, size = _support(logits, shown, ranked, above)
    threshold = (_total(logits, support) - 1.0) / size
    return jnp.where(support | jnp.isnan(logits), jax.nn.relu(logits - threshold), 0.0)


def entmax15(logits: Array, allowed: Array) -> Array:
    r"""1.5-entmax, between softmax and sparsemax: w_ij = max(e_ij / 2 - tau_i, 0)^2.

    Args:
      logits: [T, S].
      allowed: [T, S], True = may attend.

    Returns:
      Weights [T, S], summing to one, some of them zero; a row without allowed keys is zeros.

    Peters, Niculae and Martins 2019, equation 7 and algorithm 2.

    >>> entmax15(jnp.array([[0.0, 0.0, -9.0]]), jnp.ones((1, 3), bool))
    Array([[0.5, 0.5, 0. ]], dtype=float32)
    """
    logits, shown = _shifted(0.5 * logits, allowed)
    ranked = _descending(logits)
    rank = _ranks(ranked)
    mean = jnp.cumsum(ranked, axis=1) / rank
    spread = jnp.cumsum(ranked**2, axis=1) - rank * mean**2
    above = ranked >= mean - jnp.sqrt(jnp.maximum(1.0 - spread, 0.0) / rank)
    support, size = _support(logits, shown, ranked, above)
    mean = _total(logits, support) / size
    spread = _total((logits - mean) ** 2, support)
    threshold = mean - jnp.sqrt((1.0 - spread) / size)
    return jnp.where(support | jnp.isnan(logits), (logits - threshold) ** 2, 0.0)


def _shifted(logits: Array, allowed: Array) -> tuple[Array, Array]:
    """Return the logits with a largest of 0 in each row, and FLOOR where nothing is allowed."""
    shown = allowed & (logits != -jnp.inf)
    lowest = jnp.finfo(logits.dtype).min  # and not -inf, which `jax.debug_infs` refuses
    hidden = jax.lax.stop_gradient(jnp.where(shown, logits, lowest))
    largest = jnp.max(hidden, axis=1, keepdims=True, initial=lowest)
    return jnp.where(shown, logits - largest, FLOOR), shown


def _descending(logits: Array) -> Array:
    clipped = jnp.maximum(jax.lax.stop_gradient(logits), FLOOR)
    return -jnp.sort(-clipped, axis=1)


def _support(logits: Array, shown: Array, ranked: Array, above: Array) -> tuple[Array, Array]:
    """Return which logits are among those above the threshold, [T, S], and how many, [T, 1]."""
    # Where none is above, all are below 1: the largest of a row is 0.
    smallest = jnp.min(jnp.where(above, ranked, 1.0), axis=1, keepdims=True, initial=1.0)
    support = shown & (logits >= smallest)
    count = jnp.sum(support, axis=1, keepdims=True, dtype=logits.dtype)
    return support, jnp.maximum(count, 1.0)


def _total(values: Array, support: Array) -> Array:
    return jnp.sum(jnp.where(support, values, 0.0), axis=1, keepdims=True)


def _ranks(ranked: Array) -> Array:
    return jnp.arange(1, ranked.shape[1] + 1).astype(ranked.dtype)[None, :]
