"""Layers whose attention forms no pairs: linear attention (with FAVOR+) and Linformer."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from attention_jax.base.parameters import Initializer
from attention_jax.layers.heads import Projected
from attention_jax.layers.linear import (
    LinearLayer,
    LinformerLayer,
    check_linear,
    check_linformer,
    projection_shape,
)
from attention_jax.linear import LinearState
from attention_jax.linear.feature_maps import elu_plus_one
from attention_jax.linear.linformer import projection_init as along_the_sequence
from attention_jax.linen.bound import Bound
from attention_jax.linen.projecting import Projecting, dropout_of_weights
from attention_jax.masks import Causal

Array = jax.Array


class LinearAttention(Projecting):
    r"""Multi-head linear attention: y = linear_attention(x W^Q, m W^K, m W^V) W^O.

    The twin of `attention_jax.nnx.LinearAttention`, where its fields are described.

    Katharopoulos et al. 2020, section 3; Choromanski et al. 2021.

    >>> import jax.numpy as jnp
    >>> x = jnp.ones((2, 5, 16))
    >>> y, _ = LinearAttention(4, 16).init_with_output(jax.random.key(0), x, mask=Causal())
    >>> y.shape
    (2, 5, 16)
    """

    feature_map: Any = elu_plus_one
    feature_size: int | None = None
    share_features: bool = False
    normalize: bool = True
    chunk_size: int = 128
    dropout_rate: float = 0.0
    deterministic: bool = False

    def __call__(
        self,
        query: Array,
        memory: Array | Projected | None = None,
        *,
        mask: Any = None,
        positions: Array | None = None,
        memory_positions: Array | None = None,
        **others: Any,
    ) -> Array:
        """Attend from the query to the memory, or to itself, as the twin does."""
        where = {"positions": positions, "memory_positions": memory_positions}
        return self._layer()(query, memory, mask=mask, **where, **others)

    def keys(self, memory: Array, positions: Array | None = None) -> Projected:
        """Project a memory [B, S, memory_features] once, for all the calls that attend to it."""
        return self._ways().memory(memory, None, positions)

    def init_cache(
        self,
        batch: int,
        capacity: int | None = None,
        *,
        window: int | None = None,
        ragged: bool = True,
        dtype: Any = None,
    ) -> LinearState:
        """Return the state before any token, for `decode`, as the twin does."""
        return self._layer().empty_state(batch, window, dtype)

    def decode(
        self,
        query: Array,
        cache: LinearState,
        *,
        mask: Any = Causal(),  # noqa: B008
        count: Any = None,
    ) -> tuple[Array, LinearState]:
        """Attend from the next tokens of a sequence to all tokens so far, as the twin does."""
        return self._layer().decode(query, cache, mask, count)

    def decode_memory(
        self, query: Array, memory: Array | Projected, cache: LinearState, *, mask: Any = None
    ) -> Array:
        """Attend from the next tokens of a sequence to a memory, as the twin does."""
        return self._layer().decode_memory(query, memory, cache, mask)

    @nn.compact
    def _layer(self) -> LinearLayer:
        """Return the computation with this module's parameters."""
        ways = self._ways()
        check_linear(ways.name, ways.sizes, self.dropout_rate)
        feature_map = Bound(
            self.feature_map,
            ways.sizes.key_depth,
            ways.sizes.key_depth,
            self.feature_size,
            num_heads=None if self.share_features else ways.sizes.num_key_heads,
            param_dtype=self.param_dtype,
            name="feature_map",
        )
        return LinearLayer(ways, feature_map._function(), self.normalize, self.chunk_size)


class LinformerAttention(Projecting, kw_only=True):
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
        memory: Array | Projected | None = None,
        *,
        mask: Any = None,
        deterministic: bool | None = None,
        **others: Any,
    ) -> Array:
        """Attend from the query to the memory, or to itself, as the twin does."""
        dropout = dropout_of_weights(self, deterministic)
        return self._layer()(query, memory, mask=mask, dropout=dropout, **others)

    @nn.compact
    def _layer(self) -> LinformerLayer:
        """Return the computation with this module's parameters."""
        ways = self._ways()
        check_linformer(ways.name, self.position)
        heads = None if self.share_heads else ways.sizes.num_key_heads
        shape = projection_shape(ways.name, self.rank, self.length, heads, self.fixed)
        if self.fixed is not None:
            return LinformerLayer(ways, self.fixed, self.fixed)
        drawn = (self.projection_init, shape, self.param_dtype)
        key = value = self.param("key_projection", *drawn)
        if not self.share_key_value:
            value = self.param("value_projection", *drawn)
        return LinformerLayer(ways, key, value)
