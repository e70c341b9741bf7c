"""How a layer of D features becomes heads and comes back: what the Flax modules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attention_jax import checks

Array = jax.Array


class HeadSizes(NamedTuple):
    """N query heads and K key heads of a layer, and their depths Hq, Hk and V."""

    num_heads: int
    num_key_heads: int
    query_depth: int
    key_depth: int
    value_depth: int

    @classmethod
    def of(
        cls,
        operation: str,
        in_features: int,
        memory_features: int,
        *,
        num_heads: int,
        num_key_heads: int | None,
        query_depth: int | None,
        key_depth: int | None,
        value_depth: int | None,
        projections: bool,
        share_query_key: bool,
    ) -> HeadSizes:
        """Complete what is not given, and refuse what does not fit.

        Raises:
          ValueError: heads that do not divide, or options that exclude each other.
        """
        num_key_heads = num_heads if num_key_heads is None else num_key_heads
        checks.multiple(operation, "num_heads", num_heads, "num_key_heads", num_key_heads)
        given = (query_depth, key_depth, value_depth)
        if not projections:
            if given != (None, None, None) or share_query_key:
                raise ValueError(
                    f"{operation}: without projections the depths follow from the inputs and "
                    "nothing is shared; leave out query_depth, key_depth, value_depth and "
                    "share_query_key."
                )
            depth = checks.multiple(operation, "in_features", in_features, "num_heads", num_heads)
            memory_depth = checks.multiple(
                operation, "memory_features", memory_features, "num_key_heads", num_key_heads
            )
            return cls(num_heads, num_key_heads, depth, memory_depth, memory_depth)
        if query_depth is None:
            query_depth = checks.multiple(
                operation, "in_features", in_features, "num_heads", num_heads
            )
        key_depth = query_depth if key_depth is None else key_depth
        value_depth = query_depth if value_depth is None else value_depth
        if share_query_key:
            query = (in_features, num_heads, query_depth)
            key = (memory_features, num_key_heads, key_depth)
            if query != key:
                raise ValueError(
                    f"{operation}: share_query_key needs one shape for query and key, got "
                    f"(features, heads, depth) = {query} and {key}."
                )
        return cls(num_heads, num_key_heads, query_depth, key_depth, value_depth)


def split_heads(x: Array, num_heads: int) -> Array:
    """Cut features into heads without a projection: [B, T, D] -> [B, T, N, D / N]."""
    return x.reshape(*x.shape[:-1], num_heads, -1)


def concat_heads(context: Array) -> Array:
    """Put heads side by side: [B, T, N, V] -> [B, T, N V] (Vaswani et al. 2017, section 3.2.2)."""
    return context.reshape(*context.shape[:-2], -1)


def sum_heads(context: Array) -> Array:
    """Add heads up: [B, T, N, V] -> [B, T, V]; concatenation whose W^O repeats one block."""
    return jnp.sum(context, axis=-2)


def place(
    position: Callable[[Array, Array], Array] | None, x: Array, positions: Array | None
) -> Array:
    """Apply `position(x [T, H], positions [T])`, such as a rotation, to every head.

    Args:
      position: the function of one head; None leaves x as it is.
      x: [B, T, N, H].
      positions: [T], or [B, T] where examples stand at different places; None is 0, 1, ...
    """
    if position is None:
        return x
    if positions is None:
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)
    by_head = jax.vmap(position, in_axes=(1, None), out_axes=1)
    return jax.vmap(by_head, in_axes=(0, 0 if positions.ndim == 2 else None))(x, positions)


def check_combine(operation: str, combine: str) -> str:
    """Return the way heads are joined.

    Raises:
      ValueError: neither "concat" nor "sum".
    """
    if combine not in ("concat", "sum"):
        raise ValueError(f"{operation}: combine must be 'concat' or 'sum', got {combine!r}.")
    return combine
