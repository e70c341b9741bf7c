"""Additive attention ignores how long the query is once tanh saturates.

Source: Common explanation of the robustness of Bahdanau attention; follows from the limits of
tanh.

Method: The entropy of the weights, relative to log n, for queries of 1 to 1000 times unit size,
additive and scaled dot product; and how far the additive weights still move (total variation) from
1000 times to the limit, a million times.

Criterion: Holds if they move by less than 0.05 over the whole interval, fails if by more. Where
their entropy is then beyond 99% of log n the statement is too weak: not only the length, the keys
are ignored too.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax import bind, diagnostics, scores
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, undecided
from experiments.claims.drawing import lines
from experiments.claims.evidence import draws, shown
from experiments.significance import interval

SIZES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
KEYS, DEPTH = 32, 32


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure entropy by size and draw, and the total variation of the last step."""
    count = setting.pick(tiny=3, quick=20, full=100)

    def of_draw(rng: jax.Array) -> dict[str, jax.Array]:
        parts = jax.random.split(rng, 5)
        query = jax.random.normal(parts[0], (64, DEPTH))
        memory = jax.random.normal(parts[1], (KEYS, DEPTH))
        matrices = jax.random.normal(parts[2], (2, DEPTH, DEPTH)) / DEPTH**0.5
        own = {"value": jax.random.normal(parts[3], (DEPTH,)), "bias": jnp.zeros(DEPTH)}
        own |= {"query_weight": matrices[0], "key_weight": matrices[1]}

        def weights(score: Any, size: float) -> jax.Array:
            return jax.nn.softmax(score(size * query, memory))

        found = {}
        compared = {"additive": bind(scores.additive, **own), "scaled dot": scores.scaled_dot}
        for name, score in compared.items():
            for size in SIZES:
                entropy = jnp.mean(diagnostics.entropy(weights(score, size))) / math.log(KEYS)
                found[f"{name} {size:g}"] = entropy
            moved = jnp.abs(weights(score, SIZES[-1]) - weights(score, 1e6))
            found[f"{name} moved"] = jnp.mean(jnp.sum(moved, axis=-1)) / 2
        return found

    found = draws(of_draw, rng, count)
    return {
        "sizes": SIZES,
        "entropy": {
            name: [found[f"{name} {size:g}"] for size in SIZES]
            for name in ("additive", "scaled dot")
        },
        "moved": found["additive moved"],
    }


def verdict(data: Data) -> Verdict:
    """Judge by the largest sizes."""
    additive, dot = (data["entropy"][name][-1] for name in ("additive", "scaled dot"))
    found = (
        f"From 1000 times unit size to the limit the additive weights move by "
        f"{shown(data['moved'])}; their entropy is then {shown(additive)} of log n, that of the "
        f"scaled dot product {shown(dot)}."
    )
    moved = interval(data["moved"])
    if moved.low > 0.05:
        return fails(found)
    if moved.high > 0.05:
        return undecided(found)
    if interval(additive).low > 0.99:
        found += " It is even stronger: they have gone uniform, the keys are ignored as well."
    return holds(found)


def figure(data: Data):
    """Draw entropy against size."""
    return lines(
        data["sizes"],
        data["entropy"],
        xlabel="size of the query",
        ylabel="entropy / log n",
        xscale="log",
        ylim=(0, 1.05),
        marks={"uniform": 1.0},
    )
