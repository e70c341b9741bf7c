"""RNNsearch: a bidirectional GRU reads the source, a GRU with attention writes the target.

Bahdanau, Cho and Bengio 2015, appendix A, with any score. Two differences from the paper: the
decoder starts from the last states of both directions, and the readout sees the new state.

Batches come as [B, S] and [B, T]; inside, arrays are time-major, [S, B, ...] and [T, B, ...],
the order in which the recurrences visit them. What does not depend on a recurrence is computed
for all positions at once: the gates' share of the input, the keys, the readout, the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from attention_jax.nnx import DecoderAttention
from attention_jax.scores.prepared import PreparedMemory
from experiments.data.vocabulary import BOS, PAD
from experiments.translate.mechanisms import score_of

Array = jax.Array
Graph = Any
"""The structure of a translator without its parameters, as `nnx.split` returns it."""


class Sizes(NamedTuple):
    """The sizes and switches that, with a score, determine the structure of a translator.

    Attributes:
      source_words: of the source vocabulary.
      target_words: of the target vocabulary.
      width: of embeddings, decoder state and annotations.
      attention_size: of projected queries and keys, in a Transformer of each head.
      readout_size: of the maxout layer; in a Transformer of the feed-forward layers.
      query: `previous` or `current`, the decoder state that is the query.
      bridge: `dense` or `zero`, the initial state of the decoder.
      tied: see `mechanisms.score_of`.
      normed: see `mechanisms.score_of`.
      model: `bigru`, this file, or `transformer`.
      heads: of a Transformer.
      layers: of a Transformer.
      positions: of a Transformer.
    """

    source_words: int
    target_words: int
    width: int
    attention_size: int
    readout_size: int
    query: str = "previous"
    bridge: str = "dense"
    tied: bool = False
    normed: bool = False
    model: str = "bigru"
    heads: int = 1
    layers: int = 1
    positions: str = "none"


Carry = tuple[Array, ...]
"""The decoder's state [B, D]; where the current state is the query, also the context [B, C]."""


class Memory(NamedTuple):
    """An encoded source.

    Attributes:
      source: prepared keys and values; None without attention.
      mask: [B, S], True for tokens.
      carry: of the first decoding step.
    """

    source: PreparedMemory | None
    mask: Array
    carry: Carry


def rows_at(x: Array, where: Array | None) -> Array:
    """Return the rows [n, D] of x [T, B, D] at indices [n] in T x B, or x if these are None.

    An index past the end gives the last row.
    """
    if where is None:
        return x
    steps, batch, features = x.shape  # of which the last is 0 without attention
    return x.reshape(steps * batch, features).at[where].get(mode="clip")


def gated(state: Array, inputs: Array, share: Array) -> Array:
    """Step a GRU whose gate inputs are known: h' = z h + (1 - z) tanh(n + r m).

    Cho et al. 2014, equations 5 to 8, but the reset gate r is applied after the product of state
    and matrix, so that all three gates share one product.

    Args:
      state: h, [..., D].
      inputs: contributions of the input to n, r and z, in this order, [..., 3 D].
      share: contributions of the state to r, z and m, in this order, [..., 3 D].
    """
    depth = state.shape[-1]
    # The backward pass of `split` is one concatenation; that of slices sums padded arrays.
    candidate, inputs = jnp.split(inputs, [depth], axis=-1)
    share, memory = jnp.split(share, [2 * depth], axis=-1)
    reset, update = jnp.split(jax.nn.sigmoid(inputs + share), 2, axis=-1)
    return update * state + (1 - update) * jnp.tanh(candidate + reset * memory)


