"""A sweep in the terminal: the scores at each point, how they differ, and what that says."""

from __future__ import annotations

import itertools

from rich import box
from rich.console import Console
from rich.table import Table

from experiments.terminal import two_lines
from experiments.translate import table as of_run
from experiments.translate.workdir import Record
from experiments.translate_sweep.config import RATE


def show(console: Console, results: Record) -> None:
    """Print everything."""
    signatures = results["signatures"]
    parts = [
        _mechanisms(results),
        f"Test set of {results['pairs']['test']:,} pairs, {of_run.decoding(results)}. "
        f"{of_run.over_seeds(results)}.",
        f"BLEU {signatures['bleu']}",
        f"chrF {signatures['chrf']}",
        *([_comparisons(results)] if results["comparisons"] else []),
        results["conclusion"],
    ]
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def _mechanisms(results: Record) -> Table:
    axes, columns = results["axes"], of_run.columns(results)
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
            cells = [of_run.cell(found["metrics"][name], digits) for name, _, digits in columns]
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
        table.add_row(pair, *point, *of_run.difference(found, results))
    return table
