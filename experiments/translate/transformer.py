"""The Transformer as a translator: the library's encoder-decoder with any score.

Vaswani et al. 2017, with norms first (Xiong et al. 2020). The score is used in the self-attention
of encoder and decoder and in cross-attention.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.layers import ProjectedMemory
from attention_jax.masks import Lengths
from attention_jax.nnx import EncoderDecoder, MultiHeadAttention
from attention_jax.positions import rotary, sinusoidal
from experiments.data.vocabulary import BOS, PAD
from experiments.translate.mechanisms import score_of_head
from experiments.translate.model import Sizes, rows_at

Array = jax.Array


class Memory(NamedTuple):
    """An encoded source: its keys and values for every layer, and its lengths [B]."""

    projected: list[ProjectedMemory | None]
    lengths: Array


class TransformerTranslator(nnx.Module):
    """Encoder and decoder, with the methods of `model.Translator`.

    Args:
      score: a name of `mechanisms.score_of_head`.
      sizes: of vocabularies and layers; `attention_size` is the depth of queries and keys in a
        head, `readout_size` that of the feed-forward layers.
      dropout: of embeddings, attention weights and the output of each sublayer.
      dtype: of the computation.
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
        attention = functools.partial(
            MultiHeadAttention,
            query_depth=sizes.attention_size,
            value_depth=sizes.width // sizes.heads,
            score=score_of_head(score, sizes.attention_size),
            attention_size=sizes.attention_size,
            share_query_key=sizes.tied,
            qk_norm=nnx.RMSNorm if sizes.normed else None,
        )
        rotated = sizes.positions == "rotary"
        self.model = EncoderDecoder(
            sizes.source_words,
            sizes.target_words,
            features=sizes.width,
            num_heads=sizes.heads,
            num_layers=sizes.layers,
            hidden_features=sizes.readout_size,
            position=sinusoidal if sizes.positions == "sinusoidal" else None,
            attention=functools.partial(attention, position=rotary if rotated else None),
            cross_attention=attention,
            norm_placement="before",
            dropout_rate=dropout,
            dtype=dtype,
            rngs=rngs,
        )
        self.layers, self.dropout = sizes.layers, dropout
        # Random keys for dropout come with each call: parameters are the only state.
        self._drop_by(None)

    def encode(self, source: Array) -> Memory:
        """Read a batch of sources [B, S]."""
        lengths = _lengths(source)
        memory = self.model.encode(source, Lengths(lengths), deterministic=True)
        return Memory(self.model.keys(memory), lengths)

    def __call__(
        self,
        source: Array,
        target: Array,
        dropout_rng: Array | None = None,
        where: Array | None = None,
    ) -> tuple[Array, Array]:
        """Return logits [T, B, W] and weights [T, B, S] of each target word, given those before it.

        With indices `where` [n] in T x B, return the logits of these words only, [n, W].

        The weights are the mean over heads of the last layer but one, which is closest to an
        alignment (Garg et al. 2019, section 4.1).
        """
        self._drop_by(dropout_rng)
        written, weights = self.model.write(
            source,
            _shifted(target),
            Lengths(_lengths(source)),
            deterministic=dropout_rng is None,
            return_weights=True,
        )
        looked = weights[max(self.layers - 2, 0)].cross_attention.mean(axis=1)
        written = rows_at(written.swapaxes(0, 1), where)
        return self.model.target.attend(written), looked.swapaxes(0, 1)

    def look(self, source: Array, target: Array) -> dict[str, Array]:
        """Return the weights [B, L, N, queries, keys] of every attention when pairs are read."""
        self._drop_by(None)
        mask = Lengths(_lengths(source))
        weighed: dict[str, Any] = {"deterministic": True, "return_weights": True}
        _, encoder = self.model.encode(source, mask, **weighed)
        _, decoder = self.model.write(source, _shifted(target), mask, **weighed)
        every = {
            "cross-attention": [layer.cross_attention for layer in decoder],
            "encoder": [layer.attention for layer in encoder],
            "decoder": [layer.attention for layer in decoder],
        }
        return {name: jnp.stack(weights, axis=1) for name, weights in every.items()}

    def start(self, memory: Memory, longest: int) -> Any:
        """Return the carry of the first step: arrays with a leading axis B."""
        return self.model.init_cache(len(memory.lengths), longest, ragged=True)

    def step(self, memory: Memory, carry: Any, previous: Array) -> tuple[Any, Array]:
        """Return the next carry and logits [B, W] of the word after the previous one, [B]."""
        logits, carry = self.model.decode(
            previous[:, None], carry, memory.projected, source_mask=Lengths(memory.lengths)
        )
        return carry, logits[:, 0]

    def _drop_by(self, rng: Array | None) -> None:
        """Give each layer with dropout its own random stream."""
        modules = (module for _, module in nnx.iter_modules(self.model) if self.dropout)
        layers = [m for m in modules if isinstance(m, (nnx.Dropout, MultiHeadAttention))]
        for number, layer in enumerate(layers):
            own = None if rng is None else jax.random.fold_in(rng, number)
            layer.rngs = nnx.data(None if own is None else nnx.RngStream(own, tag="dropout"))


def _shifted(target: Array) -> Array:
    """Return the word before each of the target's [B, T]."""
    begin = jnp.full_like(target[:, :1], BOS)
    return jnp.concatenate([begin, target[:, :-1]], axis=1)


def _lengths(tokens: Array) -> Array:
    return jnp.sum(tokens != PAD, axis=1)
