"""Layers whose attention forms no pairs: linear attention (with FAVOR+) and Linformer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers as standard

from attention_jax.feature_maps import elu_plus_one
from attention_jax.heads import HeadSizes
from attention_jax.linear import LinearState
from attention_jax.linformer import projection_init as along_the_sequence
from attention_jax.nnx.bound import Bound
from attention_jax.pairless import (
    LinearLayer,
    LinformerLayer,
    Projections,
    head_sizes,
    projection_shape,
)
from attention_jax.parameters import Initializer

Array = jax.Array


class LinearAttention(nnx.Module):
    r"""Multi-head linear attention: y = linear_attention(x W^Q, m W^K, m W^V) W^O.

    The projections have the names and shapes of `MultiHeadAttention`, so its parameters fit.

    Args:
      num_heads: N.
      in_features: D of the queries' input.
      memory_features: D of the input of keys and values; `in_features` unless given.
      out_features: of the result; `in_features` unless given.
      num_key_heads: K, a divisor of N; N unless given.
      depth: H of a query or key head; in_features / N unless given.
      value_depth: V; H unless given.
      feature_map: phi, see `linear_attention`; what it declares is created here. Random features
        are bound to it already, and stay as they are: `bind(performer.positive, projection=...)`.
      feature_size: A, where the feature map has a size to choose.
      share_features: let all key heads share the feature map's parameters.
      normalize: False leaves out the denominator.
      chunk_size: under a causal mask, how many keys are taken at once.
      use_bias: of the four projections.
      kernel_init: of the four projections.
      bias_init: of the four projections.
      dtype: of the computation; that of inputs and parameters unless given.
      param_dtype: of the parameters.
      rngs: the stream `params` draws the parameters.

    Raises:
      ShapeError: heads that do not divide.

    Katharopoulos et al. 2020, section 3; Choromanski et al. 2021.

    >>> from attention_jax import masks
    >>> layer = LinearAttention(4, 16, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 5, 16)), mask=masks.Causal()).shape
    (2, 5, 16)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        memory_features: int | None = None,
        out_features: int | None = None,
        *,
        num_key_heads: int | None = None,
        depth: int | None = None,
        value_depth: int | None = None,
        feature_map: Any = elu_plus_one,
        feature_size: int | None = None,
        share_features: bool = False,
        normalize: bool = True,
        chunk_size: int = 128,
        use_bias: bool = True,
        kernel_init: Initializer = standard.glorot_uniform(),  # noqa: B008
        bias_init: Initializer = standard.zeros,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.in_features = in_features
        self.memory_features = in_features if memory_features is None else memory_features
        widths = (in_features, self.memory_features)
        self.sizes = head_sizes(
            type(self).__name__, *widths, num_heads, num_key_heads, depth, value_depth
        )
        self.normalize = normalize
        self.chunk_size = chunk_size
        self.query, self.key, self.value, self.out = _projections(
            self.sizes,
            *widths,
            out_features or in_features,
            use_bias=use_bias,
            kernel_init=kernel_init,
            bias_init=bias_init,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.feature_map = Bound(
            feature_map,
            self.sizes.key_depth,
            self.sizes.key_depth,
            feature_size,
            num_heads=None if share_features else self.sizes.num_key_heads,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, query: Array, memory: Array | None = None, *, mask: Any = None) -> Array:
        """Attend from the query to the memory, or to itself.

        Args:
          query: [B, T, in_features].
          memory: [B, S, memory_features]; the query unless given.
          mask: `masks.Causal` and padding, as in `linear_attention`.

        Returns:
          [B, T, out_features].

        Raises:
          ShapeError: inputs that do not fit each other or the module.
          ValueError: a mask that cannot be honoured.
        """
        return self.layer()(query, memory, mask)

    def init_state(self, batch: int, dtype: Any = jnp.float32) -> LinearState:
        """Return the state before any token, for `decode`; its size never grows."""
        return self.layer().empty_state(batch, dtype)

    def decode(
        self, query: Array, state: LinearState, *, count: Any = None
    ) -> tuple[Array, LinearState]:
        """Attend from the next tokens of a sequence to all tokens so far.

        Args:
          query: [B, T, in_features], any number T of tokens.
          state: from `init_state`, or from the previous call.
          count: how many of the T are tokens, [B] where examples differ; the rest is padding.

        Returns:
          What the full causal pass gives at these positions, [B, T, out_features], and the next
          state.

        Raises:
          ShapeError: inputs that do not fit each other or the module.
        """
        return self.layer().decode(query, state, count)

    def layer(self) -> LinearLayer:
        """Return the computation with this module's parameters."""
        return LinearLayer(_bound(self), self.feature_map(), self.normalize, self.chunk_size)


class LinformerAttention(nnx.Module):
    r"""Multi-head Linformer attention: y = linformer_attention(x W^Q, m W^K, m W^V; E, F) W^O.

    Args:
      num_heads: N.
      in_features: D of the queries' input.
      length: L, the most keys there can be.
      rank: R, how many rows they are projected to.
      memory_features: D of the input of keys and values; `in_features` unless given.
      out_features: of the result; `in_features` unless given.
      num_key_heads: K, a divisor of N; N unless given.
      depth: H of a query or key head; in_features / N unless given.
      value_depth: V; H unless given.
      share_heads: False learns projections for each key head.
      share_key_value: True learns one projection for keys and values.
      fixed: E and F, [R, L], instead of learned ones (`linformer.random_projection`,
        `linformer.mean_pooling`).
      use_bias: of the four projections of features.
      kernel_init: of the four projections of features.
      bias_init: of the four projections of features.
      projection_init: of E and F; that of the authors' code unless given.
      dtype: of the computation; that of inputs and parameters unless given.
      param_dtype: of the parameters.
      rngs: the stream `params` draws the parameters.

    Raises:
      ShapeError: heads that do not divide, or fixed projections of another shape.
      ValueError: a rank below 1 or above the length.

    Wang et al. 2020, section 4.

    >>> layer = LinformerAttention(4, 16, length=9, rank=3, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 9, 16))).shape, layer.key_projection.shape
    ((2, 9, 16), (3, 9))
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        length: int,
        rank: int,
        memory_features: int | None = None,
        out_features: int | None = None,
        *,
        num_key_heads: int | None = None,
        depth: int | None = None,
        value_depth: int | None = None,
        share_heads: bool = True,
        share_key_value: bool = False,
        fixed: Array | None = None,
        use_bias: bool = True,
        kernel_init: Initializer = standard.glorot_uniform(),  # noqa: B008
        bias_init: Initializer = standard.zeros,
        projection_init: Initializer = along_the_sequence,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        name = type(self).__name__
        self.in_features = in_features
        self.memory_features = in_features if memory_features is None else memory_features
        widths = (in_features, self.memory_features)
        self.sizes = head_sizes(name, *widths, num_heads, num_key_heads, depth, value_depth)
        self.query, self.key, self.value, self.out = _projections(
            self.sizes,
            *widths,
            out_features or in_features,
            use_bias=use_bias,
            kernel_init=kernel_init,
            bias_init=bias_init,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        heads = None if share_heads else self.sizes.num_key_heads
        shape = projection_shape(name, rank, length, heads, fixed)

        def learned() -> nnx.Param:
            return nnx.Param(projection_init(rngs.params(), shape, param_dtype))

        self.key_projection = learned() if fixed is None else nnx.data(fixed)
        is_one = share_key_value or fixed is not None
        self.value_projection = nnx.data(None) if is_one else learned()

    def __call__(self, query: Array, memory: Array | None = None, *, mask: Any = None) -> Array:
        """Attend from the query to the memory, or to itself.

        Args:
          query: [B, T, in_features].
          memory: [B, S, memory_features] with at most `length` rows; the query unless given.
          mask: padding, as in `linformer_attention`.

        Returns:
          [B, T, out_features].

        Raises:
          ShapeError: inputs that do not fit each other or the module.
          ValueError: a mask that cannot be honoured.
        """
        return self.layer()(query, memory, mask)

    def layer(self) -> LinformerLayer:
        """Return the computation with this module's parameters."""
        key = self.key_projection[...]
        value = key if self.value_projection is None else self.value_projection[...]
        return LinformerLayer(_bound(self), key, value)


def _projections(
    sizes: HeadSizes, in_features: int, memory_features: int, out_features: int, **options: Any
) -> tuple[nnx.LinearGeneral, ...]:
    """Return the projections to queries, keys and values, and back."""
    key_heads = sizes.num_key_heads
    heads = (sizes.num_heads, sizes.value_depth)
    return (
        nnx.LinearGeneral(in_features, (sizes.num_heads, sizes.query_depth), **options),
        nnx.LinearGeneral(memory_features, (key_heads, sizes.key_depth), **options),
        nnx.LinearGeneral(memory_features, (key_heads, sizes.value_depth), **options),
        nnx.LinearGeneral(heads, out_features, axis=(-2, -1), **options),
    )


def _bound(module: Any) -> Projections:
    return Projections(
        type(module).__name__,
        module.in_features,
        module.memory_features,
        module.sizes,
        module.query,
        module.key,
        module.value,
        module.out,
    )
