"""An additive score cannot exceed the l1 norm of v, so it needs no scale.

Source: Follows from |tanh| <= 1; given as the reason why additive attention is not scaled, for
instance in discussions of Vaswani et al. 2017, section 3.2.1.

Method: The largest |e| / |v|_1 over random inputs up to 1000 times unit size and over inputs made
to reach it (every feature of W_q q driven to the sign of v). Then |v|_1 after training to point at
a key, relative to its value after a tenth of the steps.

Criterion: Fails if any score is beyond |v|_1 by more than rounding. If none is, and the bound
itself grows by more than a tenth in training, it holds for fixed v only.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from attention_jax import bind, scores
from attention_jax.base.parameters import initialize, parameters_of
from experiments.claims import pointing, training
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, holds_only_if
from experiments.claims.drawing import lines
from experiments.claims.evidence import draws, shown
from experiments.significance import interval

SIZES = (1.0, 10.0, 100.0, 1000.0)


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure the largest share of the bound that is reached, and how the bound grows."""
    count, depth = setting.pick(tiny=3, quick=20, full=100), 16
    steps, seeds = (
        setting.pick(tiny=20, quick=400, full=2000),
        setting.pick(tiny=2, quick=6, full=8),
    )

    def reached(rng: jax.Array, size: float) -> dict[str, jax.Array]:
        parts = jax.random.split(rng, 3)
        own = initialize(parts[0], parameters_of(scores.normalized_additive, depth, depth))
        own = {name: own[name] for name in ("query_weight", "key_weight", "value", "bias")}
        query, memory = size * jax.random.normal(parts[1], (2, 64, depth))
        # The query that drives every feature to the sign of v: W_q q = size sign(v).
        worst = jnp.linalg.solve(own["query_weight"].T, size * jnp.sign(own["value"]))
        logits = bind(scores.additive, **own)(jnp.concatenate([query, worst[None]]), memory)
        return {"share": jnp.max(jnp.abs(logits)) / jnp.sum(jnp.abs(own["value"]))}

    share = [draws(partial(reached, size=size), rng, count)["share"] for size in SIZES]
    growth = _bound_after(steps, seeds, rng) / _bound_after(steps // 10, seeds, rng)
    return {"sizes": SIZES, "share": share, "growth": growth.tolist()}


def _bound_after(steps: int, seeds: int, rng: jax.Array) -> jax.Array:
    """Train a number of steps and return |v|_1, for each seed."""
    task = pointing.Task()
    arm = pointing.arm(scores.additive, task, attention_size=16)
    trained = training.train(arm, task.batch, rng, rates=(1e-2,), seeds=seeds, steps=steps)
    return jnp.sum(jnp.abs(trained.parameters["value"]), axis=-1)


def verdict(data: Data) -> Verdict:
    """Judge by the worst input and by what training does to the bound."""
    worst = max(max(of_size) for of_size in data["share"])
    found = (
        f"The largest |e|/|v|_1 of all inputs is {worst:.4f}; ten times the training multiplies "
        f"|v|_1 by {shown(data['growth'])}."
    )
    if worst > 1 + 1e-5:
        return fails(found)
    if interval(data["growth"]).low > 1.1:
        return holds_only_if("v is fixed; it is learned, and the bound with it", found)
    return holds(found)


def figure(data: Data):
    """Draw the share of the bound that is reached against the size of the inputs."""
    return lines(
        data["sizes"],
        {"largest |e| / |v|_1": data["share"]},
        xlabel="size of query and key",
        ylabel="share of the bound",
        xscale="log",
        marks={"bound": 1.0},
    )
