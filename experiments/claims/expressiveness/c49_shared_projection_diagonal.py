"""Sharing the projection of queries and keys forces the diagonal of self-attention to dominate.

Source: Folklore about why W_Q and W_K are separate; a token is most similar to itself.

Method: The share of rows whose largest weight is their own, for 64 tokens through one shared
random projection (Kitaev et al. 2020) and through two, when token lengths are log-normal with
spread 0, 0.5 and 1; also with tokens of one length. And how asymmetric the weights are.

Criterion: Holds if the diagonal is largest in at least 95% of rows of every case. Fails if the 95%
interval of some case is below.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax import bind, scores
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, undecided
from experiments.claims.drawing import maps
from experiments.claims.evidence import draws, shown
from experiments.significance import interval

TOKENS, DEPTH = 64, 64
SPREADS = (0.0, 0.5, 1.0)
SIZES = (4, 64)


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure the share of rows by spread of lengths and size of the projection."""
    count = setting.pick(tiny=4, quick=40, full=200)

    def share(spread: float, size: int, tied: bool) -> list[float]:
        return draws(partial(_share, spread=spread, size=size, tied=tied), rng, count)["share"]

    logits = _logits(rng, spread=1.0, size=64, tied=True)
    weights = jax.nn.softmax(logits)
    asymmetry = {
        name: float(jnp.linalg.norm(x - x.T) / jnp.linalg.norm(x))
        for name, x in (("logits", logits), ("weights", weights))
    }
    return {
        "share": {
            f"shared, size {size}, spread {spread:g}": share(spread, size, True)
            for size in SIZES
            for spread in SPREADS
        },
        "separate": share(0.0, 64, False),
        "asymmetry": asymmetry,
        "example": [[round(float(w), 4) for w in row[:24]] for row in weights[:24]],
    }


def _logits(rng: jax.Array, *, spread: float, size: int, tied: bool) -> jax.Array:
    """Draw tokens of different lengths and projections, and return the logits of all pairs."""
    parts = jax.random.split(rng, 3)
    tokens = jax.random.normal(parts[0], (TOKENS, DEPTH))
    tokens = tokens * jnp.exp(spread * jax.random.normal(parts[1], (TOKENS, 1)))
    own = jax.random.normal(parts[2], (2, DEPTH, size)) / DEPTH**0.5
    score = bind(scores.low_rank_bilinear, query_weight=own[0], key_weight=own[1])
    score = bind(scores.shared_projection, weight=own[0]) if tied else score
    return score(tokens, tokens)


def _share(rng: jax.Array, **options: Any) -> dict[str, jax.Array]:
    """Return the share of tokens whose largest logit is that of the token itself."""
    largest = jnp.argmax(_logits(rng, **options), axis=1)
    return {"share": jnp.mean(largest == jnp.arange(TOKENS))}


def verdict(data: Data) -> Verdict:
    """Judge by the case with the fewest rows."""
    found = {name: interval(of) for name, of in data["share"].items()}
    worst = min(found, key=lambda name: found[name].mean)
    best = max(found, key=lambda name: found[name].mean)
    asymmetry = data["asymmetry"]
    because = (
        f"The own token is largest in {shown(data['share'][best])} of rows at best ({best}), in "
        f"{shown(data['share'][worst])} at worst ({worst}): a longer token outbids it. Separate: "
        f"{shown(data['separate'])}. The "
        f"logits are symmetric (relative asymmetry {asymmetry['logits']:.1e}), the weights are not "
        f"({asymmetry['weights']:.2f})."
    )
    if found[worst].high < 0.95:
        return fails(because)
    return holds(because) if found[worst].low >= 0.95 else undecided(because)


def figure(data: Data):
    """Draw the weights of a counter-example."""
    return maps({"shared W, spread 1": data["example"]}, xlabel="token", ylabel="token")


def table(data: Data) -> list[list[str]]:
    """Show all cases."""
    rows = [[name, shown(of)] for name, of in data["share"].items()]
    rows.append(["separate, size 64, spread 0", shown(data["separate"])])
    return [["case", "share of rows with the largest weight on themselves"], *rows]
