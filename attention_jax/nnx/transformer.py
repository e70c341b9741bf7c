"""Transformer layers: feed-forward, block, stack, and the embedding of tokens and positions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers as standard

from attention_jax.base import checks
from attention_jax.base.parameters import Initializer
from attention_jax.layers import transformer
from attention_jax.nnx.bound import Bound, held
from attention_jax.nnx.multi_head import MultiHeadAttention

Array = jax.Array


class FeedForward(nnx.Module):
    r"""Two layers at each position: f(x W_1 + b_1) W_2 + b_2.

    Args:
      features: D, of input and result.
      hidden_features: between the layers; 4 D unless given.
      activation: f; ReLU as in the paper, GELU in BERT, GPT and ViT.
      dtype: of the computation.
      param_dtype: of the parameters.
      rngs: the stream `params` draws the parameters.

    Vaswani et al. 2017, equation 2.

    >>> FeedForward(8, rngs=nnx.Rngs(0))(jnp.ones((2, 5, 8))).shape
    (2, 5, 8)
    """

    def __init__(
        self,
        features: int,
        *,
        hidden_features: int | None = None,
        activation: Callable[[Array], Array] = jax.nn.relu,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        linear = functools.partial(
            nnx.Linear,
            kernel_init=standard.glorot_uniform(),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        hidden_features = transformer.hidden_size(features, hidden_features)
        self.hidden = linear(features, hidden_features)
        self.out = linear(hidden_features, features)
        self.activation = held(activation)

    def __call__(self, x: Array) -> Array:
        """Map [..., features] to [..., features]."""
        return self.out(self.activation(self.hidden(x)))


class TransformerBlock(transformer.BlockMethods, nnx.Module):
    r"""Self-attention, attention to a memory if there is one, feed-forward; each with a residual.

    y = x + f(norm(x)) with `norm_first`, else y = norm(x + f(x)) as in the paper.

    Args:
      features: D.
      num_heads: N.
      hidden_features: of the feed-forward layer; 4 D unless given.
      memory_features: of the memory that a decoder attends to; None for a block without.
      attention: builds the self-attention; `functools.partial(MultiHeadAttention, score=...)` for
        any score, bias, position or normalizer. Where no dropout is asked for, any layer called
        as `attention(x, mask=...)` will do.
      cross_attention: builds the attention to the memory.
      norm: `nnx.LayerNorm` or `nnx.RMSNorm`.
      norm_first: where the norms are.
      activation: of the feed-forward layer.
      dropout_rate: of attention weights and of what each sublayer adds.
      attention_dropout_rate: of attention weights, where it is another.
      deterministic: True leaves dropout out; `model.train()` and `model.eval()` set it.
      dtype: of the computation.
      param_dtype: of the parameters.
      rngs: the stream `params` draws the parameters, the stream `dropout` what is dropped.

    Vaswani et al. 2017, sections 3.1 and 5.4; Xiong et al. 2020 (norm first).

    >>> block = TransformerBlock(8, 2, rngs=nnx.Rngs(0))
    >>> block(jnp.ones((2, 5, 8))).shape
    (2, 5, 8)
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        hidden_features: int | None = None,
        memory_features: int | None = None,
        attention: Callable[..., Any] = MultiHeadAttention,
        cross_attention: Callable[..., Any] = MultiHeadAttention,
        norm: Callable[..., Any] = nnx.LayerNorm,
        norm_first: bool = True,
        activation: Callable[[Array], Array] = jax.nn.relu,
        dropout_rate: float = 0.0,
        attention_dropout_rate: float | None = None,
        deterministic: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        rate = dropout_rate if attention_dropout_rate is None else attention_dropout_rate
        dropped = transformer.attention_dropout(rate, deterministic)
        self.attention = attention(num_heads, features, **dropped, **dtypes)
        self.attention_norm = norm(features, **dtypes)
        self.cross_attention = self.cross_attention_norm = nnx.data(None)
        if memory_features is not None:
            self.cross_attention = cross_attention(
                num_heads, features, memory_features=memory_features, **dropped, **dtypes
            )
            self.cross_attention_norm = norm(features, **dtypes)
        self.feed_forward = FeedForward(
            features, hidden_features=hidden_features, activation=activation, **dtypes
        )
        self.feed_forward_norm = norm(features, **dtypes)
        self.dropout = dropout_of(dropout_rate, deterministic, rngs)
        self.norm_first = norm_first

    def _layer(self, deterministic: bool | None = None) -> transformer.Block:
        """Return the computation with this module's parameters."""
        return transformer.Block(
            attention=self.attention,
            attention_norm=self.attention_norm,
            cross_attention=self.cross_attention,
            cross_attention_norm=self.cross_attention_norm,
            feed_forward=self.feed_forward,
            feed_forward_norm=self.feed_forward_norm,
            dropout=functools.partial(self.dropout, deterministic=deterministic),
            norm_first=self.norm_first,
        )


