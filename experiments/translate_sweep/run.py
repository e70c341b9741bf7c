"""A whole sweep: train every run that is missing, then choose, compare and draw."""

from __future__ import annotations

import functools
import json
import time
from collections import defaultdict
from pathlib import Path

import jax
from rich.console import Console

from experiments import files
from experiments.command_line import show, terminal
from experiments.leases import Leases, visible
from experiments.shards import Shard, dealt, shares
from experiments.translate import results as run_results
from experiments.translate import workdir
from experiments.translate.config import Config, group_of
from experiments.translate.data import Task, check_data, load_task, save_tokenizer
from experiments.translate.marks import write_marked
from experiments.translate.prepare import Run, check_fits, prepare
from experiments.translate.run import train_and_measure
from experiments.translate.stopping import Diverged
from experiments.translate.workdir import Record
from experiments.translate_sweep import figures, results, table
from experiments.translate_sweep.config import RATE, Sweep, Trial

# Fields outside of the group "Data" that determine the batches.
_BATCH_FIELDS = (
    "seeds",
    "steps",
    "batch_size",
    "buckets",
    "evaluate_every",
    "guided_alignment",
)
_KEPT = ("parameters", "sizes", "compile_seconds", "train_seconds", "tokens_per_second")


def run_sweep(sweep: Sweep) -> None:
    """Do the remaining runs of a sweep and write its results, or do a share of the runs.

    Raises:
      UsageError: the data or the folder cannot be used.
      Interrupted: the sweep was stopped; the same call resumes it.
    """
    console = terminal()
    workdir.check(sweep)
    trials = list(sweep.trials())
    _check(trials)
    task = _task(trials[0].config)
    if sweep.shard:
        _run(trials, workdir.shared(sweep), console, sweep.shard)
        show(_told(sweep.shard, trials))
        return
    with workdir.opened(sweep) as folder:
        records = _run(trials, folder, console)
        summary = results.summarize(sweep, records)
        summary |= {
            "environment": json.loads((folder / "config.json").read_text("utf-8"))["environment"],
            "signatures": run_results.signatures(
                task.sets["test"].pairs, sweep.base.lowercase, task.corpus.at_spaces
            ),
            "pairs": {name: len(of_set.pairs) for name, of_set in task.sets.items()},
        }
        others = _other_rows(folder, records)
        files.write_text(folder / "sweep.csv", table.csv_table(summary, records, others))
        files.write_json(folder / "results.json", summary)
        figures.draw_all(summary, folder / "figures")
    table.show(console, summary)
    path = folder / "results.json"
    show(path.absolute())


def _other_rows(folder: Path, records: list[Record]) -> list[table.Row]:
    """Return the rows of sweep.csv of the runs in the folder that are not among these records.

    They are read from the sealed files of the runs, not from the table, which anybody may edit.
    """
    now, rows = {Path(record["folder"]).name for record in records}, []
    for path in sorted(folder.glob("runs/*/config.json")):
        run = path.parent
        if run.name in now:
            continue
        config = workdir.read_json(path, folder, workdir.LOST)["config"]
        (score,) = config["scores"]
        files = _files(run, score)
        if any(file.exists() for file in files):
            about = {"score": score, "point": {}, RATE: config[RATE]}
            rows += table.rows_of_run(about | _outcome(run, score), config)
    return rows


def _check(trials: list[Trial]) -> None:
    """Check all trials before the first one starts.

    Raises:
      UsageError: the data, a score or a folder of any run cannot be used.
    """
    of_task: dict[Config, list[Trial]] = defaultdict(list)
    for trial in trials:
        workdir.check(trial.config)
        of_task[_task_config(trial.config)].append(trial)
    for sharing in of_task.values():
        for trial in sharing:
            check_data(trial.config.directory, _task(trial.config).corpus)
            # The sizes do not depend on the learning rate.
            if trial.rate == trials[0].rate:
                check_fits(trial.score, _prepared(trial))


