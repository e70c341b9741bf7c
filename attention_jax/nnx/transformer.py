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
from attention_jax.layers import embedding, transformer
from attention_jax.layers.options import (
    BlockOptions,
    StackOptions,
    attention_options,
    feed_forward_options,
    norms_of,
    options_of,
    options_of_last_norm,
    options_of_layers,
)
from attention_jax.nnx.bound import Bound, held
from attention_jax.nnx.multi_head import MultiHeadAttention

Array = jax.Array
LAYER_NORM = functools.partial(nnx.LayerNorm, use_fast_variance=False)


class FeedForward(nnx.Module):
    r"""Two layers at each position: f(x W_1 + b_1) W_2 + b_2.

    Gated: (f(x G + c) * (x W_1 + b_1)) W_2 + b_2.

    Args:
      features: D, of input and result.
      hidden_features: between the layers; 4 D unless given.
      activation: f; ReLU as in the paper, GELU in BERT, GPT and ViT.
      gated: multiply by f of a third layer G; SwiGLU with `jax.nn.silu`.
      use_bias: False leaves out b_1, b_2 and c.
      dtype: of the computation.
      param_dtype: of the parameters.
      rngs: the stream `params` draws the parameters.

    Vaswani et al. 2017, equation 2; Shazeer 2020, equation 5 (gated).

    >>> FeedForward(8, rngs=nnx.Rngs(0))(jnp.ones((2, 5, 8))).shape
    (2, 5, 8)
    """

    def __init__(
        self,
        features: int,
        *,
        hidden_features: int | None = None,
        activation: Callable[[Array], Array] = jax.nn.relu,
        gated: bool = False,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        linear = functools.partial(
            nnx.Linear,
            use_bias=use_bias,
            kernel_init=standard.glorot_uniform(),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        hidden_features = transformer.hidden_size(features, hidden_features)
        self.hidden = linear(features, hidden_features)
        self.out = linear(hidden_features, features)
        self.gate = linear(features, hidden_features) if gated else nnx.data(None)
        self.activation = held(activation)

    def __call__(self, x: Array) -> Array:
        """Map [..., features] to [..., features]."""
        return transformer.feed_forward(x, self.hidden, self.gate, self.out, self.activation)


class TransformerBlock(transformer.BlockMethods, nnx.Module):
    r"""Self-attention, attention to a memory if there is one, feed-forward; each with a residual.

    y = x + f(norm(x)), or with the norm in another place: `norm_placement`.

    Args:
      features: D.
      num_heads: N.
      rngs: the stream `params` draws the parameters, the stream `dropout` what is dropped.
      **options: of `attention_jax.layers.BlockOptions`: hidden_features, memory_features,
        attention, cross_attention, feed_forward, norm, norm_placement, branch_norm, parallel,
        share_norm, activation, dropout_rate, attention_dropout_rate, sequence_axis, deterministic,
        dtype and param_dtype.

    Raises:
      TypeError: there is no option of a name.
      ValueError: an unknown placement, or sizes that do not fit.

    Vaswani et al. 2017, sections 3.1 and 5.4; Xiong et al. 2020 (norm before).

    >>> block = TransformerBlock(8, 2, rngs=nnx.Rngs(0))
    >>> block(jnp.ones((2, 5, 8))).shape
    (2, 5, 8)
    """

    def __init__(self, features: int, num_heads: int, *, rngs: nnx.Rngs, **options: Any):
        given = options_of(BlockOptions, "TransformerBlock", options)
        self.norms = norms_of(given)
        checks.sizes("TransformerBlock", memory_features=given.memory_features)
        dtypes: dict[str, Any] = {
            "dtype": given.dtype,
            "param_dtype": given.param_dtype,
            "rngs": rngs,
        }
        dropped = attention_options(given)
        self.parallel = given.parallel
        self.memory_features = given.memory_features
        attention = given.attention or MultiHeadAttention
        self.attention = attention(num_heads, features, **dropped, **dtypes)
        self._add_norms("attention", given, features, dtypes)
        self.cross_attention = nnx.data(None)
        if given.memory_features is not None:
            cross_attention = given.cross_attention or MultiHeadAttention
            self.cross_attention = cross_attention(
                num_heads, features, memory_features=given.memory_features, **dropped, **dtypes
            )
            self._add_norms("cross_attention", given, features, dtypes)
        feed_forward = given.feed_forward or FeedForward
        self.feed_forward = feed_forward(features, **feed_forward_options(given), **dtypes)
        self._add_norms("feed_forward", given, features, dtypes)
        self.dropout = dropout_of(given.dropout_rate, given.deterministic, rngs)

    def _add_norms(self, sublayer: str, given: BlockOptions, features: int, dtypes: Any) -> None:
        norm = given.norm or LAYER_NORM
        for where, name in self.norms.names(sublayer).items():
            build = (given.branch_norm or norm) if where == "branch" else norm
            if not hasattr(self, name):
                setattr(self, name, build(features, **dtypes))

    def _layer(self, deterministic: bool | None = None) -> transformer.Block:
        """Return the computation with this module's parameters."""
        dropout = functools.partial(self.dropout, deterministic=deterministic)
        own = functools.partial(self._sublayer, dropout)
        return transformer.Block(
            attention=own("attention"),
            cross_attention=None if self.cross_attention is None else own("cross_attention"),
            feed_forward=own("feed_forward"),
            parallel=self.parallel,
        )

    def _sublayer(self, dropout: Callable[[Array], Array], name: str) -> transformer.Sublayer:
        norms = {where: getattr(self, norm) for where, norm in self.norms.names(name).items()}
        return transformer.Sublayer(getattr(self, name), dropout, **norms)


class TransformerStack(transformer.StackMethods, nnx.Module):
    """Blocks one above the other, with a last norm unless each block ends with one ("after").

    Args:
      num_layers: how many.
      features: D.
      num_heads: N.
      rngs: as in `TransformerBlock`.
      **options: of `attention_jax.layers.StackOptions`: remat, shared_bias, share_layers, and those
        of a block (`attention_jax.layers.BlockOptions`), for all layers or for each.

    Raises:
      TypeError: there is no option of a name.
      ValueError: a list or tuple that does not have one entry for each layer.

    Vaswani et al. 2017, figure 1; Chen et al. 2016 (remat).

    >>> stack = TransformerStack(2, 8, num_heads=2, rngs=nnx.Rngs(0))
    >>> stack(jnp.ones((2, 5, 8))).shape
    (2, 5, 8)
    """

    def __init__(
        self, num_layers: int, features: int, *, num_heads: int, rngs: nnx.Rngs, **options: Any
    ):
        given = options_of(StackOptions, "TransformerStack", options)
        checks.at_least("TransformerStack", 0, num_layers=num_layers)
        blocks = options_of_layers(given, num_heads, num_layers)
        for n, own in enumerate(blocks):
            setattr(self, f"block_{n}", TransformerBlock(features, **own, rngs=rngs))
        last = options_of_last_norm(given, blocks)
        self.norm = nnx.data(None)
        if last is not None:
            norm, dtypes = last
            self.norm = (norm or LAYER_NORM)(features, **dtypes, rngs=rngs)
        self.bias = nnx.data(None)
        if given.shared_bias is not None:
            self.bias = Bound(
                given.shared_bias,
                num_heads=num_heads,
                param_dtype=given.param_dtype,
                rngs=rngs,
            )
        self.num_layers = num_layers
        self.remat = given.remat
        self.share_layers = given.share_layers

    @property
    def blocks(self) -> list[TransformerBlock]:
        """The blocks, lowest first."""
        numbers = [0] * self.num_layers if self.share_layers else range(self.num_layers)
        return [getattr(self, f"block_{n}") for n in numbers]

    def _stack(self) -> transformer.Stack:
        """Return the blocks, the last norm and the shared bias with this module's parameters."""
        bias = None if self.bias is None else self.bias.resolved
        return transformer.Stack(self.blocks, self.norm, bias)

    def _rematerialized(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        """Return `apply(block, x, memory)`, rematerialized where the module says so."""
        return nnx.remat(apply) if self.remat else apply


class Embedding(nnx.Module):
    """Tokens as vectors, with vectors of their positions and types added if there are any.

    Other kinds of position belong to the attention: `position`, `bias` or `score` there.

    Args:
      vocabulary_size: how many tokens there are.
      features: D.
      position: `position(positions [T]) -> [T, D]`, such as
        `positions.sinusoidal` or `positions.learned_table(L, D)`; None adds nothing.
      scale: of the tokens' vectors; the paper has sqrt(D).
      num_types: how many types of token there are (BERT's segments); None for none.
      norm: Flax's `LayerNorm` or `RMSNorm`, of the sum; None for none.
      table_features: of all tables and the norm, D unless given; where it is, a linear layer maps
        the normed sum to D, and logits need a head.
      tokens: another embedding, whose tokens' vectors are also those of this one.
      dropout_rate: of the result.
      deterministic: True leaves dropout out; `model.train()` and `model.eval()` set it.
      embedding_init: of the tokens' vectors.
      dtype: of the result.
      param_dtype: of the parameters.
      rngs: the stream `params` draws the parameters, the stream `dropout` what is dropped.

    Raises:
      ValueError: a size below 1, or the tokens of an embedding of other sizes.

    Vaswani et al. 2017, sections 3.4 (also shared tokens), 3.5 and 5.4; Devlin et al. 2019,
    figure 2 (types); Lan et al. 2020 (ALBERT), section 3.1 (smaller tables).

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
        num_types: int | None = None,
        norm: Callable[..., Any] | None = None,
        table_features: int | None = None,
        tokens: Embedding | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        embedding_init: Initializer = standard.normal(0.02),  # noqa: B008
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        sizes = {"vocabulary_size": vocabulary_size, "features": features}
        checks.sizes("Embedding", **sizes, num_types=num_types)
        width = checks.size_or(features, "Embedding", table_features=table_features)
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        table = functools.partial(
            nnx.Embed, features=width, embedding_init=embedding_init, **dtypes
        )
        if tokens is None:
            self.token = table(vocabulary_size)
        else:
            own = tokens.token
            embedding.check_tokens((own.num_embeddings, own.features), (vocabulary_size, width))
            self.token = own
        self.position = self.token_type = self.norm = self.projection = nnx.data(None)
        if position is not None:
            position = embedding.position_of_depth(position, width)
            self.position = Bound(position, param_dtype=param_dtype, rngs=rngs)
        if num_types is not None:
            self.token_type = table(num_types)
        if norm is not None:
            self.norm = norm(width, **dtypes)
        if table_features is not None:
            self.projection = nnx.Linear(width, features, **dtypes)
        self.scale = scale
        self.dropout_rate = dropout_rate
        self.dropout = dropout_of(dropout_rate, deterministic, rngs)

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        deterministic: bool | None = None,
        *,
        types: Array | None = None,
    ) -> Array:
        """Map tokens [B, T] at positions [T] or [B, T] to [B, T, features].

        `types` [B, T] are 0 unless given.
        """
        position = None if self.position is None else self.position.resolved
        embedder = embedding.Embedder(
            self.token, self.scale, self.token_type, position, self.norm, self.projection
        )
        return self.dropout(embedder(tokens, positions, types), deterministic=deterministic)

    def attend(self, x: Array) -> Array:
        """Return logits [..., vocabulary]: products with the tokens' vectors.

        Raises:
          ValueError: these have other features than the model.
        """
        embedding.check_tied(self.projection)
        return self.token.attend(x)


def dropout_of(rate: float, deterministic: bool, rngs: nnx.Rngs) -> nnx.Dropout:
    """Return a dropout that needs the stream `dropout` only where it drops something."""
    return nnx.Dropout(rate, deterministic=deterministic, rngs=rngs if rate else None)
