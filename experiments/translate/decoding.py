"""Translating: with the reference given, to measure loss and alignment, and freely.

All seeds of one mechanism translate the same batch at once; their parameters have a leading
axis N.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.data.vocabulary import BOS, EOS, PAD
from experiments.translate.beam import search
from experiments.translate.learning import Graph, token_losses

Array = jax.Array


def force(graph: Graph, parameters: Any, source: Array, target: Array) -> tuple[Array, Array]:
    """Read a translation aloud: its words are given, not chosen.

    Args:
      graph: structure of the translator.
      parameters: with leading axis N.
      source: [B, S].
      target: [B, T].

    Returns:
      The losses of the words of each sentence, summed, [N, B], and the weights [N, B, T, S].
    """

    def one_seed(parameters: Any) -> tuple[Array, Array]:
        logits, weights = nnx.merge(graph, parameters)(source, target)
        return jnp.sum(token_losses(logits, target.T), axis=0), weights.swapaxes(0, 1)

    return jax.vmap(one_seed)(parameters)


def greedy(graph: Graph, longest: int, parameters: Any, source: Array) -> Array:
    """Choose the most probable word until every sentence of every seed has ended.

    Args:
      graph: structure of the translator.
      longest: words after which a translation is cut off.
      parameters: with leading axis N.
      source: [B, S].

    Returns:
      Words [N, B, longest], PAD behind EOS.
    """
    memory, carry = begin(graph, longest, parameters, source)

    def next_word(parameters: Any, memory: Any, carry: Any, previous: Array) -> Any:
        carry, logits = nnx.merge(graph, parameters).step(memory, carry, previous)
        return carry, jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def some_go_on(loop: Any) -> Array:
        position, _, _, ended, _ = loop
        return (position < longest) & ~jnp.all(ended)

    def step(loop: Any) -> Any:
        position, carry, previous, ended, words = loop
        carry, word = jax.vmap(next_word)(parameters, memory, carry, previous)
        word = jnp.where(ended, PAD, word)
        words = words.at[:, :, position].set(word)
        return position + 1, carry, word, ended | (word == EOS), words

    shape = jax.tree.leaves(carry)[0].shape[:2]
    start = (
        jnp.int32(0),
        carry,
        jnp.full(shape, BOS, jnp.int32),
        jnp.zeros(shape, bool),
        jnp.full((*shape, longest), PAD, jnp.int32),
    )
    return jax.lax.while_loop(some_go_on, step, start)[-1]


def beam(
    graph: Graph, longest: int, size: int, alpha: float, parameters: Any, source: Array
) -> Array:
    """Search for the most probable translations, `size` at a time.

    Args:
      graph: structure of the translator.
      longest: words after which a translation is cut off.
      size: K, of the beam.
      alpha: of the penalty for length.
      parameters: with leading axis N.
      source: [B, S].

    Returns:
      The words of the best one of each beam, [N, B, longest], PAD behind EOS.
    """
    memory, carry = begin(graph, longest, parameters, source)

    def copied(leaf: Array) -> Array:
        return jnp.repeat(leaf, size, axis=1)

    memory = jax.tree.map(copied, memory)
    carry = jax.tree.map(lambda leaf: _apart(copied(leaf), size), carry)

    def next_words(parameters: Any, memory: Any, carry: Any, previous: Array) -> Any:
        return nnx.merge(graph, parameters).step(memory, carry, previous)

    def step(carry: Any, previous: Array) -> Any:
        together = jax.tree.map(_together, (carry, previous))
        carry, logits = jax.vmap(next_words)(parameters, memory, *together)
        return jax.tree.map(lambda leaf: _apart(leaf, size), (carry, logits))

    shape = jax.tree.leaves(carry)[0].shape[:2]
    return search(step, carry, shape, size, longest, alpha).words[:, :, 0]


def _apart(leaf: Array, size: int) -> Array:
    """[N, B K, ...] to [N, B, K, ...]."""
    return leaf.reshape(leaf.shape[0], -1, size, *leaf.shape[2:])


def _together(leaf: Array) -> Array:
    """[N, B, K, ...] to [N, B K, ...]."""
    return leaf.reshape(leaf.shape[0], -1, *leaf.shape[3:])


def begin(graph: Graph, longest: int, parameters: Any, source: Array) -> tuple[Any, Any]:
    """Read sources [B, S] with every seed: memories and first carries, leaves [N, B, ...]."""

    def one_seed(parameters: Any) -> tuple[Any, Any]:
        translator = nnx.merge(graph, parameters)
        memory = translator.encode(source)
        return memory, translator.start(memory, longest)

    return jax.vmap(one_seed)(parameters)
