"""Summing the heads instead of concatenating them loses quality.

Source: Folklore about why heads are concatenated.

Method: Concatenation with an output matrix made of equal blocks is compared with the sum, exactly;
then Transformers with 4 heads that translate the generated grammar are trained in both ways; six
seeds or more, the learning rate of each arm swept, BLEU of greedy translations.

Criterion: Fails if the identity is broken by more than 1e-5. Holds if concatenation is
conclusively higher, fails if the sum is, or if the interval of the difference lies within 1 BLEU
of zero.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.nnx import MultiHeadAttention
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, undecided
from experiments.claims.drawing import bars
from experiments.claims.evidence import difference, higher, learned, shown, within
from experiments.claims.translating import trained_transformer

HEADS, WIDTH = 4, 32


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure the breach of the identity, and train both arms."""
    concat: Any = MultiHeadAttention(HEADS, WIDTH, rngs=nnx.Rngs(rng))
    summed: Any = MultiHeadAttention(HEADS, WIDTH, combine="sum", rngs=nnx.Rngs(rng))
    for name in ("query", "key", "value"):
        setattr(summed, name, getattr(concat, name))
    concat.out.kernel[...] = jnp.stack([summed.out.kernel[...]] * HEADS)
    x = jax.random.normal(rng, (2, 10, WIDTH))
    breach = jnp.max(jnp.abs(concat(x) - summed(x))) / jnp.max(jnp.abs(summed(x)))
    bleu = {
        name: trained_transformer(setting, HEADS, how)[2]
        for name, how in {"concatenated": "", "summed": "summed"}.items()
    }
    return {"breach": float(breach), "bleu": bleu}


def verdict(data: Data) -> Verdict:
    """Judge the identity, then accuracy on longer sequences."""
    concat, summed = data["bleu"]["concatenated"], data["bleu"]["summed"]
    found = (
        f"The sum is concatenation with equal blocks of W^O (breach {data['breach']:.1e}). BLEU "
        f"{shown(concat)} concatenated, {shown(summed)} summed: {difference(concat, summed)}."
    )
    if data["breach"] > 1e-5:
        return fails(found)
    if not learned(concat):
        return undecided(found)
    if higher(concat, summed):
        return holds(found)
    return (
        fails(found)
        if within(concat, summed, -1, 1) or higher(summed, concat)
        else (undecided(found))
    )


def figure(data: Data):
    """Draw BLEU of both."""
    return bars(data["bleu"], xlabel="BLEU")
