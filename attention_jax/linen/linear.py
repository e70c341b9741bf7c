"""Layers whose attention forms no pairs: linear attention (with FAVOR+) and Linformer."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers as standard

from attention_jax.feature_maps import elu_plus_one
from attention_jax.linear import LinearState
from attention_jax.linen.bound import Bound
from attention_jax.linformer import projection_init as along_the_sequence
from attention_jax.pairless import (
    LinearLayer,
    LinformerLayer,
    Projections,
    head_sizes,
    projection_shape,
)
from attention_jax.parameters import Initializer

Array = jax.Array


class LinearAttention(nn.Module):
    r"""Multi-head linear attention: y = linear_attention(x W^Q, m W^K, m W^V) W^O.

    The twin of `attention_jax.nnx.LinearAttention`, where its fields are described.

    Katharopoulos et al. 2020, section 3; Choromanski et al. 2021.

    >>> from attention_jax import masks
    >>> x = jnp.ones((2, 5, 16))
    >>> y, _ = LinearAttention(4, 16).init_with_output(jax.random.key(0), x, mask=masks.Causal())
    >>> y.shape
    (2, 5, 16)
    """

    num_heads: int
    in_features: int
    memory_features: int | None = None
    out_features: int | None = None
    num_key_heads: int | None = None
    depth: int | None = None
    value_depth: int | None = None
    feature_map: Any = elu_plus_one
    feature_size: int | None = None
    share_features: bool = False
    normalize: bool = True
    chunk_size: int = 128
    use_bias: bool = True
    kernel_init: Initializer = standard.glorot_uniform()
    bias_init: Initializer = standard.zeros
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __call__(self, query: Array, memory: Array | None = None, *, mask: Any = None) -> Array:
        """Attend from the query to the memory, or to itself, as the twin does."""
        return self.layer()(query, memory, mask)

    def init_state(self, batch: int, dtype: Any = jnp.float32) -> LinearState:
        """Return the state before any token, for `decode`; its size never grows."""
        return self.layer().empty_state(batch, dtype)

    def decode(
        self, query: Array, state: LinearState, *, count: Any = None
    ) -> tuple[Array, LinearState]:
        """Attend from the next tokens of a sequence to all tokens so far, as the twin does."""
        return self.layer().decode(query, state, count)

    @nn.compact
    def layer(self) -> LinearLayer:
        """Return the computation with this module's parameters."""
        projections = _projections(self)
        sizes = projections.sizes
        feature_map = Bound(
            self.feature_map,
            sizes.key_depth,
            sizes.key_depth,
            self.feature_size,
            num_heads=None if self.share_features else sizes.num_key_heads,
            param_dtype=self.param_dtype,
            name="feature_map",
        )
        return LinearLayer(projections, feature_map(), self.normalize, self.chunk_size)


class LinformerAttention(nn.Module):
    r"""Multi-head Linformer attention: y = linformer_attention(x W^Q, m W^K, m W^V; E, F) W^O.

    The twin of `attention_jax.nnx.LinformerAttention`, where its fields are described.

    Wang et al. 2020, section 4.

    >>> x = jnp.ones((2, 9, 16))
    >>> layer = LinformerAttention(4, 16, length=9, rank=3)
    >>> y, variables = layer.init_with_output(jax.random.key(0), x)
    >>> y.shape, variables["params"]["key_projection"].shape
    ((2, 9, 16), (3, 9))
    """

    num_heads: int
    in_features: int
    length: int
    rank: int
    memory_features: int | None = None
    out_features: int | None = None
    num_key_heads: int | None = None
    depth: int | None = None
    value_depth: int | None = None
    share_heads: bool = True
    share_key_value: bool = False
    fixed: Array | None = None
    use_bias: bool = True
    kernel_init: Initializer = standard.glorot_uniform()
    bias_init: Initializer = standard.zeros
    projection_init: Initializer = along_the_sequence
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __call__(self, query: Array, memory: Array | None = None, *, mask: Any = None) -> Array:
        """Attend from the query to the memory, or to itself, as the twin does."""
        return self.layer()(query, memory, mask)

    @nn.compact
    def layer(self) -> LinformerLayer:
        """Return the computation with this module's parameters."""
        projections = _projections(self)
        heads = None if self.share_heads else projections.sizes.num_key_heads
        shape = projection_shape(type(self).__name__, self.rank, self.length, heads, self.fixed)
        if self.fixed is not None:
            return LinformerLayer(projections, self.fixed, self.fixed)
        drawn = (self.projection_init, shape, self.param_dtype)
        key = value = self.param("key_projection", *drawn)
        if not self.share_key_value:
            value = self.param("value_projection", *drawn)
        return LinformerLayer(projections, key, value)


def _projections(module: Any) -> Projections:
    """Create the projections to queries, keys and values, and back."""
    name, in_features = type(module).__name__, module.in_features
    memory_features = module.memory_features or in_features
    sizes = head_sizes(
        name,
        in_features,
        memory_features,
        module.num_heads,
        module.num_key_heads,
        module.depth,
        module.value_depth,
    )
    options = {
        "use_bias": module.use_bias,
        "kernel_init": module.kernel_init,
        "bias_init": module.bias_init,
        "dtype": module.dtype,
        "param_dtype": module.param_dtype,
    }
    out_features = module.out_features or in_features
    return Projections(
        name,
        in_features,
        memory_features,
        sizes,
        nn.DenseGeneral((sizes.num_heads, sizes.query_depth), name="query", **options),
        nn.DenseGeneral((sizes.num_key_heads, sizes.key_depth), name="key", **options),
        nn.DenseGeneral((sizes.num_key_heads, sizes.value_depth), name="value", **options),
        nn.DenseGeneral(out_features, axis=(-2, -1), name="out", **options),
    )
