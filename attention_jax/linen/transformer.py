"""Transformer layers: feed-forward, block, stack, and the embedding of tokens and positions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers as standard

from attention_jax.base.parameters import Initializer
from attention_jax.layers import transformer
from attention_jax.layers.heads import Projected
from attention_jax.layers.transformer import Cache
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
        hidden = linear(self.hidden_features or 4 * self.features, name="hidden")(x)
        return linear(self.features, name="out")(self.activation(hidden))


class TransformerBlock(nn.Module):
    r"""Self-attention, attention to a memory if there is one, feed-forward; each with a residual.

    The twin of `attention_jax.nnx.TransformerBlock`, where its fields and the arguments of its
    methods are described; attentions are of `attention_jax.linen`, and the norm is
    `nn.LayerNorm` or `nn.RMSNorm`.

    Vaswani et al. 2017, sections 3.1 and 5.4; Xiong et al. 2020 (norm first).

    >>> block = TransformerBlock(8, 2)
    >>> block.init_with_output(jax.random.key(0), jnp.ones((2, 5, 8)))[0].shape
    (2, 5, 8)
    """

    features: int
    num_heads: int
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

    @nn.compact
    def _layer(self, deterministic: bool | None = None) -> transformer.TransformerBlock:
        """Return the computation with this module's parameters."""
        numbers = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        rate = self.attention_dropout_rate
        rate = self.dropout_rate if rate is None else rate
        dropped = transformer.dropout_options(rate, self.deterministic)
        sizes = (self.num_heads, self.features)
        cross_attention = cross_attention_norm = None
        if self.memory_features is not None:
            cross_attention = self.cross_attention(
                *sizes,
                memory_features=self.memory_features,
                **dropped,
                **numbers,
                name="cross_attention",
            )
            cross_attention_norm = self.norm(**numbers, name="cross_attention_norm")
        deterministic = self.deterministic if deterministic is None else deterministic
        return transformer.TransformerBlock(
            attention=self.attention(*sizes, **dropped, **numbers, name="attention"),
            attention_norm=self.norm(**numbers, name="attention_norm"),
            cross_attention=cross_attention,
            cross_attention_norm=cross_attention_norm,
            feed_forward=FeedForward(
                self.features,
                self.hidden_features,
                self.activation,
                **numbers,
                name="feed_forward",
            ),
            feed_forward_norm=self.norm(**numbers, name="feed_forward_norm"),
            dropout=nn.Dropout(self.dropout_rate, deterministic=deterministic, name="dropout"),
            norm_first=self.norm_first,
        )

    def __call__(
        self,
        x: Array,
        memory: Array | Projected | None = None,
        *,
        mask: Any = None,
        memory_mask: Any = None,
        deterministic: bool | None = None,
        **options: Any,
    ) -> Any:
        """Apply the block to [B, T, features], as the twin does."""
        layer = self._layer(deterministic)
        masks = {"mask": mask, "memory_mask": memory_mask}
        return layer(x, memory, **masks, deterministic=deterministic, **options)

    def keys(self, memory: Array) -> Projected:
        """Project a memory [B, S, memory_features] once, for all the calls that attend to it."""
        return self._layer().cross_attention.keys(memory)

    def init_cache(self, batch: int, capacity: int, **options: Any) -> Cache:
        """Return an empty cache for `decode`; see `attention_jax.cache.init`."""
        return self._layer().init_cache(batch, capacity, **options)

    def decode(
        self,
        x: Array,
        cache: Cache,
        memory: Array | Projected | None = None,
        *,
        mask: Any = None,
        memory_mask: Any = None,
        count: Any = None,
    ) -> tuple[Array, Cache]:
        """Apply the block to the next tokens [B, T, features] of a sequence, as the twin does."""
        options = {"mask": mask, "memory_mask": memory_mask, "count": count}
        return self._layer(deterministic=True).decode(x, cache, memory, **options)


