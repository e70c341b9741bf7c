"""Test the chosen claims one after the other, print and write the results."""

from __future__ import annotations

import contextlib
import functools
import json
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from attention_jax.diagnostics.plots import save
from experiments.claims import report
from experiments.claims.claim import SETTINGS, Claim, Setting, all_themes
from experiments.claims.command_line import Options
from experiments.claims.workdir import Cache, together, writable
from experiments.command_line import show, terminal
from experiments.files import write_json, write_text
from experiments.leases import Leases, State
from experiments.shards import dealt, shares
from experiments.translate.environment import environment
from experiments.translate.figures import style

Record = dict[str, Any]

FAILED = "failed"
_COLORS = {"holds": "green", "holds only if": "cyan", "does not hold": "red", FAILED: "bold red"}


def run(options: Options) -> int:
    """Test what is asked for, write the results, and return the exit code.

    Raises:
      UsageError: the folder is another program's, or cannot be written to.
    """
    folder, setting = writable(Path(options.workdir)), SETTINGS[options.setting]
    console, start = terminal(), time.perf_counter()
    records = _test_all(options, folder, console)
    failed = any(record["outcome"] == FAILED for record in records)
    if options.shard:
        show(_told(options, folder))
        return int(failed)
    results = {
        "setting": setting.name,
        "seconds": round(time.perf_counter() - start, 1),
        "environment": environment(),
        "claims": records,
    }
    write_json(folder / "results.json", results)
    path = report.write(results, folder)
    if options.out:
        out = Path(options.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        with_kept = joined(results, out.with_suffix(".json"))
        write_text(out, markdown(with_kept))
        # Without indentation, because there are many numbers.
        write_text(out.with_suffix(".json"), json.dumps(with_kept) + "\n")
    _show(console, results)
    show(path.absolute())
    return int(failed)


def _test_all(options: Options, folder: Path, console: Console) -> list[Record]:
    """Test the share of a shard, or else all; return the records in the order of the claims."""
    setting, leases = SETTINGS[options.setting], Leases(folder / "leases")
    groups = _groups(options)
    is_measured = functools.partial(_is_measured, folder, setting)
    records: dict[int, Record] = {}
    with Progress(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        say = functools.partial(progress.console.print, soft_wrap=True)
        own = sum(len(groups[name]) for name in shares(list(groups), options.shard)[0])
        bar = progress.add_task("", total=own)
        for group, lease in dealt(groups, options.shard, leases, is_measured, say):
            with lease or contextlib.nullcontext():
                for claim in group:
                    progress.update(bar, description=f"{claim.number}  {claim.claim[:60]}")
                    record = records[claim.number] = test(claim, setting, folder)
                    if lease and record["outcome"] == FAILED:
                        lease.state = State.FAILED
                    progress.advance(bar)
                    if not console.is_terminal:
                        say(_line(record))
    return [records[claim.number] for claim in options.chosen if claim.number in records]


def _groups(options: Options) -> dict[str, list[Claim]]:
    """Return the chosen claims, in groups that a process does together, by their lease's name."""
    groups = together(options.chosen)
    return {f"{name}-{options.setting}": group for name, group in groups.items()}


def _is_measured(folder: Path, setting: Setting, group: Sequence[Claim]) -> bool:
    cache = Cache(folder / "cache")
    return all(cache.has(claim, setting) for claim in group)


def _told(options: Options, folder: Path) -> str:
    """Return the last line of a shard."""
    setting, chosen = SETTINGS[options.setting], options.chosen
    left = sum(not _is_measured(folder, setting, [claim]) for claim in chosen)
    if left:
        return (
            f"shard {options.shard} is done; of {len(chosen)} claims {left} failed or are still at "
            "work in other processes"
        )
    return (
        f"shard {options.shard} is done, and all {len(chosen)} claims are measured; the same "
        "command without --shard writes the results"
    )


def test(claim: Claim, setting: Setting, folder: Path) -> Record:
    """Measure a claim, or read what was measured before, and judge and draw the data.

    An error is the outcome of this claim; the others are tested all the same.
    """
    record: Record = {
        name: getattr(claim, name)
        for name in ("number", "theme", "claim", "source", "method", "criterion", "published")
    }
    log = folder / "errors" / f"{claim.number}.txt"
    log.unlink(missing_ok=True)
    try:
        return record | _tested(claim, setting, folder)
    except Exception as error:
        write_text(_with_folder(log), traceback.format_exc())
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return record | {"outcome": FAILED, "because": f"{what} (see {log})", "verdict": FAILED}
    finally:
        jax.clear_caches()


def _tested(claim: Claim, setting: Setting, folder: Path) -> Record:
    module, cache = claim.load(), Cache(folder / "cache")
    found = cache.get(claim, setting)
    cached = found is not None
    if found is None:
        start = time.perf_counter()
        measured = module.measure(setting, jax.random.key(claim.number))
        # Round trip through JSON, so that new and cached data are the same.
        data = json.loads(json.dumps(measured))
        found = data, round(time.perf_counter() - start, 2)
        cache.put(claim, setting, *found)
    data, seconds = found
    verdict = module.verdict(data)
    name = claim.path.stem
    if hasattr(module, "figure"):
        with style():
            save(module.figure(data), _with_folder(folder / "figures" / name))
    return {
        "outcome": str(verdict.outcome),
        "verdict": str(verdict),
        "because": verdict.because,
        "table": module.table(data) if hasattr(module, "table") else None,
        "figure": name if hasattr(module, "figure") else None,
        "seconds": seconds,
        "cached": cached,
        "data": data,
    }


def joined(results: Record, held: Path) -> Record:
    """Return results with the claims of a file that were not tested now, as they are there.

    Each record then has the setting and the environment that it was `made` with.
    """
    tested = {record["number"] for record in results["claims"]}
    before = json.loads(held.read_text(encoding="utf-8")) if held.exists() else {"claims": []}
    kept = [record for record in before["claims"] if record["number"] not in tested]
    if not kept:
        return results
    records = [_as_made(record, before) for record in kept]
    records += [_as_made(record, results) for record in results["claims"]]
    themes = list(all_themes())
    records.sort(key=lambda record: (themes.index(record["theme"]), record["number"]))
    return {**results, "claims": records}


def _as_made(record: Record, results: Record) -> Record:
    return {"made": _made(results), **record}


def _made(results: Record) -> Record:
    return {name: results[name] for name in ("setting", "environment")}


def markdown(results: Record) -> str:
    """Write all verdicts as a table in Markdown."""
    lines = [
        "# Claims about attention, tested",
        "",
        f"{_made_by(results)} "
        "How each was tested, and what decides, is in its file in `experiments/claims/`.",
    ]
    for name, theme in all_themes().items():
        of_theme = [record for record in results["claims"] if record["theme"] == name]
        if of_theme:
            lines += ["", f"## {theme.title}", "", "| # | claim | verdict | because |"]
            lines.append("|---|---|---|---|")
        for record in of_theme:
            cells = (
                str(record["number"]),
                record["claim"],
                f"**{record['verdict']}**",
                record["because"],
            )
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _made_by(results: Record) -> str:
    """Return by what commands, and where, the claims were tested; first the one of most of them."""
    now, runs = _made(results), {}
    for record in results["claims"]:
        runs.setdefault(json.dumps(record.get("made", now)), []).append(record)
    first, *others = sorted(runs, key=lambda made: (-len(runs[made]), json.loads(made) == now))
    sentences = [f"Made by {_by(json.loads(first), results['claims'])} ({summary(results)})."]
    for made in others:
        sentences.append(f"Some of them by {_by(json.loads(made), runs[made])}.")
    return " ".join(sentences)


def _by(made: Record, claims: list[Record]) -> str:
    environment = made["environment"]
    return (
        f"`{report.command(made | {'claims': claims})}`, jax {environment['jax']} on "
        f"{environment['device']}, {environment['processors']} processors"
    )


def summary(results: Record) -> str:
    """Count the outcomes: "20 hold, 9 hold only if ..."."""
    counts = Counter(record["outcome"] for record in results["claims"])
    return ", ".join(f"{counts[outcome]} × {outcome}" for outcome in counts)


def _show(console: Console, results: Record) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title in ("#", "claim", "verdict", "because"):
        table.add_column(title, ratio={"claim": 3, "verdict": 2, "because": 5}.get(title))
    for record in results["claims"]:
        color = _COLORS.get(record["outcome"], "yellow")
        verdict = Text(record["verdict"], color)
        table.add_row(str(record["number"]), record["claim"], verdict, record["because"])
    console.print(table)
    console.print(f"{summary(results)}; {results['seconds']:.0f} s.")


def _line(record: Record) -> str:
    seconds = f"{record['seconds']:.1f} s" if "seconds" in record else "-"
    seconds = "as before" if record.get("cached") else seconds
    return f"{record['number']}  {record['verdict']}  ({seconds}): {record['claim']}"


def _with_folder(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
