"""Orders of positions: put rows into the order in which devices hold them, and back."""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from attention_jax.base import checks

__all__ = ["permute", "restore"]


def permute(x: Any, order: Any, axis: int = 1) -> Any:
    """Put positions into the order in which devices hold them: y[b, i] = x[b, order[i]].

    Args:
      x: [B, T, ...], or T at another axis; of NumPy or of JAX, and so is the result.
      order: [T], from `deal`; None leaves x as it is.
      axis: of the positions.

    Raises:
      ShapeError: an order of another length, or one that is not an order of all positions.

    >>> permute(np.array([[10, 11, 12, 13]]), np.array([0, 3, 1, 2]))
    array([[10, 13, 11, 12]])
    """
    if order is None:
        return x
    return _taken(x, order_of("permute", "T", order, _size("permute", x, axis)), axis)


def restore(x: Any, order: Any, axis: int = 1) -> Any:
    """Put positions back into their own order: the inverse of `permute`, y[b, order[i]] = x[b, i].

    Args:
      x: [B, T, ...], or T at another axis; of NumPy or of JAX, and so is the result.
      order: [T], as it was given to `permute`.
      axis: of the positions.

    Raises:
      ShapeError: an order of another length, or one that is not an order of all positions.

    >>> restore(np.array([[10, 13, 11, 12]]), np.array([0, 3, 1, 2]))
    array([[10, 11, 12, 13]])
    """
    if order is None:
        return x
    return _taken(x, order_of("restore", "T", order, _size("restore", x, axis)).argsort(), axis)


def order_of(operation: str, letter: str, order: Any, length: int) -> Any:
    """Return an order of all positions as an array; one known only in `jit` is not looked at."""
    if order is None:
        return np.arange(length, dtype=np.int32)
    is_traced = isinstance(order, jax.core.Tracer)
    order = order if is_traced else np.asarray(order)
    is_order = order.shape == (length,) and jnp.issubdtype(order.dtype, jnp.integer)
    if is_order and not is_traced:
        is_order = np.array_equal(np.sort(order), np.arange(length))
    if not is_order:
        raise checks.ShapeError(
            f"{operation}: an order [{letter}] must hold each of the {length} positions once, as "
            f"parallel.deal returns it, got {order.dtype} of shape {order.shape}."
        )
    return order


def _size(operation: str, x: Any, axis: int) -> int:
    """Return the size of an axis."""
    shape = np.shape(x)
    if not -len(shape) <= axis < len(shape):
        raise checks.ShapeError(f"{operation}: x has no axis {axis}, got shape {shape}.")
    return shape[axis]


def _taken(x: Any, order: Any, axis: int) -> Any:
    is_numpy = isinstance(order, np.ndarray) and not isinstance(x, jax.Array)
    return np.take(x, order, axis) if is_numpy else jnp.take(x, order, axis)
