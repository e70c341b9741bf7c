"""Without positions attention cannot see the order of its tokens.

Source: Vaswani et al. 2017, section 3.5 ("since our model contains no recurrence ...").

Method: The breach of permutation equivariance, the change of the outputs of tokens in another
order relative to the outputs, of two layers of self-attention: without mask or positions, with a
causal mask, and with sinusoids added.

Criterion: Fails if without mask and positions the breach is above 1e-5. If so, and with a causal
mask alone it is above 0.01, the claim needs the condition that there is no mask.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax import masks
from attention_jax.nnx import MultiHeadAttention
from attention_jax.positions import sinusoidal
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, holds_only_if
from experiments.claims.drawing import bars
from experiments.claims.evidence import draws, shown
from experiments.significance import interval

LENGTH, WIDTH = 16, 32


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure the breach in the three cases."""
    count = setting.pick(tiny=3, quick=30, full=200)
    layers = [MultiHeadAttention(4, WIDTH, rngs=nnx.Rngs(n)) for n in range(2)]
    cases = {"neither": (None, 0.0), "causal mask": (masks.Causal(), 0.0), "sinusoids": (None, 1.0)}

    def of_draw(rng: jax.Array) -> dict[str, jax.Array]:
        tokens, order = jax.random.split(rng)
        x = jax.random.normal(tokens, (1, LENGTH, WIDTH))
        order = jax.random.permutation(order, LENGTH)
        plain = {name: _output(layers, x, *case)[:, order] for name, case in cases.items()}
        found = {name: _output(layers, x[:, order], *case) for name, case in cases.items()}
        return {
            name: jnp.linalg.norm(found[name] - y) / jnp.linalg.norm(y) for name, y in plain.items()
        }

    found = draws(of_draw, rng, count)
    return {"breach": {name: found[name] for name in cases}}


def _output(
    layers: list[MultiHeadAttention], x: jax.Array, mask: masks.Mask | None, gain: float
) -> jax.Array:
    """Add sinusoids times a gain, apply all layers, and take the sinusoids away again."""
    places = sinusoidal(jnp.arange(LENGTH), WIDTH)[None]
    x = x + gain * places
    for layer in layers:
        x = x + layer(x, mask=mask)
    return x - gain * places


def verdict(data: Data) -> Verdict:
    """Judge the plain case, then the mask alone."""
    breach = data["breach"]
    found = "Another order changes the outputs by " + ", ".join(
        f"{shown(values)} ({name})" for name, values in breach.items()
    )
    if max(breach["neither"]) > 1e-5:
        return fails(f"{found}.")
    if interval(breach["causal mask"]).low > 0.01:
        return holds_only_if("there is no causal mask; the mask alone shows the order", f"{found}.")
    return holds(f"{found}.")


def figure(data: Data):
    """Draw the breaches."""
    least = {name: [max(x, 1e-9) for x in values] for name, values in data["breach"].items()}
    return bars(least, xlabel="relative change of the outputs", xscale="log")
