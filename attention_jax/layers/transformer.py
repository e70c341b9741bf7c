"""Transformer blocks, stacks and embeddings, whichever of the two Flax APIs holds their parameters.

A layer returns its output, or a tuple of it and its extras: attention weights where they are asked
for, or the next cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.base import checks
from attention_jax.cache import KeyValueCache
from attention_jax.layers.heads import ProjectedMemory
from attention_jax.linear import LinearState
from attention_jax.masks import MaskLike
from attention_jax.masks.intervals import indices

Array = jax.Array
Cache = KeyValueCache | LinearState
"""What attention keeps of the past: all keys and values, or their sums."""


class BlockWeights(NamedTuple):
    """The weights of a block: of self-attention [B, N, T, T] and, to a memory, [B, N, T, S]."""

    attention: Array
    cross_attention: Array | None = None


class Block(NamedTuple):
    """Self-attention, attention to a memory (or None) and feed-forward, each with a residual."""

    attention: Any
    attention_norm: Any
    cross_attention: Any
    cross_attention_norm: Any
    feed_forward: Any
    feed_forward_norm: Any
    dropout: Callable[[Array], Array]
    norm_first: bool

    def add(self, x: Array, norm: Any, function: Callable[[Array], Any]) -> tuple[Any, ...]:
        """Return x + f(norm(x)) where norms come first, else norm(x + f(x)); and f's extras."""
        change, *extras = output_and_extras(function(norm(x) if self.norm_first else x))
        x = x + self.dropout(change).astype(x.dtype)
        return (x if self.norm_first else norm(x)), *extras

    def check_memory(self, memory: Any) -> None:
        """Require a memory where the block attends to one, and none where it does not."""
        if self.cross_attention is None and memory is not None:
            raise ValueError(
                "TransformerBlock: it was built without attention to a memory; give "
                "memory_features, or leave out the memory."
            )
        if self.cross_attention is not None and memory is None:
            raise ValueError("TransformerBlock: it attends to a memory, and none was given.")


class BlockMethods:
    """The methods of `TransformerBlock` that the two APIs share."""

    def _layer(self, deterministic: bool | None = None) -> Block:
        """Return the computation with this module's parameters."""
        raise NotImplementedError

    def __call__(
        self,
        x: Array,
        memory: Array | ProjectedMemory | None = None,
        *,
        mask: MaskLike = None,
        memory_mask: MaskLike = None,
        deterministic: bool | None = None,
        **options: Any,
    ) -> Any:
        """Apply the block.

        Args:
          x: [B, T, features].
          memory: [B, S, memory_features], or what `keys` made of it.
          mask: of the self-attention.
          memory_mask: of the attention to the memory.
          deterministic: instead of the module's own.
          **options: positions, return_weights and sow_weights of `MultiHeadAttention`.

        Returns:
          [B, T, features]; with it `attention_jax.layers.BlockWeights` where asked for.

        Raises:
          ValueError: a memory for a block without, or none for one with.
        """
        block = self._layer(deterministic)
        block.check_memory(memory)
        options["deterministic"] = deterministic
        known = _known(block.attention, options)
        attention = functools.partial(block.attention, mask=mask, **known)
        x, *weights = block.add(x, block.attention_norm, attention)
        if memory is not None:
            known = _known(block.cross_attention, options)
            attention = functools.partial(block.cross_attention, mask=memory_mask, **known)
            attention = functools.partial(_call_with_memory, attention, memory)
            x, *more = block.add(x, block.cross_attention_norm, attention)
            weights += more
        (x,) = block.add(x, block.feed_forward_norm, block.feed_forward)
        return (x, BlockWeights(*weights)) if weights else x

    def keys(self, memory: Array) -> ProjectedMemory:
        """Project a memory [B, S, memory_features] once, for all the calls that attend to it."""
        return self._layer().cross_attention.keys(memory)

    def init_cache(self, batch: int, capacity: int, **options: Any) -> Cache:
        """Return an empty cache for `decode`; see `attention_jax.cache.init`.

        Raises:
          TypeError: the attention cannot decode.
        """
        attention = self._layer().attention
        if not hasattr(attention, "init_cache"):
            raise TypeError(
                f"TransformerBlock: {type(attention).__name__} keeps nothing of the past; build "
                "the block with MultiHeadAttention or LinearAttention to decode token by token."
            )
        return attention.init_cache(batch, capacity, **options)

    def decode(
        self,
        x: Array,
        cache: Cache,
        memory: Array | ProjectedMemory | None = None,
        *,
        mask: MaskLike = None,
        memory_mask: MaskLike = None,
        causal: bool = True,
        count: Any = None,
    ) -> tuple[Array, Cache]:
        """Apply the block to the next tokens of a sequence, as `MultiHeadAttention.decode` does.

        Args:
          x: [B, T, features], any number T of tokens.
          cache: from `init_cache`, or from the previous call.
          memory: as in the full pass.
          mask: the mask of the whole sequence.
          memory_mask: as in the full pass.
          causal: no token attends to a later one, whatever the mask allows.
          count: how many of the T are tokens, [B] in a ragged batch; the rest is padding.

        Returns:
          What the full causal pass gives at these positions, [B, T, features], and the next cache.
        """
        block = self._layer(deterministic=True)
        block.check_memory(memory)
        options = {"mask": mask, "causal": causal, "count": count}
        attention = functools.partial(block.attention.decode, cache=cache, **options)
        x, following = block.add(x, block.attention_norm, attention)
        if memory is not None:
            to_memory = block.cross_attention.decode_memory
            attention = functools.partial(to_memory, memory=memory, cache=cache, mask=memory_mask)
            (x,) = block.add(x, block.cross_attention_norm, attention)
        (x,) = block.add(x, block.feed_forward_norm, block.feed_forward)
        return x, following


