"""Layers whose attention forms no pairs: linear attention (with FAVOR+) and Linformer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

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
from attention_jax.masks import Causal
from attention_jax.nnx.bound import Bound
from attention_jax.nnx.projecting import Projecting, dropout_of_weights

Array = jax.Array


class LinearAttention(Projecting):
    r"""Multi-head linear attention: y = linear_attention(x W^Q, m W^K, m W^V) W^O.

    The projections have the names and shapes of `MultiHeadAttention`, so its parameters fit. A
    position turns queries and keys before the feature map; where the map's products estimate a
    function of q . k, as those of FAVOR+ do, they then depend on distance alone.

    Args:
      *sizes: num_heads, in_features, memory_features and out_features, of `Projecting`.
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
      **options: of `Projecting`, such as `num_key_heads`, `position` or `qk_norm`.

    Raises:
      ValueError: heads that do not divide, two depths for queries and keys, or dropout.

    Katharopoulos et al. 2020, section 3; Choromanski et al. 2021.

    >>> layer = LinearAttention(4, 16, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 5, 16)), mask=Causal()).shape
    (2, 5, 16)
    """

    def __init__(
        self,
        *sizes: int,
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
        super().__init__(*sizes, param_dtype=param_dtype, rngs=rngs, **options)
        check_linear(type(self).__name__, self.sizes, dropout_rate)
        self.normalize = normalize
        self.chunk_size = chunk_size
        depth = self.sizes.key_depth
        self.feature_map = Bound(
            feature_map,
            depth,
            depth,
            feature_size,
            num_heads=None if share_features else self.sizes.num_key_heads,
            param_dtype=param_dtype,
            rngs=rngs,
        )

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
        """Attend from the query to the memory, or to itself.

        Args:
          query: [B, T, in_features].
          memory: [B, S, memory_features], or what `keys` made of it; the query unless given.
          mask: `masks.Causal` and padding, as in `linear_attention`.
          positions: where the queries stand, [T] or [B, T]; 0, 1, ... unless given.
          memory_positions: where the keys stand; as `positions` for self-attention.
          **others: of `MultiHeadAttention`, refused by name.

        Returns:
          [B, T, out_features].

        Raises:
          ShapeError: inputs that do not fit each other or the module.
          ValueError: a mask or an option that cannot be honoured.
        """
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
        """Return the state before any token, for `decode`.

        Its size never grows: any capacity will do, and every example has its own length, asked
        for (ragged) or not.

        Args:
          batch: B.
          capacity: how many tokens there may be; the state is as large for all.
          window: refused, as a sum forgets nothing.
          ragged: without effect.
          dtype: of the tokens, that of the computation unless given; the state is in float32 or
            better.

        Raises:
          ValueError: a window.
        """
        return self._layer().empty_state(batch, window, dtype)

    def decode(
        self,
        query: Array,
        cache: LinearState,
        *,
        mask: Any = Causal(),  # noqa: B008
        count: Any = None,
    ) -> tuple[Array, LinearState]:
        """Attend from the next tokens of a sequence to all tokens so far.

        Args:
          query: [B, T, in_features], any number T of tokens.
          cache: from `init_cache`, or from the previous call.
          mask: the mask of the whole sequence: `masks.Causal()`, and padding joined by `&`.
          count: how many of the T are tokens, [B] where examples differ; the rest is padding.

        Returns:
          What the full causal pass gives at these positions, [B, T, out_features], and the next
          state.

        Raises:
          ShapeError: inputs that do not fit each other or the module.
          ValueError: a mask that cannot be honoured.
        """
        return self._layer().decode(query, cache, mask, count)

    def decode_memory(
        self, query: Array, memory: Array | Projected, cache: LinearState, *, mask: Any = None
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
        return self._layer().decode_memory(query, memory, cache, mask)

    def _layer(self) -> LinearLayer:
        """Return the computation with this module's parameters."""
        feature_map = self.feature_map._function()
        return LinearLayer(self._ways(), feature_map, self.normalize, self.chunk_size)


class LinformerAttention(Projecting):
    r"""Multi-head Linformer attention: y = linformer_attention(x W^Q, m W^K, m W^V; E, F) W^O.

    Args:
      *sizes: num_heads, in_features, memory_features and out_features, of `Projecting`.
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
      **options: of `Projecting`, such as `num_key_heads` or `qk_norm`.

    Raises:
      ValueError: a rank below 1 or above the length, heads that do not divide, fixed projections of
        another shape, or a position.

    Wang et al. 2020, section 4.

    >>> layer = LinformerAttention(4, 16, length=9, rank=3, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 9, 16))).shape, layer.key_projection.shape
    ((2, 9, 16), (3, 9))
    """

    def __init__(
        self,
        *sizes: int,
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
        super().__init__(*sizes, param_dtype=param_dtype, rngs=rngs, **options)
        heads = None if share_heads else self.sizes.num_key_heads
        shape = projection_shape(name, rank, length, heads, fixed)

        def learned() -> nnx.Param:
            return nnx.Param(projection_init(rngs.params(), shape, param_dtype))

        self.key_projection = learned() if fixed is None else nnx.data(fixed)
        is_one = share_key_value or fixed is not None
        self.value_projection = nnx.data(None) if is_one else learned()

    def __call__(
        self,
        query: Array,
        memory: Array | Projected | None = None,
        *,
        mask: Any = None,
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
        dropout = dropout_of_weights(self, deterministic, rngs)
        return self._layer()(query, memory, mask=mask, dropout=dropout, **others)

    def _layer(self) -> LinformerLayer:
        """Return the computation with this module's parameters."""
        key = self.key_projection[...]
        value = key if self.value_projection is None else self.value_projection[...]
        return LinformerLayer(self._ways(), key, value)
