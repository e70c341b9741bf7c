"""Small Transformers that are ready to train, of tokens, of pairs of sequences and of images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers as standard

from attention_jax.cache import next_positions
from attention_jax.layers import transformer
from attention_jax.layers.heads import Projected
from attention_jax.layers.transformer import Cache
from attention_jax.nnx.transformer import Embedding, TransformerStack, dropout_of
from attention_jax.positions import sinusoidal

Array = jax.Array


class TokenModel(nnx.Module):
    """Blocks over an embedding of tokens, which also gives the logits ("tied").

    Args:
      vocabulary: how many tokens there are.
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
        vocabulary: int,
        features: int,
        num_heads: int,
        num_layers: int,
        max_length: int | None = None,
        *,
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
        numbers: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        shared = {"dropout_rate": dropout_rate, "deterministic": deterministic, **numbers}
        position = transformer.table_unless(position, max_length, features)
        self.embedding = Embedding(vocabulary, features, position=position, **shared)
        options = {"norm_first": norm_first, "activation": activation, **shared, **options}
        self.stack = TransformerStack(num_layers, features, num_heads, **options)
        self.max_length = max_length

    def encode(
        self,
        tokens: Array,
        mask: Any = None,
        *,
        positions: Array | None = None,
        deterministic: bool | None = None,
        **options: Any,
    ) -> Any:
        """Return a vector for each token, [B, T, features].

        Args:
          tokens: [B, T].
          mask: which tokens may attend to which, such as `masks.Lengths`.
          positions: where the tokens stand, [T] or [B, T]; 0, 1, ... unless given.
          deterministic: instead of the module's own.
          **options: return_weights and sow_weights, as in `TransformerStack`.
        """
        if positions is None:
            transformer.check_length(tokens.shape[1], self.max_length)
        x = self.embedding(tokens, positions, deterministic)
        return self.stack(x, mask=mask, positions=positions, deterministic=deterministic, **options)


class TokenEncoder(TokenModel):
    """Reads tokens in both directions, in the shape of BERT: norms after residuals, GELU.

    Arguments are those of `TokenModel`. Left out are BERT's segment embedding, the norm of the
    embedding and the layer before the logits.

    Devlin et al. 2019, section 3.

    >>> model = TokenEncoder(10, 8, 2, 2, max_length=16, rngs=nnx.Rngs(0))
    >>> model(jnp.array([[1, 2, 3]])).shape
    (1, 3, 10)
    """

    def __init__(self, *sizes: int, norm_first: bool = False, **options: Any):
        super().__init__(*sizes, norm_first=norm_first, **options)

    def __call__(self, tokens: Array, mask: Any = None, **options: Any) -> Any:
        """Return logits [B, T, vocabulary] of tokens [B, T]; arguments are those of `encode`."""
        return transformer.on_output(self.embedding.attend, self.encode(tokens, mask, **options))