class TransformerStack(nn.Module):
    """Blocks one above the other, with a last norm where blocks norm first.

    The twin of `attention_jax.nnx.TransformerStack`, where its fields are described; `options`
    are fields of `TransformerBlock`.

    Vaswani et al. 2017, figure 1; Chen et al. 2016 (remat: "sublinear memory cost").

    >>> stack = TransformerStack(2, 8, 2, options={"hidden_features": 16})
    >>> stack.init_with_output(jax.random.key(0), jnp.ones((2, 5, 8)))[0].shape
    (2, 5, 8)
    """

    num_layers: int
    features: int
    num_heads: int
    remat: bool = False
    norm: Callable[..., Any] = nn.LayerNorm
    norm_first: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    options: Mapping[str, Any] | None = None

    @nn.compact
    def _layers(self) -> tuple[list[TransformerBlock], Any]:
        """Return the blocks, lowest first, and the last norm or None."""
        numbers = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        options = {"norm": self.norm, "norm_first": self.norm_first, **(self.options or {})}
        block = functools.partial(
            TransformerBlock, self.features, self.num_heads, **numbers, **options
        )
        blocks = [block(name=f"block_{n}") for n in range(self.num_layers)]
        return blocks, self.norm(**numbers, name="norm") if self.norm_first else None

    def __call__(self, x: Array, memory: Any = None, **options: Any) -> Any:
        """Apply the blocks to [B, T, features], as the twin does."""

        def apply(block: TransformerBlock, x: Array, memory: Any) -> Any:
            return block(x, memory, **options)

        apply = nn.remat(apply) if self.remat else apply
        blocks, norm = self._layers()
        return transformer.one_after_another(apply, blocks, x, memory, norm)

    def keys(self, memory: Array) -> list[Projected]:
        """Project a memory [B, S, memory_features] for every block, once for all calls."""
        return [block.keys(memory) for block in self._layers()[0]]

    def init_cache(self, batch: int, capacity: int, **options: Any) -> list[Cache]:
        """Return an empty cache for every block; see `attention_jax.cache.init`."""
        return [block.init_cache(batch, capacity, **options) for block in self._layers()[0]]

    def decode(
        self, x: Array, caches: Sequence[Cache], memory: Any = None, **options: Any
    ) -> tuple[Array, list[Cache]]:
        """Apply the blocks to the next tokens; options are those of a block's `decode`."""
        blocks, norm = self._layers()
        return transformer.decoded_one_after_another(blocks, x, caches, memory, norm, **options)


class Embedding(nn.Module):
    """Tokens as vectors, and with what is added to say where they stand.

    The twin of `attention_jax.nnx.Embedding`, where its fields are described.

    Vaswani et al. 2017, sections 3.4, 3.5 and 5.4.

    >>> Embedding(10, 8).init_with_output(jax.random.key(0), jnp.array([[1, 2, 3]]))[0].shape
    (1, 3, 8)
    """

    vocabulary: int
    features: int
    position: Any = None
    scale: float = 1.0
    dropout_rate: float = 0.0
    deterministic: bool = False
    embedding_init: Initializer = standard.normal(0.02)
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def _tables(self) -> tuple[nn.Embed, Any]:
        """Return the module of the tokens' vectors and what returns the position, or None."""
        token = nn.Embed(
            self.vocabulary,
            self.features,
            embedding_init=self.embedding_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="token",
        )
        if self.position is None:
            return token, None
        position = Bound(self.position, param_dtype=self.param_dtype, name="position")
        return token, position._function

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        deterministic: bool | None = None,
    ) -> Array:
        """Map tokens [B, T], standing at positions [T] or [B, T], to [B, T, features]."""
        token, position = self._tables()
        x = transformer.embed(token, tokens, self.scale, position and position(), positions)
        deterministic = self.deterministic if deterministic is None else deterministic
        return nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)

    def attend(self, x: Array) -> Array:
        """Return logits [..., vocabulary]: products with the tokens' vectors."""
        return self._tables()[0].attend(x)
