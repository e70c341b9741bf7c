"""Sinusoidal positions extrapolate to sequences longer than those trained on.

Source: Vaswani et al. 2017, section 3.5 ("may allow the model to extrapolate").

Method: PE(p + k) = R_k PE(p) is checked for p and k up to 4096 in float64. Then encoders of two
layers learn to label each token with the one three before it, on sequences of up to 16 tokens, and
are tested at 16, 32 and 64; with sinusoids, with rotary positions and with T5's buckets of
distance.

Criterion: Fails if with sinusoids the accuracy at 64 is conclusively more than 10 points below
that at 16; holds if it is conclusively not; undecided if the task is not learned to 90% at 16.

Published: Press et al. 2022, figure 1: with sinusoids perplexity explodes soon after the length
trained on.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from attention_jax import positions
from attention_jax.nnx import MultiHeadAttention
from experiments.claims import tagging
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, undecided
from experiments.claims.drawing import lines
from experiments.claims.evidence import difference, higher, shown
from experiments.significance import interval

LENGTHS = (16, 32, 64)
KINDS = {
    "sinusoids": {"position": partial(positions.sinusoidal, depth=tagging.WIDTH)},
    "rotary": {"attention": partial(MultiHeadAttention, position=positions.rotary)},
    "T5": {"attention": partial(MultiHeadAttention, bias=positions.learned_buckets())},
}


def three_before(tokens: jax.Array, length: jax.Array) -> jax.Array:
    """Label each token with the one three before it; the first three have no label."""
    return jnp.where(jnp.arange(len(tokens)) >= 3, jnp.roll(tokens, 3), -1)


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure the identity, and accuracy by kind, length and seed."""
    data: Data = {"lengths": LENGTHS, "identity": _identity(), "right": {}}
    for kind in setting.pick(tiny=("sinusoids",), quick=tuple(KINDS), full=tuple(KINDS)):
        merge, found = tagging.trained_tagger(setting, three_before, LENGTHS[0], **KINDS[kind])
        data["right"][kind] = [
            tagging.right(setting, merge, found.parameters, three_before, n) for n in LENGTHS
        ]
    return data


def _identity() -> float:
    with jax.enable_x64(True):
        places = jnp.array([0, 1, 100, 4096])
        encode = partial(positions.sinusoidal, depth=64, dtype=jnp.float64)
        return max(
            float(
                jnp.max(
                    jnp.abs(
                        encode(places + k)
                        - encode(places) @ positions.sinusoidal_step(k, 64, dtype=jnp.float64).T
                    )
                )
            )
            for k in (1, 7, 4096)
        )


def verdict(data: Data) -> Verdict:
    """Judge the longest sequences."""
    first, last = data["right"]["sinusoids"][0], data["right"]["sinusoids"][-1]
    found = (
        f"PE(p + k) = R_k PE(p) to {data['identity']:.1e}. Right at {data['lengths'][0]} and "
        f"{data['lengths'][-1]} tokens: "
        + ", ".join(f"{k} {shown(of[0])}% and {shown(of[-1])}%" for k, of in data["right"].items())
        + f"; sinusoids lose {difference(first, last)}."
    )
    if interval(first).mean < 90:
        return undecided(found)
    if higher([x - 10 for x in first], last):
        return fails(found)
    return holds(found) if higher(last, [x - 10 for x in first]) else undecided(found)


def figure(data: Data):
    """Draw accuracy against length."""
    return lines(
        data["lengths"],
        data["right"],
        xlabel="tokens",
        ylabel="right labels (%)",
        xscale="log",
        ylim=(0, 103),
        marks={"chance": 100 / tagging.SYMBOLS},
    )
