"""The attention of a recurrent decoder over its source, with any score in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax import scores
from attention_jax.base import checks
from attention_jax.base.parameters import Initializer, luong_uniform
from attention_jax.nnx.bound import Bound
from attention_jax.normalizers import softmax
from attention_jax.scores.prepared import Source, prepare, read

Array = jax.Array


class DecoderAttention(nnx.Module):
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

    >>> attention = DecoderAttention(scores.bilinear, 8, 16, rngs=nnx.Rngs(0))
    >>> source = attention.keys(jnp.ones((2, 5, 16)))
    >>> context, weights = attention(jnp.ones((2, 8)), source)  # in each step of a scan
    >>> context.shape, weights.shape
    ((2, 16), (2, 5))
    """

    def __init__(
        self,
        score: Any,
        state_features: int,
        memory_features: int,
        attention_size: int | Sequence[int] | None = None,
        *,
        normalizer: Any = softmax,
        initializers: Mapping[str, Initializer] | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.state_features = state_features
        self.memory_features = memory_features
        self.score = Bound(
            score,
            state_features,
            memory_features,
            attention_size,
            initializers=initializers,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.normalizer = Bound(normalizer, param_dtype=param_dtype, rngs=rngs)
        self.dtype = dtype

    def keys(self, memory: Array) -> Source:
        """Prepare a source [B, S, memory_features], once for all the steps that ask it."""
        checks.features("DecoderAttention", "memory", memory, self.memory_features)
        return prepare(self.score._function(), memory)

    def __call__(
        self, state: Array, memory: Array | Source, mask: Any = None
    ) -> tuple[Array, Array]:
        """Attend to the source.

        Args:
          state: [B, state_features], or [B, T, state_features] for several at once.
          memory: [B, S, memory_features], or what `keys` made of it.
          mask: a mask, or a boolean array that broadcasts to the weights. True = may attend.

        Returns:
          Context [B, memory_features] and weights [B, S], or [B, T, ...] for several states;
          zeros for a state that may attend to nothing.

        Raises:
          ShapeError: state, memory and mask do not fit each other or the module.
        """
        checks.features("DecoderAttention", "state", state, self.state_features)
        source = memory if isinstance(memory, Source) else self.keys(memory)
        functions = self.score._function(), self.normalizer._function()
        context, weights = read(functions[0], state, source, mask, functions[1])
        return context.astype(self.dtype or state.dtype), weights


class AdditiveAttention(DecoderAttention):
    r"""Additive attention of a decoder: e_tj = v^T tanh(W_q s_t + W_k h_j + b).

    `DecoderAttention` with the additive score; arguments and results are the same.

    Bahdanau, Cho and Bengio 2015, section 3.1 and appendix A.1.2 ("RNNsearch").

    >>> attention = AdditiveAttention(8, 16, attention_size=4, rngs=nnx.Rngs(0))
    >>> attention.score.key_weight.shape
    (16, 4)
    """

    def __init__(
        self,
        state_features: int,
        memory_features: int,
        attention_size: int | None = None,
        **options: Any,
    ):
        super().__init__(
            scores.additive, state_features, memory_features, attention_size, **options
        )


class GlobalAttention(nnx.Module):
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

    >>> attention = GlobalAttention(scores.dot, 8, 8, rngs=nnx.Rngs(0))
    >>> vector, weights = attention(jnp.ones((2, 8)), jnp.ones((2, 5, 8)))
    >>> vector.shape, weights.shape
    ((2, 8), (2, 5))
    """

    def __init__(
        self,
        score: Any,
        state_features: int,
        memory_features: int,
        out_features: int | None = None,
        *,
        kernel_init: Initializer = luong_uniform,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        self.attention = DecoderAttention(
            score,
            state_features,
            memory_features,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
            **options,
        )
        self.combine = nnx.Linear(
            memory_features + state_features,
            out_features or state_features,
            use_bias=False,
            kernel_init=kernel_init,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def keys(self, memory: Array) -> Source:
        """Prepare a source [B, S, memory_features], once for all the steps that ask it."""
        return self.attention.keys(memory)

    def __call__(
        self, state: Array, memory: Array | Source, mask: Any = None
    ) -> tuple[Array, Array]:
        """Return the attentional vector [B, out_features] and the weights [B, S].

        Arguments, the axis T and errors are those of `DecoderAttention`.
        """
        context, weights = self.attention(state, memory, mask)
        return jnp.tanh(self.combine(jnp.concatenate([context, state], axis=-1))), weights
