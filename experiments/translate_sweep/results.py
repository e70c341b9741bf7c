"""The results of a sweep as JSON: the best learning rate of each score at each point, and tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import significance
from experiments.translate import results as run_results
from experiments.translate.report import command
from experiments.translate.workdir import Record
from experiments.translate_sweep.conclusion import conclude
from experiments.translate_sweep.config import RATE, Point, Sweep, shown

# The metric of the comparisons. Only one: further ones would make every test weaker.
COMPARED, WORDS = "bleu", "BLEU on test"


def summarize(sweep: Sweep, records: Sequence[Record]) -> Record:
    """Choose, compare and conclude.

    Args:
      sweep: that was done.
      records: of its runs: `score`, `point`, `learning_rate`, and either `metrics` with a value
        of each seed, or `diverged` with a sentence.

    Returns:
      Everything that table and figures show.
    """
    mechanisms, diverged = [], []
    for point in sweep.points:
        for score in sweep.base.scores:
            of_rates = [r for r in records if (r["score"], r["point"]) == (score, point)]
            best = choose(of_rates)
            if best is None:
                diverged.append({"score": score, "point": point})
            else:
                mechanisms.append(_mechanism(best, of_rates))
    summary = {
        "command": command(sweep.flags, "experiments.translate_sweep"),
        "config": sweep.base.identity | {name: list(v) for name, v in sweep.values.items()},
        "axes": {name: list(values) for name, values in sweep.axes.items()},
        "rates": list(sweep.rates),
        "mechanisms": mechanisms,
        "diverged": diverged,
        "comparisons": compare(mechanisms, sweep.points),
    }
    return summary | {"conclusion": conclude(summary)}


def choose(of_rates: Sequence[Record]) -> Record | None:
    """Return the run with the lowest mean validation loss over seeds, if one did not diverge."""
    finished = [record for record in of_rates if "diverged" not in record]
    return min(finished, key=lambda record: mean(record["metrics"]["valid_loss"]), default=None)


def compare(mechanisms: Sequence[Record], points: Sequence[Point]) -> list[Record]:
    """Test every pair of scores at every point, corrected for all tests of the sweep."""
    families: dict[str, dict[str, list[float]]] = {}
    of_family: dict[str, Point] = {}
    for point in points:
        here = [m for m in mechanisms if m["point"] == point]
        if len(here) > 1:
            family = f"{WORDS} at {shown(point)}" if point else WORDS
            families[family] = {m["score"]: m["metrics"][COMPARED]["values"] for m in here}
            of_family[family] = point
    return [
        {"point": of_family[family], **run_results.without_nan(dataclasses.asdict(found))}
        for family, comparisons in significance.compare_families(families).items()
        for found in comparisons
    ]


def mean(values: Any) -> float:
    """Return the mean over seeds."""
    return float(np.mean(values))


def _mechanism(best: Record, of_rates: Sequence[Record]) -> Record:
    rates = [{RATE: record[RATE], **_validated(record)} for record in of_rates]
    return {
        **{name: value for name, value in best.items() if name != "metrics"},
        "metrics": {name: run_results.summary(values) for name, values in best["metrics"].items()},
        "rates": rates,
    }


def _validated(record: Record) -> Record:
    if "diverged" in record:
        return {"valid_loss": None, "diverged": record["diverged"]}
    return {"valid_loss": run_results.summary(record["metrics"]["valid_loss"])}
