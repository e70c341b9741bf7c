"""The attention of a recurrent decoder over its source, with any score in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax import scores
from attention_jax.base.parameters import Initializer, luong_uniform
from attention_jax.layers import decoder
from attention_jax.layers.heads import Learnable
from attention_jax.nnx.bound import Bound
from attention_jax.normalizers import softmax

Array = jax.Array


class DecoderAttention(decoder.DecoderMethods, nnx.Module):
    r"""A decoder state attends to a source: context_t = sum_j softmax_j(score(s_t, h_j)) h_j.

    Asked with the state *before* the step, as in RNNsearch, or after it, as in Luong's models:
    that is the decoder's choice. `keys` does once per source what does not depend on the state.

    Args:
      score: any score; the parameters that it declares are created here.
      state_features: depth of the state, Hq.
      memory_features: depth of the memory, Hk.
      attention_size: A, where the score has a size to choose.
      normalizer: from logits to weights.
      initializers: by parameter name, instead of the score's paper's.
      dtype: of the context; that of the state unless given. Logits are in float32 or better.
      param_dtype: of the parameters.
      rngs: the stream `params` draws the parameters.

    Bahdanau, Cho and Bengio 2015, section 3.1; Luong, Pham and Manning 2015, section 3.1.

    >>> attention = DecoderAttention(scores.bilinear, 8, memory_features=16, rngs=nnx.Rngs(0))
    >>> source = attention.keys(jnp.ones((2, 5, 16)))
    >>> context, weights = attention(jnp.ones((2, 8)), source)  # in each step of a scan
    >>> context.shape, weights.shape
    ((2, 16), (2, 5))
    """

    def __init__(
        self,
        score: Learnable,
        state_features: int,
        *,
        memory_features: int,
        attention_size: int | Sequence[int] | None = None,
        normalizer: Learnable = softmax,
        initializers: Mapping[str, Initializer] | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        decoder.check_features(state_features, memory_features)
        self.state_features = state_features
        self.memory_features = memory_features
        self.score = Bound(
            score,
            query_depth=state_features,
            key_depth=memory_features,
            attention_size=attention_size,
            initializers=initializers,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.normalizer = Bound(
            normalizer,
            query_depth=state_features,
            key_depth=memory_features,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.dtype = dtype

    def _functions(self) -> tuple[Any, Any]:
        """Return score and normalizer with their parameters bound."""
        return self.score.resolved, self.normalizer.resolved


class AdditiveAttention(DecoderAttention):
    r"""Additive attention of a decoder: e_tj = v^T tanh(W_q s_t + W_k h_j + b).

    `DecoderAttention` with the additive score; arguments and results are the same.

    Bahdanau, Cho and Bengio 2015, section 3.1 and appendix A.1.2 ("RNNsearch").

    >>> attention = AdditiveAttention(8, 16, attention_size=4, rngs=nnx.Rngs(0))
    >>> attention.score.key_weight.shape
    (16, 4)
    """

    def __init__(self, state_features: int, memory_features: int, **options: Any):
        super().__init__(
            scores.additive, state_features, memory_features=memory_features, **options
        )


class GlobalAttention(decoder.GlobalMethods, nnx.Module):
    r"""Luong's global attention: h~_t = tanh(W_c [c_t; s_t]), c_t as in `DecoderAttention`.

    Args:
      score: `scores.dot`, `scores.bilinear` ("general"), `scores.concat`, or any other.
      state_features: depth of the state.
      memory_features: depth of the memory.
      out_features: depth of the attentional vector; that of the state unless given.
      kernel_init: of W_c; the paper's uniform [-0.1, 0.1].
      dtype: of the computation of the attentional vector.
      param_dtype: of the parameters.
      rngs: the stream `params` draws the parameters.
      **options: of `DecoderAttention`.

    Luong, Pham and Manning 2015, equations 5, 7 and 8.

    >>> attention = GlobalAttention(scores.dot, 8, memory_features=8, rngs=nnx.Rngs(0))
    >>> vector, weights = attention(jnp.ones((2, 8)), jnp.ones((2, 5, 8)))
    >>> vector.shape, weights.shape
    ((2, 8), (2, 5))
    """

    def __init__(
        self,
        score: Learnable,
        state_features: int,
        *,
        memory_features: int,
        out_features: int | None = None,
        kernel_init: Initializer = luong_uniform,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        self.attention = DecoderAttention(
            score,
            state_features,
            memory_features=memory_features,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
            **options,
        )
        self.combine = nnx.Linear(
            memory_features + state_features,
            decoder.vector_features(state_features, out_features),
            use_bias=False,
            kernel_init=kernel_init,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
