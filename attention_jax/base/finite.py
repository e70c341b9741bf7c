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
