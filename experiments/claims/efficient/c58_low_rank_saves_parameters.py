"""A bilinear form of low rank saves parameters at a small loss.

Source: Kim et al. 2017 (low-rank bilinear pooling); the error is bounded by Eckart and Young 1936.

Method: W of depth 32 is cut to rank r by its singular values, once drawn at random and once
trained to point at a key. The largest |q^T (W - W_r) k| over the bound sigma_(r+1) |q| |k|, the
relative error of the logits, and for the trained W how often it still points right.

Criterion: Fails if the bound is exceeded or the trained W at a quarter of the rank loses more than
2 points of accuracy. Holds only for decaying spectra if the random W then has a relative error
above 0.25.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attention_jax import scores
from experiments.claims import pointing, training
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, holds_only_if
from experiments.claims.drawing import lines
from experiments.claims.evidence import by_name, shown
from experiments.statistics import interval

DEPTH = 32
RANKS = (2, 4, 8, 16, 32)


def measure(setting: Setting, key: jax.Array) -> Data:
    """Measure errors by rank and seed."""
    task = pointing.Task(DEPTH, DEPTH, latent=12, examples=128)
    steps, seeds = (
        setting.pick(tiny=20, quick=500, full=2000),
        setting.pick(tiny=2, quick=6, full=8),
    )
    arm = pointing.arm(scores.bilinear, task)
    trained = training.train(arm, task.batch, key, rates=(3e-3, 1e-2), seeds=seeds, steps=steps)
    given = task.batch(jax.random.fold_in(key, 1))
    query, memory = given.query, given.key.reshape(-1, DEPTH)
    spectra = {
        "trained": trained.parameters["weight"],
        "random": jax.random.normal(key, (seeds, DEPTH, DEPTH)) / DEPTH**0.5,
    }

    def errors(weight: jax.Array, rank: int) -> dict[str, jax.Array]:
        u, s, v = jnp.linalg.svd(weight)
        cut = (u[:, :rank] * s[:rank]) @ v[:rank]
        wrong = jnp.abs(query @ (weight - cut) @ memory.T)
        norms = jnp.linalg.norm(query, axis=1)[:, None] * jnp.linalg.norm(memory, axis=1)
        bound = (s[rank] if rank < DEPTH else 1e-6 * s[0]) * norms
        whole = jnp.linalg.norm(query @ weight @ memory.T)
        right = pointing.right(scores.bilinear, {"weight": cut[None]}, given)[0]
        found = jnp.max(wrong / bound), jnp.linalg.norm(wrong) / whole, right
        return dict(zip(("bound", "error", "right"), found, strict=True))

    data: Data = {"ranks": RANKS, "saved": [1 - 2 * r / DEPTH for r in RANKS]}
    for name, weights in spectra.items():
        found = [jax.vmap(lambda w, r=rank: errors(w, r))(weights) for rank in RANKS]
        data[name] = by_name([{k: v.tolist() for k, v in of.items()} for of in found])
    return data


def verdict(data: Data) -> Verdict:
    """Judge at a quarter of the rank."""
    at = data["ranks"].index(DEPTH // 4)
    trained, random = data["trained"], data["random"]
    worst = max(max(of) for name in ("trained", "random") for of in data[name]["bound"])
    lost = 100 * (interval(trained["right"][-1]).mean - interval(trained["right"][at]).mean)
    found = (
        f"No error exceeds {worst:.3f} of its bound. At rank {DEPTH // 4} of {DEPTH}, with "
        f"{100 * data['saved'][at]:.0f}% of the parameters saved, the trained W loses {lost:.1f} "
        f"points of accuracy (relative error {shown(trained['error'][at])}); a random W has "
        f"relative error {shown(random['error'][at])}."
    )
    if worst > 1.001 or lost > 2:
        return fails(found)
    if interval(random["error"][at]).low > 0.25:
        return holds_only_if("the spectrum of W decays, as training may make it", found)
    return holds(found)


def figure(data: Data):
    """Draw relative errors against the rank."""
    series = {f"{name} W": data[name]["error"] for name in ("trained", "random")}
    return lines(
        data["ranks"], series, xlabel="rank", ylabel="relative error of logits", xscale="log"
    )