def orthogonal_gates(rng: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Draw an orthogonal matrix for each of three gates: [..., D, 3 D]."""
    *leading, depth, _ = shape
    gates = initializers.orthogonal()(rng, (*leading, 3, depth, depth), dtype)
    return jnp.moveaxis(gates, -3, -2).reshape(shape)


def keeping_products(step: Callable[..., Any]) -> Callable[..., Any]:
    """Save the matrix products of a step for the backward pass, and recompute the rest.

    The other intermediate values, above all the pairs of a state with every word, are large and
    cheap to compute.
    """
    return jax.checkpoint(step, policy=jax.checkpoint_policies.dots_saveable)


def token_losses(logits: Array, words: Array, smoothing: float = 0.0) -> Array:
    """Cross-entropy [...] of logits [..., W] with words [...], zero for padding.

    The target distribution has 1 - smoothing on the right word and spreads the rest evenly
    over all words (Szegedy et al. 2016, section 7).
    """
    right = jnp.take_along_axis(logits, words[..., None], axis=-1)[..., 0]
    expected = (1 - smoothing) * right + smoothing * jnp.mean(logits, axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - expected
    return jnp.where(words == PAD, 0.0, losses)


class Encoder(nnx.Module):
    """Annotations of the source, the states of a GRU in each direction (appendix A.2.1)."""

    def __init__(self, words: int, width: int, *, dtype: Any = None, rngs: nnx.Rngs):
        self.depth = width // 2
        self.embedding = nnx.Embed(words, width, dtype=dtype, rngs=rngs)
        self.inputs = nnx.Linear(width, 2 * 3 * self.depth, rngs=rngs)
        self.recurrent = nnx.Param(orthogonal_gates(rngs.params(), (2, self.depth, 3 * self.depth)))
        self.bias = nnx.Param(jnp.zeros((2, 3 * self.depth)))

    def __call__(self, embedded: Array, mask: Array) -> tuple[Array, Array]:
        """Map [S, B, E] and mask [S, B] to annotations [B, S, D] and the last states [B, D]."""
        forward, backward = jnp.split(self.inputs(embedded), 2, axis=-1)
        gates = jnp.stack([forward, backward[::-1]], axis=1)
        recurrent, bias = self.recurrent[...], self.bias[...][:, None]

        def step(state: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
            gates, present = inputs
            share = jnp.einsum("dbh,dhg->dbg", state, recurrent) + bias
            state = jnp.where(present[..., None], gated(state, gates, share), state)
            return state, state

        initial = jnp.zeros((2, embedded.shape[1], self.depth), embedded.dtype)
        present = jnp.stack([mask, mask[::-1]], axis=1)
        last, states = jax.lax.scan(keeping_products(step), initial, (gates, present))
        annotations = jnp.concatenate([states[:, 0], states[::-1, 1]], axis=-1)
        return annotations.swapaxes(0, 1), jnp.concatenate([last[0], last[1]], axis=-1)


class Decoder(nnx.Module):
    """A GRU with attention, whose query is the previous (appendix A.2.2) or the current state.

    With the current state (Luong, Pham and Manning 2015, section 3) the cell sees the context of
    the previous step, so that both variants have the same parameters.
    """

    def __init__(self, score: str, sizes: Sizes, *, dtype: Any = None, rngs: nnx.Rngs):
        width = sizes.width
        self.embedding = nnx.Embed(sizes.target_words, width, dtype=dtype, rngs=rngs)
        self.bridge = nnx.Linear(width, width, rngs=rngs) if sizes.bridge == "dense" else None
        self.inputs = nnx.Linear(width, 3 * width, rngs=rngs)
        self.recurrent = nnx.Param(orthogonal_gates(rngs.params(), (width, 3 * width)))
        self.bias = nnx.Param(jnp.zeros(3 * width))
        self.query_is_current = sizes.query == "current" and score != "none"
        if score == "none":
            self.attention = self.context = None
        else:
            options = {"tied": sizes.tied, "normed": sizes.normed}
            bound = score_of(score, width, width, sizes.attention_size, **options)
            self.attention = DecoderAttention(
                bound, width, memory_features=width, attention_size=sizes.attention_size, rngs=rngs
            )
            self.context = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        seen = (2 if score == "none" else 3) * width
        self.readout = nnx.Linear(seen, 2 * sizes.readout_size, rngs=rngs)
        self.output = nnx.Linear(sizes.readout_size, sizes.target_words, rngs=rngs)

    def remember(self, annotations: Array, last: Array, mask: Array) -> Memory:
        """Compute once per source what all steps share."""
        source = self.attention and self.attention.keys(annotations)
        state = jnp.zeros_like(last) if self.bridge is None else jnp.tanh(self.bridge(last))
        context = (jnp.zeros_like(annotations[:, 0]),) if self.query_is_current else ()
        return Memory(source, mask, (state, *context))

    def step(self, carry: Carry, gates: Array, memory: Memory) -> tuple[Carry, Array, Array]:
        """Return the next carry, the context [B, C] and the weights [B, S]."""
        state, *last_context = carry
        share = state @ self.recurrent[...] + self.bias[...][None]
        if self.attention is None or self.context is None or memory.source is None:
            weights = jnp.zeros(memory.mask.shape, state.dtype)
            return (gated(state, gates, share),), state[:, :0], weights
        if self.query_is_current:
            state = gated(state, gates + self.context(*last_context), share)
            context, weights = self.attention(state, memory.source, memory.mask)
            return (state, context), context, weights
        context, weights = self.attention(state, memory.source, memory.mask)
        return (gated(state, gates + self.context(context), share),), context, weights

    def logits(self, state: Array, context: Array, embedded: Array) -> Array:
        """Return logits from states, contexts and previous words through a maxout layer."""
        return self.output(self.read(state, context, embedded))

    def read(self, state: Array, context: Array, embedded: Array) -> Array:
        """Return maxout units, each the larger of two linear maps."""
        units = self.readout(jnp.concatenate([state, context, embedded], axis=-1))
        return jnp.maximum(*jnp.split(units, 2, axis=-1))


class Translator(nnx.Module):
    """Encoder and decoder.

    Args:
      score: a name of `mechanisms.score_of`, or `none` for a decoder without attention.
      sizes: of vocabularies and layers.
      dropout: share of embedding and readout features that is dropped in training.
      dtype: of embedded words; what follows computes in the type of words and parameters.
      rngs: the stream `params` draws the parameters.
    """

    def __init__(
        self,
        score: str,
        sizes: Sizes,
        dropout: float = 0.0,
        *,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        self.encoder = Encoder(sizes.source_words, sizes.width, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(score, sizes, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def encode(self, source: Array, dropout_rng: Array | None = None) -> Memory:
        """Read a batch of sources [B, S]."""
        mask = source != PAD
        embedded = self._dropped(self.encoder.embedding(source.T), dropout_rng, 0)
        return self.decoder.remember(*self.encoder(embedded, mask.T), mask)

    def __call__(
        self,
        source: Array,
        target: Array,
        dropout_rng: Array | None = None,
        where: Array | None = None,
    ) -> tuple[Array, Array]:
        """Return logits [T, B, W] and weights [T, B, S] of each target word, given those before it.

        With indices `where` [n] in T x B, return the logits of these words only, [n, W].
        """
        memory = self.encode(source, dropout_rng)
        begin = jnp.full_like(target[:, :1], BOS)
        previous = jnp.concatenate([begin, target[:, :-1]], axis=1).T
        embedded = self._dropped(self.decoder.embedding(previous), dropout_rng, 1)

        def step(carry: Carry, gates: Array) -> tuple[Carry, tuple[Array, Array, Array]]:
            carry, context, weights = self.decoder.step(carry, gates, memory)
            return carry, (carry[0], context, weights)

        gates = self.decoder.inputs(embedded)
        _, (states, contexts, weights) = jax.lax.scan(keeping_products(step), memory.carry, gates)
        units = self.decoder.read(*(rows_at(x, where) for x in (states, contexts, embedded)))
        units = self._dropped(units, dropout_rng, 2, target.T.shape, where)
        return self.decoder.output(units), weights

    def look(self, source: Array, target: Array) -> dict[str, Array]:
        """Return the weights [B, 1, 1, T, S] when pairs are read; none without attention."""
        if self.decoder.attention is None:
            return {}
        _, weights = self(source, target)
        return {"cross-attention": weights.swapaxes(0, 1)[:, None, None]}

    def start(self, memory: Memory, longest: int) -> Carry:
        """Return the carry of the first step: arrays with a leading axis B."""
        del longest
        return memory.carry

    def step(self, memory: Memory, carry: Carry, previous: Array) -> tuple[Carry, Array]:
        """Return the next carry and logits [B, W] of the word after the previous one, [B]."""
        embedded = self.decoder.embedding(previous)
        gates = self.decoder.inputs(embedded)
        carry, context, _ = self.decoder.step(carry, gates, memory)
        return carry, self.decoder.logits(carry[0], context, embedded)

    def _dropped(
        self,
        x: Array,
        rng: Array | None,
        place: int,
        positions: tuple[int, ...] | None = None,
        where: Array | None = None,
    ) -> Array:
        """Apply dropout to x, which may be the rows `where` of many `positions`.

        The mask is drawn for all positions, so that it does not depend on `where`.
        """
        if rng is None or self.dropout.rate == 0:
            return x
        everywhere = jnp.ones((*(positions or x.shape[:-1]), x.shape[-1]), x.dtype)
        rng = jax.random.fold_in(rng, place)
        return x * rows_at(self.dropout(everywhere, deterministic=False, rngs=rng), where)
