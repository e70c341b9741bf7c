"""Small Transformers, whichever of the two Flax APIs holds their parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.nn import initializers as standard

from attention_jax.base.parameters import initializer
from attention_jax.cache import and_causal, next_positions
from attention_jax.layers.embedding import to_logits
from attention_jax.layers.generation import generate, with_types
from attention_jax.layers.heads import ProjectedMemory
from attention_jax.layers.options import map_layers
from attention_jax.layers.transformer import Cache, known, map_output
from attention_jax.positions import learned_table

Array = jax.Array


class TokenModelMethods:
    """The methods that models of tokens share, in the two APIs."""

    embedding: Any
    stack: Any
    output: Any
    max_length: int | None
    logit_scale: float
    logit_cap: float | None

    def encode(
        self,
        tokens: Array,
        mask: Any = None,
        *,
        positions: Array | None = None,
        types: Array | None = None,
        deterministic: bool | None = None,
        **options: Any,
    ) -> Any:
        """Return a vector for each token, [B, T, features].

        Args:
          tokens: [B, T].
          mask: which tokens may attend to which, such as `masks.Lengths`; for all layers or each,
            as in `TransformerStack`.
          positions: of the tokens, [T] or [B, T]; 0, 1, ... or the `order` unless given.
          types: of the tokens, [B, T], where the embedding has any; 0 unless given.
          deterministic: instead of the module's own.
          **options: bias, order, tile_sizes, return_weights, sow_weights, statistics and
            sow_statistics, as in `TransformerStack`.
        """
        if positions is None:
            check_length(tokens.shape[1], self.max_length)
            positions = options.get("order")
        x = self.embedding(tokens, positions, deterministic, types=types)
        return self.stack(x, mask=mask, positions=positions, deterministic=deterministic, **options)

    def logits(self, x: Array) -> Array:
        """Return logits [..., vocabulary] of vectors [..., features], as `encode` returns them."""
        scaled = self.logit_scale, self.logit_cap
        return to_logits(x, self.embedding.attend, self.output, *scaled)


class TokenEncoderMethods(TokenModelMethods):
    """The methods of `TokenEncoder` that the two APIs share."""

    def __call__(self, tokens: Array, mask: Any = None, **options: Any) -> Any:
        """Return logits [B, T, vocabulary] of tokens [B, T]; arguments are those of `encode`."""
        return map_output(self.logits, self.encode(tokens, mask, **options))


class CausalDecoderMethods(TokenModelMethods):
    """The methods of `CausalDecoder` that the two APIs share."""

    def _pure_decode(self) -> Callable[..., Any]:
        """Return `decode` as a function that a loop of JAX may call."""
        raise NotImplementedError

    def __call__(self, tokens: Array, mask: Any = None, **options: Any) -> Any:
        """Return logits [B, T, vocabulary] of the token after each of tokens [B, T].

        Arguments are those of `encode`.
        """
        return map_output(self.logits, self.encode(tokens, mask, **options))

    def encode(
        self, tokens: Array, mask: Any = None, *, causal: bool = True, **options: Any
    ) -> Any:
        """Return a vector [B, T, features] for each token, made of it and of those before.

        The mask, for all layers or each, is joined with the causal one; causal=False leaves that to
        the mask, such as `masks.Prefix(n) | masks.Causal()`, whose first n tokens see each other
        (prefix language models; Raffel et al. 2020, section 3.2.1). Options are positions, types,
        deterministic, bias, order, tile_sizes, return_weights, sow_weights, statistics and
        sow_statistics.
        """
        return super().encode(tokens, map_layers(and_causal, mask) if causal else mask, **options)

    def init_cache(self, batch: int, capacity: int, **options: Any) -> list[Cache]:
        """Return empty caches for `decode`; see `attention_jax.cache.init`."""
        return self.stack.init_cache(batch, capacity, **options)

    def decode(
        self,
        tokens: Array,
        caches: Sequence[Cache],
        *,
        mask: Any = None,
        causal: bool = True,
        count: Any = None,
        types: Array | None = None,
    ) -> tuple[Array, list[Cache]]:
        """Return logits [B, T, vocabulary] of the next tokens [B, T], and the next caches.

        The mask is that of the whole sequence, for all layers or each, joined with the causal one
        unless told not to, as in `encode`; a prefix is then given in one call. In a ragged batch
        `count` [B] tells how many of the T are tokens. `types` [B, T] are those of the next tokens,
        where the embedding has any; 0 unless given.
        """
        positions = next_positions(caches[0], tokens.shape[1])
        x = self.embedding(tokens, positions, deterministic=True, types=types)
        x, following = self.stack.decode(x, caches, mask=mask, causal=causal, count=count)
        return self.logits(x), following

    def generate(
        self,
        prompt: Array,
        num_steps: int,
        *,
        lengths: Array | Sequence[int] | None = None,
        mask: Any = None,
        causal: bool = True,
        window: Any = None,
        types: Array | None = None,
        **options: Any,
    ) -> Array:
        """Continue prompts [B, T] by [B, num_steps].

        Args:
          prompt: tokens [B, T].
          num_steps: how many tokens to add.
          lengths: how many tokens of each prompt count, [B].
          mask: of the whole sequence, for all layers or each, joined with the causal one.
          causal: as in `encode`.
          window: how many tokens before the newest the caches keep, for all layers or each; the
            mask must let no query attend further (`masks.Window(window, 0)`). None keeps all.
          types: of the prompt's tokens, [B, T], where the embedding has any; 0 unless given. What
            is written has the type of the prompt's last token.
          **options: rng, temperature and end of `attention_jax.layers.generate`.
        """
        batch, length = prompt.shape
        check_length(length + num_steps - 1, self.max_length)
        total = length + num_steps
        window = map_layers(functools.partial(_window_below, total), window)
        capacity = map_layers(lambda own: total if own is None else own + 1, window)
        kept = {} if window is None else {"window": window}
        caches = self.init_cache(batch, capacity, ragged=lengths is not None, **kept)
        decode = functools.partial(self._pure_decode(), mask=mask, causal=causal)
        decode = with_types(decode, types, lengths)
        return generate(decode, caches, prompt, num_steps, lengths=lengths, **options)


class EncoderDecoderMethods:
    """The methods of `EncoderDecoder` that the two APIs share."""

    source: Any
    target: Any
    encoder: Any
    decoder: Any
    output: Any
    logit_scale: float
    logit_cap: float | None

    def _pure_decode(self) -> Callable[..., Any]:
        """Return `decode` as a function that a loop of JAX may call."""
        raise NotImplementedError

    def __call__(
        self,
        source: Array,
        target: Array,
        source_mask: Any = None,
        mask: Any = None,
        **options: Any,
    ) -> Any:
        """Return logits [B, T, target vocabulary] of the token after each of the target's.

        Arguments are those of `write`.
        """
        written = self.write(source, target, source_mask, mask, **options)
        return map_output(self.logits, written)

    def logits(self, x: Array) -> Array:
        """Return logits [..., target vocabulary] of vectors [..., features], as of `write`."""
        scaled = self.logit_scale, self.logit_cap
        return to_logits(x, self.target.attend, self.output, *scaled)

    def write(
        self,
        source: Array,
        target: Array,
        source_mask: Any = None,
        mask: Any = None,
        *,
        deterministic: bool | None = None,
        source_order: Any = None,
        source_types: Array | None = None,
        types: Array | None = None,
        **options: Any,
    ) -> Any:
        """Return a vector for each of the target's tokens, of which `logits` makes logits.

        Args:
          source: tokens [B, S], or what the reader takes.
          target: tokens [B, T].
          source_mask: which of the source's tokens are seen, by itself and by the target, such as
            `masks.Lengths`; for all layers or each, as in `TransformerStack`.
          mask: of the target, likewise, joined with the causal one.
          deterministic: instead of the module's own.
          source_order: of the source, as `order` is of the target, where the sequences are split
            over devices; see `MultiHeadAttention`.
          source_types: of the source's tokens, [B, S], where the embedding has any; 0 unless given.
          types: of the target's tokens, [B, T], likewise.
          **options: of the decoder: order, return_weights, sow_weights, statistics and
            sow_statistics, as in `TransformerStack`.

        Returns:
          [B, T, features].
        """
        own = {"types": source_types, "order": source_order}
        memory = self.encode(source, source_mask, deterministic=deterministic, **own)
        x = self.target(target, options.get("order"), deterministic=deterministic, types=types)
        return self.decoder(
            x,
            memory,
            mask=map_layers(and_causal, mask),
            memory_mask=source_mask,
            deterministic=deterministic,
            memory_order=source_order,
            **options,
        )

    def encode(
        self,
        source: Array,
        mask: Any = None,
        *,
        deterministic: bool | None = None,
        types: Array | None = None,
        **options: Any,
    ) -> Any:
        """Return the memory [B, S, features] that the target attends to; options as the call's.

        `types` [B, S] are those of the source's tokens, where the embedding has any.
        """
        given = {"deterministic": deterministic, "types": types}
        given = known(self.source, {**given, "positions": options.get("order")})
        x = self.source(source, **given)
        return self.encoder(x, mask=mask, deterministic=deterministic, **options)

    def keys(self, memory: Array) -> list[ProjectedMemory | None]:
        """Project a memory for every block, once for all the steps of `decode`."""
        return self.decoder.keys(memory)

    def init_cache(self, batch: int, capacity: int, **options: Any) -> list[Cache]:
        """Return empty caches for `decode`; see `attention_jax.cache.init`."""
        return self.decoder.init_cache(batch, capacity, **options)

    def decode(
        self,
        tokens: Array,
        caches: Sequence[Cache],
        memory: Array | Sequence[ProjectedMemory | None],
        *,
        source_mask: Any = None,
        mask: Any = None,
        count: Any = None,
        types: Array | None = None,
    ) -> tuple[Array, list[Cache]]:
        """Return logits [B, T, target vocabulary] of the next tokens [B, T], and the next caches.

        The memory is from `encode`, or what `keys` made of it; the mask is that of the whole
        target, joined with the causal one. `types` [B, T] are those of the next tokens.
        """
        positions = next_positions(caches[0], tokens.shape[1])
        x, following = self.decoder.decode(
            self.target(tokens, positions, deterministic=True, types=types),
            caches,
            memory,
            mask=mask,
            memory_mask=source_mask,
            count=count,
        )
        return self.logits(x), following

    def generate(
        self,
        source: Array,
        prompt: Array,
        num_steps: int,
        source_mask: Any = None,
        *,
        lengths: Array | Sequence[int] | None = None,
        mask: Any = None,
        source_types: Array | None = None,
        types: Array | None = None,
        **options: Any,
    ) -> Array:
        """Write after a prompt [B, T], such as one token that begins every target: [B, num_steps].

        Args:
          source: tokens [B, S].
          prompt: tokens [B, T].
          num_steps: how many tokens to add.
          source_mask: as in the call.
          lengths: how many tokens of each prompt count, [B].
          mask: of the whole target, for all layers or each, joined with the causal one.
          source_types: as in the call.
          types: of the prompt's tokens, [B, T]; what is written has the type of the last.
          **options: rng, temperature and end of `attention_jax.layers.generate`.
        """
        source = self.encode(source, source_mask, deterministic=True, types=source_types)
        memory = self.keys(source)
        batch, length = prompt.shape
        caches = self.init_cache(batch, length + num_steps, ragged=lengths is not None)
        seen = {"source_mask": source_mask, "mask": mask}
        decode = functools.partial(self._pure_decode(), memory=memory, **seen)
        decode = with_types(decode, types, lengths)
        return generate(decode, caches, prompt, num_steps, lengths=lengths, **options)


def _window_below(total: int, window: int | None) -> int | None:
    """Return the window of a cache; None where no token of a sequence is ever forgotten."""
    return None if window is None or window + 1 >= total else window


def position_or_table(
    position: Any, max_length: int | None, features: int, embedding_options: Any = None
) -> Any:
    """Return the position that is given, or a learned table where a length is given.

    Raises:
      ValueError: both are given.
    """
    if position is not None and max_length is not None:
        raise ValueError(
            f"positions: give a position, or max_length = {max_length} for a learned table of "
            "them, not both."
        )
    features = (embedding_options or {}).get("table_features") or features
    return position if max_length is None else learned_table(max_length, features)


def embedding_as_published(features: int, position: Any) -> dict[str, Any]:
    """Return the options of the embeddings of the first Transformer: sqrt(D) times the vectors.

    Vaswani et al. 2017, section 3.4.
    """
    init = initializer(standard.normal, features**-0.5)
    return {"position": position, "scale": features**0.5, "embedding_init": init}


def check_sources(vocabulary_size: int | None, reader: Any, share_tokens: bool) -> None:
    """Require a source of tokens, or a reader of something else.

    Raises:
      ValueError: none of them, both, or tokens shared with what has none.
    """
    if (vocabulary_size is None) == (reader is None):
        raise ValueError(
            "EncoderDecoder: give source_vocabulary_size, or None and a reader of the source, got "
            f"{vocabulary_size} and {'no' if reader is None else 'a'} reader."
        )
    if share_tokens and reader is not None:
        raise ValueError(
            "EncoderDecoder: share_tokens is for a source of tokens; leave it out with a reader."
        )


def check_length(length: int, max_length: int | None) -> None:
    """Refuse positions that a learned table does not have.

    Raises:
      ValueError: more tokens than positions.
    """
    if max_length is not None and length > max_length:
        raise ValueError(
            f"positions: {length} tokens were given and the learned table has {max_length} "
            "positions; give fewer tokens, or build the model with a larger max_length."
        )