def _run(
    trials: list[Trial], folder: Path, console: Console, shard: Shard | None = None
) -> list[Record]:
    """Do what is missing, and return what was done; without a shard, that of all trials in order.

    Args:
      trials: of the sweep.
      folder: of the sweep, where other processes may do other trials.
      console: where progress is shown.
      shard: the share to do.
    """
    missing = [trial for trial in trials if not _is_done(trial)]
    counted = f"{len(trials)} runs, {len(trials) - len(missing)} of them done before"
    console.print(counted, soft_wrap=True)
    named = {trial.config.directory.name: trial for trial in trials}
    own = [named[name] for name in shares(list(named), shard)[0]]
    start, records, trained = time.perf_counter(), {}, 0

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    for trial, lease in dealt(named, shard, Leases(folder / "leases"), _is_done, say):
        number = trials.index(trial)
        head = f"{number + 1}/{len(trials)} {trial}"
        if lease is None:
            found = _outcome(trial.config.directory, trial.score)
            text = f"{_described(found)}; done {'elsewhere' if trial in missing else 'before'}"
        else:
            say(f"{head}: training")
            with lease:
                found = _train(trial, console, lease.orphaned)
            trained += 1
            text = _described(found)
            if trial in own:
                left = (time.perf_counter() - start) / trained * sum(not _is_done(t) for t in own)
                text += f"; {left / 60:.0f} min left"
        say(f"{head}: {text}")
        about = {"score": trial.score, "point": trial.point, RATE: trial.rate}
        records[number] = about | found
    return [records[number] for number in sorted(records)]


def _told(shard: Shard, trials: list[Trial]) -> str:
    """Return the last line of a shard."""
    left = sum(not _is_done(trial) for trial in trials)
    if left:
        return (
            f"shard {shard} is done; of {len(trials)} runs {left} are still at work in other "
            "processes"
        )
    return (
        f"shard {shard} is done, and so are all {len(trials)} runs; the same command without "
        "--shard writes the results"
    )


def _is_done(trial: Trial) -> bool:
    return any(visible(path) for path in _files(trial.config.directory, trial.score))


def _outcome(folder: Path, score: str) -> Record:
    """Return the outcome of a trial that is done: its metrics, or why it diverged."""
    measured, diverged = _files(folder, score)
    if diverged.exists():
        return {"folder": str(folder), **run_results.read_outcome(diverged, folder)}
    found = run_results.read_outcome(measured, folder)
    kept = {name: found[name] for name in _KEPT}
    return {"folder": str(folder), **kept, "metrics": run_results.measured(found)}


def _files(folder: Path, score: str) -> tuple[Path, Path]:
    return folder / "outcomes" / f"{score}.json", folder / "diverged.json"


def _train(trial: Trial, console: Console, orphaned: bool) -> Record:
    """Train and measure a trial, from where it was interrupted.

    Args:
      trial: what is trained.
      console: where progress is shown.
      orphaned: see `workdir.opened`.
    """
    # Outside of a terminal a line for every validation would be too much.
    quiet = console if console.is_terminal else Console(quiet=True)
    run = _prepared(trial, quiet)
    workdir.check(trial.config)
    with workdir.opened(trial.config, orphaned=orphaned) as folder:
        save_tokenizer(folder, run.task.corpus, run.task.longest, trial.config)
        try:
            train_and_measure(trial.score, run)
        except Diverged as error:
            _, diverged = _files(folder, trial.score)
            write_marked(diverged, folder, {"diverged": str(error)})
        finally:
            jax.clear_caches()
    return _outcome(trial.config.directory, trial.score)


def _prepared(trial: Trial, console: Console | None = None) -> Run:
    return prepare(trial.config, console, _task)


def _task(config: Config) -> Task:
    """Load the data of a run; successive runs with the same data share them."""
    return _loaded(_task_config(config))


def _task_config(config: Config) -> Config:
    needed = (f for f in vars(config) if group_of(f) == "Data" or f in _BATCH_FIELDS)
    return Config(**{name: getattr(config, name) for name in needed})


@functools.lru_cache(maxsize=1)
def _loaded(config: Config) -> Task:
    return load_task(config)


def _described(found: Record) -> str:
    if "diverged" in found:
        return f"diverged ({found['diverged'].split(';')[0]})"
    means = {name: results.mean(found["metrics"][name]) for name in ("valid_loss", "bleu")}
    return f"valid loss {means['valid_loss']:.3f}, BLEU {means['bleu']:.1f}"
