"""Results as tables: of a run and of an evaluation in the terminal, and the cells of the report."""

from __future__ import annotations

from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from experiments.command_line import two_lines
from experiments.significance import seeds_needed, too_few_to_cover
from experiments.translate.workdir import Record

# The metrics in which the first two mechanisms are compared. Not all pairs of mechanisms: with five
# scores these were 40 tests, which need at least 11 seeds to show anything.
COMPARED = {
    "exact_match": "exact match on test (%)",
    "bleu": "BLEU on test",
    "valid_loss": "validation loss",
    "mean_exact_match": "mean exact match over training (%)",
}

# Key, title and digits of each column.
COLUMNS = (
    ("valid_loss", "valid loss", 3),
    ("exact_match", "exact match %", 1),
    ("token_accuracy", "token acc. %", 1),
    ("bleu", "BLEU", 1),
    ("chrf", "chrF", 1),
    ("alignment_error", "AER %", 1),
    ("steps_to_90", "steps to 90%", 0),
)
EVALUATION_COLUMNS = (
    ("loss", "loss", 3),
    ("exact_match", "exact match %", 1),
    ("token_accuracy", "token acc. %", 1),
    ("bleu", "BLEU", 1),
    ("chrf", "chrF", 1),
    ("chrf_plus_plus", "chrF++", 1),
    ("comet", "COMET", 1),
    ("alignment_error", "AER %", 1),
    ("sure_found", "sure found %", 1),
    ("possible_found", "possible found %", 1),
    ("links_wrong", "links wrong %", 1),
)


class Cell(NamedTuple):
    """A mean and its interval, as text."""

    value: str
    interval: str = ""


def columns(results: Record) -> list[tuple[str, str, int]]:
    """Return key, title and digits of the columns for which anything was measured.

    Without gold alignments there is no alignment error; if no seed reached 90%, no steps to 90%.
    """

    def known(name: str) -> bool:
        found = (mechanism["metrics"][name] for mechanism in results["mechanisms"])
        return any(f and any(value is not None for value in f["values"]) for f in found)

    return [column for column in COLUMNS if known(column[0])]


def header(results: Record) -> list[str]:
    """Return the names of the columns."""
    return ["score", "parameters", *(title for _, title, _ in columns(results)), "tokens/s"]


def over_seeds(results: Record) -> str:
    """Say over which seeds the numbers of a row are taken."""
    seeds = results["config"]["seeds"]
    if "ensemble" in results:
        return "The mean of probabilities, so that there is no interval"
    if seeds == 1:
        return "One seed, so that there is no interval"
    note = too_few_to_cover(seeds)
    return f"Mean and 95% bootstrap interval over {seeds} seeds" + (f"; {note}" if note else "")


def decoding(results: Record) -> str:
    """Say how translations were found."""
    size, penalty = (results["config"][name] for name in ("beam_size", "length_penalty"))
    return "greedy decoding" if size == 1 else f"beam of {size}, length penalty {penalty:g}"


def rows(results: Record) -> list[list[Cell]]:
    """Return a row of cells for each mechanism."""
    return [
        [
            Cell(mechanism["score"]),
            Cell(f"{mechanism['parameters']:,}"),
            *(cell(mechanism["metrics"][name], digits) for name, _, digits in columns(results)),
            Cell(f"{mechanism['tokens_per_second'] / 1000:.0f}k"),
        ]
        for mechanism in results["mechanisms"]
    ]


def compared_header(results: Record) -> list[str]:
    """Return the names of the columns of `compared`."""
    first, second = (results["comparisons"][0][which] for which in ("first", "second"))
    return [f"{first} - {second}", "difference", "95% interval", "p", "conclusion"]


def compared(results: Record) -> list[list[str]]:
    """Return a row for each metric in which the first two mechanisms are compared."""
    return [
        [COMPARED[found["metric"]], *difference(found, results)] for found in results["comparisons"]
    ]


def difference(found: Record, results: Record) -> list[str]:
    """Return the mean of a difference, its interval, its p, and what it shows, as text."""
    mean, *bounds = (found["difference"][which] for which in ("mean", "low", "high"))
    interval = "–" if None in bounds else " to ".join(f"{bound:+.3g}" for bound in bounds)
    p_value = "–" if found["p_value"] is None else f"{found['p_value']:.2g}"
    return [f"{mean:+.3g}", interval, p_value, _shown(found, results)]


def _shown(found: Record, results: Record) -> str:
    if found["conclusive"]:
        higher = found["first"] if found["difference"]["mean"] > 0 else found["second"]
        return f"{higher} is higher"
    seeds = results["config"]["seeds"]
    if seeds >= seeds_needed(comparisons=len(results["comparisons"])):
        return "no difference shown"
    return "one seed is too few" if seeds == 1 else f"{seeds} seeds are too few"


def show(console: Console, results: Record) -> None:
    """Print the table, and what it does and does not say."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for number, title in enumerate(header(results)):
        table.add_column(title, justify="left" if number == 0 else "right")
    for row in rows(results):
        table.add_row(*(two_lines(*c) for c in row))
    signatures = results["signatures"]
    parts = [
        table,
        f"Test set of {results['data']['pairs']['test']:,} pairs, {decoding(results)}. "
        f"{over_seeds(results)}.",
        f"BLEU {signatures['bleu']}",
        f"chrF {signatures['chrf']}",
        *(_on_extra(results, name) for name in results["mechanisms"][0]["extra"]),
    ]
    if results["comparisons"]:
        table = Table(*compared_header(results), box=box.SIMPLE_HEAD, pad_edge=False)
        for row in compared(results):
            table.add_row(*row)
        parts += [table, results["comparisons"][0]["sentence"]]
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def _on_extra(results: Record, name: str) -> str:
    cells = [(m["score"], cell(m["extra"][name]["exact_match"], 1)) for m in results["mechanisms"]]
    found = ", ".join(
        f"{score} {c.value}" + (f" ({c.interval})" if c.interval else "") for score, c in cells
    )
    return f"{name}, {results['data']['pairs'][name]:,} pairs: exact match % {found}"


def cell(summary: Record | None, digits: int) -> Cell:
    """Return a mean and its interval over seeds as text."""
    if summary is None:
        return Cell("–")
    if summary["mean"] is None:
        reached = sum(value is not None for value in summary["values"])
        return Cell("–", f"{reached} of {len(summary['values'])} seeds")
    value = f"{summary['mean']:.{digits}f}"
    if summary["low"] is None:
        return Cell(value)
    return Cell(value, f"{summary['low']:.{digits}f}–{summary['high']:.{digits}f}")


def show_evaluation(console: Console, evaluation: Record) -> None:
    """Print what one evaluation measured of each score."""
    rows = evaluation["scores"]
    columns = [column for column in EVALUATION_COLUMNS if any(row.get(column[0]) for row in rows)]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title in ("score", *(title for _, title, _ in columns)):
        table.add_column(title, justify="left" if title == "score" else "right")
    for row in rows:
        cells = [cell(row.get(key), digits) for key, _, digits in columns]
        table.add_row(row["score"], *(two_lines(*c) for c in cells))
    signatures = evaluation["signatures"]
    parts = [
        table,
        f"{evaluation['set']}, {evaluation['pairs']:,} pairs, {decoding(evaluation)}. "
        f"{over_seeds(evaluation)}.",
        f"BLEU {signatures['bleu']}",
        f"chrF {signatures['chrf']}",
    ]
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))