class CausalDecoder(TokenModel):
    """Predicts the next token from those before, in the shape of GPT-2: norms first, GELU.

    Arguments are those of `TokenModel`.

    Radford et al. 2019, section 2.3.

    >>> model = CausalDecoder(10, 8, 2, 2, max_length=16, rngs=nnx.Rngs(0))
    >>> model(jnp.array([[1, 2, 3]])).shape, model.generate(jnp.array([[1, 2, 3]]), 4).shape
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
        """Return logits [B, T, vocabulary] of the next tokens [B, T], and the next caches.

        In a ragged batch `count` [B] tells how many of the T are tokens.
        """
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
        return transformer.generate(self.decode, caches, prompt, steps, lengths=lengths, **options)


class EncoderDecoder(nnx.Module):
    """Reads a source and writes a target token by token: the Transformer as first published.

    Args:
      source_vocabulary: how many tokens there are to read.
      target_vocabulary: how many tokens there are to write; their embedding gives the logits.
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

    >>> model = EncoderDecoder(10, 12, 8, 2, 2, rngs=nnx.Rngs(0))
    >>> model(jnp.array([[1, 2, 3]]), jnp.array([[4, 5]])).shape
    (1, 2, 12)
    """

    def __init__(
        self,
        source_vocabulary: int,
        target_vocabulary: int,
        features: int,
        num_heads: int,
        num_layers: int,
        *,
        position: Any = None,
        norm_first: bool = False,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        numbers: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        shared = {"dropout_rate": dropout_rate, "deterministic": deterministic, **numbers}
        embedding = functools.partial(
            Embedding,
            features=features,
            position=position or functools.partial(sinusoidal, depth=features),
            scale=features**0.5,
            embedding_init=standard.normal(features**-0.5),
            **shared,
        )
        self.source = embedding(source_vocabulary)
        self.target = embedding(target_vocabulary)
        stack = functools.partial(
            TransformerStack,
            num_layers,
            features,
            num_heads,
            norm_first=norm_first,
            **shared,
            **options,
        )
        self.encoder = stack()
        self.decoder = stack(memory_features=features)

    def __call__(self, source: Array, target: Array, *masks: Any, **options: Any) -> Any:
        """Return logits [B, T, target_vocabulary] of the token after each of the target's.

        Arguments are those of `write`.
        """
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
        """Return a vector for each of the target's tokens, of which `target.attend` makes logits.

        Args:
          source: tokens [B, S].
          target: tokens [B, T].
          source_mask: which of the source's tokens are seen, by itself and by the target, such as
            `masks.Lengths`.
          mask: of the target, beside the causal one.
          deterministic: instead of the module's own.
          **options: return_weights and sow_weights, as in `TransformerStack`, of the decoder.

        Returns:
          [B, T, features].
        """
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

        def decode(tokens: Array, caches: Any, count: Any) -> tuple[Array, Any]:
            return self.decode(tokens, caches, memory, source_mask, count=count)

        return transformer.generate(decode, caches, prompt, steps, **options)


class PatchEncoder(nnx.Module):
    """Reads an image as patches, in the shape of ViT; logits of classes from a class token.

    Args:
      image_size: height and width.
      patch_size: of the squares.
      channels: of a pixel.
      classes: how many there are.
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

    >>> model = PatchEncoder((8, 8), 4, 3, 10, 8, 2, 2, rngs=nnx.Rngs(0))
    >>> model(jnp.ones((2, 8, 8, 3))).shape
    (2, 10)
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        patch_size: int,
        channels: int,
        classes: int,
        features: int,
        num_heads: int,
        num_layers: int,
        *,
        activation: Callable[[Array], Array] = jax.nn.gelu,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        numbers: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        dropped = {"dropout_rate": dropout_rate, "deterministic": deterministic}
        count = 1 + transformer.patch_count(image_size, patch_size)
        table = standard.normal(0.02)(rngs.params(), (count, features), param_dtype)
        self.patch_size = patch_size
        self.patch = nnx.Linear(patch_size**2 * channels, features, **numbers)
        self.class_token = nnx.Param(jnp.zeros(features, param_dtype))
        self.positions = nnx.Param(table)
        self.dropout = dropout_of(dropout_rate, deterministic, rngs)
        options = {"activation": activation, **dropped, **numbers, **options}
        self.stack = TransformerStack(num_layers, features, num_heads, **options)
        self.classifier = nnx.Linear(features, classes, kernel_init=standard.zeros, **numbers)

    def __call__(self, images: Array, *, deterministic: bool | None = None, **options: Any) -> Any:
        """Return logits [B, classes] of images [B, height, width, C].

        Options are return_weights and sow_weights, as in `TransformerStack`.
        """
        x = self.patch(transformer.patches(images, self.patch_size))
        x = transformer.with_class_token(x, self.class_token[...], self.positions[...])
        x = self.dropout(x, deterministic=deterministic)
        result = self.stack(x, deterministic=deterministic, **options)
        return transformer.on_output(lambda x: self.classifier(x[:, 0]), result)
