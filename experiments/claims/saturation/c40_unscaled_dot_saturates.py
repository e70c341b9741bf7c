"""Without the scale 1/sqrt(d) the softmax saturates as d grows, and its gradients vanish.

Source: Vaswani et al. 2017, section 3.2.1; often retold as gradients that explode.

Method: Entropy of the weights relative to log n, and the trace of the softmax Jacobian, 1 - sum of
squared weights, for standard normal queries and n keys at depths 4 to 1024, unscaled and scaled.

Criterion: Holds if at the largest depth the unscaled entropy is below half of log n and the trace
below half of its value at the smallest depth, while scaled both stay within a tenth of theirs. The
trace is at most 1: whatever happens, it does not explode.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp

from attention_jax import diagnostics, scores
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, undecided
from experiments.claims.drawing import lines
from experiments.claims.evidence import by_name, draws, shown
from experiments.significance import interval

NAMES = ("entropy / log n", "trace of Jacobian")
DEPTHS = (4, 16, 64, 256, 1024)
KEYS = 64


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure entropy / log n and the trace for each score, depth and draw."""
    count = setting.pick(tiny=3, quick=20, full=60)

    def of_draw(rng: jax.Array, depth: int) -> dict[str, jax.Array]:
        query, memory = jax.random.normal(rng, (2, KEYS, depth))
        found = {}
        for score in (scores.dot, scores.scaled_dot):
            weights = jax.nn.softmax(score(query, memory))
            entropy = jnp.mean(diagnostics.entropy(weights)) / math.log(KEYS)
            found[f"entropy / log n, {score.__name__}"] = entropy
            trace = jnp.mean(diagnostics.jacobian_trace(weights))
            found[f"trace of Jacobian, {score.__name__}"] = trace
        return found

    found = [draws(partial(of_draw, depth=depth), rng, count) for depth in DEPTHS]
    return {"depths": DEPTHS, "found": by_name(found)}


def verdict(data: Data) -> Verdict:
    """Judge by the first and the last depth."""
    entropy, trace = (data["found"][f"{name}, dot"] for name in NAMES)
    found = (
        f"Unscaled, the entropy goes from {shown(entropy[0])} to {shown(entropy[-1])} of log n and "
        f"the trace of the Jacobian from {shown(trace[0])} to {shown(trace[-1])}."
    )
    if interval(entropy[-1]).low > 0.5 or interval(trace[-1]).low > interval(trace[0]).mean / 2:
        return fails(found)
    found += " It vanishes; it cannot explode."
    scaled = [data["found"][f"{name}, scaled_dot"] for name in NAMES]
    found += f" Scaled: {shown(scaled[0][-1])} and {shown(scaled[1][-1])} at the largest depth."
    moved = [abs(interval(of[-1]).mean - interval(of[0]).mean) for of in scaled]
    return holds(found) if max(moved) <= 0.1 else undecided(found)


def figure(data: Data):
    """Draw entropy and trace against the depth."""
    return lines(
        data["depths"],
        data["found"],
        xlabel="depth d",
        ylabel="",
        xscale="log",
        ylim=(0, 1.02),
        xmarks={"sqrt(d) = sqrt(2 ln n)": 2 * math.log(KEYS)},
    )
