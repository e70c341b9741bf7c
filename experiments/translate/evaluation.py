"""How good the translators of one score are on one set: all that is measured, and its table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from experiments import terminal
from experiments.translate import evaluate, results, table
from experiments.translate.config import Config
from experiments.translate.evaluate import Examples, Weights, Words
from experiments.translate.programs import Programs
from experiments.translate.workdir import Record, write_json

COLUMNS = (
    ("loss", "loss", 3),
    ("exact_match", "exact match %", 1),
    ("token_accuracy", "token acc. %", 1),
    ("bleu", "BLEU", 1),
    ("chrf", "chrF", 1),
    ("alignment_error", "AER %", 1),
    ("sure_found", "sure found %", 1),
    ("possible_found", "possible found %", 1),
    ("links_wrong", "links wrong %", 1),
)


class Found(NamedTuple):
    """What was measured for each seed, the translations of each, and weights of the first."""

    measured: dict[str, list[float] | None]
    translations: list[list[Words]]
    weights: list[Weights]


def of_set(score: str, programs: Programs, parameters: Any, given: Examples) -> Found:
    """Translate and read a set of pairs, and measure both."""
    found = evaluate.translations(programs, parameters, given)
    links, weights = evaluate.attended(programs, parameters, given)
    measured = {
        **evaluate.quality(found, given.pairs),
        "loss": evaluate.losses(programs, parameters, given),
        **evaluate.alignment(links if score != "none" else [], given.pairs),
    }
    return Found(measured, found, weights)


def _decoding(config: Config) -> str:
    """Tell evaluations of one set apart that may find other translations."""
    if config.beam_size == 1:
        return ""
    return f"-beam{config.beam_size}-penalty{config.length_penalty:g}"


def report(
    config: Config, name: str, pairs: int, signatures: dict[str, str], records: Sequence[Record]
) -> Path:
    """Print the table of what was measured of each score, write it as JSON, return its path.

    The file keeps what was measured before of the run's other scores.
    """
    rows = [
        {
            "score": r["score"],
            "step": r["step"],
            **{k: results.summary(r[k]) for k, _, _ in COLUMNS},
        }
        for r in records
    ]
    columns = [column for column in COLUMNS if any(row[column[0]] for row in rows)]
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title in ("score", *(title for _, title, _ in columns)):
        shown.add_column(title, justify="left" if title == "score" else "right")
    for row in rows:
        cells = [table.cell(row[key], digits) for key, _, digits in columns]
        shown.add_row(row["score"], *(terminal.two_lines(*c) for c in cells))
    summary = {
        "set": name,
        "pairs": pairs,
        "config": config.identity,
        "signatures": signatures,
        "scores": rows,
    }
    about = f"{name}, {pairs:,} pairs, {table.decoding(summary)}. {table.over_seeds(summary)}."
    console = terminal.console()
    for part in (shown, about, f"BLEU {signatures['bleu']}", f"chrF {signatures['chrf']}"):
        console.print(part, soft_wrap=isinstance(part, str))
    path = config.directory / "evaluations" / f"{name}{_decoding(config)}.json"
    path.parent.mkdir(exist_ok=True)
    every = [*rows, *_other_rows(path, config.scores)]
    scores = {"scores": [row["score"] for row in every]}
    write_json(path, {**summary, "config": config.identity | scores, "scores": every})
    return path


def _other_rows(path: Path, scores: Sequence[str]) -> list[Record]:
    """Return what an evaluation before this one found of other scores."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["scores"]
        return [row for row in rows if row["score"] not in scores]
    except (OSError, ValueError, KeyError, TypeError):  # it is not there, or damaged
        return []
