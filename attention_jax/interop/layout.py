"""From Flax's layout [*batch, T, N, H] to that of `attend`, with one batch axis, and back."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp

from attention_jax.base import checks
from attention_jax.masks import Table

Array = jax.Array


def is_array(part: Any) -> TypeGuard[Array]:
    """Tell an array from a mask or a function."""
    return hasattr(part, "dtype") and hasattr(part, "shape")


class Layout(NamedTuple):
    """The batch axes of a call, and its sizes N, T and S."""

    batch: tuple[int, ...]
    pairs: tuple[int, int, int]

    @classmethod
    def of(cls, query: Array, key: Array, value: Array) -> Layout:
        """Return the layout of query, key and value, each [*batch, length, heads, depth].

        Raises:
          ShapeError: different batch axes, or too few axes.
        """
        batch = query.shape[:-3]
        for name, tensor in {"query": query, "key": key, "value": value}.items():
            if tensor.ndim < 3 or tensor.shape[:-3] != batch:
                raise checks.ShapeError(
                    f"attention_fn: {name} must be [*batch, length, heads, depth] with the batch "
                    f"axes {batch} of query, got shape {tensor.shape}."
                )
        return cls(batch, (query.shape[-2], query.shape[-3], key.shape[-3]))

    def joined(self, x: Array) -> Array:
        """Join the batch axes: [*batch, T, N, H] to [B, T, N, H]."""
        return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])

    def split(self, x: Array) -> Array:
        """Split the batch axis: [B, T, N, H] to [*batch, T, N, H]."""
        return x.reshape(*self.batch, *x.shape[1:])

    def table(self, mask: Array) -> Table:
        """Return an array that broadcasts to [*batch, N, T, S] as a mask; nonzero = may attend.

        Raises:
          ShapeError: an array that does not broadcast to that shape.
        """
        return Table(self.fitted("mask", mask).astype(bool))

    def fitted(self, name: str, array: Array) -> Array:
        """Return an array that broadcasts to [*batch, N, T, S] as [B, N, T, S].

        Where the examples share it the result is [1, N, T, S].

        Raises:
          ShapeError: an array that does not broadcast to that shape.
        """
        full = (*self.batch, *self.pairs)
        shape = (1,) * (len(full) - array.ndim) + array.shape
        if array.ndim > len(full) or any(
            got not in (1, size) for got, size in zip(shape, full, strict=True)
        ):
            raise checks.ShapeError(
                f"attention_fn: {name} must broadcast to [*batch, N, T, S] = {full}, got shape "
                f"{array.shape}."
            )
        is_shared = all(size == 1 for size in shape[:-3])
        own = shape[:-3] if is_shared else self.batch
        return self.joined(jnp.broadcast_to(array.reshape(shape), (*own, *shape[-3:])))


def last_allowed(mask: Table) -> Array:
    """Return the last key that the mask allows to any query; 0 if there is none."""
    allowed = jnp.any(mask.allowed, axis=(0, 1, 2))
    return jnp.max(jnp.where(allowed, jnp.arange(allowed.shape[0], dtype=jnp.int32), 0))
