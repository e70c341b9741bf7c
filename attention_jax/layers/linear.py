"""Linear attention and Linformer, whichever of the two Flax APIs holds their parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax import linear
from attention_jax.base import checks
from attention_jax.cache import and_causal, next_positions
from attention_jax.layers.heads import HeadSizes, HeadsMethods, ProjectedMemory, Projections
from attention_jax.linear import LinearState, linear_attention
from attention_jax.linear.linformer import check_rank, linformer_attention
from attention_jax.masks import MaskLike, padding

Array = jax.Array


class LinearLayer(NamedTuple):
    """y = linear_attention(x W^Q, m W^K, m W^V) W^O from the parts that it has."""

    projections: Projections
    feature_map: Any
    normalize: bool
    chunk_size: int

    def options(self) -> dict[str, Any]:
        """Return the options of `linear_attention`."""
        return {
            "feature_map": self.feature_map,
            "normalize": self.normalize,
            "chunk_size": self.chunk_size,
        }


class LinearMethods(HeadsMethods):
    """The methods of `LinearAttention` that the two APIs share."""

    def _layer(self) -> LinearLayer:
        """Return the computation with this module's parameters."""
        raise NotImplementedError

    def __call__(
        self,
        query: Array,
        memory: Array | ProjectedMemory | None = None,
        *,
        mask: MaskLike = None,
        positions: Array | None = None,
        memory_positions: Array | None = None,
        **others: Any,
    ) -> Array:
        """Attend from the query to the memory, or to itself.

        Args:
          query: [B, T, in_features].
          memory: [B, S, memory_features], or what `keys` made of it; the query unless given.
          mask: `masks.Causal` and padding, as in `linear_attention`.
          positions: of the queries, [T] or [B, T]; 0, 1, ... unless given.
          memory_positions: of the keys; as `positions` for self-attention.
          **others: of `MultiHeadAttention`, refused by name.

        Returns:
          [B, T, out_features].

        Raises:
          ShapeError: inputs that do not fit each other or the module.
          ValueError: a mask or an option that cannot be honoured.
        """
        layer = self._layer()
        projections = layer.projections
        padding.refuse(projections.name, others, "mask", "positions", "memory_positions")
        heads = projections.heads(query, memory, None, positions, memory_positions)
        return projections.join(linear_attention(*heads, mask=mask, **layer.options()))

    def init_cache(
        self,
        batch: int,
        capacity: int | None = None,
        *,
        window: int | None = None,
        ragged: bool = True,
        dtype: Any = None,
    ) -> LinearState:
        """Return the state before any token, for `decode`.

        Its size never grows: any capacity will do, and every example has its own length, asked
        for (ragged) or not.

        Args:
          batch: B.
          capacity: without effect, as the state has one size for any number of tokens.
          window: refused, as a sum forgets nothing.
          ragged: without effect.
          dtype: of the tokens, that of the computation unless given; the state is in float32 or
            better.

        Raises:
          ValueError: a window.
        """
        layer = self._layer()
        projections = layer.projections
        if window is not None:
            raise ValueError(
                f"{projections.name}: window = {window} cannot be honoured, because a sum "
                "forgets no key; leave it out, the state does not grow anyway."
            )
        sizes = projections.sizes
        depths = (sizes.num_key_heads, sizes.key_depth, sizes.value_depth)
        dtype = projections.dtype if dtype is None else dtype
        return linear.init(batch, *depths, feature_map=layer.feature_map, dtype=dtype)

    def decode(
        self,
        query: Array,
        cache: LinearState,
        *,
        mask: MaskLike = None,
        causal: bool = True,
        count: Any = None,
    ) -> tuple[Array, LinearState]:
        """Attend from the next tokens of a sequence to all tokens so far.

        Args:
          query: [B, T, in_features], any number T of tokens.
          cache: from `init_cache`, or from the previous call.
          mask: padding of the whole sequence.
          causal: True, as the sums of the past hold no later token.
          count: how many of the T are tokens, [B] where examples differ; the rest is padding.

        Returns:
          What the full causal pass gives at these positions, [B, T, out_features], and the next
          state.

        Raises:
          ShapeError: inputs that do not fit each other or the module.
          ValueError: a mask that cannot be honoured, or causal=False.
        """
        layer = self._layer()
        if not causal:
            raise ValueError(
                f"{layer.projections.name}: causal=False cannot be honoured, because the sums of "
                "the past hold no later token; use MultiHeadAttention."
            )
        positions = next_positions(cache, query.shape[1])
        heads = layer.projections.heads(query, positions=positions)
        options = {"mask": and_causal(mask), "count": count, **layer.options()}
        context, cache = linear.decode(*heads, cache, **options)
        return layer.projections.join(context), cache

    def decode_memory(
        self,
        query: Array,
        memory: Array | ProjectedMemory,
        cache: LinearState,
        *,
        mask: MaskLike = None,
    ) -> Array:
        """Attend from the next tokens of a sequence to a memory.

        Args:
          query: [B, T, in_features], any number T of tokens.
          memory: [B, S, memory_features], or what `keys` made of it.
          cache: of the tokens before these.
          mask: padding, as in the full pass.

        Returns:
          What the full pass gives at these positions, [B, T, out_features].
        """
        layer = self._layer()
        projections = layer.projections
        positions = next_positions(cache, query.shape[1])
        heads = projections.heads(query, memory, positions=positions)
        sizes = {"B": query.shape[0], "N": heads[0].shape[2]}
        sizes |= {"T": query.shape[1], "S": heads[1].shape[1]}
        found = padding.from_mask(
            projections.name,
            mask,
            sizes,
            causal=False,
            reason="all tokens share one sum over the memory",
            starts=(cache.length, 0),
        )
        keys_mask = found.key[:, None, None, :]
        context = linear_attention(*heads, mask=keys_mask, **layer.options())
        context = jnp.where(found.query[:, :, None, None], context, 0.0)
        return projections.join(context)


class LinformerLayer(NamedTuple):
    """y = linformer_attention(x W^Q, m W^K, m W^V; E, F) W^O from the parts that it has."""

    projections: Projections
    key_projection: Array
    value_projection: Array

    def __call__(
        self,
        query: Array,
        memory: Array | ProjectedMemory | None,
        *,
        mask: MaskLike,
        dropout: dict[str, Any],
        **others: Any,
    ) -> Array:
        """Return the output [B, T, out_features]."""
        padding.refuse(self.projections.name, others, "mask", "deterministic", "rngs")
        heads = self.projections.heads(query, memory)
        along = (self.key_projection, self.value_projection)
        context = linformer_attention(*heads, *along, mask=mask, **dropout)
        return self.projections.join(context)


def check_linear(
    operation: str, sizes: HeadSizes, feature_size: int | None, dropout_rate: float
) -> None:
    """Refuse options that linear attention cannot honour.

    Raises:
      ValueError: two depths for queries and keys, or dropout of weights.
    """
    checks.sizes(operation, feature_size=feature_size)
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
    """Refuse a position, which Linformer cannot honour.

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
    checks.sizes(operation, length=length, rank=rank)
    check_rank(operation, rank, length)
    shape = (rank, length) if num_key_heads is None else (num_key_heads, rank, length)
    if fixed is not None and jnp.shape(fixed) != shape:
        raise checks.ShapeError(
            f"{operation}: fixed must have the shape {shape} that rank, length and share_heads "
            f"say, got {jnp.shape(fixed)}."
        )
    return shape
