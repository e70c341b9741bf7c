"""A bilinear form of low rank saves parameters at a small loss.

Source: Kim et al. 2017 (low-rank bilinear pooling); the error is bounded by Eckart and Young 1936.

Method: Bilinear scores of depth 32 learn to point at a key by 8 latent features, with a full W and
with rank 8: accuracy on new examples. And W, full and trained or drawn at random, is cut to rank r
by its singular values: the largest |q^T (W - W_r) k| over the bound sigma_(r+1) |q| |k|, and the
relative error of the logits.

Criterion: Fails if the bound is exceeded or the score of low rank is conclusively more than 2
points below the full one; undecided if the interval of its loss is not below 2. Holds only for
forms of low rank if cutting a random W has a relative error above 0.25.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attention_jax import scores
from experiments.claims import pointing, training
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, holds_only_if, undecided
from experiments.claims.drawing import lines
from experiments.claims.evidence import by_name, higher, shown, within
from experiments.significance import interval

DEPTH = 32
RANKS = (2, 4, 8, 16, 32)


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure errors by rank and seed."""
    task = pointing.Task(DEPTH, DEPTH, latent=8, examples=128)
    steps, seeds = (
        setting.pick(tiny=20, quick=500, full=2000),
        setting.pick(tiny=2, quick=6, full=8),
    )
    arm = pointing.arm(scores.bilinear, task)
    trained = training.train(arm, task.batch, rng, rates=(3e-3, 1e-2), seeds=seeds, steps=steps)
    low = pointing.arm(scores.low_rank_bilinear, task, DEPTH // 4)
    trained_low = training.train(low, task.batch, rng, rates=(3e-3, 1e-2), seeds=seeds, steps=steps)
    given = task._replace(examples=1024).batch(jax.random.fold_in(rng, 1))
    query, memory = given.query, given.key.reshape(-1, DEPTH)
    spectra = {
        "trained": trained.parameters["weight"],
        "random": jax.random.normal(rng, (seeds, DEPTH, DEPTH)) / DEPTH**0.5,
    }

    def errors(weight: jax.Array, rank: int) -> dict[str, jax.Array]:
        u, s, v = jnp.linalg.svd(weight)
        cut = (u[:, :rank] * s[:rank]) @ v[:rank]
        wrong = jnp.abs(query @ (weight - cut) @ memory.T)
        norms = jnp.linalg.norm(query, axis=1)[:, None] * jnp.linalg.norm(memory, axis=1)
        bound = (s[rank] if rank < DEPTH else 1e-6 * s[0]) * norms
        whole = jnp.linalg.norm(query @ weight @ memory.T)
        return {"bound": jnp.max(wrong / bound), "error": jnp.linalg.norm(wrong) / whole}

    arms = {"full": (scores.bilinear, trained), "low": (scores.low_rank_bilinear, trained_low)}
    data: Data = {
        "ranks": RANKS,
        "saved": [1 - 2 * r / DEPTH for r in RANKS],
        "right": {
            name: (100 * pointing.right(score, of.parameters, given)).tolist()
            for name, (score, of) in arms.items()
        },
    }
    for name, weights in spectra.items():
        found = [jax.vmap(lambda w, r=rank: errors(w, r))(weights) for rank in RANKS]
        data[name] = by_name([{k: v.tolist() for k, v in of.items()} for of in found])
    return data


def verdict(data: Data) -> Verdict:
    """Judge at a quarter of the rank."""
    at = data["ranks"].index(DEPTH // 4)
    full, low = data["right"]["full"], data["right"]["low"]
    worst = max(max(of) for name in ("trained", "random") for of in data[name]["bound"])
    found = (
        f"No error exceeds {worst:.3f} of its bound. At rank {DEPTH // 4} of {DEPTH}, with "
        f"{100 * data['saved'][at]:.0f}% of the parameters saved, a score trained at that rank "
        f"points right in {shown(low)}%, the full one in {shown(full)}%; cutting a full W after "
        f"training costs a relative error of {shown(data['trained']['error'][at])}, a random one "
        f"{shown(data['random']['error'][at])}."
    )
    if worst > 1.001 or higher([x - 2 for x in full], low):
        return fails(found)
    if not within(full, low, -100, 2):
        return undecided(found)
    if interval(data["random"]["error"][at]).low > 0.25:
        return holds_only_if("what is to be matched has low rank, and W is trained with it", found)
    return holds(found)


def figure(data: Data):
    """Draw relative errors against the rank."""
    series = {f"{name} W": data[name]["error"] for name in ("trained", "random")}
    return lines(
        data["ranks"], series, xlabel="rank", ylabel="relative error of logits", xscale="log"
    )
