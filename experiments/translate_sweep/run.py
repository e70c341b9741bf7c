"""A whole sweep: do every run that is not done yet, then choose, compare and draw."""

from __future__ import annotations

import functools
import json
import time
from collections import defaultdict
from pathlib import Path

import jax
from rich.console import Console

from experiments import terminal
from experiments.command_line import show
from experiments.translate import fitting, kept, outcome, task, workdir
from experiments.translate import results as of_run
from experiments.translate.budget import sizes_of
from experiments.translate.config import Config, group_of
from experiments.translate.model import Sizes
from experiments.translate.run import outcome_of
from experiments.translate.train import Diverged
from experiments.translate.workdir import Record
from experiments.translate_sweep import figures, results, table, tidy
from experiments.translate_sweep.config import RATE, Cell, Sweep

# Fields outside of the group "Data" that what is learned depends on.
_OF_TASK = ("seeds", "steps", "batch_size", "buckets", "evaluate_every")
_KEPT = ("parameters", "sizes", "compile_seconds", "train_seconds", "tokens_per_second")


def run(sweep: Sweep) -> Path:
    """Do what is left to do of a sweep, and return the path of its results.

    Raises:
      UsageError: the data or the folder cannot be used.
      Interrupted: the sweep was asked to stop; the same call goes on.
    """
    console = terminal.console()
    workdir.check(sweep)
    cells = list(sweep.cells())
    _check(cells)
    given = _task(cells[0].config)
    with workdir.opened(sweep) as folder:
        records = _do_all(cells, console)
        summary = results.summarize(sweep, records)
        summary |= {
            "environment": json.loads((folder / "config.json").read_text("utf-8"))["environment"],
            "signatures": of_run.signatures(sweep.base.lowercase, given.corpus.at_spaces),
            "pairs": {name: len(of_set.pairs) for name, of_set in given.sets.items()},
        }
        others = tidy.others(folder, records)
        workdir.write_text(folder / "sweep.csv", tidy.table(summary, records, others))
        workdir.write_json(folder / "results.json", summary)
        figures.draw_all(summary, folder / "figures")
    table.show(console, summary)
    path = folder / "results.json"
    show(path.absolute())
    return path


def _check(cells: list[Cell]) -> None:
    """Refuse at once what would otherwise end the sweep when some of its runs are done.

    Raises:
      UsageError: the data, a score or a folder of any run cannot be used.
    """
    of_task: dict[Config, list[Cell]] = defaultdict(list)
    for cell in cells:
        workdir.check(cell.config)
        of_task[_config_of_task(cell.config)].append(cell)
    for together in of_task.values():
        for cell in together:
            given = _task(cell.config)
            kept.check_data(cell.config.directory, given.corpus)
            # With another learning rate the sizes are the same.
            if cell.rate == cells[0].rate:
                fitting.check(cell.score, _sizes(cell, given), cell.config, given)


def _do_all(cells: list[Cell], console: Console) -> list[Record]:
    before = [_found(cell) for cell in cells]
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


def _found(cell: Cell) -> Record | None:
    """Read what a run came to, if it is over: what was measured, or why it diverged."""
    folder = cell.config.directory
    measured, diverged = _files(cell)
    if diverged.exists():
        return {"folder": str(folder), **outcome.read(diverged)}
    if not measured.exists():
        return None
    found = outcome.read(measured)
    kept_of_it = {name: found[name] for name in _KEPT}
    return {"folder": str(folder), **kept_of_it, "metrics": of_run.measured(found)}


def _files(cell: Cell) -> tuple[Path, Path]:
    folder = cell.config.directory
    return folder / "outcomes" / f"{cell.score}.json", folder / "diverged.json"


def _done(cell: Cell, console: Console) -> Record:
    """Do a run, or the rest of one that was interrupted."""
    # Where there is no bar to show, a line for every validation would be too many.
    quiet = console if console.is_terminal else Console(quiet=True)
    given = _task(cell.config)
    sizes = _sizes(cell, given)
    workdir.check(cell.config)
    with workdir.opened(cell.config) as folder:
        kept.write(folder, given.corpus, given.longest, cell.config)
        try:
            outcome_of(cell.score, sizes, cell.config, given, folder, quiet)
        except Diverged as error:
            _, diverged = _files(cell)
            workdir.write_json(diverged, {"diverged": str(error)})
        finally:
            jax.clear_caches()
    found = _found(cell)
    assert found is not None
    return found


def _sizes(cell: Cell, given: task.Task) -> Sizes:
    vocabularies = given.corpus.source_vocabulary, given.corpus.target_vocabulary
    return sizes_of(cell.config, *map(len, vocabularies))[cell.score]


def _task(config: Config) -> task.Task:
    """Read what a run learns; runs that learn the same and follow each other share it."""
    return _read(_config_of_task(config))


def _config_of_task(config: Config) -> Config:
    needed = (f for f in vars(config) if group_of(f) == "Data" or f in _OF_TASK)
    return Config(**{name: getattr(config, name) for name in needed})


@functools.lru_cache(maxsize=1)
def _read(config: Config) -> task.Task:
    return task.read(config)


def _said(found: Record) -> str:
    if "diverged" in found:
        return f"diverged ({found['diverged'].split(';')[0]})"
    means = {name: results.mean(found["metrics"][name]) for name in ("valid_loss", "bleu")}
    return f"valid loss {means['valid_loss']:.3f}, BLEU {means['bleu']:.1f}"
