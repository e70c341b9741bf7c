"""Transformer blocks, stacks and embeddings, whichever of the two Flax APIs holds their parameters.

A layer returns its output, or a tuple of it and its extras: attention weights where they are asked
for, or the next cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from attention_jax.base import checks
from attention_jax.base.binding import BiasLike
from attention_jax.cache import KeyValueCache
from attention_jax.layers.heads import ProjectedMemory
from attention_jax.layers.options import of_layer
from attention_jax.linear import LinearState
from attention_jax.masks import MaskLike

Array = jax.Array
Cache = KeyValueCache | LinearState
"""What attention keeps of the past: all keys and values, or their sums."""


class BlockWeights(NamedTuple):
    """The weights of a block: of self-attention [B, N, T, T] and, to a memory, [B, N, T, S].

    Or statistics, where these are asked for; both, as a pair, where both are.
    """

    attention: Any
    cross_attention: Any = None


class Sublayer(NamedTuple):
    """A layer f and its norms: y = after(x + dropout(branch(f(before(x)))))."""

    layer: Any
    dropout: Callable[[Array], Array]
    before: Any = None
    branch: Any = None
    after: Any = None

    def add(
        self, x: Array, function: Callable[[Array], Any], source: Array | None = None
    ) -> tuple[Any, ...]:
        """Return x with what `function`, a method of the layer, adds to it; and its extras.

        The layer reads x, or `source` where that is given.
        """
        source = x if source is None else source
        change, *extras = output_and_extras(function(_normed(self.before, source)))
        x = x + self.dropout(_normed(self.branch, change)).astype(x.dtype)
        return _normed(self.after, x), *extras


def _normed(norm: Any, x: Array) -> Array:
    return x if norm is None else norm(x)


class Block(NamedTuple):
    """Self-attention, attention to a memory (or None) and feed-forward, each with a residual.

    In a parallel block all of them read its input.
    """

    attention: Sublayer
    cross_attention: Sublayer | None
    feed_forward: Sublayer
    parallel: bool = False

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
        bias: BiasLike = None,
        deterministic: bool | None = None,
        **options: Any,
    ) -> Any:
        """Apply the block.

        Args:
          x: [B, T, features].
          memory: [B, S, memory_features], or what `keys` made of it.
          mask: of the self-attention.
          memory_mask: of the attention to the memory.
          bias: of the self-attention, instead of its own.
          deterministic: instead of the module's own.
          **options: positions, order, tile_sizes, return_weights, sow_weights, statistics and
            sow_statistics of `MultiHeadAttention`; and memory_order, where the memory is dealt to
            devices too.

        Returns:
          [B, T, features]; with it `attention_jax.layers.BlockWeights` where asked for.

        Raises:
          ValueError: a memory for a block without, or none for one with.
        """
        block = self._layer(deterministic)
        block.check_memory(memory)
        source = x if block.parallel else None
        options["deterministic"] = deterministic
        memory_order = options.pop("memory_order", None)
        layer = block.attention.layer
        given = known(layer, {**options, "bias": bias})
        x, *found = block.attention.add(x, functools.partial(layer, mask=mask, **given))
        weights = _as_one(found)
        if block.cross_attention is not None:
            layer = block.cross_attention.layer
            if memory_order is not None:
                options["order"] = options.get("order"), memory_order
            attention = functools.partial(layer, mask=memory_mask, **known(layer, options))
            attention = functools.partial(_call_with_memory, attention, memory)
            x, *found = block.cross_attention.add(x, attention, source)
            weights += _as_one(found)
        (x,) = block.feed_forward.add(x, block.feed_forward.layer, source)
        return (x, BlockWeights(*weights)) if weights else x

    def keys(self, memory: Array) -> ProjectedMemory:
        """Project a memory [B, S, memory_features] once, for all the calls that attend to it."""
        block = self._layer()
        block.check_memory(memory)
        return block.cross_attention.layer.keys(memory)  # pyright: ignore[reportOptionalMemberAccess]

    def init_cache(self, batch: int, capacity: int, **options: Any) -> Cache:
        """Return an empty cache for `decode`; see `attention_jax.cache.init`.

        Raises:
          TypeError: the attention cannot decode.
        """
        attention = self._layer().attention.layer
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
        bias: BiasLike = None,
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
          bias: as in the full pass.
          causal: no token attends to a later one, whatever the mask allows.
          count: how many of the T are tokens, [B] in a ragged batch; the rest is padding.

        Returns:
          What the full causal pass gives at these positions, [B, T, features], and the next cache.
        """
        block = self._layer(deterministic=True)
        block.check_memory(memory)
        source = x if block.parallel else None
        options = {"mask": mask, "causal": causal, "count": count}
        options |= {} if bias is None else {"bias": bias}
        attention = functools.partial(_decode_layer, block.attention.layer, cache, options)
        x, following = block.attention.add(x, attention)
        if block.cross_attention is not None:
            to_memory = block.cross_attention.layer.decode_memory
            attention = functools.partial(to_memory, memory=memory, cache=cache, mask=memory_mask)
            (x,) = block.cross_attention.add(x, attention, source)
        (x,) = block.feed_forward.add(x, block.feed_forward.layer, source)
        return x, following


