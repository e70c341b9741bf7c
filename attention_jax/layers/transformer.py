"""The computation of Transformers, whichever of the two Flax APIs holds their parameters.

A layer returns its output, or a tuple of it and what is beside it: attention weights where they
are asked for, or the next cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from attention_jax import masks
from attention_jax.base import checks
from attention_jax.cache import KeyValueCache
from attention_jax.linear import LinearState
from attention_jax.masks.intervals import indices
from attention_jax.positions import learned_table

Array = jax.Array
Cache = KeyValueCache | LinearState
"""What attention keeps of the past: all keys and values, or their sums."""


class BlockWeights(NamedTuple):
    """The weights of a block: of self-attention [B, N, T, T] and, to a memory, [B, N, T, S]."""

    attention: Array
    cross_attention: Array | None = None


class TransformerBlock(NamedTuple):
    """Self-attention, attention to a memory (or None) and feed-forward, each with a residual."""

    attention: Any
    attention_norm: Any
    cross_attention: Any
    cross_attention_norm: Any
    feed_forward: Any
    feed_forward_norm: Any
    dropout: Callable[[Array], Array]
    norm_first: bool

    def __call__(
        self,
        x: Array,
        memory: Any,
        *,
        mask: Any,
        memory_mask: Any,
        deterministic: bool | None,
        **options: Any,
    ) -> Any:
        """Return the output [B, T, D] and, where the options ask for them, the weights."""
        self._check(memory)
        options["deterministic"] = deterministic
        attention = functools.partial(self.attention, mask=mask, **_known(self.attention, options))
        x, *weights = self._add(x, self.attention_norm, attention)
        if memory is not None:
            known = _known(self.cross_attention, options)
            attention = functools.partial(self.cross_attention, mask=memory_mask, **known)
            x, *more = self._add(x, self.cross_attention_norm, lambda x: attention(x, memory))
            weights += more
        (x,) = self._add(x, self.feed_forward_norm, self.feed_forward)
        return (x, BlockWeights(*weights)) if weights else x

    def init_cache(self, batch: int, capacity: int, **options: Any) -> Cache:
        """Return an empty cache for `decode`.

        Raises:
          TypeError: the attention cannot decode.
        """
        if not hasattr(self.attention, "init_cache"):
            raise TypeError(
                f"TransformerBlock: {type(self.attention).__name__} keeps nothing of the past; "
                "build the block with MultiHeadAttention or LinearAttention to decode token by "
                "token."
            )
        return self.attention.init_cache(batch, capacity, **options)

    def decode(
        self,
        x: Array,
        cache: Cache,
        memory: Any,
        *,
        mask: Any,
        memory_mask: Any,
        count: Any,
    ) -> tuple[Array, Cache]:
        """Return what the full pass gives for the next tokens, and the next cache."""
        self._check(memory)
        attention = functools.partial(self.attention.decode, cache=cache, mask=mask, count=count)
        x, following = self._add(x, self.attention_norm, attention)
        if memory is not None:
            to_memory = self.cross_attention.decode_memory
            attention = functools.partial(to_memory, memory=memory, cache=cache, mask=memory_mask)
            (x,) = self._add(x, self.cross_attention_norm, attention)
        (x,) = self._add(x, self.feed_forward_norm, self.feed_forward)
        return x, following

    def _add(self, x: Array, norm: Any, function: Callable[[Array], Any]) -> tuple[Any, ...]:
        """Return x + f(norm(x)) where norms come first, else norm(x + f(x)); and what is beside."""
        change, *beside = _parts(function(norm(x) if self.norm_first else x))
        x = x + self.dropout(change).astype(x.dtype)
        return (x if self.norm_first else norm(x)), *beside

    def _check(self, memory: Any) -> None:
        if self.cross_attention is None and memory is not None:
            raise ValueError(
                "TransformerBlock: it was built without attention to a memory; give "
                "memory_features, or leave out the memory."
            )
        if self.cross_attention is not None and memory is None:
            raise ValueError("TransformerBlock: it attends to a memory, and none was given.")


def one_after_another(
    apply: Callable[..., Any], blocks: Sequence[Any], x: Array, memory: Any, norm: Any, *each: Any
) -> Any:
    """Apply `apply(block, x, memory, ...)` block after block, and a last norm where there is one.

    Args:
      apply: of one block, to x [B, T, D]; returns it, and what else comes of the block.
      blocks: lowest first.
      x: [B, T, D].
      memory: one array for all blocks, or what `keys` made for each.
      norm: a function, or None.
      *each: more arguments, a sequence with one for each block.

    Returns:
      x [B, T, D]; with it a list of what else came of every block, where something did.
    """
    memories = memory if isinstance(memory, list) else [memory] * len(blocks)
    beside = []
    for block, *others in zip(blocks, memories, *each, strict=True):
        x, *more = _parts(apply(block, x, *others))
        beside += more
    x = x if norm is None else norm(x)
    return (x, beside) if beside else x


def decoded_one_after_another(
    blocks: Sequence[Any], x: Array, caches: Sequence[Cache], memory: Any, norm: Any, **options: Any
) -> tuple[Array, list[Cache]]:
    """Let every block decode, each with its own cache; returns x and the next caches."""

    def decode(block: Any, x: Array, memory: Any, cache: Cache) -> tuple[Array, Cache]:
        return block.decode(x, cache, memory, **options)

    return one_after_another(decode, blocks, x, memory, norm, caches)


def on_output(function: Callable[[Array], Array], result: Any) -> Any:
    """Apply a function to the output of a layer and leave what is beside it.

    >>> on_output(jnp.negative, (jnp.array(1.0), "weights"))
    (Array(-1., dtype=float32, weak_type=True), 'weights')
    """
    output, *beside = _parts(result)
    return (function(output), *beside) if beside else function(output)


def dropout_options(dropout_rate: float, deterministic: bool) -> dict[str, Any]:
    """Return what an attention is told of dropout: nothing where there is none."""
    dropped = {"dropout_rate": dropout_rate, "deterministic": deterministic}
    return dropped if dropout_rate else {}


def embed(
    token: Callable[[Array], Array],
    tokens: Array,
    scale: float,
    position: Callable[[Array], Array] | None,
    positions: Array | None,
) -> Array:
    """Return the tokens' vectors [B, T, D], scaled, plus those of where they stand, if any."""
    checks.axes("Embedding", tokens=(tokens, "BT"))
    vectors = token(_as_indices(tokens))
    vectors = vectors * jnp.asarray(scale, vectors.dtype)
    if position is None:
        return vectors
    added = position(indices(tokens.shape[1]) if positions is None else positions)
    return vectors + jnp.broadcast_to(added.astype(vectors.dtype), vectors.shape)


