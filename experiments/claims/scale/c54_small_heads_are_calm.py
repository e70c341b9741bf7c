"""Attention in small subspaces, many heads of few features, is numerically calmer.

Source: Given as a benefit of multi-head attention in lectures.

Method: Standard normal tokens of width 256 through projections that keep unit variance, for 1 to
64 heads of 256/h features: the variance of the logits of a head, dot and scaled dot.

Criterion: Holds if from 1 to 64 heads the variance falls by more than half for both scores. Holds
only unscaled if that is so for dot alone.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from attention_jax import scores
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, holds_only_if
from experiments.claims.drawing import lines
from experiments.claims.evidence import by_name, draws, shown
from experiments.significance import interval

WIDTH = 256
HEADS = (1, 4, 16, 64)


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure the variance of logits by number of heads and draw."""
    count = setting.pick(tiny=3, quick=20, full=60)

    def of_draw(rng: jax.Array, heads: int) -> dict[str, jax.Array]:
        tokens, weights = jax.random.split(rng)
        x = jax.random.normal(tokens, (64, WIDTH))
        own = jax.random.normal(weights, (2, WIDTH, WIDTH // heads)) / WIDTH**0.5
        query, memory = x @ own
        return {s.__name__: jnp.var(s(query, memory)) for s in (scores.dot, scores.scaled_dot)}

    found = [draws(partial(of_draw, heads=heads), rng, count) for heads in HEADS]
    return {"heads": HEADS, "variance": by_name(found)}


def verdict(data: Data) -> Verdict:
    """Judge by the first and the last number of heads."""
    plain, scaled = (data["variance"][name] for name in ("dot", "scaled_dot"))
    found = (
        f"From {data['heads'][0]} to {data['heads'][-1]} heads the variance of the logits goes "
        f"from {shown(plain[0])} to {shown(plain[-1])} unscaled and from {shown(scaled[0])} to "
        f"{shown(scaled[-1])} scaled."
    )
    calmer = [interval(of[-1]).high < interval(of[0]).low / 2 for of in (plain, scaled)]
    if all(calmer):
        return holds(found)
    return holds_only_if("the dot product is not scaled", found) if calmer[0] else fails(found)


def figure(data: Data):
    """Draw the variance against the number of heads."""
    return lines(
        data["heads"],
        data["variance"],
        xlabel="heads",
        ylabel="variance of logits",
        xscale="log",
        yscale="log",
    )
