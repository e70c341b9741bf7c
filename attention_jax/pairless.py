"""Layers whose attention forms no pairs, as the two Flax APIs share them: heads, features, sums."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax import checks
from attention_jax.heads import HeadSizes
from attention_jax.linear import LinearState, decode, init, linear_attention
from attention_jax.linformer import linformer_attention

Array = jax.Array


class Projections(NamedTuple):
    """The projections of a layer: x [B, T, D] to heads, and heads back to features."""

    name: str
    in_features: int
    memory_features: int
    sizes: HeadSizes
    query: Any
    key: Any
    value: Any
    out: Any

    def heads(self, x: Array, memory: Array | None = None) -> tuple[Array, Array, Array]:
        """Return queries [B, T, N, H], keys [B, S, K, H] and values [B, S, K, V]."""
        memory = x if memory is None else memory
        checks.axes(self.name, query=(x, "BTD"), memory=(memory, "BSE"))
        checks.features(self.name, "query", x, self.in_features)
        checks.features(self.name, "memory", memory, self.memory_features)
        return self.query(x), self.key(memory), self.value(memory)


class LinearLayer(NamedTuple):
    """y = linear_attention(x W^Q, m W^K, m W^V) W^O."""

    projections: Projections
    feature_map: Any
    normalize: bool
    chunk_size: int

    def __call__(self, x: Array, memory: Array | None, mask: Any) -> Array:
        """Return the output [B, T, out_features]."""
        heads = self.projections.heads(x, memory)
        return self.projections.out(linear_attention(*heads, mask=mask, **self._how()))

    def decode(self, x: Array, state: LinearState, count: Any) -> tuple[Array, LinearState]:
        """Return the output for the next tokens and the next state."""
        context, state = decode(*self.projections.heads(x), state, count=count, **self._how())
        return self.projections.out(context), state

    def empty_state(self, batch: int, dtype: Any = jnp.float32) -> LinearState:
        """Return the state before any token."""
        sizes = self.projections.sizes
        depths = (sizes.num_key_heads, sizes.key_depth, sizes.value_depth)
        return init(batch, *depths, feature_map=self.feature_map, dtype=dtype)

    def _how(self) -> dict[str, Any]:
        return {
            "feature_map": self.feature_map,
            "normalize": self.normalize,
            "chunk_size": self.chunk_size,
        }


class LinformerLayer(NamedTuple):
    """y = linformer_attention(x W^Q, m W^K, m W^V) W^O."""

    projections: Projections
    key_projection: Array
    value_projection: Array

    def __call__(self, x: Array, memory: Array | None, mask: Any) -> Array:
        """Return the output [B, T, out_features]."""
        heads = self.projections.heads(x, memory)
        context = linformer_attention(*heads, self.key_projection, self.value_projection, mask=mask)
        return self.projections.out(context)


def head_sizes(
    operation: str,
    in_features: int,
    memory_features: int,
    num_heads: int,
    num_key_heads: int | None,
    depth: int | None,
    value_depth: int | None,
) -> HeadSizes:
    """Complete what is not given; queries and keys have one depth.

    Raises:
      ShapeError: heads that do not divide.
    """
    return HeadSizes.of(
        operation,
        in_features,
        memory_features,
        num_heads=num_heads,
        num_key_heads=num_key_heads,
        query_depth=depth,
        key_depth=None,
        value_depth=value_depth,
        projections=True,
        share_query_key=False,
    )


def projection_shape(
    operation: str, rank: int, length: int, num_key_heads: int | None, fixed: Any
) -> tuple[int, ...]:
    """Return the shape of a projection along the sequence, [R, L] or [K, R, L].

    Raises:
      ValueError: a rank below 1 or above the length, or fixed projections of another shape.
    """
    if not 1 <= rank <= length:
        raise ValueError(
            f"{operation}: rank must be 1 or more and at most the length {length}, got {rank}."
        )
    shape = (rank, length) if num_key_heads is None else (num_key_heads, rank, length)
    if fixed is not None and jnp.shape(fixed) != shape:
        raise checks.ShapeError(
            f"{operation}: fixed must have the shape {shape} that rank, length and share_heads "
            f"say, got {jnp.shape(fixed)}."
        )
    return shape
