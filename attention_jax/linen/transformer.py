"""Transformer layers: feed-forward, block, stack, and the embedding of tokens and positions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers as standard

from attention_jax.base import checks
from attention_jax.base.parameters import Initializer
from attention_jax.layers import transformer
from attention_jax.linen.bound import Bound
from attention_jax.linen.multi_head import MultiHeadAttention

Array = jax.Array


class FeedForward(nn.Module):
    r"""Two layers at each position: f(x W_1 + b_1) W_2 + b_2.

    The twin of `attention_jax.nnx.FeedForward`, where its fields are described.

    Vaswani et al. 2017, equation 2.

    >>> FeedForward(8).init_with_output(jax.random.key(0), jnp.ones((2, 5, 8)))[0].shape
    (2, 5, 8)
    """

    features: int
    _: dataclasses.KW_ONLY
    hidden_features: int | None = None
    activation: Callable[[Array], Array] = jax.nn.relu
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map [..., features] to [..., features]."""
        linear = functools.partial(
            nn.Dense,
            kernel_init=standard.glorot_uniform(),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        hidden_features = transformer.hidden_size(self.features, self.hidden_features)
        hidden = linear(hidden_features, name="hidden")(x)
        return linear(self.features, name="out")(self.activation(hidden))


class TransformerBlock(transformer.BlockMethods, nn.Module):
    r"""Self-attention, attention to a memory if there is one, feed-forward; each with a residual.

    The twin of `attention_jax.nnx.TransformerBlock`, where its fields are described; attentions
    are of `attention_jax.linen`, and the norm is
    `nn.LayerNorm` or `nn.RMSNorm`.

    Vaswani et al. 2017, sections 3.1 and 5.4; Xiong et al. 2020 (norm first).

    >>> block = TransformerBlock(8, 2)
    >>> block.init_with_output(jax.random.key(0), jnp.ones((2, 5, 8)))[0].shape
    (2, 5, 8)
    """

    features: int
    num_heads: int
    _: dataclasses.KW_ONLY
    hidden_features: int | None = None
    memory_features: int | None = None
    attention: Callable[..., Any] = MultiHeadAttention
    cross_attention: Callable[..., Any] = MultiHeadAttention
    norm: Callable[..., Any] = nn.LayerNorm
    norm_first: bool = True
    activation: Callable[[Array], Array] = jax.nn.relu
    dropout_rate: float = 0.0
    attention_dropout_rate: float | None = None
    deterministic: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    __call__ = transformer.BlockMethods.__call__

    @nn.compact
    def _layer(self, deterministic: bool | None = None) -> transformer.Block:
        """Return the computation with this module's parameters."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        rate = self.attention_dropout_rate
        rate = self.dropout_rate if rate is None else rate
        dropped = transformer.attention_dropout(rate, self.deterministic)
        sizes = (self.num_heads, self.features)
        cross_attention = cross_attention_norm = None
        if self.memory_features is not None:
            cross_attention = self.cross_attention(
                *sizes,
                memory_features=self.memory_features,
                **dropped,
                **dtypes,
                name="cross_attention",
            )
            cross_attention_norm = self.norm(**dtypes, name="cross_attention_norm")
        deterministic = self.deterministic if deterministic is None else deterministic
        return transformer.Block(
            attention=self.attention(*sizes, **dropped, **dtypes, name="attention"),
            attention_norm=self.norm(**dtypes, name="attention_norm"),
            cross_attention=cross_attention,
            cross_attention_norm=cross_attention_norm,
            feed_forward=FeedForward(
                self.features,
                hidden_features=self.hidden_features,
                activation=self.activation,
                **dtypes,
                name="feed_forward",
            ),
            feed_forward_norm=self.norm(**dtypes, name="feed_forward_norm"),
            dropout=nn.Dropout(self.dropout_rate, deterministic=deterministic, name="dropout"),
            norm_first=self.norm_first,
        )


class TransformerStack(transformer.StackMethods, nn.Module):
    """Blocks one above the other, with a last norm where blocks norm first.

    The twin of `attention_jax.nnx.TransformerStack`, where its fields are described; `options`
    are fields of `TransformerBlock`.

    Vaswani et al. 2017, figure 1; Chen et al. 2016 (remat: "sublinear memory cost").

    >>> stack = TransformerStack(2, 8, num_heads=2, options={"hidden_features": 16})
    >>> stack.init_with_output(jax.random.key(0), jnp.ones((2, 5, 8)))[0].shape
    (2, 5, 8)
    """

    num_layers: int
    features: int
    _: dataclasses.KW_ONLY
    num_heads: int
    remat: bool = False
    norm: Callable[..., Any] = nn.LayerNorm
    norm_first: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    options: Mapping[str, Any] | None = None

    __call__ = transformer.StackMethods.__call__

    @nn.compact
    def _layers(self) -> tuple[list[TransformerBlock], Any]:
        """Return the blocks, lowest first, and the last norm or None."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        options = {"norm": self.norm, "norm_first": self.norm_first, **(self.options or {})}
        checks.at_least("TransformerStack", 0, num_layers=self.num_layers)
        block = functools.partial(
            TransformerBlock, self.features, self.num_heads, **dtypes, **options
        )
        blocks = [block(name=f"block_{n}") for n in range(self.num_layers)]
        return blocks, self.norm(**dtypes, name="norm") if self.norm_first else None

    def _rematerialized(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        """Return `apply(block, x, memory)`, rematerialized where the module says so."""
        return nn.remat(apply) if self.remat else apply


class Embedding(nn.Module):
    """Tokens as vectors, with vectors of their positions added if there are any.

    The twin of `attention_jax.nnx.Embedding`, where its fields are described.

    Vaswani et al. 2017, sections 3.4, 3.5 and 5.4.

    >>> Embedding(10, 8).init_with_output(jax.random.key(0), jnp.array([[1, 2, 3]]))[0].shape
    (1, 3, 8)
    """

    vocabulary_size: int
    features: int
    _: dataclasses.KW_ONLY
    position: Any = None
    scale: float = 1.0
    dropout_rate: float = 0.0
    deterministic: bool = False
    embedding_init: Initializer = standard.normal(0.02)
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def _tables(self) -> tuple[nn.Embed, Any]:
        """Return the module of the tokens' vectors, and a function that returns the position."""
        sizes = {"vocabulary_size": self.vocabulary_size, "features": self.features}
        checks.sizes("Embedding", **sizes)
        token = nn.Embed(
            self.vocabulary_size,
            self.features,
            embedding_init=self.embedding_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="token",
        )
        if self.position is None:
            return token, None
        position = Bound(self.position, param_dtype=self.param_dtype, name="position")
        return token, position.resolve

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        deterministic: bool | None = None,
    ) -> Array:
        """Map tokens [B, T] at positions [T] or [B, T] to [B, T, features]."""
        token, position = self._tables()
        x = transformer.embed(token, tokens, self.scale, position and position(), positions)
        deterministic = self.deterministic if deterministic is None else deterministic
        return nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)

    def attend(self, x: Array) -> Array:
        """Return logits [..., vocabulary]: products with the tokens' vectors."""
        return self._tables()[0].attend(x)
