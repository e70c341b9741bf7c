"""Multi-head attention with any score, mask, bias, normalizer and position."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers as standard

from attention_jax import scores
from attention_jax.base.parameters import Initializer
from attention_jax.cache import KeyValueCache
from attention_jax.layers.heads import Projected
from attention_jax.layers.multi_head import MultiHead
from attention_jax.nnx.bound import Bound
from attention_jax.nnx.projecting import Projecting, dropout_of_weights
from attention_jax.normalizers import softmax

Array = jax.Array


class MultiHeadAttention(Projecting):
    r"""Multi-head attention: y = combine_n(attend(x W_n^Q, m W_n^K, m W_n^V)) W^O.

    With the default arguments the parameters have the names and shapes of
    `flax.nnx.MultiHeadAttention`, and the result is the same.

    Args:
      num_heads: N.
      in_features: D of the queries' input.
      memory_features: D of the input of keys and values; `in_features` unless given.
      out_features: of the result; `in_features` unless given.
      num_key_heads: K, a divisor of N (grouped-query; 1 is multi-query); N unless given.
      query_depth: Hq; in_features / N unless given.
      key_depth: Hk; Hq unless given. Another depth needs a score for two depths.
      value_depth: V; Hq unless given.
      score: any score; the parameters that it declares are created here, for each head.
      attention_size: A, where the score has a size to choose.
      share_score: let all heads share the score's parameters.
      initializers: of the score's parameters, by name, instead of its paper's.
      bias: added to the logits, a function (q_idx, kv_idx) -> numbers of one head; what it
        declares is created here for each head.
      normalizer: from logits to weights; what it declares is created here for each head.
      position: `position(x [T, H], positions [T])` applied to queries and keys (rotary).
      qk_norm: `nnx.RMSNorm` or `nnx.LayerNorm`, applied to the depth of queries and of keys.
      share_query_key: one projection for query and key.
      projections: False attends to the input as it is, cut into heads: X X^T.
      combine: "concat" or "sum" of the heads.
      use_bias: of the four projections.
      dropout_rate: of the weights.
      deterministic: True leaves dropout out; `model.train()` and `model.eval()` set it.
      implementation: of `attend`.
      kernel_init: of the four projections.
      bias_init: of the four projections.
      dtype: of the computation; that of inputs and parameters unless given.
      param_dtype: of the parameters.
      rngs: the stream `params` draws the parameters, the stream `dropout` what is dropped.

    Raises:
      ValueError: heads that do not divide, or options that exclude each other.

    Vaswani et al. 2017, section 3.2.2; Ainslie et al. 2023 (grouped-query); Henry et al. 2020
    and Dehghani et al. 2023, section 2 (norm of query and key); Kitaev et al. 2020 (shared).

    >>> x = jnp.ones((2, 5, 16))
    >>> layer = MultiHeadAttention(4, 16, num_key_heads=2, score=scores.additive, rngs=nnx.Rngs(0))
    >>> layer(x).shape, layer.key.kernel.shape, layer.score.key_weight.shape
    ((2, 5, 16), (16, 2, 4), (4, 4, 4))
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        memory_features: int | None = None,
        out_features: int | None = None,
        *,
        num_key_heads: int | None = None,
        query_depth: int | None = None,
        key_depth: int | None = None,
        value_depth: int | None = None,
        score: Any = scores.scaled_dot,
        attention_size: int | Sequence[int] | None = None,
        share_score: bool = False,
        initializers: Mapping[str, Initializer] | None = None,
        bias: Any = None,
        normalizer: Any = softmax,
        position: Callable[[Array, Array], Array] | None = None,
        qk_norm: Callable[..., Any] | None = None,
        share_query_key: bool = False,
        projections: bool = True,
        combine: str = "concat",
        use_bias: bool = True,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        implementation: str | None = None,
        kernel_init: Initializer = standard.glorot_uniform(),  # noqa: B008
        bias_init: Initializer = standard.zeros,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dropout_rate = dropout_rate
        self.deterministic = deterministic
        self.implementation = implementation
        self.rngs = rngs.dropout.fork() if dropout_rate else None
        super().__init__(
            num_heads,
            in_features,
            memory_features,
            out_features,
            num_key_heads=num_key_heads,
            query_depth=query_depth,
            key_depth=key_depth,
            value_depth=value_depth,
            position=position,
            qk_norm=qk_norm,
            share_query_key=share_query_key,
            projections=projections,
            combine=combine,
            use_bias=use_bias,
            kernel_init=kernel_init,
            bias_init=bias_init,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        each_head: dict[str, Any] = {
            "num_heads": num_heads,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        of_score = {**each_head, "num_heads": None if share_score else num_heads}
        depths = (self.sizes.query_depth, self.sizes.key_depth, attention_size)
        self.score = Bound(score, *depths, initializers=initializers, **of_score)
        self.bias = nnx.data(None) if bias is None else Bound(bias, **each_head)
        self.normalizer = Bound(normalizer, **each_head)

    def __call__(
        self,
        query: Array,
        memory: Array | Projected | None = None,
        value: Array | None = None,
        *,
        mask: Any = None,
        bias: Any = None,
        positions: Array | None = None,
        memory_positions: Array | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        return_weights: bool = False,
        sow_weights: bool = False,
    ) -> Any:
        """Attend from the query to the memory, or to itself.

        Args:
          query: [B, T, in_features].
          memory: [B, S, memory_features] for keys and values, or what `keys` made of it; the query
            unless given.
          value: [B, S, memory_features], for values; the memory unless given.
          mask: as in `attend`. True = may attend.
          bias: as in `attend`, instead of the module's own.
          positions: where the queries stand, [T] or [B, T]; 0, 1, ... unless given.
          memory_positions: where the keys stand; as `positions` for self-attention.
          deterministic: instead of the module's own.
          rngs: for dropout, instead of the module's own.
          return_weights: also return the weights [B, N, T, S], after dropout.
          sow_weights: leave them as `nnx.Intermediate` "attention_weights".

        Returns:
          [B, T, out_features]; with it the weights where asked for.

        Raises:
          ShapeError: inputs that do not fit each other or the module.
          ValueError: an argument out of range, or something the implementation cannot do.
        """
        output, weights = self._layer()(
            query,
            memory,
            value,
            mask=mask,
            bias=bias,
            positions=positions,
            memory_positions=memory_positions,
            dropout=dropout_of_weights(self, deterministic, rngs),
            return_weights=return_weights or sow_weights,
        )
        if sow_weights:
            self.sow(nnx.Intermediate, "attention_weights", weights)
        return (output, weights) if return_weights else output

    def keys(self, memory: Array, positions: Array | None = None) -> Projected:
        """Project a memory [B, S, memory_features] once, for all the calls that attend to it."""
        return self._ways().memory(memory, None, positions)

    def init_cache(
        self,
        batch: int,
        capacity: int,
        *,
        window: int | None = None,
        ragged: bool = False,
        dtype: Any = None,
    ) -> KeyValueCache:
        """Return an empty cache for `decode`; see `attention_jax.cache.init`.

        Its dtype is that of the layer's computation unless given.
        """
        options = {"window": window, "ragged": ragged, "dtype": dtype}
        return self._layer().empty_cache(batch, capacity, **options)

    def decode(
        self,
        query: Array,
        cache: KeyValueCache,
        *,
        mask: Any = None,
        bias: Any = None,
        count: Any = None,
        return_weights: bool = False,
    ) -> Any:
        """Attend from the next tokens of a sequence to all tokens so far, without dropout.

        Args:
          query: [B, T, in_features], any number T of tokens.
          cache: from `init_cache`, or from the previous call.
          mask: the mask of the whole sequence, such as `masks.Causal()`.
          bias: of the whole sequence, instead of the module's own.
          count: how many of the T are tokens, [B] in a ragged batch; the rest is padding.
          return_weights: also return the weights, by slot of the cache.

        Returns:
          What the full pass gives at these positions, [B, T, out_features], and the next cache;
          with them the weights [B, N, T, C] where asked for.

        Raises:
          ShapeError: inputs that do not fit each other or the module.
          ValueError: more tokens than the capacity.
        """
        return self._layer().decode(
            query, cache, mask=mask, bias=bias, count=count, return_weights=return_weights
        )

    def decode_memory(
        self,
        query: Array,
        memory: Array | Projected,
        cache: KeyValueCache,
        *,
        mask: Any = None,
        bias: Any = None,
        return_weights: bool = False,
    ) -> Any:
        """Attend from the next tokens of a sequence to a memory, without dropout.

        Args:
          query: [B, T, in_features], any number T of tokens.
          memory: [B, S, memory_features], or what `keys` made of it.
          cache: of the tokens before these.
          mask: as in the full pass, over the whole sequence and the memory.
          bias: likewise, instead of the module's own.
          return_weights: also return the weights [B, N, T, S].

        Returns:
          What the full pass gives at these positions, [B, T, out_features].
        """
        output, *weights = self._layer().decode_memory(
            query, memory, cache, mask=mask, bias=bias, return_weights=return_weights
        )
        return (output, *weights) if return_weights else output

    def _layer(self) -> MultiHead:
        """Return the computation with this module's parameters: projections, score, join."""
        return MultiHead(
            self._ways(),
            self.score._function,
            None if self.bias is None else self.bias._function,
            self.normalizer._function,
            self.implementation,
        )
