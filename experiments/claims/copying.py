"""Decoders of a text in which some symbols say "copy the symbol before me" (Guo et al. 2024)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.nnx import CausalDecoder, MultiHeadAttention
from experiments.claims.training import Arm, arm_of, cross_entropy, merged

SYMBOLS, COPYING, LENGTH = 12, 2, 24
BEGIN, WIDTH, HEADS = SYMBOLS, 32, 2


class Batch(NamedTuple):
    """Texts [B, T], and the symbol that follows each of their tokens [B, T]."""

    tokens: jax.Array
    following: jax.Array


def batch(rng: jax.Array, data: None = None, num_texts: int = 16) -> Batch:
    """Draw texts."""
    del data
    logits = 2 * jax.random.normal(jax.random.key(7), (SYMBOLS, SYMBOLS))

    def step(state: tuple[jax.Array, jax.Array], rng: jax.Array) -> Any:
        before, last = state
        drawn = jax.random.categorical(rng, logits[last])
        chosen = jnp.where(last < COPYING, before, drawn).astype(jnp.int32)
        return (last, chosen), chosen

    start = jax.random.randint(jax.random.fold_in(rng, 0), (2, num_texts), COPYING, SYMBOLS)
    rngs = jax.random.split(jax.random.fold_in(rng, 1), LENGTH - 1)
    _, rest = jax.lax.scan(step, (start[0], start[1]), rngs)
    text = jnp.concatenate([jnp.full((1, num_texts), BEGIN), start[1:], rest]).T
    return Batch(text[:, :-1], text[:, 1:])


def decoder(normalizer: Callable[..., Any]) -> tuple[Arm, Callable[[Any], Any]]:
    """Return an arm, a decoder of one layer, and the function from parameters to the module."""
    attention = functools.partial(MultiHeadAttention, normalizer=normalizer)
    options = {"hidden_features": 2 * WIDTH, "max_length": LENGTH, "attention": attention}

    def build(rngs: nnx.Rngs) -> CausalDecoder:
        return CausalDecoder(
            SYMBOLS + 1, WIDTH, num_heads=HEADS, num_layers=1, **options, rngs=rngs
        )

    def loss(model: CausalDecoder, batch: Batch) -> jax.Array:
        return cross_entropy(model(batch.tokens), batch.following)

    return arm_of(build, loss), merged(build)
