"""Small Transformers, whichever of the two Flax APIs holds their parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from attention_jax.base import checks
from attention_jax.cache import and_causal, next_positions
from attention_jax.layers.heads import ProjectedMemory
from attention_jax.layers.transformer import Cache, map_output
from attention_jax.masks import MaskLike
from attention_jax.positions import learned_table

Array = jax.Array


class TokenModelMethods:
    """The methods that models of tokens share, in the two APIs."""

    embedding: Any
    stack: Any
    max_length: int | None

    def encode(
        self,
        tokens: Array,
        mask: MaskLike = None,
        *,
        positions: Array | None = None,
        deterministic: bool | None = None,
        **options: Any,
    ) -> Any:
        """Return a vector for each token, [B, T, features].

        Args:
          tokens: [B, T].
          mask: which tokens may attend to which, such as `masks.Lengths`.
          positions: of the tokens, [T] or [B, T]; 0, 1, ... unless given.
          deterministic: instead of the module's own.
          **options: return_weights and sow_weights, as in `TransformerStack`.
        """
        if positions is None:
            check_length(tokens.shape[1], self.max_length)
        x = self.embedding(tokens, positions, deterministic)
        return self.stack(x, mask=mask, positions=positions, deterministic=deterministic, **options)


class TokenEncoderMethods(TokenModelMethods):
    """The methods of `TokenEncoder` that the two APIs share."""

    def __call__(self, tokens: Array, mask: MaskLike = None, **options: Any) -> Any:
        """Return logits [B, T, vocabulary] of tokens [B, T]; arguments are those of `encode`."""
        return map_output(self.embedding.attend, self.encode(tokens, mask, **options))


class CausalDecoderMethods(TokenModelMethods):
    """The methods of `CausalDecoder` that the two APIs share."""

    def _pure_decode(self) -> Callable[..., Any]:
        """Return `decode` as a function that a loop of JAX may call."""
        raise NotImplementedError

    def __call__(self, tokens: Array, mask: MaskLike = None, **options: Any) -> Any:
        """Return logits [B, T, vocabulary] of the token after each of tokens [B, T].

        The mask is joined with the causal one; other arguments are those of `encode`.
        """
        result = self.encode(tokens, and_causal(mask), **options)
        return map_output(self.embedding.attend, result)

    def init_cache(self, batch: int, capacity: int, **options: Any) -> list[Cache]:
        """Return empty caches for `decode`; see `attention_jax.cache.init`."""
        return self.stack.init_cache(batch, capacity, **options)

    def decode(
        self, tokens: Array, caches: Sequence[Cache], *, mask: MaskLike = None, count: Any = None
    ) -> tuple[Array, list[Cache]]:
        """Return logits [B, T, vocabulary] of the next tokens [B, T], and the next caches.

        The mask is that of the whole sequence, joined with the causal one. In a ragged batch
        `count` [B] tells how many of the T are tokens.
        """
        x = self.embedding(tokens, next_positions(caches[0], tokens.shape[1]), deterministic=True)
        x, following = self.stack.decode(x, caches, mask=mask, count=count)
        return self.embedding.attend(x), following

    def generate(
        self,
        prompt: Array,
        num_steps: int,
        *,
        lengths: Array | Sequence[int] | None = None,
        **options: Any,
    ) -> Array:
        """Continue prompts [B, T] by [B, num_steps]; see `attention_jax.layers.generate`."""
        batch, length = prompt.shape
        check_length(length + num_steps - 1, self.max_length)
        caches = self.init_cache(batch, length + num_steps, ragged=lengths is not None)
        options["lengths"] = lengths
        return generate(self._pure_decode(), caches, prompt, num_steps, **options)


class EncoderDecoderMethods:
    """The methods of `EncoderDecoder` that the two APIs share."""

    source: Any
    target: Any
    encoder: Any
    decoder: Any

    def _pure_decode(self) -> Callable[..., Any]:
        """Return `decode` as a function that a loop of JAX may call."""
        raise NotImplementedError

    def __call__(
        self,
        source: Array,
        target: Array,
        source_mask: MaskLike = None,
        mask: MaskLike = None,
        **options: Any,
    ) -> Any:
        """Return logits [B, T, target vocabulary] of the token after each of the target's.

        Arguments are those of `write`.
        """
        written = self.write(source, target, source_mask, mask, **options)
        return map_output(self.target.attend, written)

    def write(
        self,
        source: Array,
        target: Array,
        source_mask: MaskLike = None,
        mask: MaskLike = None,
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
          mask: of the target, joined with the causal one.
          deterministic: instead of the module's own.
          **options: return_weights and sow_weights, as in `TransformerStack`, of the decoder.

        Returns:
          [B, T, features].
        """
        memory = self.encode(source, source_mask, deterministic=deterministic)
        return self.decoder(
            self.target(target, deterministic=deterministic),
            memory,
            mask=and_causal(mask),
            memory_mask=source_mask,
            deterministic=deterministic,
            **options,
        )

    def encode(
        self,
        source: Array,
        mask: MaskLike = None,
        *,
        deterministic: bool | None = None,
        **options: Any,
    ) -> Any:
        """Return the memory [B, S, features] that the target attends to; options as the call's."""
        x = self.source(source, deterministic=deterministic)
        return self.encoder(x, mask=mask, deterministic=deterministic, **options)

    def keys(self, memory: Array) -> list[ProjectedMemory]:
        """Project a memory for every block, once for all the steps of `decode`."""
        return self.decoder.keys(memory)

    def init_cache(self, batch: int, capacity: int, **options: Any) -> list[Cache]:
        """Return empty caches for `decode`; see `attention_jax.cache.init`."""
        return self.decoder.init_cache(batch, capacity, **options)

    def decode(
        self,
        tokens: Array,
        caches: Sequence[Cache],
        memory: Array | Sequence[ProjectedMemory],
        *,
        source_mask: MaskLike = None,
        mask: MaskLike = None,
        count: Any = None,
    ) -> tuple[Array, list[Cache]]:
        """Return logits [B, T, target vocabulary] of the next tokens [B, T], and the next caches.

        The memory is from `encode`, or what `keys` made of it; the mask is that of the whole
        target, joined with the causal one.
        """
        positions = next_positions(caches[0], tokens.shape[1])
        x, following = self.decoder.decode(
            self.target(tokens, positions, deterministic=True),
            caches,
            memory,
            mask=mask,
            memory_mask=source_mask,
            count=count,
        )
        return self.target.attend(x), following

    def generate(
        self,
        source: Array,
        prompt: Array,
        num_steps: int,
        source_mask: MaskLike = None,
        *,
        lengths: Array | Sequence[int] | None = None,
        **options: Any,
    ) -> Array:
        """Write after a prompt [B, T], such as one token that begins every target: [B, num_steps].

        Options are those of `attention_jax.layers.generate`.
        """
        memory = self.keys(self.encode(source, source_mask, deterministic=True))
        batch, length = prompt.shape
        caches = self.init_cache(batch, length + num_steps, ragged=lengths is not None)
        decode = functools.partial(self._pure_decode(), memory=memory, source_mask=source_mask)
        options["lengths"] = lengths
        return generate(decode, caches, prompt, num_steps, **options)


