"""Small Transformers that are ready to train, of tokens, of pairs of sequences and of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers as standard

from attention_jax.base import checks
from attention_jax.layers import embedding, models, transformer
from attention_jax.layers.options import (
    StackOptions,
    options_of,
    options_of_embedding,
    options_of_layers,
)
from attention_jax.nnx.transformer import Embedding, TransformerStack, dropout_of
from attention_jax.positions import sinusoidal

Array = jax.Array


class TokenModel(models.TokenModelMethods, nnx.Module):
    """Blocks over an embedding of tokens, which also gives the logits ("tied") or has a head.

    Args:
      vocabulary_size: how many tokens there are.
      features: D.
      num_heads: N.
      num_layers: how many blocks.
      max_length: positions of a learned table; None where the attention knows positions.
      position: as in `Embedding`, instead of the table.
      embedding_options: more of `Embedding`, such as scale, num_types or norm.
      head: builds the map from vectors to logits, `nnx.Linear` or a partial application; None
        takes products with the tokens' vectors.
      logit_scale: multiplies the logits.
      logit_cap: c of logits c tanh(logits / c); None leaves them as they are.
      rngs: the stream `params` draws the parameters, the stream `dropout` what is dropped.
      **options: of `attention_jax.layers.StackOptions`, such as `hidden_features`, `attention`,
        `norm_placement` or `remat`; dropout also of the embedding, and dtypes also of the head.
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
        embedding_options: Mapping[str, Any] | None = None,
        head: Callable[..., Any] | None = None,
        logit_scale: float = 1.0,
        logit_cap: float | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        name = type(self).__name__
        given = options_of(StackOptions, name, {"activation": jax.nn.gelu, **options})
        checks.sizes(name, features=features, max_length=max_length)
        position = models.position_or_table(position, max_length, features, embedding_options)
        layers = options_of_layers(given, num_heads, num_layers)
        own = options_of_embedding(given, layers, position=position, **(embedding_options or {}))
        self.embedding = Embedding(vocabulary_size, features, **own, rngs=rngs)
        self.stack = TransformerStack(
            num_layers, features, num_heads=num_heads, rngs=rngs, **vars(given)
        )
        self.output = built_head(head, features, vocabulary_size, own, rngs)
        self.logit_scale = logit_scale
        self.logit_cap = logit_cap
        self.max_length = max_length


def built_head(
    head: Callable[..., Any] | None,
    features: int,
    vocabulary_size: int,
    options: Mapping[str, Any],
    rngs: nnx.Rngs,
) -> Any:
    """Return the module that makes logits, with the dtypes of the embedding; None if tied."""
    if head is None:
        return nnx.data(None)
    dtypes = {name: options[name] for name in ("dtype", "param_dtype")}
    return head(features, vocabulary_size, **dtypes, rngs=rngs)


class TokenEncoder(models.TokenEncoderMethods, TokenModel):
    """Reads tokens in both directions, in the shape of BERT: norms after residuals, exact GELU.

    Arguments are those of `TokenModel`. BERT has token types and a norm of the embedding:
    `embedding_options={"num_types": 2, "norm": nnx.LayerNorm}`. The layer before its logits is
    left out.

    Devlin et al. 2019, section 3.

    >>> model = TokenEncoder(10, 4, num_heads=2, num_layers=1, max_length=16, rngs=nnx.Rngs(0))
    >>> nnx.jit(lambda model, tokens: model(tokens))(model, jnp.array([[1, 2, 3]])).shape
    (1, 3, 10)
    """

    def __init__(
        self,
        vocabulary_size: int,
        features: int,
        *,
        norm_placement: str = "after",
        activation: Callable[[Array], Array] = transformer.gelu,
        **options: Any,
    ):
        given = {"norm_placement": norm_placement, "activation": activation, **options}
        super().__init__(vocabulary_size, features, **given)


