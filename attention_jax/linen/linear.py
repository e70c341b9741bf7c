"""Layers in time linear in the sequence: linear attention (with FAVOR+) and Linformer."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

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
from attention_jax.linen.bound import Bound
from attention_jax.linen.heads import MultiHeadLayer, dropout_options
from attention_jax.masks import MaskLike

Array = jax.Array


class LinearAttention(LinearMethods, MultiHeadLayer, kw_only=True):
    r"""Multi-head linear attention: y = linear_attention(x W^Q, m W^K, m W^V) W^O.

    The twin of `attention_jax.nnx.LinearAttention`, where its fields are described.

    Katharopoulos et al. 2020, section 3; Choromanski et al. 2021.

    >>> import jax.numpy as jnp
    >>> from attention_jax.masks import Causal
    >>> x = jnp.ones((2, 5, 16))
    >>> layer = LinearAttention(4, 16)
    >>> variables = jax.jit(layer.init)(jax.random.key(0), x)
    >>> jax.jit(layer.apply)(variables, x, mask=Causal()).shape
    (2, 5, 16)
    """

    feature_map: Any = elu_plus_one
    feature_size: int | None = None
    share_features: bool = False
    normalize: bool = True
    chunk_size: int = 128
    dropout_rate: float = 0.0
    deterministic: bool = False

    __call__ = LinearMethods.__call__

    @nn.compact
    def _layer(self) -> LinearLayer:
        """Return the computation with this module's parameters."""
        projections = self._projections()
        check_linear(projections.name, projections.sizes, self.feature_size, self.dropout_rate)
        feature_map = Bound(
            self.feature_map,
            query_depth=projections.sizes.key_depth,
            key_depth=projections.sizes.key_depth,
            attention_size=self.feature_size,
            num_heads=None if self.share_features else projections.sizes.num_key_heads,
            param_dtype=self.param_dtype,
            name="feature_map",
        )
        return LinearLayer(projections, feature_map.resolve(), self.normalize, self.chunk_size)


class LinformerAttention(MultiHeadLayer, kw_only=True):
    r"""Multi-head Linformer attention: y = linformer_attention(x W^Q, m W^K, m W^V; E, F) W^O.

    The twin of `attention_jax.nnx.LinformerAttention`, where its fields are described.

    Wang et al. 2020, section 4.

    >>> import jax.numpy as jnp
    >>> x = jnp.ones((2, 9, 16))
    >>> layer = LinformerAttention(4, 16, length=9, rank=3)
    >>> y, variables = layer.init_with_output(jax.random.key(0), x)
    >>> y.shape, variables["params"]["key_projection"].shape
    ((2, 9, 16), (3, 9))
    """

    length: int
    rank: int
    share_heads: bool = True
    share_key_value: bool = False
    fixed: Array | None = None
    projection_init: Initializer = along_the_sequence
    dropout_rate: float = 0.0
    deterministic: bool = False

    def __call__(
        self,
        query: Array,
        memory: Array | ProjectedMemory | None = None,
        *,
        mask: MaskLike = None,
        deterministic: bool | None = None,
        **others: Any,
    ) -> Array:
        """Attend from the query to the memory, or to itself, as the twin does."""
        dropout = dropout_options(self, deterministic)
        return self._layer()(query, memory, mask=mask, dropout=dropout, **others)

    @nn.compact
    def _layer(self) -> LinformerLayer:
        """Return the computation with this module's parameters."""
        projections = self._projections()
        check_linformer(projections.name, self.position)
        heads = None if self.share_heads else projections.sizes.num_key_heads
        shape = projection_shape(projections.name, self.rank, self.length, heads, self.fixed)
        if self.fixed is not None:
            return LinformerLayer(projections, self.fixed, self.fixed)
        drawn = (self.projection_init, shape, self.param_dtype)
        key = value = self.param("key_projection", *drawn)
        if not self.share_key_value:
            value = self.param("value_projection", *drawn)
        return LinformerLayer(projections, key, value)
