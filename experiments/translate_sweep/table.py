"""A sweep as tables: scores and differences in the terminal, and all runs of its folder as CSV."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from experiments.command_line import two_lines
from experiments.translate import table as run_table
from experiments.translate.workdir import Record
from experiments.translate_sweep.config import LISTED, RATE

_SECONDS = ("compile_seconds", "train_seconds")

Row = dict[str, Any]


def show(console: Console, results: Record) -> None:
    """Print everything."""
    signatures = results["signatures"]
    parts = [
        _mechanisms(results),
        f"Test set of {results['pairs']['test']:,} pairs, {run_table.decoding(results)}. "
        f"{run_table.over_seeds(results)}.",
        f"BLEU {signatures['bleu']}",
        f"chrF {signatures['chrf']}",
        *([_comparisons(results)] if results["comparisons"] else []),
        results["conclusion"],
    ]
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def _mechanisms(results: Record) -> Table:
    axes, columns = results["axes"], run_table.columns(results)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("score")
    for title in (*axes, "best rate", "parameters", *(title for _, title, _ in columns)):
        table.add_column(title, justify="right")
    for _, of_point in itertools.groupby(_in_order(results), key=lambda found: found["point"]):
        for found in of_point:
            point = [str(value) for value in found["point"].values()]
            if "metrics" not in found:
                table.add_row(found["score"], *point, "all diverged")
                continue
            cells = [run_table.cell(found["metrics"][name], digits) for name, _, digits in columns]
            table.add_row(
                found["score"],
                *point,
                f"{found[RATE]:g}",
                f"{found['parameters']:,}",
                *(two_lines(*c) for c in cells),
            )
        table.add_section()
    return table


def _in_order(results: Record) -> list[Record]:
    """Return what was found of every score at every point, in the order of the flags."""

    def place(found: Record) -> list[int]:
        values = zip(results["axes"].values(), found["point"].values(), strict=True)
        score = results["config"]["scores"].index(found["score"])
        return [*(of_axis.index(value) for of_axis, value in values), score]

    return sorted(results["mechanisms"] + results["diverged"], key=place)


def _comparisons(results: Record) -> Table:
    axes = results["axes"]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("difference in BLEU")
    for title in (*axes, "mean", "95% interval", "corrected p"):
        table.add_column(title, justify="right")
    table.add_column("conclusion")
    for found in results["comparisons"]:
        point = [str(value) for value in found["point"].values()]
        pair = f"{found['first']} - {found['second']}"
        table.add_row(pair, *point, *run_table.difference(found, results))
    return table


def rows_of_run(record: Record, config: Record) -> list[Row]:
    """Return the rows of sweep.csv, one for each seed, of a run that is not of this command.

    Args:
      record: of the run, as `results.summarize` takes them, with an empty point.
      config: the values of its flags.
    """
    shared = {name: config[name] for name in LISTED}
    return [_csv_row(record, seed, shared, set()) for seed in range(config["seeds"])]


def csv_table(results: Record, records: Sequence[Record], others: Sequence[Row] = ()) -> str:
    """Return a CSV table with a row for every score, point, learning rate and seed.

    Args:
      results: from `results.summarize`.
      records: of all runs, as passed to it.
      others: rows of other runs, which are not in the results.
    """
    rows = [*_csv_rows(results, records), *others]
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


def _csv_rows(results: Record, records: Sequence[Record]) -> list[Row]:
    chosen = {mechanism["folder"] for mechanism in results["mechanisms"]}
    shared = {name: results["config"][name] for name in LISTED}
    return [
        _csv_row(record, seed, shared, chosen)
        for record in records
        for seed in range(results["config"]["seeds"])
    ]


def _csv_row(record: Record, seed: int, shared: Row, chosen: set[str]) -> Row:
    metrics = record.get("metrics", {}).items()
    return {
        **shared,
        **record["point"],
        **{name: record.get(name) for name in ("score", RATE, "parameters", "folder", *_SECONDS)},
        "seed": seed,
        "chosen": str(record["folder"] in chosen).lower(),
        "diverged": str("diverged" in record).lower(),
        **{name: None if values is None else values[seed] for name, values in metrics},
    }


def _differs(name: str, rows: Sequence[Row]) -> bool:
    return any(row[name] != rows[0][name] for row in rows)
