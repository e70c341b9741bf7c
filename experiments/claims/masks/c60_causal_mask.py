"""Under a causal mask nothing flows from the future.

Source: Vaswani et al. 2017, section 3.2.3.

Method: All derivatives d y_i / d x_j of self-attention over 12 tokens, for scaled dot product and
additive scores, dense and tiled; the future is j > i. Then the last token is made NaN.

Criterion: Holds if every derivative from the future is exactly zero, those from the past are not,
and NaN in the last token leaves all earlier outputs finite.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attention_jax import attend, bind, masks, scores
from experiments.claims.claim import Data, Setting, Verdict, fails, holds
from experiments.claims.drawing import maps

LENGTH, DEPTH = 12, 4


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure the largest derivative from the future and the smallest from the past."""
    parts = jax.random.split(rng, 3)
    x = jax.random.normal(parts[0], (LENGTH, DEPTH))
    own = jax.random.normal(parts[1], (2, DEPTH, DEPTH))
    vectors = {"value": jax.random.normal(parts[2], (DEPTH,)), "bias": jnp.zeros(DEPTH)}
    additive = bind(scores.additive, query_weight=own[0], key_weight=own[1], **vectors)
    future = jnp.arange(LENGTH)[None, :] > jnp.arange(LENGTH)[:, None]
    cases = {}
    for name, score in {"scaled dot": scores.scaled_dot, "additive": additive}.items():
        for implementation in ("dense", "tiled"):
            how = {"score": score, "mask": masks.Causal(), "implementation": implementation}

            @jax.jit
            def attended(x: jax.Array, how=how) -> jax.Array:
                x = x[None, :, None]
                return attend(x, x, x, **how)[0, :, 0]

            size = jnp.abs(jax.jacrev(attended)(x)).max(axis=(1, 3))
            early = attended(x.at[-1].set(jnp.nan))[:-1]
            cases[f"{name}, {implementation}"] = {
                "future": float(jnp.max(size, where=future, initial=0.0)),
                "past": float(jnp.min(size, where=~future, initial=jnp.inf)),
                "finite": bool(jnp.all(jnp.isfinite(early))),
                "size": [[round(float(d), 5) for d in row] for row in size],
            }
    return {"cases": cases}


def verdict(data: Data) -> Verdict:
    """Judge every case."""
    cases = data["cases"].values()
    largest = max(of["future"] for of in cases)
    found = (
        f"The largest derivative from the future is {largest:g} in {len(cases)} cases, the "
        f"smallest from the past {min(of['past'] for of in cases):.1e}."
    )
    kept = all(of["future"] == 0 and of["past"] > 0 and of["finite"] for of in cases)
    return holds(found) if kept else fails(found)


def figure(data: Data):
    """Draw the sizes of all derivatives."""
    sizes = {name: of["size"] for name, of in data["cases"].items() if "tiled" in name}
    return maps(sizes, xlabel="input j", ylabel="output i")
