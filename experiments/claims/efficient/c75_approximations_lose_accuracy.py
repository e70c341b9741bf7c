"""Kernel and low-rank approximations of softmax attention lose accuracy.

Source: Choromanski et al. 2021, lemma 2; Wang et al. 2020; Katharopoulos et al. 2020.

Method: `experiments.approximation` on Gaussian rows of depth 16 and length 128: the relative error
of the context by FAVOR+, linear attention and Linformer, beside that of giving every query the
mean of all values, and the measured error of the kernel beside its formula.

Criterion: Holds if at unit standard deviation every approximation is more than 1% off; fails if
none is. Those that are worse than the mean of the values are named.
"""

from __future__ import annotations

import jax

from experiments import approximation
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, undecided
from experiments.claims.drawing import bars


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Run the experiment."""
    options = approximation.Options(
        length=setting.pick(tiny=32, quick=128, full=128),
        features=setting.pick(tiny=(16,), quick=(256,), full=(64, 256)),
        ranks=setting.pick(tiny=(8,), quick=(64,), full=(16, 64)),
        scales=setting.pick(tiny=(1.0,), quick=(0.5, 1.0), full=(0.25, 0.5, 1.0)),
        draws=setting.pick(tiny=3, quick=20, full=200),
    )
    return {"rows": [row._asdict() for row in approximation.measure(options)]}


def verdict(data: Data) -> Verdict:
    """Judge at the largest standard deviation."""
    scale = max(row["scale"] for row in data["rows"])
    rows = [row for row in data["rows"] if row["scale"] == scale]
    worse = [row["name"] for row in rows if row["context"] > row["baseline"]]
    kinds = ", ".join(dict.fromkeys(name.partition(",")[0] for name in worse))
    best = min(rows, key=lambda row: row["context"])
    found = (
        f"Relative errors at standard deviation {scale:g} from {best['context']:.2f} "
        f"({_name(best)}) to {max(row['context'] for row in rows):.2f}; the mean of the values "
        f"has {rows[0]['baseline']:.2f}. Worse than that are {len(worse)} of {len(rows)} settings"
        f"{f': of {kinds}' * bool(worse)}."
    )
    if all(row["context"] > 0.01 for row in rows):
        return holds(found)
    return fails(found) if all(row["context"] <= 0.01 for row in rows) else undecided(found)


def _name(row: Data) -> str:
    return row["name"] + (f", {row['size']}" if row["size"] else "")


def figure(data: Data):
    """Draw the errors at the largest standard deviation."""
    scale = max(row["scale"] for row in data["rows"])
    rows = [row for row in data["rows"] if row["scale"] == scale]
    errors = {_name(row): row["context"] for row in rows}
    return bars(
        errors,
        xlabel="relative error of the context",
        xscale="log",
        marks={"just the mean": rows[0]["baseline"]},
    )


def table(data: Data) -> list[list[str]]:
    """Show the measured error of the kernel beside its formula."""
    rows = [
        [
            f"{row['scale']:g}",
            _name(row),
            f"{row['context']:.2f}",
            f"{row['baseline']:.2f}",
            f"{row['measured']:.3g}",
            f"{row['theory']:.3g}",
        ]
        for row in data["rows"]
        if row["theory"] is not None
    ]
    return [
        ["std of q, k", "approximation", "error", "just the mean", "squared error", "its theory"],
        *rows,
    ]
