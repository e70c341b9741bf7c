"""A whole sweep: do every run that is not done yet, then choose, compare and draw."""

from __future__ import annotations

import functools
import json
import time
from collections import defaultdict
from pathlib import Path

import jax
from rich.console import Console

from experiments.command_line import show, terminal
from experiments.translate import results as of_run
from experiments.translate import workdir
from experiments.translate.config import Config, group_of
from experiments.translate.data import Task, check_data, load_task, save_tokenizer
from experiments.translate.prepare import Run, check_fits, prepare
from experiments.translate.run import train_and_measure
from experiments.translate.train import Diverged
from experiments.translate.workdir import Record
from experiments.translate_sweep import figures, results, table
from experiments.translate_sweep.config import RATE, Cell, Sweep

# Fields outside of the group "Data" that what is learned depends on.
_OF_TASK = ("seeds", "steps", "batch_size", "buckets", "evaluate_every")
_KEPT = ("parameters", "sizes", "compile_seconds", "train_seconds", "tokens_per_second")


def run_sweep(sweep: Sweep) -> Path:
    """Do the remaining runs of a sweep, and return the path of its results.

    Raises:
      UsageError: the data or the folder cannot be used.
      Interrupted: the sweep was stopped; the same call resumes it.
    """
    console = terminal()
    workdir.check(sweep)
    cells = list(sweep.cells())
    _check(cells)
    task = _task(cells[0].config)
    with workdir.opened(sweep) as folder:
        records = _do_all(cells, console)
        summary = results.summarize(sweep, records)
        summary |= {
            "environment": json.loads((folder / "config.json").read_text("utf-8"))["environment"],
            "signatures": of_run.signatures(sweep.base.lowercase, task.corpus.at_spaces),
            "pairs": {name: len(of_set.pairs) for name, of_set in task.sets.items()},
        }
        others = table.other_rows(folder, records)
        workdir.write_text(folder / "sweep.csv", table.csv_table(summary, records, others))
        workdir.write_json(folder / "results.json", summary)
        figures.draw_all(summary, folder / "figures")
    table.show(console, summary)
    path = folder / "results.json"
    show(path.absolute())
    return path


def _check(cells: list[Cell]) -> None:
    """Check all runs before the first one starts.

    Raises:
      UsageError: the data, a score or a folder of any run cannot be used.
    """
    of_task: dict[Config, list[Cell]] = defaultdict(list)
    for cell in cells:
        workdir.check(cell.config)
        of_task[_config_of_task(cell.config)].append(cell)
    for together in of_task.values():
        for cell in together:
            check_data(cell.config.directory, _task(cell.config).corpus)
            # The sizes do not depend on the learning rate.
            if cell.rate == cells[0].rate:
                check_fits(cell.score, _run(cell))


def _do_all(cells: list[Cell], console: Console) -> list[Record]:
    before = [_outcome(cell) for cell in cells]
    missing = before.count(None)
    counted = f"{len(cells)} runs, {len(cells) - missing} of them done before"
    console.print(counted, soft_wrap=True)
    start, records, done = time.perf_counter(), [], 0
    for number, (cell, found) in enumerate(zip(cells, before, strict=True), 1):
        head = f"{number}/{len(cells)} {cell}"
        if found is None:
            console.print(f"{head}: training", soft_wrap=True)
            found = _done(cell, console)
            done += 1
            left = (time.perf_counter() - start) / done * (missing - done)
            said = f"{_said(found)}; {left / 60:.0f} min left"
        else:
            said = f"{_said(found)}; done before"
        console.print(f"{head}: {said}", soft_wrap=True)
        records.append({"score": cell.score, "point": cell.point, RATE: cell.rate, **found})
    return records


def _outcome(cell: Cell) -> Record | None:
    """Return the outcome of a run that is done: what was measured, or why it diverged."""
    folder = cell.config.directory
    measured, diverged = _files(cell)
    if diverged.exists():
        return {"folder": str(folder), **of_run.read_outcome(diverged)}
    if not measured.exists():
        return None
    found = of_run.read_outcome(measured)
    kept_of_it = {name: found[name] for name in _KEPT}
    return {"folder": str(folder), **kept_of_it, "metrics": of_run.measured(found)}


def _files(cell: Cell) -> tuple[Path, Path]:
    folder = cell.config.directory
    return folder / "outcomes" / f"{cell.score}.json", folder / "diverged.json"


def _done(cell: Cell, console: Console) -> Record:
    """Do a run, or what remains of an interrupted one."""
    # Outside of a terminal a line for every validation would be too much.
    quiet = console if console.is_terminal else Console(quiet=True)
    run = _run(cell, quiet)
    workdir.check(cell.config)
    with workdir.opened(cell.config) as folder:
        save_tokenizer(folder, run.task.corpus, run.task.longest, cell.config)
        try:
            train_and_measure(cell.score, run)
        except Diverged as error:
            _, diverged = _files(cell)
            workdir.write_json(diverged, {"diverged": str(error)})
        finally:
            jax.clear_caches()
    found = _outcome(cell)
    assert found is not None
    return found


def _run(cell: Cell, console: Console | None = None) -> Run:
    return prepare(cell.config, console, _task)


def _task(config: Config) -> Task:
    """Load the data of a run; successive runs with the same data share them."""
    return _loaded(_config_of_task(config))


def _config_of_task(config: Config) -> Config:
    needed = (f for f in vars(config) if group_of(f) == "Data" or f in _OF_TASK)
    return Config(**{name: getattr(config, name) for name in needed})


@functools.lru_cache(maxsize=1)
def _loaded(config: Config) -> Task:
    return load_task(config)


def _said(found: Record) -> str:
    if "diverged" in found:
        return f"diverged ({found['diverged'].split(';')[0]})"
    means = {name: results.mean(found["metrics"][name]) for name in ("valid_loss", "bleu")}
    return f"valid loss {means['valid_loss']:.3f}, BLEU {means['bleu']:.1f}"