class CausalDecoder(models.CausalDecoderMethods, TokenModel):
    """Predicts the next token from those before, in the shape of GPT-2: norms first, tanh GELU.

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
      source_vocabulary_size: how many tokens there are to read; None with a reader.
      target_vocabulary_size: how many tokens there are to write; their embedding gives the logits
        unless there is a head.
      features: D.
      num_heads: N.
      num_layers: how many blocks there are on either side.
      position: as in `Embedding`, on either side; None where the attention knows positions.
      embedding_options: more of `Embedding`; scale and embedding_init are as in the paper unless
        given.
      share_tokens: the source and the target have one table of tokens' vectors, as in section 3.4
        of the paper.
      reader: builds what makes vectors [B, S, D] of a source that is not of tokens, such as images
        or sound, instead of an `Embedding`; called with D and dtypes, and then with the source,
        and with `deterministic=` where it has a `dropout_rate`.
      head: as in `TokenModel`.
      logit_scale: as in `TokenModel`.
      logit_cap: as in `TokenModel`.
      encoder_options: of the encoder alone, instead of `options`; also num_layers and num_heads.
      decoder_options: of the decoder alone, likewise.
      rngs: the stream `params` draws the parameters, the stream `dropout` what is dropped.
      **options: of `attention_jax.layers.StackOptions` on either side, such as `hidden_features`,
        `attention` or `remat`; dropout also of the embeddings. Norms are after the residuals
        unless placed elsewhere.

    Vaswani et al. 2017, section 3.

    >>> model = EncoderDecoder(10, 12, features=4, num_heads=2, num_layers=1, rngs=nnx.Rngs(0))
    >>> source, target = jnp.array([[1, 2, 3]]), jnp.array([[4, 5]])
    >>> nnx.jit(lambda model, *tokens: model(*tokens))(model, source, target).shape
    (1, 2, 12)
    """

    def __init__(
        self,
        source_vocabulary_size: int | None,
        target_vocabulary_size: int,
        *,
        features: int,
        num_heads: int,
        num_layers: int,
        position: Any = sinusoidal,
        embedding_options: Mapping[str, Any] | None = None,
        share_tokens: bool = False,
        reader: Callable[..., Any] | None = None,
        head: Callable[..., Any] | None = None,
        logit_scale: float = 1.0,
        logit_cap: float | None = None,
        encoder_options: Mapping[str, Any] | None = None,
        decoder_options: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        given = {"norm_placement": "after", **options}
        checked = options_of(StackOptions, "EncoderDecoder", given)
        checks.sizes(
            "EncoderDecoder",
            source_vocabulary_size=source_vocabulary_size,
            target_vocabulary_size=target_vocabulary_size,
            features=features,
        )
        models.check_sources(source_vocabulary_size, reader, share_tokens)
        layers = options_of_layers(checked, num_heads, num_layers)
        as_published = models.embedding_as_published(features, position)
        as_published.update(embedding_options or {})
        own = options_of_embedding(checked, layers, **as_published)
        if source_vocabulary_size is not None:
            self.source = Embedding(source_vocabulary_size, features, **own, rngs=rngs)
        elif reader is not None:
            dtypes = {name: own[name] for name in ("dtype", "param_dtype")}
            self.source = reader(features, **dtypes, rngs=rngs)
        tokens = {"tokens": self.source} if share_tokens else {}
        self.target = Embedding(target_vocabulary_size, features, **own, **tokens, rngs=rngs)
        stack = {"num_layers": num_layers, "num_heads": num_heads, **given}
        of_encoder, of_decoder = (
            {**stack, **(own or {})} for own in (encoder_options, decoder_options)
        )
        of_decoder = {"memory_features": features, **of_decoder}
        self.encoder = TransformerStack(features=features, rngs=rngs, **of_encoder)
        self.decoder = TransformerStack(features=features, rngs=rngs, **of_decoder)
        self.output = built_head(head, features, target_vocabulary_size, own, rngs)
        self.logit_scale = logit_scale
        self.logit_cap = logit_cap

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
      rngs: the stream `params` draws the parameters, the stream `dropout` what is dropped.
      **options: of `attention_jax.layers.StackOptions`, such as `hidden_features`, `attention` or
        `remat`; dropout also of the embedded patches. The activation is the exact GELU unless
        given.

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
        rngs: nnx.Rngs,
        **options: Any,
    ):
        given = options_of(
            StackOptions, "PatchEncoder", {"activation": transformer.gelu, **options}
        )
        checks.sizes(
            "PatchEncoder",
            patch_size=patch_size,
            num_channels=num_channels,
            num_classes=num_classes,
            features=features,
        )
        count = 1 + embedding.count_patches(image_size, patch_size)
        own = options_of_embedding(given, options_of_layers(given, num_heads, num_layers))
        dropped = {name: own.pop(name) for name in ("dropout_rate", "deterministic")}
        table = standard.normal(0.02)(rngs.params(), (count, features), own["param_dtype"])
        self.patch_size = patch_size
        self.patch = nnx.Linear(patch_size**2 * num_channels, features, **own, rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros(features, own["param_dtype"]))
        self.positions = nnx.Param(table)
        self.dropout = dropout_of(dropped["dropout_rate"], dropped["deterministic"], rngs)
        self.stack = TransformerStack(
            num_layers, features, num_heads=num_heads, rngs=rngs, **vars(given)
        )
        self.classifier = nnx.Linear(
            features, num_classes, kernel_init=standard.zeros, **own, rngs=rngs
        )

    def __call__(self, images: Array, *, deterministic: bool | None = None, **options: Any) -> Any:
        """Return logits [B, num_classes] of images [B, height, width, C].

        Options are return_weights, sow_weights, statistics and sow_statistics, as in
        `TransformerStack`.
        """
        result = self.encode(images, deterministic=deterministic, **options)
        return transformer.map_output(lambda x: self.classifier(x[:, 0]), result)

    def encode(self, images: Array, *, deterministic: bool | None = None, **options: Any) -> Any:
        """Return a vector of the image and one of each patch, [B, 1 + S, features].

        Arguments are those of the call.
        """
        x = self.patch(embedding.patches(images, self.patch_size))
        x = embedding.add_class_token(x, self.class_token[...], self.positions[...])
        x = self.dropout(x, deterministic=deterministic)
        return self.stack(x, deterministic=deterministic, **options)
