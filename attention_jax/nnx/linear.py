"""Layers in time linear in the sequence: linear attention (with FAVOR+) and Linformer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.base.parameters import Initializer
from attention_jax.layers.heads import ProjectedMemory
from attention_jax.layers.linear import (
    LinearLayer,
    LinearMethods,
    LinformerLayer,
    check_linear,
    check_linformer,
    projection_shape,
)
from attention_jax.linear.feature_maps import elu_plus_one
from attention_jax.linear.linformer import projection_init as along_the_sequence
from attention_jax.masks import MaskLike
from attention_jax.nnx.bound import Bound
from attention_jax.nnx.heads import MultiHeadLayer, dropout_options

Array = jax.Array


class LinearAttention(LinearMethods, MultiHeadLayer):
    r"""Multi-head linear attention: y = linear_attention(x W^Q, m W^K, m W^V) W^O.

    The projections have the names and shapes of `MultiHeadAttention`, so its parameters fit. A
    position turns queries and keys before the feature map; where the map's products estimate a
    function of q . k, as those of FAVOR+ do, they then depend on distance alone.

    Args:
      num_heads: N.
      in_features: D of the queries' input.
      feature_map: phi, see `linear_attention`; what it declares is created here. Random features
        are bound to it already, and stay as they are: `bind(performer.positive, projection=...)`.
      feature_size: A, where the feature map has a size to choose.
      share_features: let all key heads share the feature map's parameters.
      normalize: False leaves out the denominator.
      chunk_size: under a causal mask, how many keys are taken at once.
      dropout_rate: nothing but zero, as there are no weights to drop.
      deterministic: without effect.
      param_dtype: of the parameters.
      rngs: the stream `params` draws the parameters.
      **options: of `attention_jax.layers.HeadOptions`, such as `num_key_heads` or `position`.

    Raises:
      ValueError: heads that do not divide, a size below 1, two depths for queries and keys, or
        dropout.

    Katharopoulos et al. 2020, section 3; Choromanski et al. 2021.

    >>> from attention_jax.masks import Causal
    >>> layer = LinearAttention(4, 16, rngs=nnx.Rngs(0))
    >>> nnx.jit(lambda layer, x: layer(x, mask=Causal()))(layer, jnp.ones((2, 5, 16))).shape
    (2, 5, 16)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        feature_map: Any = elu_plus_one,
        feature_size: int | None = None,
        share_features: bool = False,
        normalize: bool = True,
        chunk_size: int = 128,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, param_dtype=param_dtype, rngs=rngs, **options)
        check_linear(type(self).__name__, self.sizes, feature_size, dropout_rate)
        self.normalize = normalize
        self.chunk_size = chunk_size
        depth = self.sizes.key_depth
        self.feature_map = Bound(
            feature_map,
            query_depth=depth,
            key_depth=depth,
            attention_size=feature_size,
            num_heads=None if share_features else self.sizes.num_key_heads,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def _layer(self) -> LinearLayer:
        """Return the computation with this module's parameters."""
        feature_map = self.feature_map.resolved
        return LinearLayer(self._projections(), feature_map, self.normalize, self.chunk_size)


class LinformerAttention(MultiHeadLayer):
    r"""Multi-head Linformer attention: y = linformer_attention(x W^Q, m W^K, m W^V; E, F) W^O.

    Args:
      num_heads: N.
      in_features: D of the queries' input.
      length: L, the most keys there can be.
      rank: R, how many rows they are projected to.
      share_heads: False learns projections for each key head.
      share_key_value: True learns one projection for keys and values.
      fixed: E and F, [R, L], instead of learned ones (`linformer.random_projection`,
        `linformer.mean_pooling`).
      projection_init: of E and F; that of the authors' code unless given.
      position: refused, as a projected key mixes all positions.
      dropout_rate: of the weights of projected keys.
      deterministic: True leaves dropout out; `model.train()` and `model.eval()` set it.
      param_dtype: of the parameters.
      rngs: the stream `params` draws the parameters, the stream `dropout` what is dropped.
      **options: of `attention_jax.layers.HeadOptions`, such as `num_key_heads` or `qk_norm`.

    Raises:
      ValueError: a rank below 1 or above the length, heads that do not divide, fixed projections of
        another shape, or a position.

    Wang et al. 2020, section 4.

    >>> layer = LinformerAttention(4, 16, length=9, rank=3, rngs=nnx.Rngs(0))
    >>> y = nnx.jit(lambda layer, x: layer(x))(layer, jnp.ones((2, 9, 16)))
    >>> y.shape, layer.key_projection.shape
    ((2, 9, 16), (3, 9))
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        length: int,
        rank: int,
        share_heads: bool = True,
        share_key_value: bool = False,
        fixed: Array | None = None,
        projection_init: Initializer = along_the_sequence,
        position: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        name = type(self).__name__
        check_linformer(name, position)
        self.dropout_rate = dropout_rate
        self.deterministic = deterministic
        self.rngs = rngs.dropout.fork() if dropout_rate else None
        super().__init__(num_heads, in_features, param_dtype=param_dtype, rngs=rngs, **options)
        heads = None if share_heads else self.sizes.num_key_heads
        shape = projection_shape(name, rank, length, heads, fixed)

        kind = shape, param_dtype
        if fixed is None:
            self.key_projection: Any = nnx.Param(projection_init(rngs.params(), *kind))
        else:
            self.key_projection = nnx.data(fixed)
        if share_key_value or fixed is not None:
            self.value_projection: Any = nnx.data(None)
        else:
            self.value_projection = nnx.Param(projection_init(rngs.params(), *kind))

    def __call__(
        self,
        query: Array,
        memory: Array | ProjectedMemory | None = None,
        *,
        mask: MaskLike = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        **others: Any,
    ) -> Array:
        """Attend from the query to the memory, or to itself.

        Args:
          query: [B, T, in_features].
          memory: [B, S, memory_features] with at most `length` rows; the query unless given.
          mask: padding, as in `linformer_attention`.
          deterministic: instead of the module's own.
          rngs: for dropout, instead of the module's own.
          **others: of `MultiHeadAttention`, refused by name.

        Returns:
          [B, T, out_features].

        Raises:
          ShapeError: inputs that do not fit each other or the module.
          ValueError: a mask or an option that cannot be honoured.
        """
        dropout = dropout_options(self, deterministic, rngs)
        return self._layer()(query, memory, mask=mask, dropout=dropout, **others)

    def _layer(self) -> LinformerLayer:
        """Return the computation with this module's parameters."""
        key = self.key_projection[...]
        value = key if self.value_projection is None else self.value_projection[...]
        return LinformerLayer(self._projections(), key, value)
