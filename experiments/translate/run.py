"""A whole run: train every mechanism, measure it, and report; each part only if it is missing."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from experiments import terminal
from experiments.command_line import show
from experiments.translate import (
    figures,
    fitting,
    history,
    kept,
    outcome,
    report,
    results,
    table,
    task,
    train,
    workdir,
)
from experiments.translate.budget import sizes_of
from experiments.translate.config import Config
from experiments.translate.devices import Placement
from experiments.translate.learning import count_parameters
from experiments.translate.model import Sizes
from experiments.translate.workdir import Log, Record


def run(config: Config) -> Path:
    """Do what is left to do of a run, and return the path of its report.

    Raises:
      UsageError: the data or the folder cannot be used.
      Diverged: a loss is not a number any more.
      Interrupted: the run was asked to stop; the same call goes on.
    """
    console = terminal.console()
    workdir.check(config)
    given = task.read(config)
    vocabularies = given.corpus.source_vocabulary, given.corpus.target_vocabulary
    sizes = sizes_of(config, *map(len, vocabularies))
    for score, size in sizes.items():
        fitting.check(score, size, config, given)
    with workdir.opened(config) as folder:
        kept.write(folder, given.corpus, given.longest, config)
        _describe(console, config, given, sizes)
        outcomes = [
            outcome_of(score, sizes[score], config, given, folder, console) for score in sizes
        ]
        host = json.loads((folder / "config.json").read_text(encoding="utf-8"))["environment"]
        summary = results.summarize(config, given, outcomes, host)
        workdir.write_json(folder / "results.json", summary)
        log = Log(folder / "metrics.jsonl")
        histories = {score: history.read(log, score) for score in sizes}
        names = figures.draw_all(outcomes, histories, folder / "figures")
        path = report.write(summary, outcomes, names, folder)
    table.show(console, summary)
    show(path.absolute())
    return path


def outcome_of(
    score: str, sizes: Sizes, config: Config, given: task.Task, folder: Path, console: Console
) -> Record:
    """Train and measure one mechanism, or read what was measured before."""
    path, log = folder / "outcomes" / f"{score}.json", Log(folder / "metrics.jsonl")
    if path.exists():
        history.read(log, score)
        return outcome.read(path)
    trained = train.train(score, sizes, config, given, folder, console)
    speed = outcome.speed(history.read(log, score))
    with console.status(f"{score}: evaluating"):
        measured = outcome.measure(score, sizes, trained, given, folder)
    measured |= speed
    path.parent.mkdir(exist_ok=True)
    workdir.write_json(path, measured)
    return measured


def _describe(console: Console, config: Config, given: task.Task, sizes: dict[str, Sizes]) -> None:
    corpus = given.corpus
    parameters = ", ".join(
        f"{score} {count_parameters(score, size):,}" for score, size in sizes.items()
    )
    pairs = {"train": len(corpus.train)} | {n: len(s.pairs) for n, s in given.sets.items()}
    lines = [
        f"{corpus.name}: {', '.join(f'{count:,} {name}' for name, count in pairs.items())} pairs, "
        f"{len(corpus.source_vocabulary):,} and {len(corpus.target_vocabulary):,} words",
        *corpus.notices,
        f"parameters: {parameters}",
        f"folder: {config.directory}",
    ]
    if (count := len(Placement(config.batch_size).devices)) > 1:
        lines.append(f"each batch on {count} devices")
    for line in lines:
        console.print(line, soft_wrap=True)