def _as_indices(tokens: Array) -> Array:
    """Return integers as int32: those of a byte cannot index a longer table in JAX."""
    is_whole = jnp.issubdtype(tokens.dtype, jnp.integer)
    return tokens.astype(jnp.int32) if is_whole else tokens


def table_unless(position: Any, max_length: int | None, features: int) -> Any:
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


def causal(mask: Any) -> masks.Mask:
    """Forbid the future, beside what the mask forbids."""
    return masks.Causal() & masks.as_mask(mask)


def patch_count(image_size: tuple[int, int], patch_size: int) -> int:
    """Return how many squares an image is cut into.

    Raises:
      ShapeError: height or width is not a multiple of the size.

    >>> patch_count((8, 6), 2)
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
    count = patch_count((height, width), size)
    grid = images.reshape(batch, height // size, size, width // size, size, channels)
    return grid.swapaxes(2, 3).reshape(batch, count, size * size * channels)


def with_class_token(x: Array, class_token: Array, positions: Array) -> Array:
    """Put the class token [D] before patches [B, S, D], and add positions [1 + S, D].

    Raises:
      ShapeError: more or fewer patches than positions.

    Dosovitskiy et al. 2021 (ViT), equation 1.

    >>> with_class_token(jnp.zeros((2, 3, 5)), jnp.ones(5), jnp.zeros((4, 5))).shape
    (2, 4, 5)
    """
    first = jnp.broadcast_to(class_token.astype(x.dtype), (x.shape[0], 1, x.shape[2]))
    x = jnp.concatenate([first, x], axis=1)
    checks.axes("with_class_token", positions=(positions, "SD"), patches=(x, "BSD"))
    return x + jnp.broadcast_to(positions.astype(x.dtype), x.shape)


def generate(
    decode: Callable[[Array, Any, Any], tuple[Array, Any]],
    caches: Any,
    prompt: Array,
    steps: int,
    *,
    lengths: Array | Sequence[int] | None = None,
    key: Array | None = None,
    temperature: float | Array = 1.0,
) -> Array:
    """Continue prompts, by the most likely token at each step or by one that is drawn.

    Args:
      decode: `decode(tokens [B, T], caches, count) -> (logits [B, T, vocabulary], caches)`.
      caches: empty; ragged if `lengths` is given.
      prompt: tokens [B, T], of any integer type, which the result has too.
      steps: how many tokens to add.
      lengths: how many tokens of each prompt count, [B]; the rest is padding.
      key: a `jax.random` key to draw tokens; None takes the most likely.
      temperature: logits are divided by it before tokens are drawn.

    Returns:
      The tokens after each prompt, [B, steps].

    Raises:
      ValueError: no step, a temperature that is not positive where it is known outside `jit`, or
        a prompt of a type that cannot hold every token.
    """
    checks.at_least("generate", 1, steps=steps)
    if not isinstance(temperature, jax.core.Tracer) and temperature <= 0:
        raise ValueError(f"generate: temperature must be positive, got {temperature}.")

    def choose(logits: Array, step: Any) -> Array:
        if key is None:
            return jnp.argmax(logits, axis=-1).astype(prompt.dtype)
        logits = logits / jnp.asarray(temperature, logits.dtype)
        drawn = jax.random.categorical(jax.random.fold_in(key, step), logits)
        return drawn.astype(prompt.dtype)

    def step(carry: tuple[Array, Any], number: Array) -> tuple[tuple[Array, Any], Array]:
        token, caches = carry
        logits, caches = decode(token[:, None], caches, None)
        following = choose(logits[:, 0], number)
        return (following, caches), following

    lengths = lengths if lengths is None else jnp.asarray(lengths)
    logits, caches = decode(prompt, caches, lengths)
    if logits.shape[-1] - 1 > jnp.iinfo(prompt.dtype).max:
        raise ValueError(
            f"generate: {prompt.dtype} cannot hold all of the {logits.shape[-1]} tokens; give the "
            "prompt as int32."
        )
    last = jnp.broadcast_to(prompt.shape[1] if lengths is None else lengths, prompt.shape[:1]) - 1
    token = choose(jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0], 0)
    _, rest = jax.lax.scan(step, (token, caches), jnp.arange(1, steps))
    return jnp.concatenate([token[:, None], rest.swapaxes(0, 1)], axis=1)


def _known(attention: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that are given; `deterministic` only to what drops weights."""
    given = {name: value for name, value in options.items() if value is not None}
    if not getattr(attention, "dropout_rate", 0.0):
        given.pop("deterministic", None)
    return given


def _parts(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)
