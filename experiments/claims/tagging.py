"""Small encoders that label every token of a sequence: tasks of any length, drawn as they train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax import masks
from attention_jax.nnx import TokenEncoder
from experiments.claims.claim import Setting
from experiments.claims.training import Arm, Trained, accuracy, arm_of, cross_entropy, merged, train

Array = jax.Array
SYMBOLS, WIDTH, HEADS = 8, 32, 4


class Batch(NamedTuple):
    """Tokens [B, T], lengths [B], and labels [B, T], -1 where there is none."""

    tokens: Array
    lengths: Array
    labels: Array


# From tokens [T] and their length to labels [T].
Task = Callable[[Array, Array], Array]


def draw(task: Task, rng: Array, longest: int, shortest: int = 1, num_sequences: int = 32) -> Batch:
    """Draw sequences of all lengths between two."""
    symbols, sizes = jax.random.split(rng)
    tokens = jax.random.randint(symbols, (num_sequences, longest), 0, SYMBOLS)
    lengths = jax.random.randint(sizes, (num_sequences,), shortest, longest + 1)
    there = jnp.arange(longest)[None] < lengths[:, None]
    labels = jnp.where(there, jax.vmap(task)(tokens, lengths), -1)
    return Batch(jnp.where(there, tokens, SYMBOLS), lengths, labels)


def trained_tagger(
    setting: Setting, task: Task, longest: int, **options: Any
) -> tuple[Callable[[Any], Any], Trained]:
    """Train encoders of two layers on sequences up to a length; options are the encoder's."""

    def build(rngs: nnx.Rngs) -> TokenEncoder:
        sizes = {"hidden_features": 2 * WIDTH, "norm_placement": "before"}
        return TokenEncoder(
            SYMBOLS + 1, WIDTH, num_heads=HEADS, num_layers=2, **sizes, **options, rngs=rngs
        )

    arm: Arm = arm_of(build, lambda model, batch: cross_entropy(logits(model, batch), batch.labels))

    def batch(rng: Array, data: None) -> Batch:
        del data
        return draw(task, rng, longest)

    found = train(
        arm,
        batch,
        jax.random.key(0),
        rates=setting.pick(tiny=(3e-3,), quick=(1e-3, 3e-3), full=(3e-4, 1e-3, 3e-3)),
        seeds=setting.pick(tiny=2, quick=6, full=8),
        steps=setting.pick(tiny=4, quick=400, full=2000),
        held_out=draw(task, jax.random.key(1), longest, num_sequences=256),
    )
    return merged(build), found


def logits(model: TokenEncoder, batch: Batch) -> Array:
    """Return logits [B, T, symbols] with padding masked."""
    return model(batch.tokens, masks.Lengths(batch.lengths))


def right(
    setting: Setting, merge: Callable[[Any], Any], parameters: Any, task: Task, length: int
) -> list[float]:
    """Return for each seed the percentage of right labels in sequences of exactly one length."""
    count = setting.pick(tiny=8, quick=128, full=512)
    batch = draw(task, jax.random.key(2), length, length, count)

    def of_seed(own: Any) -> Array:
        return 100 * accuracy(logits(merge(own), batch), batch.labels)

    return jax.jit(jax.vmap(of_seed))(parameters).tolist()
