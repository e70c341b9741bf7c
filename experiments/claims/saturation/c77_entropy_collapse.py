"""Attention entropy collapses before training diverges, and a norm of queries and keys prevents it.

Source: Zhai et al. 2023, sections 1 and 3; for the norm Henry et al. 2020 and Dehghani et al. 2023,
section 2.

Method: Encoders of two layers learn to sort 12 symbols by Adam, at six learning rates of which the
largest are far too large, with and without an RMS norm of queries and keys. At every step the loss
of the batch is noted, and the mean entropy of the weights in the layer where it is least, as a
share of log 12; both are averaged over five steps. A run diverges where its loss first is 1.5 times
that of guessing, or no number; its entropy collapses where it first is below a quarter. Runs that
do not diverge are the control: entropy may collapse in them as well.

Criterion: Collapse comes first if, over seeds without the norm, the interval of the share of
diverging runs in which it came before lies above one half, and that share is conclusively higher
than the share of other runs with a collapse; it does not if the interval lies below one half. The
norm prevents divergence if conclusively fewer than half as many runs diverge with it, and does not
if conclusively more than half as many do. Holds if both are so, only in part if one is, fails if
neither is; undecided if a seed has no run that diverges or none that does not.
"""

from __future__ import annotations

import math

import jax
import numpy as np
from flax import nnx

from experiments.claims import watching
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, holds_only_if, undecided
from experiments.claims.drawing import lines
from experiments.claims.evidence import higher, shown
from experiments.claims.tagging import SYMBOLS
from experiments.significance import interval

RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
ARMS = {"plain": None, "norm": nnx.RMSNorm}
DIVERGED, COLLAPSED = 1.5 * math.log(SYMBOLS), 0.25


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Note loss, entropy and largest logit by arm, rate, seed and five steps."""
    rates = setting.pick(tiny=(1e-2, 1.0), quick=RATES, full=RATES)
    seeds = jax.random.split(rng, setting.pick(tiny=2, quick=6, full=8))
    steps = setting.pick(tiny=10, quick=200, full=400)
    found = {name: watching.sorting(norm, rates, seeds, steps) for name, norm in ARMS.items()}
    return {"rates": rates, "steps": watching.TOGETHER, **found}


def shares(data: Data) -> dict[str, list[float]]:
    """Return shares of the runs of each seed: that diverge, and in which entropy collapses.

    Of a seed without runs of a kind the share is -1.
    """
    ends = {name: _first(np.asarray(data[name]["loss"]) >= DIVERGED) for name in ARMS}
    at, collapse = ends["plain"], _first(np.asarray(data["plain"]["entropy"]) < COLLAPSED)
    first, calm = [], []
    for seed in range(at.shape[1]):
        diverges = at[:, seed] < np.inf
        before, ever = (collapse < at)[diverges, seed], (collapse < np.inf)[~diverges, seed]
        first.append(float(before.mean()) if before.size else -1.0)
        calm.append(float(ever.mean()) if ever.size else -1.0)
    of_arms = {f"diverged, {n}": np.mean(end < np.inf, axis=0).tolist() for n, end in ends.items()}
    return {"collapsed first": first, "collapsed, calm": calm, **of_arms}


def _first(is_so: np.ndarray) -> np.ndarray:
    """Return the first place on the last axis where it is so, infinity where there is none."""
    return np.where(is_so.any(axis=-1), is_so.argmax(axis=-1), np.inf)


def verdict(data: Data) -> Verdict:
    """Judge what comes first, then what the norm prevents."""
    first, calm, plain, norm = shares(data).values()
    largest = max(max(map(max, of_rate)) for of_rate in data["plain"]["largest logit"])
    found = (
        f"Of all runs {shown(plain)} diverge without the norm, {shown(norm)} with it. Without it "
        f"entropy collapsed before in {shown(first)} of those that diverge, and in {shown(calm)} "
        f"of the others; logits reach {largest:.3g}."
    )
    if min(*first, *calm) < 0:
        return undecided(found)
    precedes = _decided(
        interval(first).low > 0.5 and higher(first, calm), interval(first).high < 0.5
    )
    twice = [2 * share for share in norm]
    prevents = _decided(higher(plain, twice), higher(twice, plain))
    if None in (precedes, prevents):
        return undecided(found)
    if precedes and prevents:
        return holds(found)
    if precedes:
        return holds_only_if("nothing is said of the norm, which does not prevent it", found)
    if prevents:
        return holds_only_if("nothing is said of entropy, which does not collapse first", found)
    return fails(found)


def _decided(is_so: bool, is_not: bool) -> bool | None:
    return is_so if is_so or is_not else None


def figure(data: Data):
    """Draw the entropy of the plain runs at every rate."""
    entropies = dict(zip(data["rates"], data["plain"]["entropy"], strict=True))
    series = {f"rate {rate:g}": np.transpose(of).tolist() for rate, of in entropies.items()}
    count = len(next(iter(series.values())))
    return lines(
        [data["steps"] * (n + 1) for n in range(count)],
        series,
        xlabel="step",
        ylabel="least entropy of a layer / log 12",
        marks={"collapse": COLLAPSED},
    )


def table(data: Data) -> list[list[str]]:
    """Show by rate how many runs diverge, and how far the loss gets."""
    rows = [
        ["learning rate", *(f"{what}, {name}" for name in ARMS for what in ("diverged", "loss"))]
    ]
    for number, rate in enumerate(data["rates"]):
        row = [f"{rate:g}"]
        for name in ARMS:
            losses = data[name]["loss"][number]
            diverged = sum(max(loss) >= DIVERGED for loss in losses)
            row += [f"{diverged} of {len(losses)}", shown([loss[-1] for loss in losses])]
        rows.append(row)
    return rows
