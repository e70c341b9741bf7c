"""Layers whose attention forms no pairs, as the two Flax APIs share them: heads, features, sums."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.base import checks
from attention_jax.cache import next_positions
from attention_jax.layers.heads import HeadSizes, Projected, Projections
from attention_jax.linear import LinearState, decode, init, linear_attention
from attention_jax.linear.linformer import linformer_attention
from attention_jax.masks import padding

Array = jax.Array


class LinearLayer(NamedTuple):
    """y = linear_attention(x W^Q, m W^K, m W^V) W^O."""

    projections: Projections
    feature_map: Any
    normalize: bool
    chunk_size: int

    def __call__(
        self,
        query: Array,
        memory: Array | Projected | None,
        *,
        mask: Any,
        positions: Array | None,
        memory_positions: Array | None,
        **others: Any,
    ) -> Array:
        """Return the output [B, T, out_features]."""
        padding.refuse(self.projections.name, others, "mask", "positions", "memory_positions")
        heads = self.projections.heads(query, memory, None, positions, memory_positions)
        return self.projections.join(linear_attention(*heads, mask=mask, **self._how()))

    def decode(
        self, query: Array, state: LinearState, mask: Any, count: Any
    ) -> tuple[Array, LinearState]:
        """Return the output for the next tokens and the next state."""
        heads = self.projections.heads(query, positions=next_positions(state, query.shape[1]))
        context, state = decode(*heads, state, mask=mask, count=count, **self._how())
        return self.projections.join(context), state

    def decode_memory(
        self, query: Array, memory: Array | Projected, state: LinearState, mask: Any
    ) -> Array:
        """Return the output for tokens that come after those of the state."""
        positions = next_positions(state, query.shape[1])
        heads = self.projections.heads(query, memory, positions=positions)
        sizes = {"B": query.shape[0], "N": heads[0].shape[2]}
        sizes |= {"T": query.shape[1], "S": heads[1].shape[1]}
        found = padding.from_mask(
            self.projections.name,
            mask,
            sizes,
            causal=False,
            reason="all tokens share one sum over the memory",
            starts=(state.length, 0),
        )
        context = linear_attention(*heads, mask=found.key[:, None, None, :], **self._how())
        context = jnp.where(found.query[:, :, None, None], context, 0.0)
        return self.projections.join(context)

    def empty_state(self, batch: int, window: int | None, dtype: Any) -> LinearState:
        """Return the state before any token.

        Raises:
          ValueError: a window.
        """
        if window is not None:
            raise ValueError(
                f"{self.projections.name}: window = {window} cannot be honoured, because a sum "
                "forgets no key; leave it out, the state does not grow anyway."
            )
        sizes = self.projections.sizes
        depths = (sizes.num_key_heads, sizes.key_depth, sizes.value_depth)
        dtype = self.projections.dtype if dtype is None else dtype
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

    def __call__(
        self,
        query: Array,
        memory: Array | Projected | None,
        *,
        mask: Any,
        dropout: dict[str, Any],
        **others: Any,
    ) -> Array:
        """Return the output [B, T, out_features]."""
        padding.refuse(self.projections.name, others, "mask", "deterministic", "rngs")
        heads = self.projections.heads(query, memory)
        along = (self.key_projection, self.value_projection)
        context = linformer_attention(*heads, *along, mask=mask, **dropout)
        return self.projections.join(context)


def check_linear(operation: str, sizes: HeadSizes, dropout_rate: float) -> None:
    """Refuse what linear attention has no place for.

    Raises:
      ValueError: two depths for queries and keys, or dropout of weights.
    """
    if sizes.query_depth != sizes.key_depth:
        raise ValueError(
            f"{operation}: query_depth and key_depth must be equal, because one feature map takes "
            f"both, got {sizes.query_depth} and {sizes.key_depth}."
        )
    if dropout_rate:
        raise ValueError(
            f"{operation}: dropout_rate = {dropout_rate} cannot be honoured, because no weight of "
            "a pair is ever formed; give a block attention_dropout_rate=0.0, and it drops only of "
            "what its sublayers add."
        )


def check_linformer(operation: str, position: Any) -> None:
    """Refuse what Linformer has no place for.

    Raises:
      ValueError: a position.
    """
    if position is not None:
        raise ValueError(
            f"{operation}: a position of queries and keys cannot be honoured, because each "
            "projected key mixes all positions; add one to the input, as an Embedding does."
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