class Stack(NamedTuple):
    """Blocks, lowest first, the last norm or None, and the bias that they share or None."""

    blocks: list[Any]
    norm: Any
    bias: Any


class StackMethods:
    """The methods of `TransformerStack` that the two APIs share."""

    def _stack(self) -> Stack:
        """Return the blocks, the last norm and the shared bias with this module's parameters."""
        raise NotImplementedError

    def _rematerialized(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        """Return `apply(block, x, memory)`, rematerialized where the module says so."""
        raise NotImplementedError

    def __call__(
        self,
        x: Array,
        memory: Array | Sequence[ProjectedMemory | None] | None = None,
        **options: Any,
    ) -> Any:
        """Apply the blocks to [B, T, features]; options are those of a block's call.

        The memory is one array for all blocks that attend to one, or what `keys` made of it.
        `mask`, `memory_mask` and `bias` are one for all blocks, a list or tuple with one for each,
        or `attention_jax.layers.by_layer(function)`. With `return_weights` or `statistics` a list
        with the `BlockWeights` of every block comes with the result.

        Raises:
          ValueError: a list or tuple that does not have one entry for each layer.
        """
        stack = self._stack()
        calls = [
            self._rematerialized(functools.partial(_call_block, own))
            for own in _options_of_blocks(stack, options)
        ]
        return _apply_blocks(stack, x, memory, calls)

    def keys(self, memory: Array) -> list[ProjectedMemory | None]:
        """Project a memory [B, S, memory_features] for every block, once for all calls.

        None is for blocks that do not attend to it, in a stack where others do.
        """
        blocks = self._stack().blocks
        memories = zip(blocks, _memories(blocks, memory), strict=True)
        return [None if own is None else block.keys(own) for block, own in memories]

    def init_cache(self, batch: int, capacity: Any, **options: Any) -> list[Cache]:
        """Return an empty cache for every block; see `attention_jax.cache.init`.

        Capacity and options, such as `window`, may differ between blocks, as in the call.
        """
        blocks = self._stack().blocks
        options = {"capacity": capacity, **options}
        return [
            block.init_cache(batch, **of_layer("init_cache", options, n, len(blocks)))
            for n, block in enumerate(blocks)
        ]

    def decode(
        self,
        x: Array,
        caches: Sequence[Cache],
        memory: Array | Sequence[ProjectedMemory | None] | None = None,
        **options: Any,
    ) -> tuple[Array, list[Cache]]:
        """Apply the blocks to the next tokens; options are those of a block's `decode`.

        `mask`, `memory_mask` and `bias` may differ between blocks, as in the call.
        """
        stack = self._stack()
        calls = [
            functools.partial(_decode_block, own) for own in _options_of_blocks(stack, options)
        ]
        return _apply_blocks(stack, x, memory, calls, caches)


def _as_one(extras: list[Any]) -> list[Any]:
    """Return the extras of one attention as one entry, if there are any."""
    return [tuple(extras)] if len(extras) > 1 else extras


def _options_of_blocks(stack: Stack, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the options of every block's call; the shared bias where no other is given."""
    if stack.bias is not None and options.get("bias") is None:
        options = {**options, "bias": stack.bias}
    own = {name: options[name] for name in ("mask", "memory_mask", "bias") if name in options}
    count = len(stack.blocks)
    return [{**options, **of_layer("TransformerStack", own, n, count)} for n in range(count)]


def _apply_blocks(
    stack: Stack, x: Array, memory: Any, calls: Sequence[Callable[..., Any]], *each: Any
) -> Any:
    """Apply one block after the other, then the last norm.

    Args:
      stack: the blocks and the norm.
      x: [B, T, D].
      memory: one array for all blocks, or what `keys` made for each.
      calls: for each block `call(block, x, memory, ...)`, which returns x and the block's extras.
      *each: more arguments, a sequence with one for each block.

    Returns:
      x [B, T, D]; with it a list of the extras of every block, where there are any.
    """
    memories = _memories(stack.blocks, memory)
    extras = []
    for call, block, *others in zip(calls, stack.blocks, memories, *each, strict=True):
        x, *more = output_and_extras(call(block, x, *others))
        extras += more
    x = _normed(stack.norm, x)
    return (x, extras) if extras else x


def _memories(blocks: Sequence[Any], memory: Any) -> list[Any]:
    """Return the memory of each block: none for blocks without attention to it, if others have."""
    each = memory if isinstance(memory, list) else [memory] * len(blocks)
    attend = [block.memory_features is not None for block in blocks]
    if not any(attend):
        return each
    return [own if attends else None for own, attends in zip(each, attend, strict=True)]


def _call_block(options: dict[str, Any], block: Any, x: Array, memory: Any) -> Any:
    return block(x, memory, **options)


def _call_with_memory(attention: Callable[..., Any], memory: Any, x: Array) -> Any:
    return attention(x, memory)


def _decode_layer(attention: Any, cache: Cache, options: dict[str, Any], x: Array) -> Any:
    return attention.decode(x, cache, **options)


def _decode_block(
    options: dict[str, Any], block: Any, x: Array, memory: Any, cache: Cache
) -> tuple[Array, Cache]:
    return block.decode(x, cache, memory, **options)


def map_output(function: Callable[[Array], Array], result: Any) -> Any:
    """Apply a function to the output of a layer and leave its extras.

    >>> import jax.numpy as jnp
    >>> map_output(jnp.negative, (jnp.array(1.0), "weights"))
    (Array(-1., dtype=float32, weak_type=True), 'weights')
    """
    output, *extras = output_and_extras(result)
    return (function(output), *extras) if extras else function(output)


def output_and_extras(result: Any) -> tuple[Any, ...]:
    """Return the result of a layer as a tuple, whether or not extras come with the output."""
    return result if isinstance(result, tuple) else (result,)


def feed_forward(
    x: Array, hidden: Any, gate: Any, out: Any, activation: Callable[[Array], Array]
) -> Array:
    """Return out(f(hidden(x))), or with a gate out(f(gate(x)) * hidden(x))."""
    inside = activation(hidden(x)) if gate is None else activation(gate(x)) * hidden(x)
    return out(inside)


def hidden_size(features: int, hidden_features: int | None) -> int:
    """Return the features inside of a feed-forward layer, 4 D unless given."""
    checks.sizes("FeedForward", features=features)
    return checks.size_or(4 * features, "FeedForward", hidden_features=hidden_features)


def gelu(x: Array) -> Array:
    """GELU as BERT and ViT have it: x Phi(x), by the error function (Hendrycks and Gimpel 2016)."""
    return jax.nn.gelu(x, approximate=False)


def known(layer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that are given; `deterministic` only to what drops something."""
    given = {name: value for name, value in options.items() if value is not None}
    if not getattr(layer, "dropout_rate", 0.0):
        given.pop("deterministic", None)
    return given
