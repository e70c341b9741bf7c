"""Small Transformers that are ready to train, of tokens, of pairs of sequences and of images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers as standard

from attention_jax.base import checks
from attention_jax.base.binding import bind
from attention_jax.layers import models, transformer
from attention_jax.nnx.transformer import Embedding, TransformerStack, dropout_of
from attention_jax.positions import sinusoidal

Array = jax.Array


class TokenModel(models.TokenModelMethods, nnx.Module):
    """Blocks over an embedding of tokens, which also gives the logits ("tied").

    Args:
      vocabulary_size: how many tokens there are.
      features: D.
      num_heads: N.
      num_layers: how many blocks.
      max_length: positions of a learned table; None where the attention knows positions.
      position: as in `Embedding`, instead of the table.
      norm_first: where the norms of the blocks are.
      activation: of the feed-forward layers.
      dropout_rate: of the embedding, of attention weights and of what each sublayer adds.
      deterministic: True leaves dropout out; `model.train()` and `model.eval()` set it.
      dtype: of the computation.
      param_dtype: of the parameters.
      rngs: the stream `params` draws the parameters, the stream `dropout` what is dropped.
      **options: of `TransformerStack`, such as `hidden_features`, `attention` or `remat`.
    """

    def __init__(
        self,
        vocabulary_size: int,
        features: int,
        *,
        num_heads: int,
        num_layers: int,
        max_length: int | None = None,
        position: Any = None,
        norm_first: bool = True,
        activation: Callable[[Array], Array] = jax.nn.gelu,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        shared = {"dropout_rate": dropout_rate, "deterministic": deterministic, **dtypes}
        checks.sizes(type(self).__name__, features=features, max_length=max_length)
        position = models.position_or_table(position, max_length, features)
        self.embedding = Embedding(vocabulary_size, features, position=position, **shared)
        options = {"norm_first": norm_first, "activation": activation, **shared, **options}
        self.stack = TransformerStack(num_layers, features, num_heads=num_heads, **options)
        self.max_length = max_length


class TokenEncoder(models.TokenEncoderMethods, TokenModel):
    """Reads tokens in both directions, in the shape of BERT: norms after residuals, GELU.

    Arguments are those of `TokenModel`. Left out are BERT's segment embedding, the norm of the
    embedding and the layer before the logits.

    Devlin et al. 2019, section 3.

    >>> model = TokenEncoder(10, 4, num_heads=2, num_layers=1, max_length=16, rngs=nnx.Rngs(0))
    >>> nnx.jit(lambda model, tokens: model(tokens))(model, jnp.array([[1, 2, 3]])).shape
    (1, 3, 10)
    """

    def __init__(
        self, vocabulary_size: int, features: int, *, norm_first: bool = False, **options: Any
    ):
        super().__init__(vocabulary_size, features, norm_first=norm_first, **options)


class CausalDecoder(models.CausalDecoderMethods, TokenModel):
    """Predicts the next token from those before, in the shape of GPT-2: norms first, GELU.

    Arguments are those of `TokenModel`.

    Radford et al. 2019, section 2.3.

    >>> model = CausalDecoder(10, 4, num_heads=2, num_layers=1, max_length=16, rngs=nnx.Rngs(0))
    >>> generate = nnx.jit(CausalDecoder.generate, static_argnames="num_steps")
    >>> generate(model, jnp.array([[1, 2, 3]]), num_steps=4).shape
    (1, 4)
    """

    def _pure_decode(self) -> Callable[..., Any]:
        """Return `decode` as a function that a loop of JAX may call."""
        return self.decode


class EncoderDecoder(models.EncoderDecoderMethods, nnx.Module):
    """Reads a source and writes a target token by token: the Transformer as first published.

    Args:
      source_vocabulary_size: how many tokens there are to read.
      target_vocabulary_size: how many tokens there are to write; their embedding gives the logits.
      features: D.
      num_heads: N.
      num_layers: how many blocks there are on either side.
      position: as in `Embedding`, on either side; sinusoids unless given.
      norm_first: False as in the paper.
      dropout_rate: of embeddings, of attention weights and of what each sublayer adds.
      deterministic: True leaves dropout out; `model.train()` and `model.eval()` set it.
      dtype: of the computation.
      param_dtype: of the parameters.
      rngs: the stream `params` draws the parameters, the stream `dropout` what is dropped.
      **options: of `TransformerStack`, such as `hidden_features`, `attention` or `remat`.

    Vaswani et al. 2017, section 3.

    >>> model = EncoderDecoder(10, 12, features=4, num_heads=2, num_layers=1, rngs=nnx.Rngs(0))
    >>> source, target = jnp.array([[1, 2, 3]]), jnp.array([[4, 5]])
    >>> nnx.jit(lambda model, *tokens: model(*tokens))(model, source, target).shape
    (1, 2, 12)
    """

    def __init__(
        self,
        source_vocabulary_size: int,
        target_vocabulary_size: int,
        *,
        features: int,
        num_heads: int,
        num_layers: int,
        position: Any = None,
        norm_first: bool = False,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        shared = {"dropout_rate": dropout_rate, "deterministic": deterministic, **dtypes}
        checks.sizes(
            "EncoderDecoder",
            source_vocabulary_size=source_vocabulary_size,
            target_vocabulary_size=target_vocabulary_size,
            features=features,
        )
        if position is None:
            position = bind(sinusoidal, depth=features)
        embedding = functools.partial(
            Embedding,
            features=features,
            position=position,
            scale=features**0.5,
            embedding_init=standard.normal(features**-0.5),
            **shared,
        )
        self.source = embedding(source_vocabulary_size)
        self.target = embedding(target_vocabulary_size)
        stack = functools.partial(
            TransformerStack,
            num_layers,
            features,
            num_heads=num_heads,
            norm_first=norm_first,
            **shared,
            **options,
        )
        self.encoder = stack()
        self.decoder = stack(memory_features=features)

    def _pure_decode(self) -> Callable[..., Any]:
        """Return `decode` as a function that a loop of JAX may call."""
        return self.decode


class PatchEncoder(nnx.Module):
    """Reads an image as patches, in the shape of ViT; logits of classes from a class token.

    Args:
      image_size: height and width.
      patch_size: of the squares.
      num_channels: of a pixel.
      num_classes: how many logits.
      features: D.
      num_heads: N.
      num_layers: how many blocks.
      activation: of the feed-forward layers.
      dropout_rate: of the embedded patches, of attention weights and of what each sublayer adds.
      deterministic: True leaves dropout out; `model.train()` and `model.eval()` set it.
      dtype: of the computation.
      param_dtype: of the parameters.
      rngs: the stream `params` draws the parameters, the stream `dropout` what is dropped.
      **options: of `TransformerStack`, such as `hidden_features`, `attention` or `remat`.

    Raises:
      ShapeError: an image size that is not a multiple of the patch size.

    Dosovitskiy et al. 2021, section 3.1.

    >>> model = PatchEncoder(
    ...     (8, 8), 4, num_channels=3, num_classes=10, features=4, num_heads=2, num_layers=1,
    ...     rngs=nnx.Rngs(0),
    ... )
    >>> nnx.jit(lambda model, images: model(images))(model, jnp.ones((2, 8, 8, 3))).shape
    (2, 10)
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        patch_size: int,
        *,
        num_channels: int,
        num_classes: int,
        features: int,
        num_heads: int,
        num_layers: int,
        activation: Callable[[Array], Array] = jax.nn.gelu,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        dropped = {"dropout_rate": dropout_rate, "deterministic": deterministic}
        checks.sizes(
            "PatchEncoder",
            patch_size=patch_size,
            num_channels=num_channels,
            num_classes=num_classes,
            features=features,
        )
        count = 1 + models.count_patches(image_size, patch_size)
        table = standard.normal(0.02)(rngs.params(), (count, features), param_dtype)
        self.patch_size = patch_size
        self.patch = nnx.Linear(patch_size**2 * num_channels, features, **dtypes)
        self.class_token = nnx.Param(jnp.zeros(features, param_dtype))
        self.positions = nnx.Param(table)
        self.dropout = dropout_of(dropout_rate, deterministic, rngs)
        options = {"activation": activation, **dropped, **dtypes, **options}
        self.stack = TransformerStack(num_layers, features, num_heads=num_heads, **options)
        self.classifier = nnx.Linear(features, num_classes, kernel_init=standard.zeros, **dtypes)

    def __call__(self, images: Array, *, deterministic: bool | None = None, **options: Any) -> Any:
        """Return logits [B, num_classes] of images [B, height, width, C].

        Options are return_weights and sow_weights, as in `TransformerStack`.
        """
        x = self.patch(models.patches(images, self.patch_size))
        x = models.add_class_token(x, self.class_token[...], self.positions[...])
        x = self.dropout(x, deterministic=deterministic)
        result = self.stack(x, deterministic=deterministic, **options)
        return transformer.map_output(lambda x: self.classifier(x[:, 0]), result)
