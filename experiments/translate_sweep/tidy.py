"""The tidy table of a sweep: a row for every score, point, learning rate and seed."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from experiments.translate.workdir import Record
from experiments.translate_sweep.config import RATE

_SECONDS = ("compile_seconds", "train_seconds")


def table(results: Record, records: Sequence[Record]) -> str:
    """Return the table as CSV; what was not measured is empty.

    Args:
      results: from `results.summarize`.
      records: of all runs, as they were given to it.
    """
    chosen = {mechanism["folder"] for mechanism in results["mechanisms"]}
    names = list(dict.fromkeys(name for record in records for name in record.get("metrics", ())))
    first = ("score", *results["axes"], RATE, "seed", "chosen", "diverged", "parameters")
    text = io.StringIO()
    rows = csv.DictWriter(text, (*first, *names, *_SECONDS, "folder"), lineterminator="\n")
    rows.writeheader()
    for record in records:
        for seed in range(results["config"]["seeds"]):
            of_seed = {
                name: None if values is None else values[seed]
                for name, values in record.get("metrics", {}).items()
            }
            rows.writerow(
                {
                    **record["point"],
                    **{name: record.get(name) for name in ("score", RATE, "parameters", "folder")},
                    **{name: record.get(name) for name in _SECONDS},
                    "seed": seed,
                    "chosen": str(record["folder"] in chosen).lower(),
                    "diverged": str("diverged" in record).lower(),
                    **of_seed,
                }
            )
    return text.getvalue()
