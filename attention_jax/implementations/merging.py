"""Joining attention over parts of the keys, each with its log-sum-exp."""

from __future__ import annotations

from functools import reduce

import jax
import jax.numpy as jnp

from attention_jax.base import checks
from attention_jax.base.finite import infinite_where
from attention_jax.implementations.head import Attended


def merge(*parts: Attended) -> Attended:
    r"""Join attention over disjoint blocks of keys into attention over all of them.

    With o^a, L^a over block a:  L = log sum_a exp(L^a),  o = sum_a exp(L^a - L) o^a.

    Args:
      *parts: for each block what `attend` returns with `return_logsumexp=True`: the context
        [B, T, N, V] and the log-sum-exp [B, T, N]; the same leading axes, whatever they are. Where
        a normalizer has a sink, each part counts it: give it to one part, and softmax to the rest.

    Returns:
      Context and log-sum-exp over all keys; zeros and -inf where every block was empty.

    Raises:
      ShapeError: a log-sum-exp that does not fit its context, or parts that do not fit each other.
      ValueError: no part, or one without log-sum-exp.

    Dao et al. 2022, section 3.1 (the decomposition of softmax over blocks).

    >>> from attention_jax import attend
    >>> x = jax.random.normal(jax.random.key(0), (1, 6, 2, 4))
    >>> halves = [attend(x, k, k, return_logsumexp=True) for k in (x[:, :3], x[:, 3:])]
    >>> bool(jnp.allclose(merge(*halves).context, attend(x, x, x), atol=1e-6))
    True
    """
    if not parts:
        raise ValueError("merge: give at least one part, got none.")
    expected = parts[0].context.shape
    for context, logsumexp in map(_known, parts):
        if context.shape != expected:
            raise checks.ShapeError(
                f"merge: the context of every part must have the shape of the first, {expected}, "
                f"got {context.shape}; merge joins blocks of keys that the same queries attend to."
            )
        if context.shape[:-1] != logsumexp.shape:
            raise checks.ShapeError(
                f"merge: a log-sum-exp must have the shape of its context without the last axis, "
                f"{context.shape[:-1]}, got {logsumexp.shape}."
            )
    return reduce(_merge_two, parts)


def _known(part: Attended) -> tuple[jax.Array, jax.Array]:
    """Return context and log-sum-exp of a part."""
    if part.logsumexp is None:
        raise ValueError("merge: a part has no log-sum-exp; attend with return_logsumexp=True.")
    return part.context, part.logsumexp


def _merge_two(first: Attended, second: Attended) -> Attended:
    (context_a, log_a), (context_b, log_b) = _known(first), _known(second)
    largest = jax.lax.stop_gradient(jnp.maximum(log_a, log_b))
    largest = jnp.where(largest == -jnp.inf, 0.0, largest)
    exp_a, exp_b = (_exponential(log, largest) for log in (log_a, log_b))
    empty = (exp_a == 0) & (exp_b == 0)
    total = jnp.where(empty, 1.0, exp_a + exp_b)
    share_a, share_b = exp_a / total, exp_b / total
    context = (
        context_a.astype(total.dtype) * share_a[..., None]
        + context_b.astype(total.dtype) * share_b[..., None]
    )
    logsumexp = infinite_where(empty, jnp.log(total) + largest)
    return Attended(context.astype(context_a.dtype), logsumexp=logsumexp)


def _exponential(log: jax.Array, largest: jax.Array) -> jax.Array:
    """Return exp(log - largest), of -inf without an infinite number on the way."""
    empty = log == -jnp.inf
    return jnp.where(empty, 0.0, jnp.exp(jnp.where(empty, 0.0, log - largest)))
