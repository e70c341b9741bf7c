"""The attention of a recurrent decoder over its source, with any score in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attention_jax import scores
from attention_jax.base import checks
from attention_jax.base.parameters import Initializer, luong_uniform
from attention_jax.linen.bound import Bound
from attention_jax.normalizers import softmax
from attention_jax.scores.prepared import Source, prepare, read

Array = jax.Array


class DecoderAttention(nn.Module):
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

    score: Any
    state_features: int
    memory_features: int
    attention_size: int | Sequence[int] | None = None
    normalizer: Any = softmax
    initializers: Mapping[str, Initializer] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def _functions(self) -> tuple[Any, Any]:
        """Return score and normalizer with their parameters bound."""
        score = Bound(
            self.score,
            self.state_features,
            self.memory_features,
            self.attention_size,
            initializers=self.initializers,
            param_dtype=self.param_dtype,
            name="score",
        )
        normalizer = Bound(self.normalizer, param_dtype=self.param_dtype, name="normalizer")
        return score._function(), normalizer._function()

    def keys(self, memory: Array) -> Source:
        """Prepare a source [B, S, memory_features], once for all the steps that ask it."""
        checks.features("DecoderAttention", "memory", memory, self.memory_features)
        return prepare(self._functions()[0], memory)

    def __call__(
        self, state: Array, memory: Array | Source, mask: Any = None
    ) -> tuple[Array, Array]:
        """Attend to the source, as `attention_jax.nnx.DecoderAttention` does."""
        checks.features("DecoderAttention", "state", state, self.state_features)
        score, normalizer = self._functions()
        source = memory if isinstance(memory, Source) else self.keys(memory)
        context, weights = read(score, state, source, mask, normalizer)
        return context.astype(self.dtype or state.dtype), weights


class AdditiveAttention(DecoderAttention, kw_only=True):
    r"""Additive attention of a decoder: e_tj = v^T tanh(W_q s_t + W_k h_j + b).

    `DecoderAttention` with the additive score; the other fields and results are the same.

    Bahdanau, Cho and Bengio 2015, section 3.1 and appendix A.1.2 ("RNNsearch").

    >>> attention = AdditiveAttention(8, 16, attention_size=4)
    >>> variables = attention.init(jax.random.key(0), jnp.ones((2, 8)), jnp.ones((2, 5, 16)))
    >>> variables["params"]["score"]["key_weight"].shape
    (16, 4)
    """

    score: Any = scores.additive


class GlobalAttention(nn.Module):
    r"""Luong's global attention: h~_t = tanh(W_c [c_t; s_t]), c_t as in `DecoderAttention`.

    The twin of `attention_jax.nnx.GlobalAttention`, where its fields are described; `options`
    are fields of `DecoderAttention`.

    Luong, Pham and Manning 2015, equations 5, 7 and 8.

    >>> attention = GlobalAttention(scores.dot, 8, 8)
    >>> state, memory = jnp.ones((2, 8)), jnp.ones((2, 5, 8))
    >>> (vector, weights), _ = attention.init_with_output(jax.random.key(0), state, memory)
    >>> vector.shape, weights.shape
    ((2, 8), (2, 5))
    """

    score: Any
    state_features: int
    memory_features: int
    out_features: int | None = None
    kernel_init: Initializer = luong_uniform
    dtype: Any = None
    param_dtype: Any = jnp.float32
    options: Mapping[str, Any] | None = None

    def setup(self) -> None:
        numbers = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.attention = DecoderAttention(
            self.score, self.state_features, self.memory_features, **numbers, **(self.options or {})
        )
        self.combine = nn.Dense(
            self.out_features or self.state_features,
            use_bias=False,
            kernel_init=self.kernel_init,
            **numbers,
        )

    def keys(self, memory: Array) -> Source:
        """Prepare a source [B, S, memory_features], once for all the steps that ask it."""
        return self.attention.keys(memory)

    def __call__(
        self, state: Array, memory: Array | Source, mask: Any = None
    ) -> tuple[Array, Array]:
        """Return the attentional vector [B, out_features] and the weights [B, S]."""
        context, weights = self.attention(state, memory, mask)
        return jnp.tanh(self.combine(jnp.concatenate([context, state], axis=-1))), weights
