"""Ignore NaN and Inf in masked keys and values, and return NaN where they are attended to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def finite(x: Array) -> Array:
    """Return x with zeros for NaN and Inf."""
    return lax.select(lax.is_finite(x), x, jnp.zeros_like(x))


def poison(x: Array) -> Array:
    """Return NaN for each row of x [S, H] that holds NaN or Inf, and zero for the others.

    It is added to the logits of the allowed pairs, so such a row makes NaN of what attends to it
    and of nothing else: 0 * NaN never enters a sum, in a value or in a derivative.
    """
    # Zero times NaN or Inf is NaN. As a product this reads the rows once; the barrier hides that
    # its other side is zero, and the highest precision rounds no large number to Inf.
    zeros = lax.optimization_barrier(jnp.zeros(x.shape[-1], x.dtype))
    return jnp.dot(lax.stop_gradient(x), zeros, precision="highest")


def finite_rows(x: Array) -> tuple[Array, Array]:
    """Split rows [S, H] into usable numbers and a poison [S]."""
    return finite(x), poison(x)


def infinite_where(empty: Array, log: Array) -> Array:
    """Return -inf where a sum is empty, else its logarithm.

    A constant -inf would be a value of its own, which JAX may take out of a loop and hand to the
    backward pass, where `jax.debug_infs` refuses it; the logarithm of zero is none.

    >>> infinite_where(jnp.array([True, False]), jnp.array([2.0, 2.0]))
    Array([-inf,   2.], dtype=float32)
    """
    some = jnp.where(empty, 0.0, 1.0).astype(log.dtype)
    return jnp.where(empty, 0.0, log) + jnp.log(some)
