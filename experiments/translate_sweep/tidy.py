"""The tidy table of a sweep: a row for every score, point, learning rate and seed.

It has all runs of its folder, also those that other commands asked for.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.translate.workdir import Record
from experiments.translate_sweep.config import LISTED, RATE

_SECONDS = ("compile_seconds", "train_seconds")

Row = dict[str, Any]


def others(folder: Path, records: Sequence[Record]) -> list[Row]:
    """Return the rows of the runs in the folder of a sweep that are none of these records."""
    path = folder / "sweep.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("folder")]
    now = {Path(record["folder"]).name for record in records}
    names = {Path(row["folder"]).name for row in rows} - now
    fields = {name: _fields(folder / "runs" / name) for name in names}
    return [
        {**row, **found, "chosen": "false"}
        for row in rows
        if (found := fields.get(Path(row["folder"]).name))
    ]


def _fields(run: Path) -> Row:
    """Return what may be swept of the configuration of a run; nothing if the run is gone."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))["config"]
        return {name: config[name] for name in LISTED}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def table(results: Record, records: Sequence[Record], earlier: Sequence[Row] = ()) -> str:
    """Return the table as CSV; what was not measured is empty.

    Args:
      results: from `results.summarize`.
      records: of all runs, as they were given to it.
      earlier: rows of other runs, of which the results say nothing.
    """
    rows = [*_rows(results, records), *earlier]
    listed = [name for name in LISTED if name != RATE]
    axes = [name for name in listed if name in results["axes"] or _differs(name, rows)]
    first = ("score", *axes, RATE, "seed", "chosen", "diverged", "parameters")
    last = (*_SECONDS, "folder")
    measured = dict.fromkeys(name for row in rows for name in row)
    names = [name for name in measured if name and name not in (*first, *last, *LISTED)]
    text = io.StringIO()
    written = csv.DictWriter(
        text, (*first, *names, *last), extrasaction="ignore", lineterminator="\n"
    )
    written.writeheader()
    written.writerows(rows)
    return text.getvalue()


def _rows(results: Record, records: Sequence[Record]) -> list[Row]:
    chosen = {mechanism["folder"] for mechanism in results["mechanisms"]}
    shared = {name: results["config"][name] for name in LISTED}
    return [
        {
            **shared,
            **record["point"],
            **{name: record.get(name) for name in ("score", RATE, "parameters", "folder")},
            **{name: record.get(name) for name in _SECONDS},
            "seed": seed,
            "chosen": str(record["folder"] in chosen).lower(),
            "diverged": str("diverged" in record).lower(),
            **{
                name: None if values is None else values[seed]
                for name, values in record.get("metrics", {}).items()
            },
        }
        for record in records
        for seed in range(results["config"]["seeds"])
    ]


def _differs(name: str, rows: Sequence[Row]) -> bool:
    return any(row[name] != rows[0][name] for row in rows)
