"""Beam search: the best outputs of a model that writes word by word, several kept at a time.

Outputs are ranked by log-probability over a penalty for length (Wu et al. 2016, equation 14).
Those that have ended stay in the beam and compete with those that go on, so that a beam of one
is greedy decoding, and a beam of all outputs finds the best of all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.data.vocabulary import BOS, EOS, PAD

Array = jax.Array
Step = Callable[[Any, Array], tuple[Any, Array]]


class Beam(NamedTuple):
    """The best outputs so far, the best one first.

    `words` [..., K, longest], PAD behind EOS; `log_probability` [..., K]; `length` [..., K] in
    words, EOS included; `ended` [..., K] where EOS was written.
    """

    words: Array
    log_probability: Array
    length: Array
    ended: Array


def length_penalty(length: Array, alpha: float) -> Array:
    r"""What a log-probability is divided by: lp(Y) = ((5 + |Y|) / 6)^\alpha.

    Wu et al. 2016, equation 14.
    """
    return ((5.0 + length.astype(jnp.float32)) / 6.0) ** alpha


def search(
    step: Step, carry: Any, shape: tuple[int, ...], size: int, longest: int, alpha: float
) -> Beam:
    """Search for the most probable outputs, many searches at once.

    Args:
      step: `step(carry, words [*shape, K]) -> (carry, logits [*shape, K, W])`, of the words that
        follow these.
      carry: what the first step is handed: leaves [*shape, K, ...], all K alike.
      shape: of the searches.
      size: K.
      longest: words after which an output is cut off.
      alpha: how much length is made up for; 0 ranks by probability.

    Returns:
      The last beams.
    """
    # Of K equal beginnings, all but one are impossible, or the beam would hold copies.
    first = jnp.where(jnp.arange(size) == 0, 0.0, -jnp.inf)
    beam = Beam(
        words=jnp.full((*shape, size, longest), PAD, jnp.int32),
        log_probability=jnp.broadcast_to(first, (*shape, size)),
        length=jnp.zeros((*shape, size), jnp.int32),
        ended=jnp.zeros((*shape, size), bool),
    )
    previous = jnp.full((*shape, size), BOS, jnp.int32)

    def advance_one(beam: Beam, logits: Array, position: Array) -> tuple[Beam, Array]:
        return advanced(beam, logits, position, alpha)

    advance = advance_one
    for _ in shape:
        advance = jax.vmap(advance, in_axes=(0, 0, None))

    def some_go_on(loop: Any) -> Array:
        position, _, _, beam = loop
        return (position < longest) & ~jnp.all(beam.ended)

    def write(loop: Any) -> Any:
        position, carry, previous, beam = loop
        carry, logits = step(carry, previous)
        beam, parent = advance(beam, logits, position)
        carry = jax.tree.map(lambda leaf: _of_parents(leaf, parent), carry)
        return position + 1, carry, beam.words[..., position], beam

    return jax.lax.while_loop(some_go_on, write, (jnp.int32(0), carry, previous, beam))[-1]


def advanced(beam: Beam, logits: Array, position: Array, alpha: float) -> tuple[Beam, Array]:
    """Write one word more in one search; return the next beam, and whom each output continues.

    Args:
      beam: of K outputs.
      logits: of the next word, [K, W].
      position: where it stands.
      alpha: of `length_penalty`.
    """
    size, words = logits.shape
    following = jax.nn.log_softmax(logits.astype(jnp.float32))
    behind_end = jnp.where(jnp.arange(words) == PAD, 0.0, -jnp.inf)
    following = jnp.where(beam.ended[:, None], behind_end[None, :], following)
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
