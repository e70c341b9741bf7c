"""Attention can map any sequence to any other.

Source: Yun et al. 2020 (universal approximation), as retold; against it Hahn 2020 (parity).

Method: Encoders of two layers with sinusoids learn from sequences of up to 16 tokens to copy them,
to sort them, and to tell the parity of one symbol; six seeds or more, the learning rate swept.
Right labels at 8, 16, 24 and 32 tokens.

Criterion: Holds if every task is conclusively above 95% at every length, fails if one is
conclusively below 90% at some length. Chance is 50% for parity.

Published: Hahn 2020: for parity, the loss of a Transformer of fixed size tends to chance as
sequences grow.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from attention_jax.positions import sinusoidal
from experiments.claims import tagging
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, undecided
from experiments.claims.drawing import lines
from experiments.claims.evidence import learned, shown
from experiments.significance import interval

LENGTHS = (8, 16, 24, 32)


def copied(tokens: jax.Array, length: jax.Array) -> jax.Array:
    """Label each token with itself."""
    return tokens


def in_order(tokens: jax.Array, length: jax.Array) -> jax.Array:
    """Label the places with the tokens from the smallest to the largest."""
    there = jnp.arange(len(tokens)) < length
    return jnp.sort(jnp.where(there, tokens, tagging.SYMBOLS))


def parity(tokens: jax.Array, length: jax.Array) -> jax.Array:
    """Label the first token with the parity of how many tokens are in the upper half."""
    there = jnp.arange(len(tokens)) < length
    odd = jnp.sum(there & (tokens >= tagging.SYMBOLS // 2)) % 2
    return jnp.full(len(tokens), -1).at[0].set(odd)


TASKS = {"copy": copied, "sort": in_order, "parity": parity}


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Train each task and measure it by length and seed."""
    position = partial(sinusoidal, depth=tagging.WIDTH)
    data: Data = {"lengths": LENGTHS, "right": {}}
    for name in setting.pick(tiny=("copy",), quick=tuple(TASKS), full=tuple(TASKS)):
        merge, found = tagging.trained_tagger(setting, TASKS[name], 16, position=position)
        data["right"][name] = [
            tagging.right(setting, merge, found.parameters, TASKS[name], n) for n in LENGTHS
        ]
    return data


def verdict(data: Data) -> Verdict:
    """Judge every task at every length."""
    found = "Right labels at " + "; ".join(
        f"{n} tokens: " + ", ".join(f"{k} {shown(of[at])}%" for k, of in data["right"].items())
        for at, n in enumerate(data["lengths"])
        if n in (data["lengths"][1], data["lengths"][-1])
    )
    # Where not even copying is learned, training was too short to blame attention.
    if not learned(data["right"]["copy"][1], least=95):
        return undecided(f"{found}.")
    every = [interval(of_length) for of in data["right"].values() for of_length in of]
    if all(of.low > 95 for of in every):
        return holds(f"{found}.")
    return fails(f"{found}.") if any(of.high < 90 for of in every) else undecided(f"{found}.")


def figure(data: Data):
    """Draw accuracy against length."""
    return lines(
        data["lengths"],
        data["right"],
        xlabel="tokens",
        ylabel="right labels (%)",
        ylim=(0, 103),
        xmarks={"longest in training": 16},
    )
