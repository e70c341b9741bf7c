"""Attention does not decay with distance: near and far keys are equally within reach.

Source: Vaswani et al. 2017, section 4 (maximum path length O(1)); said of Transformers in general.

Method: A query and keys of the same content up to noise, over 512 positions: the logarithm of the
mean weight of the 16 furthest keys over that of the 16 nearest, without positions, with rotary
positions and with ALiBi (slope 1/16).

Criterion: Fails if without positions the 95% interval of the logarithm lies beyond log(4/5) or
log(5/4), undecided if it does not lie between them. Then it holds only without those positions
whose interval lies below log(4/5).
"""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp

from attention_jax import positions, scores
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, holds_only_if, undecided
from experiments.claims.drawing import lines
from experiments.claims.evidence import draws, shown
from experiments.significance import interval

LENGTH, DEPTH = 512, 64
EDGES = (1, 4, 16, 64, 256, 512)
KINDS = ("none", "rotary", "alibi")
EQUAL = math.log(5 / 4)


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure mean weights by kind, distance and draw."""
    count = setting.pick(tiny=4, quick=60, full=400)

    def of_draw(rng: jax.Array) -> dict[str, jax.Array]:
        content, noise = jax.random.split(rng)
        query = jax.random.normal(content, (1, DEPTH))
        memory = query + jax.random.normal(noise, (LENGTH, DEPTH))
        last, everywhere = jnp.full(1, LENGTH - 1), jnp.arange(LENGTH)
        turned = positions.rotary(query, last), positions.rotary(memory, everywhere)
        bias = positions.alibi(last[:, None], everywhere[None, :], jnp.float32(1 / 16))
        logits = {
            "none": scores.scaled_dot(query, memory),
            "rotary": scores.scaled_dot(*turned),
            "alibi": scores.scaled_dot(query, memory) + bias,
        }
        found = {}
        for kind in KINDS:
            by_distance = jax.nn.softmax(logits[kind])[0, ::-1]
            near, far = jnp.mean(by_distance[1:17]), jnp.mean(by_distance[-16:])
            found[f"{kind} ratio"] = jnp.log(far / near)
            for low, high in itertools.pairwise(EDGES):
                found[f"{kind} {low}"] = LENGTH * jnp.mean(by_distance[low:high])
        return found

    found = draws(of_draw, rng, count)
    weights = {kind: [found[f"{kind} {low}"] for low in EDGES[:-1]] for kind in KINDS}
    return {
        "from": EDGES[:-1],
        "weights": weights,
        "ratio": {kind: found[f"{kind} ratio"] for kind in KINDS},
    }


def verdict(data: Data) -> Verdict:
    """Judge by the ratio of far to near."""
    found = "Logarithm of the weight of far keys over that of near ones: " + ", ".join(
        f"{kind} {shown(values)}" for kind, values in data["ratio"].items()
    )
    ratio = {kind: interval(values) for kind, values in data["ratio"].items()}
    none = ratio["none"]
    if none.low > EQUAL or none.high < -EQUAL:
        return fails(f"{found}.")
    if none.low < -EQUAL or none.high > EQUAL:
        return undecided(f"{found}.")
    decaying = [kind for kind in ("rotary", "alibi") if ratio[kind].high < -EQUAL]
    if decaying:
        return holds_only_if(f"positions do not enter by {' or '.join(decaying)}", f"{found}.")
    return holds(f"{found}.")


def figure(data: Data):
    """Draw mean weights against distance."""
    return lines(
        data["from"],
        data["weights"],
        xlabel="distance, from",
        ylabel="mean weight x length",
        xscale="log",
        yscale="log",
        marks={"uniform": 1.0},
    )
