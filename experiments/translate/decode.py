"""Decoding: translate greedily or by beam search, or read a given translation (teacher forcing).

All seeds of one mechanism translate the same batch at once; their parameters have a leading
axis N.

A beam ranks outputs by log-probability over a length penalty (Wu et al. 2016, equation 14).
Finished outputs stay in the beam and compete with the others, so that a beam of one is greedy
decoding, and a beam of all outputs finds the best of all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.data.vocabulary import BOS, EOS, PAD
from experiments.translate.ensemble import built
from experiments.translate.model import Graph, token_losses

Array = jax.Array
Step = Callable[[Any, Array], tuple[Any, Array]]


class Beam(NamedTuple):
    """The best outputs so far, the best one first.

    Attributes:
      words: [..., K, longest], PAD after EOS.
      log_probability: [..., K].
      length: [..., K] in words, EOS included.
      ended: [..., K], True once EOS was written.
    """

    words: Array
    log_probability: Array
    length: Array
    ended: Array


def force(graph: Graph, parameters: Any, source: Array, target: Array) -> tuple[Array, Array]:
    """Read a given translation, word by word (teacher forcing).

    Args:
      graph: structure of the translator.
      parameters: with leading axis N.
      source: [B, S].
      target: [B, T].

    Returns:
      The losses of the words of each sentence, summed, [N, B], and the weights [N, B, T, S].
    """
    one_seed = functools.partial(_force_one_seed, graph, source, target)
    return jax.vmap(one_seed)(parameters)


def _force_one_seed(
    graph: Graph, source: Array, target: Array, parameters: Any
) -> tuple[Array, Array]:
    logits, weights = built(graph, parameters)(source, target)
    return jnp.sum(token_losses(logits, target.T), axis=0), weights.swapaxes(0, 1)


def greedy(graph: Graph, longest: int, parameters: Any, source: Array) -> Array:
    """Choose the most probable word until every sentence of every seed has ended.

    Args:
      graph: structure of the translator.
      longest: words after which a translation is cut off.
      parameters: with leading axis N.
      source: [B, S].

    Returns:
      Words [N, B, longest], PAD after EOS.
    """
    memory, carry = begin(graph, longest, parameters, source)
    next_words = functools.partial(_next_words, graph, parameters, memory)

    def unfinished(loop: Any) -> Array:
        position, _, _, ended, _ = loop
        return (position < longest) & ~jnp.all(ended)

    def step(loop: Any) -> Any:
        position, carry, previous, ended, words = loop
        carry, logits = next_words(carry, previous)
        word = jnp.argmax(logits, axis=-1).astype(jnp.int32)
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
    return jax.lax.while_loop(unfinished, step, start)[-1]


def beam(
    graph: Graph, longest: int, size: int, alpha: float, parameters: Any, source: Array
) -> Array:
    """Search for the most probable translations with a beam of `size`.

    Args:
      graph: structure of the translator.
      longest: words after which a translation is cut off.
      size: K, of the beam.
      alpha: exponent of the length penalty.
      parameters: with leading axis N.
      source: [B, S].

    Returns:
      The words of the best output of each beam, [N, B, longest], PAD after EOS.
    """
    memory, carry = begin(graph, longest, parameters, source)

    def repeated(leaf: Array) -> Array:
        return jnp.repeat(leaf, size, axis=1)

    memory = jax.tree.map(repeated, memory)
    carry = jax.tree.map(lambda leaf: _split_beam(repeated(leaf), size), carry)
    next_words = functools.partial(_next_words, graph, parameters, memory)

    def step(carry: Any, previous: Array) -> Any:
        carry, logits = next_words(*jax.tree.map(_merge_beam, (carry, previous)))
        return jax.tree.map(lambda leaf: _split_beam(leaf, size), (carry, logits))

    shape = jax.tree.leaves(carry)[0].shape[:2]
    return search(step, carry, shape, size, longest, alpha).words[:, :, 0]


def begin(graph: Graph, longest: int, parameters: Any, source: Array) -> tuple[Any, Any]:
    """Encode sources [B, S] with every seed: memories and first carries, leaves [N, B, ...]."""
    return jax.vmap(functools.partial(_begin_one_seed, graph, longest, source))(parameters)


def _begin_one_seed(graph: Graph, longest: int, source: Array, parameters: Any) -> tuple[Any, Any]:
    translator = built(graph, parameters)
    memory = translator.encode(source)
    return memory, translator.start(memory, longest)


def _next_words(
    graph: Graph, parameters: Any, memory: Any, carry: Any, previous: Array
) -> tuple[Any, Array]:
    """Return the next carry and logits [N, B, W] after the words [N, B], of every seed."""

    def one_seed(parameters: Any, *state: Any) -> tuple[Any, Array]:
        return built(graph, parameters).step(*state)

    return jax.vmap(one_seed)(parameters, memory, carry, previous)


def _split_beam(leaf: Array, size: int) -> Array:
    """[N, B K, ...] to [N, B, K, ...]."""
    return leaf.reshape(leaf.shape[0], -1, size, *leaf.shape[2:])


def _merge_beam(leaf: Array) -> Array:
    """[N, B, K, ...] to [N, B K, ...]."""
    return leaf.reshape(leaf.shape[0], -1, *leaf.shape[3:])


def length_penalty(length: Array, alpha: float) -> Array:
    r"""Return the divisor of a log-probability: lp(Y) = ((5 + |Y|) / 6)^\alpha.

    Wu et al. 2016, equation 14.
    """
    return ((5.0 + length.astype(jnp.float32)) / 6.0) ** alpha


def search(
    step: Step, carry: Any, shape: tuple[int, ...], size: int, longest: int, alpha: float
) -> Beam:
    """Search for the most probable outputs, many searches at once.

    Args:
      step: `step(carry, words [*shape, K]) -> (carry, logits [*shape, K, W])`, logits of the next
        words.
      carry: of the first step: leaves [*shape, K, ...], all K equal.
      shape: of the searches.
      size: K.
      longest: words after which an output is cut off.
      alpha: exponent of the length penalty; 0 ranks by probability.

    Returns:
      The final beams.
    """
    # All but one of K equal starts get probability zero, or the beam would hold copies.
    first = jnp.where(jnp.arange(size) == 0, 0.0, -jnp.inf)
    beam = Beam(
        words=jnp.full((*shape, size, longest), PAD, jnp.int32),
        log_probability=jnp.broadcast_to(first, (*shape, size)),
        length=jnp.zeros((*shape, size), jnp.int32),
        ended=jnp.zeros((*shape, size), bool),
    )
    previous = jnp.full((*shape, size), BOS, jnp.int32)

    advance = functools.partial(advanced, alpha=alpha)
    for _ in shape:
        advance = jax.vmap(advance, in_axes=(0, 0, None))

    def unfinished(loop: Any) -> Array:
        position, _, _, beam = loop
        return (position < longest) & ~jnp.all(beam.ended)

    def write(loop: Any) -> Any:
        position, carry, previous, beam = loop
        carry, logits = step(carry, previous)
        beam, parent = advance(beam, logits, position)
        carry = jax.tree.map(lambda leaf: _of_parents(leaf, parent), carry)
        return position + 1, carry, beam.words[..., position], beam

    return jax.lax.while_loop(unfinished, write, (jnp.int32(0), carry, previous, beam))[-1]


def advanced(beam: Beam, logits: Array, position: Array, *, alpha: float) -> tuple[Beam, Array]:
    """Append a word in one search; return the next beam, and the parent of each output in it.

    Args:
      beam: of K outputs.
      logits: of the next word, [K, W].
      position: of that word.
      alpha: of `length_penalty`.
    """
    size, words = logits.shape
    following = jax.nn.log_softmax(logits.astype(jnp.float32))
    after_end = jnp.where(jnp.arange(words) == PAD, 0.0, -jnp.inf)
    following = jnp.where(beam.ended[:, None], after_end[None, :], following)
    totals = beam.log_probability[:, None] + following
    length = jnp.where(beam.ended, beam.length, beam.length + 1)
    ranked = totals / length_penalty(length, alpha)[:, None]
    chosen = jax.lax.top_k(ranked.reshape(-1), size)[1]
    parent, word = chosen // words, (chosen % words).astype(jnp.int32)
    return (
        Beam(
            words=beam.words[parent].at[:, position].set(word),
            log_probability=totals.reshape(-1)[chosen],
            length=length[parent],
            ended=beam.ended[parent] | (word == EOS),
        ),
        parent,
    )


def _of_parents(leaf: Array, parent: Array) -> Array:
    """Take from [*shape, K, ...] what belongs to the parents [*shape, K]."""
    index = jax.lax.expand_dims(parent, range(parent.ndim, leaf.ndim))
    return jnp.take_along_axis(leaf, index, axis=parent.ndim - 1)
