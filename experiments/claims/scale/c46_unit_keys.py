"""Keys of unit length control the variance of the logits as well as the scale does.

Source: Henry et al. 2020 (query-key normalization); cosine attention in Swin v2, Liu et al. 2022.

Method: Var(q . k/|k|) and d Var(cos(q, k)) for standard normal rows at depths 4 to 1024, and the
entropy of cosine weights over 64 keys at temperatures 1 and 1/sqrt(d).

Criterion: Holds if the 95% intervals of Var(q . k/|k|) lie within 5% of 1 at every depth.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp

from attention_jax import bind, diagnostics, scores
from experiments.claims.claim import Data, Setting, Verdict, fails, holds
from experiments.claims.drawing import lines
from experiments.claims.evidence import between, by_name, draws, shown
from experiments.significance import interval

DEPTHS = (4, 16, 64, 256, 1024)
KEYS = 64


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure both variances by depth and draw, and entropies with and without temperature."""
    count, rows = 40, setting.pick(tiny=64, quick=128, full=256)

    def of_draw(rng: jax.Array, depth: int) -> dict[str, jax.Array]:
        query, memory = jax.random.normal(rng, (2, rows, depth))
        cosines = scores.cosine(query, memory)

        def entropy(temperature: float) -> jax.Array:
            score = bind(scores.cosine, temperature=temperature)
            weights = jax.nn.softmax(score(query, memory[:KEYS]))
            return jnp.mean(diagnostics.entropy(weights)) / math.log(KEYS)

        return {
            "unit keys": jnp.var(scores.key_normalized_dot(query, memory)),
            "cosine, times d": depth * jnp.var(cosines),
            "entropy": entropy(1.0),
            "entropy, temperature 1/sqrt(d)": entropy(depth**-0.5),
        }

    found = [draws(partial(of_draw, depth=depth), rng, count) for depth in DEPTHS]
    return {"depths": DEPTHS, **by_name(found)}


def verdict(data: Data) -> Verdict:
    """Judge by the variance at every depth."""
    flat, tempered = (
        interval(data[name][-1]).mean for name in ("entropy", "entropy, temperature 1/sqrt(d)")
    )
    depth = data["depths"][-1]
    found = (
        f"At d = {depth}, Var(q.k/|k|) is {shown(data['unit keys'][-1])}. With both sides "
        f"normalised it is {shown(data['cosine, times d'][-1])} / d: the entropy of the weights "
        f"is then {100 * flat:.1f}% of uniform, and a temperature is needed "
        f"({100 * tempered:.1f}% at 1/sqrt(d))."
    )
    kept = all(between(of_depth, 0.95, 1.05) for of_depth in data["unit keys"])
    return holds(found) if kept else fails(found)


def figure(data: Data):
    """Draw both variances against the depth."""
    series = {name: data[name] for name in ("unit keys", "cosine, times d")}
    return lines(
        data["depths"],
        series,
        xlabel="depth d",
        ylabel="variance",
        xscale="log",
        marks={"scaled dot": 1.0},
        ylim=(0.8, 1.2),
    )
