"""Small Transformers that are ready to train, of tokens, of pairs of sequences and of images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.nn import initializers as standard

from attention_jax.base import checks
from attention_jax.layers import embedding, models, transformer
from attention_jax.layers.options import (
    StackOptions,
    given_options,
    options_of_embedding,
    options_of_layers,
)
from attention_jax.linen.transformer import Embedding, TransformerStack
from attention_jax.positions import sinusoidal

Array = jax.Array


class TokenModel(models.TokenModelMethods, nn.Module, StackOptions):
    """Blocks over an embedding of tokens, which also gives the logits ("tied") or has a head.

    The twin of `attention_jax.nnx.models.TokenModel`, where its fields are described; the head is
    `nn.Dense` or a partial application.
    """

    vocabulary_size: int
    features: int
    _: dataclasses.KW_ONLY
    num_heads: int
    num_layers: int
    max_length: int | None = None
    position: Any = None
    embedding_options: Mapping[str, Any] | None = None
    head: Callable[..., Any] | None = None
    logit_scale: float = 1.0
    logit_cap: float | None = None
    activation: Callable[[Array], Array] = jax.nn.gelu

    def setup(self) -> None:
        checks.sizes(type(self).__name__, features=self.features, max_length=self.max_length)
        position = models.position_or_table(
            self.position, self.max_length, self.features, self.embedding_options
        )
        layers = options_of_layers(self, self.num_heads, self.num_layers)
        own = options_of_embedding(
            self, layers, position=position, **(self.embedding_options or {})
        )
        self.embedding = Embedding(self.vocabulary_size, self.features, **own)
        self.stack = TransformerStack(
            self.num_layers,
            self.features,
            num_heads=self.num_heads,
            **given_options(StackOptions, self),
        )
        self.output = built_head(self.head, self.vocabulary_size, own)


def built_head(
    head: Callable[..., Any] | None, vocabulary_size: int, options: Mapping[str, Any]
) -> Any:
    """Return the module that makes logits, with the dtypes of the embedding; None if tied."""
    dtypes = {name: options[name] for name in ("dtype", "param_dtype")}
    return None if head is None else head(vocabulary_size, **dtypes)


class TokenEncoder(models.TokenEncoderMethods, TokenModel, kw_only=True):
    """Reads tokens in both directions, in the shape of BERT: norms after residuals, exact GELU.

    The twin of `attention_jax.nnx.TokenEncoder`; fields are those of `TokenModel`.

    Devlin et al. 2019, section 3.

    >>> import jax.numpy as jnp
    >>> model = TokenEncoder(10, 8, num_heads=2, num_layers=1, max_length=16)
    >>> model.init_with_output(jax.random.key(0), jnp.array([[1, 2, 3]]))[0].shape
    (1, 3, 10)
    """

    norm_placement: str = "after"
    activation: Callable[[Array], Array] = transformer.gelu

    __call__ = models.TokenEncoderMethods.__call__


class CausalDecoder(models.CausalDecoderMethods, TokenModel):
    """Predicts the next token from those before, in the shape of GPT-2: norms first, tanh GELU.

    The twin of `attention_jax.nnx.CausalDecoder`; fields are those of `TokenModel`.

    Radford et al. 2019, section 2.3.

    >>> import jax.numpy as jnp
    >>> model, prompt = CausalDecoder(10, 8, num_heads=2, num_layers=1), jnp.array([[1, 2, 3]])
    >>> variables = jax.jit(model.init)(jax.random.key(0), prompt)
    >>> generate = functools.partial(model.apply, num_steps=4, method="generate")
    >>> jax.jit(generate)(variables, prompt).shape
    (1, 4)
    """

    __call__ = models.CausalDecoderMethods.__call__

    def _pure_decode(self) -> Callable[..., Any]:
        """Return `decode` as a function that a loop of JAX may call."""
        model, variables = self.unbind()
        return functools.partial(model.apply, variables, method="decode")


class EncoderDecoder(models.EncoderDecoderMethods, nn.Module, StackOptions):
    """Reads a source and writes a target token by token: the Transformer as first published.

    The twin of `attention_jax.nnx.EncoderDecoder`, where its fields are described.

    Vaswani et al. 2017, section 3.

    >>> import jax.numpy as jnp
    >>> model = EncoderDecoder(10, 12, features=8, num_heads=2, num_layers=1)
    >>> source, target = jnp.ones((2, 1, 3), int)
    >>> model.init_with_output(jax.random.key(0), source, target)[0].shape
    (1, 3, 12)
    """

    source_vocabulary_size: int | None
    target_vocabulary_size: int
    _: dataclasses.KW_ONLY
    features: int
    num_heads: int
    num_layers: int
    position: Any = sinusoidal
    embedding_options: Mapping[str, Any] | None = None
    share_tokens: bool = False
    reader: Callable[..., Any] | None = None
    head: Callable[..., Any] | None = None
    logit_scale: float = 1.0
    logit_cap: float | None = None
    encoder_options: Mapping[str, Any] | None = None
    decoder_options: Mapping[str, Any] | None = None
    norm_placement: str = "after"

    def setup(self) -> None:
        checks.sizes(
            "EncoderDecoder",
            source_vocabulary_size=self.source_vocabulary_size,
            target_vocabulary_size=self.target_vocabulary_size,
            features=self.features,
        )
        models.check_sources(self.source_vocabulary_size, self.reader, self.share_tokens)
        layers = options_of_layers(self, self.num_heads, self.num_layers)
        as_published = models.embedding_as_published(self.features, self.position)
        as_published.update(self.embedding_options or {})
        own = options_of_embedding(self, layers, **as_published)
        if self.source_vocabulary_size is not None:
            self.source = Embedding(self.source_vocabulary_size, self.features, **own)
        elif self.reader is not None:
            dtypes = {name: own[name] for name in ("dtype", "param_dtype")}
            self.source = self.reader(self.features, **dtypes)
        tokens = {"tokens": self.source} if self.share_tokens else {}
        self.target = Embedding(self.target_vocabulary_size, self.features, **own, **tokens)
        shared = {"num_layers": self.num_layers, "num_heads": self.num_heads}
        shared |= given_options(StackOptions, self)
        of_encoder, of_decoder = self.encoder_options or {}, self.decoder_options or {}
        of_decoder = {"memory_features": self.features, **of_decoder}
        self.encoder = TransformerStack(features=self.features, **{**shared, **of_encoder})
        self.decoder = TransformerStack(features=self.features, **{**shared, **of_decoder})
        self.output = built_head(self.head, self.target_vocabulary_size, own)

    __call__ = models.EncoderDecoderMethods.__call__

    def _pure_decode(self) -> Callable[..., Any]:
        """Return `decode` as a function that a loop of JAX may call."""
        model, variables = self.unbind()
        return functools.partial(model.apply, variables, method="decode")


class PatchEncoder(nn.Module, StackOptions):
    """Reads an image as patches, in the shape of ViT; logits of classes from a class token.

    The twin of `attention_jax.nnx.PatchEncoder`, where its fields are described; `options` are
    those of `TransformerBlock`.

    Dosovitskiy et al. 2021, section 3.1.

    >>> import jax.numpy as jnp
    >>> model = PatchEncoder(
    ...     (8, 8), 4, num_channels=3, num_classes=10, features=8, num_heads=2, num_layers=1
    ... )
    >>> model.init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 3)))[0].shape
    (2, 10)
    """

    image_size: tuple[int, int]
    patch_size: int
    _: dataclasses.KW_ONLY
    num_channels: int
    num_classes: int
    features: int
    num_heads: int
    num_layers: int
    activation: Callable[[Array], Array] = transformer.gelu

    @nn.compact
    def __call__(self, images: Array, *, deterministic: bool | None = None, **options: Any) -> Any:
        """Return logits [B, num_classes] of images [B, height, width, C], as the twin does."""
        own = options_of_embedding(self, options_of_layers(self, self.num_heads, self.num_layers))
        dtypes = {name: own[name] for name in ("dtype", "param_dtype")}
        classifier = nn.Dense(
            self.num_classes, kernel_init=standard.zeros, **dtypes, name="classifier"
        )
        result = self.encode(images, deterministic=deterministic, **options)
        return transformer.map_output(lambda x: classifier(x[:, 0]), result)

    @nn.compact
    def encode(self, images: Array, *, deterministic: bool | None = None, **options: Any) -> Any:
        """Return a vector of the image and one of each patch, [B, 1 + S, features]."""
        own = options_of_embedding(self, options_of_layers(self, self.num_heads, self.num_layers))
        dtypes = {name: own[name] for name in ("dtype", "param_dtype")}
        names = ("patch_size", "num_channels", "num_classes", "features")
        checks.sizes("PatchEncoder", **{name: getattr(self, name) for name in names})
        count = 1 + embedding.count_patches(self.image_size, self.patch_size)
        table = standard.normal(0.02)
        class_token = self.param(
            "class_token", standard.zeros, (self.features,), own["param_dtype"]
        )
        positions = self.param("positions", table, (count, self.features), own["param_dtype"])

        patches = embedding.patches(images, self.patch_size)
        x = nn.Dense(self.features, **dtypes, name="patch")(patches)
        x = embedding.add_class_token(x, class_token, positions)
        dropout = nn.Dropout(own["dropout_rate"])
        stack = TransformerStack(
            self.num_layers,
            self.features,
            num_heads=self.num_heads,
            **given_options(StackOptions, self),
            name="stack",
        )
        deterministic = own["deterministic"] if deterministic is None else deterministic
        x = dropout(x, deterministic=deterministic)
        return stack(x, deterministic=deterministic, **options)
