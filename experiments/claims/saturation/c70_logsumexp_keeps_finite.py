"""Subtracting the maximum (log-sum-exp) keeps the softmax finite, whatever the logits.

Source: Standard numerical practice; Blanchard, Higham and Higham 2021.

Method: Logits of 64 keys of size 1 to 10000 in float16, bfloat16 and float32: the share of rows of
exp(x) / sum exp(x) that are finite, and of this library's softmax; and its largest error against
float64.

Criterion: Holds if every row of the stable softmax is finite and its error is within 4 units in
the last place of 1, while the plain one is not always finite.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax as exact_softmax

from attention_jax.normalizers import softmax
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, undecided
from experiments.claims.drawing import lines

SIZES = (1.0, 10.0, 100.0, 1000.0, 10000.0)
DTYPES = ("float16", "bfloat16", "float32")


def measure(setting: Setting, key: jax.Array) -> Data:
    """Measure finite shares and errors by type and size."""
    rows = setting.pick(tiny=8, quick=256, full=1024)
    logits = jax.random.normal(key, (rows, 64))
    data: Data = {"sizes": SIZES}
    for dtype in DTYPES:
        found = []
        for size in SIZES:
            x = (size * logits).astype(dtype)
            plain, stable = jnp.exp(x) / jnp.sum(jnp.exp(x), axis=1, keepdims=True), _stable(x)
            exact = exact_softmax(np.asarray(x, np.float64), axis=1)
            wrong = np.abs(np.asarray(stable, np.float64) - exact).max()
            finite = [float(jnp.mean(jnp.isfinite(y).all(axis=1))) for y in (plain, stable)]
            found.append((*finite, float(wrong / jnp.finfo(dtype).eps)))
        plain, stable, error = (list(of) for of in zip(*found, strict=True))
        data[dtype] = {"plain": plain, "stable": stable, "error": error}
    return data


def _stable(x: jax.Array) -> jax.Array:
    """As `attend` does it: statistics in float32, the result in the type of the logits."""
    return softmax(x.astype(jnp.float32), jnp.ones(x.shape, bool)).astype(x.dtype)


def verdict(data: Data) -> Verdict:
    """Judge all types and sizes."""
    plain = min(min(data[dtype]["plain"]) for dtype in DTYPES)
    stable = min(min(data[dtype]["stable"]) for dtype in DTYPES)
    error = max(max(data[dtype]["error"]) for dtype in DTYPES)
    found = (
        f"At worst {100 * plain:.0f}% of rows are finite without it and {100 * stable:.0f}% with "
        f"it; its largest error is {error:.2f} units in the last place."
    )
    if stable < 1 or error > 4:
        return fails(found)
    return holds(found) if plain < 1 else undecided(found)


def figure(data: Data):
    """Draw the finite share of the plain softmax against the size of the logits."""
    series = {f"plain, {dtype}": data[dtype]["plain"] for dtype in DTYPES}
    series["stable, all types"] = [
        min(data[dtype]["stable"][n] for dtype in DTYPES) for n in range(len(SIZES))
    ]
    return lines(
        data["sizes"],
        series,
        xlabel="size of logits",
        ylabel="finite rows",
        xscale="log",
        ylim=(-0.03, 1.05),
    )