def position_or_table(position: Any, max_length: int | None, features: int) -> Any:
    """Return the position that is given, or a learned table where a length is given.

    Raises:
      ValueError: both are given.
    """
    if position is not None and max_length is not None:
        raise ValueError(
            f"positions: give a position, or max_length = {max_length} for a learned table of "
            "them, not both."
        )
    return position if max_length is None else learned_table(max_length, features)


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


def count_patches(image_size: tuple[int, int], patch_size: int) -> int:
    """Return how many squares an image is cut into.

    Raises:
      ShapeError: height or width is not a multiple of the size.

    >>> count_patches((8, 6), 2)
    12
    """
    rows, columns = (
        checks.multiple("patches", name, length, "the patch size", patch_size)
        for name, length in zip(("the height", "the width"), image_size, strict=True)
    )
    return rows * columns


def patches(images: Array, size: int) -> Array:
    """Cut images [B, height, width, C] into squares, row by row: [B, S, size size C].

    Raises:
      ShapeError: height or width is not a multiple of the size.

    Dosovitskiy et al. 2021 (ViT), section 3.1.

    >>> patches(jnp.zeros((2, 8, 6, 3)), 2).shape
    (2, 12, 12)
    """
    batch, height, width, channels = checks.axes("patches", images=(images, "BHWC")).values()
    count = count_patches((height, width), size)
    grid = images.reshape(batch, height // size, size, width // size, size, channels)
    return grid.swapaxes(2, 3).reshape(batch, count, size * size * channels)


def add_class_token(x: Array, class_token: Array, positions: Array) -> Array:
    """Put the class token [D] before patches [B, S, D], and add positions [1 + S, D].

    Raises:
      ShapeError: more or fewer patches than positions.

    Dosovitskiy et al. 2021 (ViT), equation 1.

    >>> add_class_token(jnp.zeros((2, 3, 5)), jnp.ones(5), jnp.zeros((4, 5))).shape
    (2, 4, 5)
    """
    first = jnp.broadcast_to(class_token.astype(x.dtype), (x.shape[0], 1, x.shape[2]))
    x = jnp.concatenate([first, x], axis=1)
    checks.axes("add_class_token", positions=(positions, "SD"), patches=(x, "BSD"))
    return x + jnp.broadcast_to(positions.astype(x.dtype), x.shape)


def generate(
    decode: Callable[..., tuple[Array, Any]],
    caches: Any,
    prompt: Array,
    num_steps: int,
    *,
    lengths: Array | Sequence[int] | None = None,
    rng: Array | None = None,
    temperature: float | Array = 1.0,
) -> Array:
    """Continue prompts, by the most likely token at each step or by one that is drawn.

    Args:
      decode: `decode(tokens [B, T], caches, count=...)`, which returns logits [B, T, vocabulary]
        and the next caches.
      caches: empty; ragged if `lengths` is given.
      prompt: tokens [B, T], of any integer type, which the result has too.
      num_steps: how many tokens to add.
      lengths: how many tokens of each prompt count, [B]; the rest is padding.
      rng: a `jax.random` key to draw tokens; None takes the most likely.
      temperature: logits are divided by it before tokens are drawn.

    Returns:
      The tokens after each prompt, [B, num_steps].

    Raises:
      ValueError: no step, a temperature that is not positive where it is known outside `jit`, or
        a prompt of a type that cannot hold every token.

    >>> def decode(tokens, caches, count):  # the next token is the last one plus 1
    ...     return jax.nn.one_hot(tokens + 1, 10), caches
    >>> generate(decode, (), jnp.array([[3, 4]]), 3)
    Array([[5, 6, 7]], dtype=int32)
    """
    checks.at_least("generate", 1, num_steps=num_steps)
    if not isinstance(temperature, jax.core.Tracer) and temperature <= 0:
        raise ValueError(f"generate: temperature must be positive, got {temperature}.")
    choose = functools.partial(_choose, rng, temperature)

    def step(carry: tuple[Array, Any], number: Array) -> tuple[tuple[Array, Any], Array]:
        token, caches = carry
        logits, caches = decode(token[:, None], caches, count=None)
        following = choose(logits[:, 0], number).astype(token.dtype)
        return (following, caches), following

    lengths = lengths if lengths is None else jnp.asarray(lengths)
    logits, caches = decode(prompt, caches, count=lengths)
    if logits.shape[-1] - 1 > jnp.iinfo(prompt.dtype).max:
        raise ValueError(
            f"generate: {prompt.dtype} cannot hold all of the {logits.shape[-1]} tokens; give the "
            "prompt as int32."
        )
    last = jnp.broadcast_to(prompt.shape[1] if lengths is None else lengths, prompt.shape[:1]) - 1
    token = choose(jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0], 0)
    token = token.astype(prompt.dtype)
    _, rest = jax.lax.scan(step, (token, caches), jnp.arange(1, num_steps))
    return jnp.concatenate([token[:, None], rest.swapaxes(0, 1)], axis=1)


def _choose(rng: Array | None, temperature: float | Array, logits: Array, step: Any) -> Array:
    """Return the most likely token of logits [B, vocabulary], or with a random key a drawn one."""
    if rng is None:
        return jnp.argmax(logits, axis=-1)
    logits = logits / jnp.asarray(temperature, logits.dtype)
    return jax.random.categorical(jax.random.fold_in(rng, step), logits)
