"""A multiplicative score is proportional to the query: f(aq, k) = a f(q, k).

Source: Definition of a bilinear form; the contrast to additive scores in lectures on attention.

Method: The largest |f(aq, k) - a f(q, k)| relative to the largest |a f(q, k)|, in float32, for a
from -100 to 100: dot, scaled dot, general, low-rank; and for contrast additive and cosine.

Criterion: Holds if every multiplicative score keeps it to 1e-5.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attention_jax import scores
from attention_jax.base.parameters import bind_parameters, initialize, parameters_of
from experiments.claims.claim import Data, Setting, Verdict, fails, holds
from experiments.claims.drawing import bars

MULTIPLICATIVE = ("dot", "scaled_dot", "bilinear", "low_rank_bilinear")
OTHERS = ("normalized_additive", "cosine")
FACTORS = (-100.0, -1.7, 0.3, 3.0, 100.0)


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure the breach of homogeneity of each score."""
    rows, depth = setting.pick(tiny=16, quick=128, full=512), 32
    query, memory = jax.random.normal(rng, (2, rows, depth))

    names = MULTIPLICATIVE + OTHERS
    return {"breach": {name: _breach(name, query, memory, rng) for name in names}}


def _breach(name: str, query: jax.Array, memory: jax.Array, rng: jax.Array) -> float:
    """Return the largest relative error of score(a q, k) = a score(q, k) over all factors a."""
    score, depths = getattr(scores, name), (query.shape[1], memory.shape[1])
    score = bind_parameters(score, initialize(rng, parameters_of(score, *depths)))
    plain = score(query, memory)
    return max(
        float(jnp.max(jnp.abs(score(a * query, memory) - a * plain)) / jnp.max(jnp.abs(a * plain)))
        for a in FACTORS
    )


def verdict(data: Data) -> Verdict:
    """Judge by the worst multiplicative score."""
    breach = data["breach"]
    worst = max(MULTIPLICATIVE, key=lambda name: breach[name])
    found = (
        f"Largest relative breach {breach[worst]:.1e} ({worst}); for contrast, "
        f"additive {breach['normalized_additive']:.2f}, cosine {breach['cosine']:.2f}."
    )
    return holds(found) if breach[worst] < 1e-5 else fails(found)


def figure(data: Data):
    """Draw the breaches."""
    return bars(data["breach"], xlabel="largest relative breach", xscale="log")