class TransformerStack(transformer.StackMethods, nnx.Module):
    """Blocks one above the other, with a last norm where blocks norm first.

    Args:
      num_layers: how many.
      features: D.
      num_heads: N.
      remat: keep only the input of each block for the backward pass, and compute the rest again;
        on a CPU what XLA compiles is then slower, and no smaller.
      norm: as in `TransformerBlock`.
      norm_first: as in `TransformerBlock`.
      dtype: of the computation.
      param_dtype: of the parameters.
      rngs: as in `TransformerBlock`.
      **options: of `TransformerBlock`.

    Vaswani et al. 2017, figure 1; Chen et al. 2016 (remat: "sublinear memory cost").

    >>> stack = TransformerStack(2, 8, num_heads=2, rngs=nnx.Rngs(0))
    >>> stack(jnp.ones((2, 5, 8))).shape
    (2, 5, 8)
    """

    def __init__(
        self,
        num_layers: int,
        features: int,
        *,
        num_heads: int,
        remat: bool = False,
        norm: Callable[..., Any] = nnx.LayerNorm,
        norm_first: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        options = {"norm": norm, "norm_first": norm_first, **dtypes, **options}
        checks.at_least("TransformerStack", 0, num_layers=num_layers)
        for n in range(num_layers):
            setattr(self, f"block_{n}", TransformerBlock(features, num_heads, **options))
        self.norm = norm(features, **dtypes) if norm_first else nnx.data(None)
        self.num_layers = num_layers
        self.remat = remat

    @property
    def blocks(self) -> list[TransformerBlock]:
        """The blocks, lowest first."""
        return [getattr(self, f"block_{n}") for n in range(self.num_layers)]

    def _layers(self) -> tuple[list[TransformerBlock], Any]:
        """Return the blocks, lowest first, and the last norm or None."""
        return self.blocks, self.norm

    def _rematerialized(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        """Return `apply(block, x, memory)`, rematerialized where the module says so."""
        return nnx.remat(apply) if self.remat else apply


class Embedding(nnx.Module):
    """Tokens as vectors, with vectors of their positions added if there are any.

    Other kinds of position belong to the attention: `position`, `bias` or `score` there.

    Args:
      vocabulary_size: how many tokens there are.
      features: D.
      position: `position(positions [T]) -> [T, D]`, such as
        `functools.partial(positions.sinusoidal, depth=D)` or `positions.learned_table(L, D)`;
        None adds nothing.
      scale: of the tokens' vectors; the paper has sqrt(D).
      dropout_rate: of the sum.
      deterministic: True leaves dropout out; `model.train()` and `model.eval()` set it.
      embedding_init: of the tokens' vectors.
      dtype: of the result.
      param_dtype: of the parameters.
      rngs: the stream `params` draws the parameters, the stream `dropout` what is dropped.

    Vaswani et al. 2017, sections 3.4, 3.5 and 5.4.

    >>> Embedding(10, 8, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])).shape
    (1, 3, 8)
    """

    def __init__(
        self,
        vocabulary_size: int,
        features: int,
        *,
        position: Any = None,
        scale: float = 1.0,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        embedding_init: Initializer = standard.normal(0.02),  # noqa: B008
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        checks.sizes("Embedding", vocabulary_size=vocabulary_size, features=features)
        self.token = nnx.Embed(
            vocabulary_size,
            features,
            embedding_init=embedding_init,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.position = nnx.data(None)
        if position is not None:
            self.position = Bound(position, param_dtype=param_dtype, rngs=rngs)
        self.scale = scale
        self.dropout = dropout_of(dropout_rate, deterministic, rngs)

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        deterministic: bool | None = None,
    ) -> Array:
        """Map tokens [B, T] at positions [T] or [B, T] to [B, T, features]."""
        position = None if self.position is None else self.position.resolved
        x = transformer.embed(self.token, tokens, self.scale, position, positions)
        return self.dropout(x, deterministic=deterministic)

    def attend(self, x: Array) -> Array:
        """Return logits [..., vocabulary]: products with the tokens' vectors."""
        return self.token.attend(x)


def dropout_of(rate: float, deterministic: bool, rngs: nnx.Rngs) -> nnx.Dropout:
    """Return a dropout that needs the stream `dropout` only where it drops something."""
    return nnx.Dropout(rate, deterministic=deterministic, rngs=rngs if rate else None)
