"""A whole run: train every mechanism, measure it, and report; each part only if it is missing."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.command_line import show, terminal
from experiments.translate import figures, report, results, table, workdir
from experiments.translate.compile import Placement
from experiments.translate.config import Config
from experiments.translate.data import save_tokenizer
from experiments.translate.prepare import Run, check_fits, prepare
from experiments.translate.train import train
from experiments.translate.train_step import count_parameters
from experiments.translate.workdir import Record


def train_and_report(config: Config) -> Path:
    """Do the remaining work of a run, and return the path of its report.

    Raises:
      UsageError: the data or the folder cannot be used.
      Diverged: a loss or a parameter is not finite.
      Interrupted: the run was stopped; the same call resumes it.
    """
    console = terminal()
    workdir.check(config)
    run = prepare(config, console)
    for score in run.sizes:
        check_fits(score, run)
    with workdir.opened(config) as folder:
        save_tokenizer(folder, run.task.corpus, run.task.longest, config)
        describe(run)
        outcomes = [train_and_measure(score, run) for score in run.sizes]
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        summary = results.summarize(run, outcomes, stored["environment"])
        workdir.write_json(folder / "results.json", summary)
        log = {score: run.log.complete_records(score) for score in run.sizes}
        names = figures.draw_all(outcomes, log, folder / "figures")
        path = report.write(summary, outcomes, names, folder)
    table.show(console, summary)
    show(path.absolute())
    return path


def train_and_measure(score: str, run: Run) -> Record:
    """Train and measure one mechanism, or read its outcome if it has one."""
    path = run.outcome(score)
    if path.exists():
        run.log.complete_records(score)
        return results.read_outcome(path)
    trained = train(score, run)
    speed = results.speed(run.log.complete_records(score))
    with run.console.status(f"{score}: evaluating"):
        outcome = results.measure(score, run, trained)
    outcome |= speed
    path.parent.mkdir(exist_ok=True)
    workdir.write_sealed(path, outcome)
    return outcome


def describe(run: Run) -> None:
    """Print the data, the sizes and the folder of a run."""
    corpus = run.task.corpus
    parameters = ", ".join(
        f"{score} {count_parameters(score, size):,}" for score, size in run.sizes.items()
    )
    pairs = {"train": len(corpus.train)}
    pairs |= {name: len(examples.pairs) for name, examples in run.task.sets.items()}
    lines = [
        f"{corpus.name}: {', '.join(f'{count:,} {name}' for name, count in pairs.items())} pairs, "
        f"{len(corpus.source_vocabulary):,} and {len(corpus.target_vocabulary):,} words",
        *corpus.notices,
        f"parameters: {parameters}",
        f"folder: {run.folder}",
    ]
    if (count := len(Placement(run.config.batch_size).devices)) > 1:
        lines.append(f"each batch on {count} devices")
    for line in lines:
        run.console.print(line, soft_wrap=True)
