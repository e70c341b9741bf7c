"""Small Transformers that are ready to train, of tokens, of pairs of sequences and of images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers as standard

from attention_jax.cache import next_positions
from attention_jax.layers import transformer
from attention_jax.layers.heads import Projected
from attention_jax.layers.transformer import Cache
from attention_jax.linen.transformer import Embedding, TransformerStack
from attention_jax.positions import sinusoidal

Array = jax.Array


class TokenModel(nn.Module):
    """Blocks over an embedding of tokens, which also gives the logits ("tied").

    The twin of `attention_jax.nnx.models.TokenModel`, where its fields are described; `options`
    are those of `TransformerBlock`.
    """

    vocabulary: int
    features: int
    num_heads: int
    num_layers: int
    max_length: int | None = None
    position: Any = None
    norm_first: bool = True
    remat: bool = False
    activation: Callable[[Array], Array] = jax.nn.gelu
    dropout_rate: float = 0.0
    deterministic: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    options: Mapping[str, Any] | None = None

    def setup(self) -> None:
        numbers = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dropped = {"dropout_rate": self.dropout_rate, "deterministic": self.deterministic}
        position = transformer.table_unless(self.position, self.max_length, self.features)
        self.embedding = Embedding(
            self.vocabulary, self.features, position=position, **dropped, **numbers
        )
        self.stack = TransformerStack(
            self.num_layers,
            self.features,
            self.num_heads,
            norm_first=self.norm_first,
            remat=self.remat,
            **numbers,
            options={"activation": self.activation, **dropped, **(self.options or {})},
        )

    def encode(
        self,
        tokens: Array,
        mask: Any = None,
        *,
        positions: Array | None = None,
        deterministic: bool | None = None,
        **options: Any,
    ) -> Any:
        """Return a vector for each token, [B, T, features], as the twin does."""
        if positions is None:
            transformer.check_length(tokens.shape[1], self.max_length)
        x = self.embedding(tokens, positions, deterministic)
        return self.stack(x, mask=mask, positions=positions, deterministic=deterministic, **options)


class TokenEncoder(TokenModel):
    """Reads tokens in both directions, in the shape of BERT: norms after residuals, GELU.

    The twin of `attention_jax.nnx.TokenEncoder`; fields are those of `TokenModel`.

    Devlin et al. 2019, section 3.

    >>> model = TokenEncoder(10, 8, 2, 2, max_length=16)
    >>> model.init_with_output(jax.random.key(0), jnp.array([[1, 2, 3]]))[0].shape
    (1, 3, 10)
    """

    norm_first: bool = False

    def __call__(self, tokens: Array, mask: Any = None, **options: Any) -> Any:
        """Return logits [B, T, vocabulary] of tokens [B, T]; arguments are those of `encode`."""
        return transformer.on_output(self.embedding.attend, self.encode(tokens, mask, **options))


class CausalDecoder(TokenModel):
    """Predicts the next token from those before, in the shape of GPT-2: norms first, GELU.

    The twin of `attention_jax.nnx.CausalDecoder`; fields are those of `TokenModel`.

    Radford et al. 2019, section 2.3.

    >>> model, prompt = CausalDecoder(10, 8, 2, 2, max_length=16), jnp.array([[1, 2, 3]])
    >>> logits, variables = model.init_with_output(jax.random.key(0), prompt)
    >>> logits.shape, model.apply(variables, prompt, 4, method="generate").shape
    ((1, 3, 10), (1, 4))
    """

    def __call__(self, tokens: Array, mask: Any = None, **options: Any) -> Any:
        """Return logits [B, T, vocabulary] of the token after each of tokens [B, T].

        The mask is beside the causal one; other arguments are those of `encode`.
        """
        result = self.encode(tokens, transformer.causal(mask), **options)
        return transformer.on_output(self.embedding.attend, result)

    def init_cache(self, batch: int, capacity: int, **options: Any) -> list[Cache]:
        """Return empty caches for `decode`; see `attention_jax.cache.init`."""
        return self.stack.init_cache(batch, capacity, **options)

    def decode(
        self, tokens: Array, caches: Sequence[Cache], count: Any = None, mask: Any = None
    ) -> tuple[Array, list[Cache]]:
        """Return logits [B, T, vocabulary] of the next tokens [B, T], and the next caches."""
        x = self.embedding(tokens, next_positions(caches[0], tokens.shape[1]), deterministic=True)
        x, caches = self.stack.decode(x, caches, mask=transformer.causal(mask), count=count)
        return self.embedding.attend(x), caches

    def generate(
        self,
        prompt: Array,
        steps: int,
        *,
        lengths: Array | Sequence[int] | None = None,
        **options: Any,
    ) -> Array:
        """Continue prompts [B, T] by [B, steps]; see `attention_jax.transformer.generate`."""
        batch, tokens = prompt.shape
        transformer.check_length(tokens + steps - 1, self.max_length)
        caches = self.init_cache(batch, tokens + steps, ragged=lengths is not None)
        model, variables = self.unbind()
        decode = functools.partial(model.apply, variables, method="decode")
        return transformer.generate(decode, caches, prompt, steps, lengths=lengths, **options)


class EncoderDecoder(nn.Module):
    """Reads a source and writes a target token by token: the Transformer as first published.

    The twin of `attention_jax.nnx.EncoderDecoder`, where its fields are described; `options` are
    those of `TransformerBlock`.

    Vaswani et al. 2017, section 3.

    >>> model, source, target = EncoderDecoder(10, 12, 8, 2, 2), *jnp.ones((2, 1, 3), int)
    >>> model.init_with_output(jax.random.key(0), source, target)[0].shape
    (1, 3, 12)
    """

    source_vocabulary: int
    target_vocabulary: int
    features: int
    num_heads: int
    num_layers: int
    position: Any = None
    norm_first: bool = False
    remat: bool = False
    dropout_rate: float = 0.0
    deterministic: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    options: Mapping[str, Any] | None = None

    def setup(self) -> None:
        numbers = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dropped = {"dropout_rate": self.dropout_rate, "deterministic": self.deterministic}
        embedding = functools.partial(
            Embedding,
            features=self.features,
            position=self.position or functools.partial(sinusoidal, depth=self.features),
            scale=self.features**0.5,
            embedding_init=standard.normal(self.features**-0.5),
            **dropped,
            **numbers,
        )
        self.source = embedding(self.source_vocabulary)
        self.target = embedding(self.target_vocabulary)
        stack = functools.partial(
            TransformerStack,
            self.num_layers,
            self.features,
            self.num_heads,
            norm_first=self.norm_first,
            remat=self.remat,
            **numbers,
        )
        options = {**dropped, **(self.options or {})}
        self.encoder = stack(options=options)
        self.decoder = stack(options={"memory_features": self.features, **options})

    def __call__(self, source: Array, target: Array, *masks: Any, **options: Any) -> Any:
        """Return logits [B, T, target_vocabulary] of the next tokens, as the twin does."""
        written = self.write(source, target, *masks, **options)
        return transformer.on_output(self.target.attend, written)

    def write(
        self,
        source: Array,
        target: Array,
        source_mask: Any = None,
        mask: Any = None,
        *,
        deterministic: bool | None = None,
        **options: Any,
    ) -> Any:
        """Return a vector for each of the target's tokens, [B, T, features], as the twin does."""
        memory = self.encode(source, source_mask, deterministic=deterministic)
        return self.decoder(
            self.target(target, deterministic=deterministic),
            memory,
            mask=transformer.causal(mask),
            memory_mask=source_mask,
            deterministic=deterministic,
            **options,
        )

    def encode(
        self,
        source: Array,
        mask: Any = None,
        *,
        deterministic: bool | None = None,
        **options: Any,
    ) -> Any:
        """Return the memory [B, S, features] that the target attends to; options as the call's."""
        x = self.source(source, deterministic=deterministic)
        return self.encoder(x, mask=mask, deterministic=deterministic, **options)

    def keys(self, memory: Array) -> list[Projected]:
        """Project a memory for every block, once for all the steps of `decode`."""
        return self.decoder.keys(memory)

    def init_cache(self, batch: int, capacity: int, **options: Any) -> list[Cache]:
        """Return empty caches for `decode`; see `attention_jax.cache.init`."""
        return self.decoder.init_cache(batch, capacity, **options)

    def decode(
        self,
        tokens: Array,
        caches: Sequence[Cache],
        memory: Array | Sequence[Projected],
        source_mask: Any = None,
        mask: Any = None,
        count: Any = None,
    ) -> tuple[Array, list[Cache]]:
        """Return logits [B, T, target_vocabulary] of the next tokens [B, T], and the next caches.

        The memory is from `encode`, or what `keys` made of it.
        """
        positions = next_positions(caches[0], tokens.shape[1])
        x, caches = self.decoder.decode(
            self.target(tokens, positions, deterministic=True),
            caches,
            memory,
            mask=transformer.causal(mask),
            memory_mask=source_mask,
            count=count,
        )
        return self.target.attend(x), caches

    def generate(
        self, source: Array, prompt: Array, steps: int, source_mask: Any = None, **options: Any
    ) -> Array:
        """Write after a prompt [B, T], such as one token that begins every target: [B, steps].

        Options are those of `attention_jax.transformer.generate`.
        """
        memory = self.keys(self.encode(source, source_mask, deterministic=True))
        ragged = options.get("lengths") is not None
        caches = self.init_cache(len(prompt), prompt.shape[1] + steps, ragged=ragged)
        model, variables = self.unbind()

        def decode(tokens: Array, caches: Any, count: Any) -> tuple[Array, Any]:
            arguments = (tokens, caches, memory, source_mask)
            return model.apply(variables, *arguments, count=count, method="decode")

        return transformer.generate(decode, caches, prompt, steps, **options)


