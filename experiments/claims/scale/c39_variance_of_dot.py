"""The dot product of a query and a key of depth d has variance d.

Source: Vaswani et al. 2017, section 3.2.1, footnote 4; repeated in every course on Transformers.

Method: Var(q . k) / d over pairs with independent standard normal entries, at depths 4 to 1024;
and over the pairs of queries and keys of an attention that has been trained to point at a key,
relative to the product of d and the mean squares of its entries.

Criterion: Holds where the 95% interval of the ratio lies within 5% of 1. If that is so for drawn
entries and not after training, the claim needs its condition.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax import scores
from experiments.claims import pointing, training
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, holds_only_if
from experiments.claims.drawing import lines
from experiments.claims.evidence import between, draws, shown
from experiments.significance import interval

DEPTHS = (4, 16, 64, 256, 1024)


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure Var(q . k) / d of drawn rows by depth, and of trained ones by seed."""
    rows, count = setting.pick(tiny=64, quick=128, full=256), 40

    def of_draw(rng: jax.Array, depth: int) -> dict[str, jax.Array]:
        return {"ratio": _ratio(*jax.random.normal(rng, (2, rows, depth)))}

    drawn = [draws(partial(of_draw, depth=d), rng, count)["ratio"] for d in DEPTHS]
    return {"depths": DEPTHS, "drawn": drawn, "trained": _trained(setting, rng)}


def _ratio(query: jax.Array, key: jax.Array) -> jax.Array:
    """Return Var(q . k) / (d E[q^2] E[k^2])."""
    expected = query.shape[1] * jnp.mean(query**2) * jnp.mean(key**2)
    return jnp.var(scores.dot(query, key)) / expected


def _trained(setting: Setting, rng: jax.Array) -> list[float]:
    task = pointing.Task()
    steps, seeds = (
        setting.pick(tiny=20, quick=400, full=1500),
        setting.pick(tiny=2, quick=6, full=8),
    )
    arm = pointing.arm(scores.low_rank_bilinear, task, attention_size=16)
    trained = training.train(arm, task.batch, rng, rates=(1e-2,), seeds=seeds, steps=steps)
    given = task.batch(rng)

    def of_seed(own: dict[str, Any]) -> jax.Array:
        keys = given.key.reshape(-1, task.key_depth) @ own["key_weight"]
        return _ratio(given.query @ own["query_weight"], keys)

    return jax.vmap(of_seed)(trained.parameters).tolist()


def verdict(data: Data) -> Verdict:
    """Judge by whether the intervals of the ratios are near 1."""
    trained = interval(data["trained"])
    found = (
        f"Var(q.k)/d is {shown(data['drawn'][-1])} at d = {data['depths'][-1]}; after training "
        f"it is {shown(data['trained'])} times what independent entries of that size would give."
    )
    if not all(between(of_depth, 0.95, 1.05) for of_depth in data["drawn"]):
        return fails(found)
    if trained.high < 0.95 or trained.low > 1.05:
        return holds_only_if("entries are independent with unit variance", found)
    return holds(found)


def figure(data: Data):
    """Draw the ratio against the depth."""
    ones = [data["trained"]] * len(data["depths"])
    return lines(
        data["depths"],
        {"drawn": data["drawn"], "trained (depth 16)": ones},
        xlabel="depth d",
        ylabel="Var(q.k) / expected",
        xscale="log",
        marks={"claim": 1.0},
    )
