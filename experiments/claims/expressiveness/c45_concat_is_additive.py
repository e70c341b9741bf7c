"""Luong's concat and Bahdanau's additive score are the same function.

Source: Luong, Pham and Manning 2015, equation 8; said in most comparisons of the two papers.

Method: Concat of one layer, with its matrix W split into W_q above and W_k below, beside additive.
And what stands before the last tanh, h(q, k): where it splits into a part of the query and one of
the key, the mixed difference h(q, k) - h(q', k) - h(q, k') + h(q', k') is zero.

Criterion: Holds for as many layers as leave the scores equal to 1e-9 and the mixed difference
below 1e-9 of the largest |h|, in float64.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attention_jax import bind, scores
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, holds_only_if
from experiments.claims.drawing import bars

DEPTH, SIZE = 8, 8


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure the distance from additive, and mixed differences for one to three layers."""
    count = setting.pick(tiny=8, quick=32, full=128)
    with jax.enable_x64(True):
        parts = jax.random.split(rng, 6)
        rows = jax.random.normal(parts[0], (2, count, DEPTH), jnp.float64)
        sizes = (2 * DEPTH, SIZE, SIZE)
        weights = [
            0.5 * jax.random.normal(k, (size, SIZE), jnp.float64) / size**0.5
            for k, size in zip(parts[1:4], sizes, strict=True)
        ]
        value = jax.random.normal(parts[4], (SIZE,), jnp.float64)

        def concat(layers: int, value: jax.Array) -> jax.Array:
            own = {"weights": weights[:layers], "biases": [jnp.zeros(SIZE)] * layers}
            return bind(scores.concat, **own, value=value)(*rows)

        def mixed(layers: int) -> float:
            h = jnp.arctanh(concat(layers, jnp.eye(SIZE)[0]))
            difference = h - h[:1] - h[:, :1] + h[:1, :1]
            return float(jnp.max(jnp.abs(difference)) / jnp.max(jnp.abs(h)))

        halves = {"query_weight": weights[0][:DEPTH], "key_weight": weights[0][DEPTH:]}
        additive = bind(scores.additive, **halves, value=value, bias=jnp.zeros(SIZE))(*rows)
        distance = jnp.max(jnp.abs(concat(1, value) - additive)) / jnp.max(jnp.abs(additive))
        return {"distance": float(distance), "mixed": {n: mixed(n) for n in (1, 2, 3)}}


def verdict(data: Data) -> Verdict:
    """Judge one layer, then more."""
    mixed = data["mixed"]
    found = (
        f"With one layer the two differ by {data['distance']:.1e}. Mixed differences before the "
        f"last tanh: {mixed['1']:.1e} with one layer, {mixed['2']:.2g} with two."
    )
    if data["distance"] > 1e-9 or mixed["1"] > 1e-9:
        return fails(found)
    if mixed["2"] > 1e-9:
        return holds_only_if("concat has one layer", found)
    return holds(found)


def figure(data: Data):
    """Draw mixed differences by the number of layers."""
    named = {f"{n} layer{'s' * (n != '1')}": max(of, 1e-17) for n, of in data["mixed"].items()}
    return bars(named, xlabel="mixed difference of query and key", xscale="log")