class StackMethods:
    """The methods of `TransformerStack` that the two APIs share."""

    def _layers(self) -> tuple[list[Any], Any]:
        """Return the blocks, lowest first, and the last norm or None."""
        raise NotImplementedError

    def _rematerialized(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        """Return `apply(block, x, memory)`, rematerialized where the module says so."""
        raise NotImplementedError

    def __call__(
        self,
        x: Array,
        memory: Array | Sequence[ProjectedMemory] | None = None,
        **options: Any,
    ) -> Any:
        """Apply the blocks to [B, T, features]; options are those of a block's call.

        The memory is one array for all blocks, or what `keys` made of it. With
        `return_weights` a list with the weights of every block comes with the result.
        """

        def apply(block: Any, x: Array, memory: Any) -> Any:
            return block(x, memory, **options)

        blocks, norm = self._layers()
        return _apply_blocks(self._rematerialized(apply), blocks, x, memory, norm)

    def keys(self, memory: Array) -> list[ProjectedMemory]:
        """Project a memory [B, S, memory_features] for every block, once for all calls."""
        return [block.keys(memory) for block in self._layers()[0]]

    def init_cache(self, batch: int, capacity: int, **options: Any) -> list[Cache]:
        """Return an empty cache for every block; see `attention_jax.cache.init`."""
        return [block.init_cache(batch, capacity, **options) for block in self._layers()[0]]

    def decode(
        self,
        x: Array,
        caches: Sequence[Cache],
        memory: Array | Sequence[ProjectedMemory] | None = None,
        **options: Any,
    ) -> tuple[Array, list[Cache]]:
        """Apply the blocks to the next tokens; options are those of a block's `decode`."""
        blocks, norm = self._layers()
        apply = functools.partial(_decode_block, options)
        return _apply_blocks(apply, blocks, x, memory, norm, caches)


def _apply_blocks(
    apply: Callable[..., Any], blocks: Sequence[Any], x: Array, memory: Any, norm: Any, *each: Any
) -> Any:
    """Apply `apply(block, x, memory, ...)` block after block, then the last norm.

    Args:
      apply: of one block, to x [B, T, D]; returns it, and the block's extras.
      blocks: lowest first.
      x: [B, T, D].
      memory: one array for all blocks, or what `keys` made for each.
      norm: a function, or None.
      *each: more arguments, a sequence with one for each block.

    Returns:
      x [B, T, D]; with it a list of the extras of every block, where there are any.
    """
    memories = memory if isinstance(memory, list) else [memory] * len(blocks)
    extras = []
    for block, *others in zip(blocks, memories, *each, strict=True):
        x, *more = output_and_extras(apply(block, x, *others))
        extras += more
    x = x if norm is None else norm(x)
    return (x, extras) if extras else x


def _call_with_memory(attention: Callable[..., Any], memory: Any, x: Array) -> Any:
    return attention(x, memory)


def _decode_block(
    options: dict[str, Any], block: Any, x: Array, memory: Any, cache: Cache
) -> tuple[Array, Cache]:
    return block.decode(x, cache, memory, **options)


def map_output(function: Callable[[Array], Array], result: Any) -> Any:
    """Apply a function to the output of a layer and leave its extras.

    >>> map_output(jnp.negative, (jnp.array(1.0), "weights"))
    (Array(-1., dtype=float32, weak_type=True), 'weights')
    """
    output, *extras = output_and_extras(result)
    return (function(output), *extras) if extras else function(output)


def output_and_extras(result: Any) -> tuple[Any, ...]:
    """Return the result of a layer as a tuple, whether or not extras come with the output."""
    return result if isinstance(result, tuple) else (result,)


def attention_dropout(dropout_rate: float, deterministic: bool) -> dict[str, Any]:
    """Return the dropout options of an attention: none where it drops nothing."""
    options = {"dropout_rate": dropout_rate, "deterministic": deterministic}
    return options if dropout_rate else {}


def hidden_size(features: int, hidden_features: int | None) -> int:
    """Return the features inside of a feed-forward layer, 4 D unless given."""
    checks.sizes("FeedForward", features=features)
    return checks.size_or(4 * features, "FeedForward", hidden_features=hidden_features)


def embed(
    token: Callable[[Array], Array],
    tokens: Array,
    scale: float,
    position: Callable[[Array], Array] | None,
    positions: Array | None,
) -> Array:
    """Return the tokens' vectors [B, T, D], scaled, plus those of their positions, if any."""
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


def _known(attention: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that are given; `deterministic` only to what drops weights."""
    given = {name: value for name, value in options.items() if value is not None}
    if not getattr(attention, "dropout_rate", 0.0):
        given.pop("deterministic", None)
    return given