class PatchEncoder(nn.Module):
    """Reads an image as patches, in the shape of ViT; logits of classes from a class token.

    The twin of `attention_jax.nnx.PatchEncoder`, where its fields are described; `options` are
    those of `TransformerBlock`.

    Dosovitskiy et al. 2021, section 3.1.

    >>> model = PatchEncoder((8, 8), 4, 3, 10, 8, 2, 2)
    >>> model.init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 3)))[0].shape
    (2, 10)
    """

    image_size: tuple[int, int]
    patch_size: int
    channels: int
    classes: int
    features: int
    num_heads: int
    num_layers: int
    remat: bool = False
    activation: Callable[[Array], Array] = jax.nn.gelu
    dropout_rate: float = 0.0
    deterministic: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    options: Mapping[str, Any] | None = None

    @nn.compact
    def __call__(self, images: Array, *, deterministic: bool | None = None, **options: Any) -> Any:
        """Return logits [B, classes] of images [B, height, width, C], as the twin does."""
        numbers = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dropped = {"dropout_rate": self.dropout_rate, "deterministic": self.deterministic}
        count = 1 + transformer.patch_count(self.image_size, self.patch_size)
        table = standard.normal(0.02)
        class_token = self.param("class_token", standard.zeros, (self.features,), self.param_dtype)
        positions = self.param("positions", table, (count, self.features), self.param_dtype)

        patches = transformer.patches(images, self.patch_size)
        x = nn.Dense(self.features, **numbers, name="patch")(patches)
        x = transformer.with_class_token(x, class_token, positions)
        dropout = nn.Dropout(self.dropout_rate)
        stack = TransformerStack(
            self.num_layers,
            self.features,
            self.num_heads,
            remat=self.remat,
            **numbers,
            options={"activation": self.activation, **dropped, **(self.options or {})},
            name="stack",
        )
        classifier = nn.Dense(
            self.classes, kernel_init=standard.zeros, **numbers, name="classifier"
        )
        deterministic = self.deterministic if deterministic is None else deterministic
        result = stack(
            dropout(x, deterministic=deterministic), deterministic=deterministic, **options
        )
        return transformer.on_output(lambda x: classifier(x[:, 0]), result)
