"""Transformer layers: feed-forward, block, stack, and the embedding of tokens and positions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers as standard

from attention_jax.base import checks
from attention_jax.base.parameters import Initializer
from attention_jax.layers import embedding, transformer
from attention_jax.layers.options import (
    BlockOptions,
    Norms,
    StackOptions,
    attention_options,
    feed_forward_options,
    norms_of,
    options_of_last_norm,
    options_of_layers,
)
from attention_jax.linen.bound import Bound
from attention_jax.linen.multi_head import MultiHeadAttention

Array = jax.Array
LAYER_NORM = functools.partial(nn.LayerNorm, use_fast_variance=False)


class FeedForward(nn.Module):
    r"""Two layers at each position: f(x W_1 + b_1) W_2 + b_2.

    The twin of `attention_jax.nnx.FeedForward`, where its fields are described.

    Vaswani et al. 2017, equation 2; Shazeer 2020, equation 5 (gated).

    >>> FeedForward(8).init_with_output(jax.random.key(0), jnp.ones((2, 5, 8)))[0].shape
    (2, 5, 8)
    """

    features: int
    _: dataclasses.KW_ONLY
    hidden_features: int | None = None
    activation: Callable[[Array], Array] = jax.nn.relu
    gated: bool = False
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map [..., features] to [..., features]."""
        linear = functools.partial(
            nn.Dense,
            use_bias=self.use_bias,
            kernel_init=standard.glorot_uniform(),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        hidden_features = transformer.hidden_size(self.features, self.hidden_features)
        hidden = linear(hidden_features, name="hidden")
        gate = linear(hidden_features, name="gate") if self.gated else None
        out = linear(self.features, name="out")
        return transformer.feed_forward(x, hidden, gate, out, self.activation)


class TransformerBlock(transformer.BlockMethods, nn.Module, BlockOptions):
    r"""Self-attention, attention to a memory if there is one, feed-forward; each with a residual.

    The twin of `attention_jax.nnx.TransformerBlock`, where its fields are described; attentions
    and feed-forward layers are of `attention_jax.linen`, and the norm is `nn.LayerNorm` or
    `nn.RMSNorm`.

    Vaswani et al. 2017, sections 3.1 and 5.4; Xiong et al. 2020 (norm before).

    >>> block = TransformerBlock(8, 2)
    >>> block.init_with_output(jax.random.key(0), jnp.ones((2, 5, 8)))[0].shape
    (2, 5, 8)
    """

    features: int
    num_heads: int

    __call__ = transformer.BlockMethods.__call__

    @nn.compact
    def _layer(self, deterministic: bool | None = None) -> transformer.Block:
        """Return the computation with this module's parameters."""
        placed = norms_of(self)
        checks.sizes("TransformerBlock", memory_features=self.memory_features)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dropped = attention_options(self)
        deterministic = self.deterministic if deterministic is None else deterministic
        dropout = nn.Dropout(self.dropout_rate, deterministic=deterministic, name="dropout")
        norm = functools.cache(functools.partial(self._norm, dtypes))

        sublayer = functools.partial(_sublayer, placed, norm, dropout)
        sizes, cross_attention = (self.num_heads, self.features), None
        options = {**dropped, **dtypes}
        if self.memory_features is not None:
            cross_attention = sublayer(
                self.cross_attention or MultiHeadAttention,
                *sizes,
                memory_features=self.memory_features,
                name="cross_attention",
                **options,
            )
        attention = self.attention or MultiHeadAttention
        feed_forward = self.feed_forward or FeedForward
        return transformer.Block(
            attention=sublayer(attention, *sizes, name="attention", **options),
            cross_attention=cross_attention,
            feed_forward=sublayer(
                feed_forward,
                self.features,
                name="feed_forward",
                **feed_forward_options(self),
                **dtypes,
            ),
            parallel=self.parallel,
        )

    def _norm(self, dtypes: dict[str, Any], where: str, name: str) -> Any:
        """Return a norm with a name, inside of a compact method."""
        own = self.branch_norm if where == "branch" else None
        return (own or self.norm or LAYER_NORM)(**dtypes, name=name)


def _sublayer(
    placed: Norms,
    norm: Callable[[str, str], Any],
    dropout: Any,
    build: Any,
    *sizes: Any,
    name: str,
    **options: Any,
) -> transformer.Sublayer:
    """Return a layer with its norms, of which `norm` makes each name once."""
    norms = {where: norm(where, own) for where, own in placed.names(name).items()}
    return transformer.Sublayer(build(*sizes, name=name, **options), dropout, **norms)


class TransformerStack(transformer.StackMethods, nn.Module, StackOptions):
    """Blocks one above the other, with a last norm unless each block ends with one ("after").

    The twin of `attention_jax.nnx.TransformerStack`, where its fields are described.

    Vaswani et al. 2017, figure 1; Chen et al. 2016 (remat).

    >>> stack = TransformerStack(2, 8, num_heads=2, hidden_features=16)
    >>> stack.init_with_output(jax.random.key(0), jnp.ones((2, 5, 8)))[0].shape
    (2, 5, 8)
    """

    num_layers: int
    features: int
    _: dataclasses.KW_ONLY
    num_heads: int

    __call__ = transformer.StackMethods.__call__

    @nn.compact
    def _stack(self) -> transformer.Stack:
        """Return the blocks, the last norm and the shared bias with this module's parameters."""
        checks.at_least("TransformerStack", 0, num_layers=self.num_layers)
        options = options_of_layers(self, self.num_heads, self.num_layers)
        blocks = [
            TransformerBlock(self.features, **own, name=f"block_{n}")
            for n, own in enumerate(options)
        ]
        blocks = blocks * self.num_layers if self.share_layers else blocks
        norm = bias = None
        last = options_of_last_norm(self, options)
        if last is not None:
            norm = (last[0] or LAYER_NORM)(**last[1], name="norm")
        if self.shared_bias is not None:
            each_head = {"num_heads": self.num_heads, "param_dtype": self.param_dtype}
            bias = Bound(self.shared_bias, **each_head, name="bias").resolve()
        return transformer.Stack(blocks, norm, bias)

    def _rematerialized(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        """Return `apply(block, x, memory)`, rematerialized where the module says so."""
        return nn.remat(apply) if self.remat else apply


class Embedding(nn.Module):
    """Tokens as vectors, with vectors of their positions and types added if there are any.

    The twin of `attention_jax.nnx.Embedding`, where its fields are described.

    Vaswani et al. 2017, sections 3.4, 3.5 and 5.4; Devlin et al. 2019, figure 2 (types).

    >>> Embedding(10, 8).init_with_output(jax.random.key(0), jnp.array([[1, 2, 3]]))[0].shape
    (1, 3, 8)
    """

    vocabulary_size: int
    features: int
    _: dataclasses.KW_ONLY
    position: Any = None
    scale: float = 1.0
    num_types: int | None = None
    norm: Callable[..., Any] | None = None
    table_features: int | None = None
    tokens: Embedding | None = None
    dropout_rate: float = 0.0
    deterministic: bool = False
    embedding_init: Initializer = standard.normal(0.02)
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def _table(self, name: str, size: int) -> nn.Embed:
        """Return the vectors of tokens or of types."""
        return nn.Embed(
            size,
            self._width,
            embedding_init=self.embedding_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    @property
    def _width(self) -> int:
        """The features of all tables."""
        return checks.size_or(self.features, "Embedding", table_features=self.table_features)

    @nn.compact
    def _tokens(self) -> nn.Embed:
        """Return the tokens' vectors, which may be those of another embedding."""
        if self.tokens is None:
            return self._table("token", self.vocabulary_size)
        own = self.tokens._tokens()
        needed = self.vocabulary_size, self._width
        embedding.check_tokens((own.num_embeddings, own.features), needed)
        return own

    @nn.compact
    def _embedder(self) -> embedding.Embedder:
        """Return the computation with this module's parameters."""
        sizes = {"vocabulary_size": self.vocabulary_size, "features": self.features}
        checks.sizes("Embedding", **sizes, num_types=self.num_types)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        position = None
        if self.position is not None:
            position = embedding.position_of_depth(self.position, self._width)
            position = Bound(position, param_dtype=self.param_dtype, name="position").resolve()
        return embedding.Embedder(
            token=self._tokens(),
            scale=self.scale,
            token_type=self._table("token_type", self.num_types) if self.num_types else None,
            position=position,
            norm=self.norm(**dtypes, name="norm") if self.norm else None,
            projection=self._projection(),
        )

    def _projection(self) -> nn.Dense | None:
        """Return the map from the tables' features to those of the result, if there is one."""
        if self.table_features is None:
            return None
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return nn.Dense(self.features, **dtypes, name="projection")

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        deterministic: bool | None = None,
        *,
        types: Array | None = None,
    ) -> Array:
        """Map tokens [B, T] at positions [T] or [B, T] to [B, T, features], as the twin does."""
        x = self._embedder()(tokens, positions, types)
        deterministic = self.deterministic if deterministic is None else deterministic
        return nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)

    def attend(self, x: Array) -> Array:
        """Return logits [..., vocabulary]: products with the tokens' vectors, as the twin does."""
        embedding.check_tied(self.table_features)
        return self._tokens().attend(x)
