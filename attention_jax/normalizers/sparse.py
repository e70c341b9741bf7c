"""Normalizers with exact zeros: sparsemax, 1.5-entmax, alpha-entmax.

Weights are a function of what a logit is above the threshold of its row. Of whole rows, sparsemax
and 1.5-entmax find it by sorting; given which keys are above it, threshold and weights are smooth
functions of the logits, and that is what JAX differentiates. Tile by tile it is searched for.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from attention_jax.base.binding import rule
from attention_jax.base.parameters import Parameter
from attention_jax.normalizers.powers import PowerThreshold
from attention_jax.normalizers.searched import Threshold, over_row

__all__ = ["entmax", "entmax15", "sparsemax"]

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


def entmax(logits: Array, allowed: Array, alpha: Any) -> Array:
    r"""alpha-entmax: w_ij = max((alpha - 1) (e_ij - tau_i), 0)^(1 / (alpha - 1)), summing to one.

    Args:
      logits: [T, S].
      allowed: [T, S], True = may attend.
      alpha: above 1, where softmax is the limit, and at most 2, which is sparsemax; a number or a
        learned scalar.

    Returns:
      Weights [T, S], summing to one, some of them zero; a row without allowed keys is zeros.

    Raises:
      ValueError: alpha is a number outside of that.

    Peters, Niculae and Martins 2019, equation 5; Correia, Niculae and Martins 2019 learn alpha.

    >>> entmax(jnp.array([[1.0, 0.5, -1.0]]), jnp.ones((1, 3), bool), alpha=2.0)
    Array([[0.75, 0.25, 0.  ]], dtype=float32)
    """
    return over_row(_of_alpha(alpha), logits, allowed)


@rule(entmax, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Parameter]:
    """Start from 1.5-entmax."""
    return {"alpha": Parameter((), initializers.constant(1.5))}


@rule(entmax, "streaming")
def _(alpha: Any) -> PowerThreshold:
    return _of_alpha(alpha)


def _of_alpha(alpha: Any) -> PowerThreshold:
    if isinstance(alpha, int | float) and not 1.0 < alpha <= 2.0:
        raise ValueError(f"entmax: alpha must be above 1 and at most 2, got {alpha}.")
    power = 1.0 / (alpha - 1.0)
    return PowerThreshold.of(power)


@rule(sparsemax, "streaming")
def _() -> Threshold:
    return Threshold(jax.nn.relu)


@rule(entmax15, "streaming")
def _() -> Threshold:
    return Threshold(_half_squared, reach=2.0, power=2.0)


def _half_squared(over: Array) -> Array:
    return jax.nn.relu(0.5 * over) ** 2


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
