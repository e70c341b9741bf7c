"""Unlike a recurrent network, attention does not share its parameters over positions.

Source: Found in comparisons of recurrent networks and Transformers.

Method: Self-attention without positions is applied to tokens and to the same tokens in another
order; where all positions have the same parameters, the outputs are the same in that order
(permutation equivariance). Its parameters are counted, and it is applied to two lengths.

Criterion: Fails if the largest breach is below 1e-5 of the largest output for every draw, at both
lengths.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.nnx import MultiHeadAttention
from experiments.claims.claim import Data, Setting, Verdict, fails, holds
from experiments.claims.drawing import lines
from experiments.claims.evidence import draws, shown

LENGTHS = (8, 64)
WIDTH = 32


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure the breach of equivariance by length and draw."""
    count = setting.pick(tiny=2, quick=20, full=100)
    layer = MultiHeadAttention(4, WIDTH, rngs=nnx.Rngs(rng))

    def of_draw(rng: jax.Array, length: int) -> dict[str, jax.Array]:
        tokens, order = jax.random.split(rng)
        x = jax.random.normal(tokens, (1, length, WIDTH))
        order = jax.random.permutation(order, length)
        y, moved = layer(x)[:, order], layer(x[:, order])
        return {"breach": jnp.max(jnp.abs(moved - y)) / jnp.max(jnp.abs(y))}

    return {
        "lengths": LENGTHS,
        "breach": [draws(lambda k, n=n: of_draw(k, n), rng, count)["breach"] for n in LENGTHS],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param))),
    }


def verdict(data: Data) -> Verdict:
    """Judge by the largest breach."""
    worst = max(max(of) for of in data["breach"])
    found = (
        f"In another order the outputs are the same to {worst:.1e} (mean "
        f"{shown(data['breach'][-1])}); the same {data['parameters']:,} parameters serve lengths "
        f"{' and '.join(map(str, data['lengths']))}."
    )
    return fails(f"{found} They are shared.") if worst < 1e-5 else holds(found)


def figure(data: Data):
    """Draw the breach against the length."""
    return lines(
        data["lengths"],
        {"breach of equivariance": data["breach"]},
        xlabel="tokens",
        ylabel="relative breach",
        yscale="log",
        marks={"criterion": 1e-5},
    )
