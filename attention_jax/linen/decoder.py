"""The attention of a recurrent decoder over its source, with any score in its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attention_jax import scores
from attention_jax.base.parameters import Initializer, luong_uniform
from attention_jax.layers import decoder
from attention_jax.layers.heads import Learnable
from attention_jax.linen.bound import Bound
from attention_jax.normalizers import softmax

Array = jax.Array


class DecoderAttention(decoder.DecoderMethods, nn.Module):
    r"""A decoder state attends to a source: context_t = sum_j softmax_j(score(s_t, h_j)) h_j.

    The twin of `attention_jax.nnx.DecoderAttention`, where its fields are described. A decoder
    that prepares its source once does so through `keys`.

    Bahdanau, Cho and Bengio 2015, section 3.1; Luong, Pham and Manning 2015, section 3.1.

    >>> attention = DecoderAttention(scores.bilinear, state_features=8, memory_features=16)
    >>> state, memory = jnp.ones((2, 8)), jnp.ones((2, 5, 16))
    >>> variables = attention.init(jax.random.key(0), state, memory)
    >>> source = attention.apply(variables, memory, method="keys")
    >>> context, weights = attention.apply(variables, state, source)
    >>> context.shape, weights.shape
    ((2, 16), (2, 5))
    """

    score: Learnable
    state_features: int
    _: dataclasses.KW_ONLY
    memory_features: int
    attention_size: int | Sequence[int] | None = None
    normalizer: Learnable = softmax
    initializers: Mapping[str, Initializer] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    __call__ = decoder.DecoderMethods.__call__

    @nn.compact
    def _functions(self) -> tuple[Any, Any]:
        """Return score and normalizer with their parameters bound."""
        decoder.check_features(self.state_features, self.memory_features)
        score = Bound(
            self.score,
            query_depth=self.state_features,
            key_depth=self.memory_features,
            attention_size=self.attention_size,
            initializers=self.initializers,
            param_dtype=self.param_dtype,
            name="score",
        )
        normalizer = Bound(
            self.normalizer,
            query_depth=self.state_features,
            key_depth=self.memory_features,
            param_dtype=self.param_dtype,
            name="normalizer",
        )
        return score.resolve(), normalizer.resolve()


class AdditiveAttention(DecoderAttention):
    r"""Additive attention of a decoder: e_tj = v^T tanh(W_q s_t + W_k h_j + b).

    `DecoderAttention` with the additive score; the other fields and results are the same.

    Bahdanau, Cho and Bengio 2015, section 3.1 and appendix A.1.2 ("RNNsearch").

    >>> attention = AdditiveAttention(8, 16, attention_size=4)
    >>> variables = attention.init(jax.random.key(0), jnp.ones((2, 8)), jnp.ones((2, 5, 16)))
    >>> variables["params"]["score"]["key_weight"].shape
    (16, 4)
    """

    score: Learnable = dataclasses.field(default=scores.additive, kw_only=True)
    memory_features: int  # pyright: ignore[reportGeneralTypeIssues]


class GlobalAttention(decoder.GlobalMethods, nn.Module):
    r"""Luong's global attention: h~_t = tanh(W_c [c_t; s_t]), c_t as in `DecoderAttention`.

    The twin of `attention_jax.nnx.GlobalAttention`, where its fields are described.

    Luong, Pham and Manning 2015, equations 5, 7 and 8.

    >>> attention = GlobalAttention(scores.dot, 8, memory_features=8)
    >>> state, memory = jnp.ones((2, 8)), jnp.ones((2, 5, 8))
    >>> (vector, weights), _ = attention.init_with_output(jax.random.key(0), state, memory)
    >>> vector.shape, weights.shape
    ((2, 8), (2, 5))
    """

    score: Learnable
    state_features: int
    _: dataclasses.KW_ONLY
    memory_features: int
    out_features: int | None = None
    kernel_init: Initializer = luong_uniform
    attention_size: int | Sequence[int] | None = None
    normalizer: Learnable = softmax
    initializers: Mapping[str, Initializer] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    __call__ = decoder.GlobalMethods.__call__

    def setup(self) -> None:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.attention = DecoderAttention(
            self.score,
            self.state_features,
            memory_features=self.memory_features,
            attention_size=self.attention_size,
            normalizer=self.normalizer,
            initializers=self.initializers,
            **dtypes,
        )
        self.combine = nn.Dense(
            decoder.vector_features(self.state_features, self.out_features),
            use_bias=False,
            kernel_init=self.kernel_init,
            **dtypes,
        )
