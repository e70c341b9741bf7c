"""An additive score is odd and a multiplicative one even, so the two can never coincide.

Source: Symmetry of tanh and of the product; used to argue that neither mechanism contains the
other.

Method: |e(q, k) + e(-q, -k)| relative to |e| for additive scores without and with biases, and the
same difference for the dot product. Then an additive score with biases that is built to be the dot
product, 4 xy = (x + y)^2 - (x - y)^2 with each square from tanh(b + z) + tanh(b - z), and the
distance between the weights of the two.

Criterion: Fails if additive scores without biases are not odd. Holds only without biases if the
built score has weights within 0.01 (total variation) of those of the dot product.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from attention_jax import bind, scores
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, holds_only_if
from experiments.claims.drawing import lines

DEPTH = 8
GAINS = (1.0, 0.3, 0.1, 0.03)


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure both symmetries, and how near the built score comes to the dot product."""
    rows = setting.pick(tiny=16, quick=64, full=256)
    with jax.enable_x64(True):
        parts = jax.random.split(rng, 4)
        query, memory = jax.random.normal(parts[0], (2, rows, DEPTH), jnp.float64)
        matrices = jax.random.normal(parts[1], (2, DEPTH, 16), jnp.float64)
        value, bias = jax.random.normal(parts[2], (2, 16), jnp.float64)
        own = {"query_weight": matrices[0], "key_weight": matrices[1], "value": value}

        def broken(score, sign: float) -> float:
            here, mirrored = score(query, memory), score(-query, -memory)
            return float(jnp.linalg.norm(here - sign * mirrored) / jnp.linalg.norm(here))

        wanted = jax.nn.softmax(scores.dot(query, memory))
        distance = [
            float(
                jnp.mean(jnp.sum(jnp.abs(jax.nn.softmax(built(gain)(query, memory)) - wanted), 1))
                / 2
            )
            for gain in GAINS
        ]
        return {
            "odd_without_bias": broken(bind(scores.additive, bias=0 * bias, **own), -1),
            "odd_with_bias": broken(bind(scores.additive, bias=bias, **own), -1),
            "even_dot": broken(scores.dot, 1),
            "gains": GAINS,
            "distance": distance,
        }


def built(gain: float):
    """Return an additive score with 4 features for each of the query's that nears the dot product.

    tanh(b + z) + tanh(b - z) = 2 tanh b + tanh''(b) z^2 + O(z^4), with z = gain (x + y) and then
    z = gain (x - y).
    """
    bias = math.atanh(3**-0.5)  # where the second derivative of tanh is largest
    curvature = -2 * math.tanh(bias) * (1 - math.tanh(bias) ** 2)
    eye, ones = jnp.eye(DEPTH), jnp.ones(DEPTH)
    return bind(
        scores.additive,
        query_weight=gain * jnp.concatenate([eye, -eye, eye, -eye], axis=1),
        key_weight=gain * jnp.concatenate([eye, -eye, -eye, eye], axis=1),
        value=jnp.concatenate([ones, ones, -ones, -ones]) / (4 * curvature * gain**2),
        bias=jnp.full(4 * DEPTH, bias),
    )


def verdict(data: Data) -> Verdict:
    """Judge the symmetry first, then what follows from it."""
    found = (
        f"Relative breach of oddness: {data['odd_without_bias']:.1e} without biases, "
        f"{data['odd_with_bias']:.2f} with; the dot product is even to {data['even_dot']:.1e}."
    )
    if data["odd_without_bias"] > 1e-9 or data["even_dot"] > 1e-9:
        return fails(found)
    nearest = min(data["distance"])
    found += f" An additive score with biases comes within {nearest:.1e} of the weights of dot."
    if nearest < 0.01:
        return holds_only_if("the additive score has no biases", found)
    return holds(found)


def figure(data: Data):
    """Draw the distance of the built score from the dot product."""
    return lines(
        data["gains"],
        {"additive score built to be a dot product": data["distance"]},
        xlabel="gain of W",
        ylabel="total variation of weights",
        xscale="log",
        yscale="log",
    )
