"""The dot product measures cosine similarity.

Source: Said of attention scores in countless introductions.

Method: Standard normal queries and keys of depth 64; the lengths of keys are multiplied by
log-normal factors of spread 0 to 1. Per query, the correlation of the dot product with the cosine
and with the length of the key, and whether both have the same largest key out of 64.

Criterion: Holds if correlation is above 0.95 at every spread. Holds only for keys of one length if
that is so without spread and the largest keys agree in fewer than 90% of queries at spread 1.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from attention_jax import scores
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, holds_only_if
from experiments.claims.drawing import lines
from experiments.claims.evidence import by_name, draws, shown
from experiments.significance import interval

SPREADS = (0.0, 0.25, 0.5, 1.0)
NAMES = ("correlation with cosine", "|dot| with length of key", "same largest key")


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure the correlations and the agreement by spread and draw."""
    count, rows, depth = setting.pick(tiny=4, quick=30, full=100), 64, 64

    def of_draw(rng: jax.Array, spread: float) -> dict[str, jax.Array]:
        parts = jax.random.split(rng)
        query, memory = jax.random.normal(parts[0], (2, rows, depth))
        length = jnp.exp(spread * jax.random.normal(parts[1], (rows, 1)))
        memory = memory / jnp.linalg.norm(memory, axis=1, keepdims=True) * depth**0.5 * length
        dots, cosines = scores.dot(query, memory), scores.cosine(query, memory)
        of_length = jnp.broadcast_to(length.T, dots.shape)
        found = (
            _correlation(dots, cosines),
            _correlation(jnp.abs(dots), of_length) if spread else jnp.zeros(rows),
            jnp.argmax(dots, axis=1) == jnp.argmax(cosines, axis=1),
        )
        return {name: jnp.mean(x) for name, x in zip(NAMES, found, strict=True)}

    found = [draws(partial(of_draw, spread=spread), rng, count) for spread in SPREADS]
    return {"spreads": SPREADS, **by_name(found)}


def _correlation(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return Pearson's correlation along the rows."""
    x, y = (z - jnp.mean(z, axis=1, keepdims=True) for z in (x, y))
    return jnp.sum(x * y, axis=1) / jnp.linalg.norm(x, axis=1) / jnp.linalg.norm(y, axis=1)


def verdict(data: Data) -> Verdict:
    """Judge by the correlation, then by the largest key."""
    cosine, length, same = (data[name] for name in NAMES)
    found = (
        f"Correlation with the cosine is {shown(cosine[0])} for keys of one length and "
        f"{shown(cosine[-1])} at spread {data['spreads'][-1]:g}, where |dot| correlates "
        f"{shown(length[-1])} with the length, and both choose the same key in {shown(same[-1])} "
        "of cases: the length is a gain."
    )
    if min(interval(of).low for of in cosine) > 0.95:
        return holds(found)
    if interval(cosine[0]).low > 0.95 and interval(same[-1]).high < 0.9:
        return holds_only_if("all keys are equally long", found)
    return fails(found)


def figure(data: Data):
    """Draw correlations and agreement against the spread."""
    series = {name: data[name] for name in NAMES}
    return lines(
        data["spreads"], series, xlabel="spread of log length", ylabel="", ylim=(-0.05, 1.05)
    )
