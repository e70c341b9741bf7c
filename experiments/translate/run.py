"""A whole run: train every mechanism, measure it, and report; each part only if it is missing."""

from __future__ import annotations

import dataclasses
import functools
import json
import socket
import webbrowser
from pathlib import Path

import jax

from attention_jax.diagnostics import Explorer
from experiments.command_line import show, terminal
from experiments.translate import figures, looking, report, results, table, workdir
from experiments.translate.compile import Placement, check_divides
from experiments.translate.config import Config
from experiments.translate.data import save_tokenizer
from experiments.translate.environment import versions
from experiments.translate.marks import write_marked
from experiments.translate.prepare import Run, check_fits, prepare
from experiments.translate.stopping import Diverged, Interrupted
from experiments.translate.train import train
from experiments.translate.train_step import count_parameters
from experiments.translate.workdir import Record
from experiments.worker import by_first, check_equal, connected, together, told


def train_together(watcher: socket.socket, config: Config) -> None:
    """Do the remaining work of a run as one process of several.

    Args:
      watcher: of this process, from `experiments.worker.adopted`.
      config: the same in all processes, but for the number of the process.

    Raises:
      UsageError: also if the processes do not find each other, or differ in flags or data.
    """
    assert config.group is not None
    with connected(watcher, config.group, common=(Diverged, Interrupted)):
        flags = dataclasses.asdict(config) | {"process": None}
        named = {f"--{name}": value for name, value in flags.items()}
        check_equal("were started with different flags", named, "give all the same")
        remedy = "install the same in all"
        check_equal("run in different environments", versions(), remedy)
        train_and_report(config)


def train_and_report(config: Config) -> Path:
    """Do the remaining work of a run, and return the path of its report.

    Raises:
      UsageError: the data or the folder cannot be used.
      Diverged: a loss or a parameter is not finite.
      Interrupted: the run was stopped; the same call resumes it.
    """
    run = together(functools.partial(_prepared, config))
    if jax.process_count() > 1:
        data = {**run.task.corpus.files, "the hash of all batches": run.task.digest()}
        check_equal("read different data", data, "give all the same files")
        # The devices connect now, while no process lags behind in compiling.
        Placement(config.batch_size).largest(0)
    with workdir.opened(config) as folder:
        tokenizer = (folder, run.task.corpus, run.task.longest, config)
        by_first(functools.partial(save_tokenizer, *tokenizer))
        describe(run)
        outcomes = [train_and_measure(score, run) for score in run.sizes]
        path = folder / "report.html"
        if not workdir.is_first():
            return path
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        gaps = [sentence for score in run.sizes for sentence in run.gaps(score)]
        summary = results.summarize(run, outcomes, stored["environment"], gaps)
        write_marked(folder / "results.json", folder, summary)
        log = {score: run.log.complete_records(score) for score in run.sizes}
        names = figures.draw_all(outcomes, log, folder / "figures")
        path = report.write(summary, outcomes, names, folder, _explorer(run))
    table.show(run.console, summary)
    for sentence in gaps:
        run.console.print(sentence, soft_wrap=True)
    show(path.absolute())
    if config.open and not webbrowser.open(path.absolute().as_uri()):
        run.console.print("--open: no browser was found to show the report.")
    return path


def _explorer(run: Run) -> Explorer | None:
    """Return a page with what the translators look at, if that was kept."""
    looks = {score: run.looks.records(score) for score in run.sizes}
    pairs = looking.sentences(run.task).pairs
    return looking.explorer(looks, pairs, run.config.model == "transformer")


def _prepared(config: Config) -> Run:
    check_divides(config.batch_size)
    workdir.check(config)
    run = prepare(config, terminal(quiet=not workdir.is_first()))
    for score in run.sizes:
        check_fits(score, run)
    return run


def train_and_measure(score: str, run: Run) -> Record:
    """Train and measure one mechanism, or read its outcome if it has one.

    Of several processes only the first one returns all that was measured.
    """
    path = run.outcome(score)
    if told(path.exists()):
        if not workdir.is_first():
            return {}
        run.log.complete_records(score)
        return results.read_outcome(path, run.folder)
    trained = train(score, run)
    speed = results.speed(run.log.complete_records(score)) if workdir.is_first() else {}
    with run.console.status(f"{score}: evaluating"):
        outcome = results.measure(score, run, trained)
    outcome |= speed
    if not workdir.is_first():
        return outcome
    path.parent.mkdir(exist_ok=True)
    write_marked(path, run.folder, outcome)
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
        f"{len(corpus.source_vocabulary):,} and {len(corpus.target_vocabulary):,} "
        f"{'subwords' if run.config.has_subwords else 'words'}",
        *corpus.notices,
        f"parameters: {parameters}",
        f"folder: {run.folder}",
    ]
    if (count := len(Placement(run.config.batch_size).devices)) > 1:
        processes = jax.process_count()
        lines.append(
            f"each batch on {count} devices" + f" of {processes} processes" * (processes > 1)
        )
    for line in lines:
        run.console.print(line, soft_wrap=True)
