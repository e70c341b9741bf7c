"""Layer norm on queries and keys keeps both mechanisms stable, however large the weights grow.

Source: Henry et al. 2020; Dehghani et al. 2023 (22B vision Transformer), section 2, for dot
products.

Method: Rows are projected by W times a gain of 1 to 64, perhaps normalised, and scored. For the
scaled dot product the largest |logit|; for additive the share of its tanh features with a
derivative below 0.05, once with the gain in the projection (before the norm), once in its own W
(behind it).

Criterion: Holds if with the norm all logits stay within sqrt(d) and no more than half of tanh is
saturated, at every gain. Holds only where the norm comes last if that fails for the gain behind it
alone.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from attention_jax import diagnostics, scores
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, holds_only_if
from experiments.claims.drawing import lines
from experiments.claims.evidence import by_name, draws, shown
from experiments.significance import interval

GAINS = (1.0, 4.0, 16.0, 64.0)
DEPTH = 64


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure the largest logit and the saturation of tanh by gain and draw."""
    count, rows = setting.pick(tiny=2, quick=20, full=60), 64

    def of_draw(rng: jax.Array, gain: float) -> dict[str, jax.Array]:
        parts = jax.random.split(rng, 3)
        rows_of = jax.random.normal(parts[0], (2, rows, DEPTH))
        project = jax.random.normal(parts[1], (2, DEPTH, DEPTH)) / DEPTH**0.5
        own = jax.random.normal(parts[2], (2, DEPTH, DEPTH)) / DEPTH**0.5
        plain = gain * rows_of @ project
        normed = _layer_norm(plain)

        def saturated(x: jax.Array, own: jax.Array) -> jax.Array:
            return jnp.mean(diagnostics.additive_saturation(*x, *own, bias=jnp.zeros(DEPTH)))

        return {
            "largest logit": jnp.max(jnp.abs(scores.scaled_dot(*plain))),
            "largest logit, norm": jnp.max(jnp.abs(scores.scaled_dot(*normed))),
            "tanh": saturated(plain, own),
            "tanh, norm": saturated(normed, own),
            "tanh, gain behind the norm": saturated(_layer_norm(rows_of @ project), gain * own),
        }

    found = [draws(partial(of_draw, gain=gain), rng, count) for gain in GAINS]
    return {"gains": GAINS, **by_name(found)}


def _layer_norm(x: jax.Array) -> jax.Array:
    """Ba, Kiros and Hinton 2016, without gain and bias."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-6)


def verdict(data: Data) -> Verdict:
    """Judge by the largest gain."""
    logit = max(max(of) for of in data["largest logit, norm"])
    wild = data["largest logit"][-1]
    before, behind = (data[name][-1] for name in ("tanh, norm", "tanh, gain behind the norm"))
    found = (
        f"With the norm the largest |logit| is {logit:.2f} (sqrt(d) = {DEPTH**0.5:g}; without it "
        f"{shown(wild)} at gain {data['gains'][-1]:g}) and {shown(before)} of tanh is saturated; "
        f"with the gain in the additive W, behind the norm, {shown(behind)}."
    )
    if logit > DEPTH**0.5 * (1 + 1e-5) or interval(before).high > 0.5:
        return fails(found)
    if interval(behind).low > 0.5:
        return holds_only_if("nothing learned follows the norm; additive has W behind it", found)
    return holds(found)


def figure(data: Data):
    """Draw the saturation of tanh against the gain."""
    series = {name: of for name, of in data.items() if name.startswith("tanh")}
    return lines(
        data["gains"],
        series,
        xlabel="gain of the weights",
        ylabel="saturated share of tanh",
        xscale="log",
        ylim=(-0.02, 1.02),
    )
