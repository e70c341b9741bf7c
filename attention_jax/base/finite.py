"""What NaN and Inf in the operands do: nothing where masked, NaN where attended."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def finite(x: Array) -> Array:
    """Return x with zeros for NaN and Inf."""
    return lax.select(lax.is_finite(x), x, jnp.zeros_like(x))


def poison(x: Array) -> Array:
    """Return, for each row of x [S, H], zero or NaN, if it holds NaN or Inf.

    The poison joins the logits of the pairs that may attend, so such a row spoils what attends to
    it and nothing else: 0 * NaN never enters a sum, in the value or in a derivative.
    """
    # Zero times NaN or Inf is NaN. As a product this reads the rows once; the barrier hides that
    # its other side is zero, and the highest precision rounds no large number to Inf.
    zeros = lax.optimization_barrier(jnp.zeros(x.shape[-1], x.dtype))
    return jnp.dot(lax.stop_gradient(x), zeros, precision="highest")


def finite_rows(x: Array) -> tuple[Array, Array]:
    """Split rows [S, H] into usable numbers and a poison [S]."""
    return finite(x), poison(x)
