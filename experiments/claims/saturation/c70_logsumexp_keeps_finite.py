"""Subtracting the maximum (log-sum-exp) keeps the softmax finite, whatever the logits.

Source: Standard numerical practice; Blanchard, Higham and Higham 2021.

Method: Logits of 64 keys of size 1 to 10000 in float16, bfloat16 and float32: the share of rows
that are finite of exp(x) / sum exp(x), and of the same after the maximum is subtracted; the
largest error of the latter against float64, beside that of exp(x - log sum exp x), which is
mathematically the same.

Criterion: Holds if every row of the stable softmax is finite and its error is within 4 units in
the last place of 1, while the plain one is not always finite.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax as exact_softmax

from experiments.claims.claim import Data, Setting, Verdict, fails, holds, undecided
from experiments.claims.drawing import lines

SIZES = (1.0, 10.0, 100.0, 1000.0, 10000.0)
DTYPES = ("float16", "bfloat16", "float32")


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure finite shares and errors by type and size."""
    rows = setting.pick(tiny=8, quick=256, full=1024)
    logits = jax.random.normal(rng, (rows, 64))
    data: Data = {"sizes": SIZES}
    for dtype in DTYPES:
        found = []
        for size in SIZES:
            x = (size * logits).astype(dtype)
            found.append(_measured(x, exact_softmax(np.asarray(x, np.float64), axis=1)))
        data[dtype] = {name: [of[name] for of in found] for name in found[0]}
    return data


def _measured(x: jax.Array, exact: np.ndarray) -> dict[str, float]:
    wide = x.astype(jnp.float32)  # statistics are float32, the result has the type of the logits
    plain = jnp.exp(x) / jnp.sum(jnp.exp(x), axis=1, keepdims=True)
    shifted = jax.nn.softmax(wide).astype(x.dtype)
    by_logsumexp = jnp.exp(wide - jax.nn.logsumexp(wide, axis=1, keepdims=True)).astype(x.dtype)

    def finite(y: jax.Array) -> float:
        return float(jnp.mean(jnp.isfinite(y).all(axis=1)))

    def error(y: jax.Array) -> float:
        wrong = np.abs(np.asarray(y, np.float64) - exact).max()
        return float(wrong / jnp.finfo(x.dtype).eps)

    return {
        "plain": finite(plain),
        "stable": min(finite(shifted), finite(by_logsumexp)),
        "error": error(shifted),
        "error by log-sum-exp": error(by_logsumexp),
    }


def verdict(data: Data) -> Verdict:
    """Judge all types and sizes."""
    plain = min(min(data[dtype]["plain"]) for dtype in DTYPES)
    stable = min(min(data[dtype]["stable"]) for dtype in DTYPES)
    error, other = (
        max(max(data[dtype][name]) for dtype in DTYPES)
        for name in ("error", "error by log-sum-exp")
    )
    found = (
        f"At worst {100 * plain:.0f}% of rows are finite without it and {100 * stable:.0f}% with "
        f"it, with errors of at most {error:.2f} units in the last place. Written as "
        f"exp(x - log sum exp x) it errs by up to {other:.3g}: as finite, less accurate."
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
