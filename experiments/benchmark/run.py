"""Measure the suites, and write tables, JSON and plots."""

from __future__ import annotations

import datetime
import functools
import os
import pathlib
import platform
import statistics
from importlib import metadata
from typing import Any

import jax
import rich.box
import rich.console
import rich.table
from cycler import cycler
from matplotlib import color_sequences
from matplotlib.figure import Figure

from attention_jax.diagnostics.plots import save
from experiments.benchmark import inside, patterns, translating
from experiments.benchmark.command_line import Options
from experiments.benchmark.measure import METERS, RATES, Compared, compared, take_turns
from experiments.benchmark.programs import HAS_TORCH
from experiments.benchmark.suites import SUITES, Comparison, Group, Suite, Sweep
from experiments.command_line import terminal
from experiments.files import write_json, write_text

_UNITS = {"cpu ms": "milliseconds of processor time", "ms": "milliseconds", "MiB": "MiB"}
SCALE_OF_QUICK = 64
SCALE_OF_QUICK_PATTERNS = SCALE_OF_QUICK_INSIDE = 16
WIDTH = 140
"""Columns that the table needs; a narrower terminal wraps it, and a file keeps it whole."""


def run(options: Options) -> None:
    """Measure the suites that are asked for, print their tables and write their results."""
    options.out.mkdir(parents=True, exist_ok=True)
    console = terminal()
    console.width = max(console.width, WIDTH)
    surroundings = machine()
    console.print(", ".join(f"{name} {value}" for name, value in surroundings.items()))
    if not HAS_TORCH:
        console.print("PyTorch is not installed, so it is not compared with.")
    scale = SCALE_OF_QUICK if options.quick else 1
    for name in options.suites:
        if name == "patterns":
            _run_patterns(options, surroundings, scale, console)
            continue
        if name in ("normalizers", "statistics"):
            _run_inside(name, options, surroundings, console)
            continue
        if name == "accelerators":
            _run_accelerators(options, surroundings, scale, console)
            continue
        if name == "matrix":
            # It loads the kernels of JAX, which other suites do not wait for.
            from experiments.benchmark import matrix

            console.print(
                matrix.run(options.out, most=6 if options.quick else None),
                soft_wrap=True,
                markup=False,
            )
            continue
        suite = _suite(name, options)
        measured = [_measure(group, options.repeats) for group in suite.groups(scale)]
        console.print(_table(name, [row for group in measured for row in group["rows"]]))
        result = {"machine": surroundings, "load": load(), "groups": measured}
        if suite.sweep is not None and options.plots:
            sweep = suite.sweep(scale)
            result["sweep"] = _swept(sweep, min(options.repeats, 3))
            draw_plot(sweep.title, sweep.unit, result["sweep"], options.out / name)
        write_json(options.out / f"{name}.json", result)
    console.print(f"load {load()}; results in {options.out}/", soft_wrap=True)


def _suite(name: str, options: Options) -> Suite:
    if name == "translate":
        return Suite(functools.partial(translating.groups, options.data))
    return SUITES[name]


def _run_accelerators(
    options: Options, surroundings: dict[str, str], scale: int, console: rich.console.Console
) -> None:
    """Compile kernels for accelerators, run them where one is; writes JSON and a table."""
    # It loads the kernels of JAX, which other suites do not wait for.
    from experiments.benchmark import accelerators, schedule

    rows = [*accelerators.measure(scale), *accelerators.timed(scale, options.repeats)]
    on = f"{surroundings['device']}, jax {surroundings['jax']}"
    schedules = schedule.report(scale)
    report = accelerators.report(rows, scale, on, schedules)
    write_text(options.out / "accelerators.md", report)
    found = [row._asdict() | {"cost": row.cost and row.cost._asdict()} for row in rows]
    write_json(options.out / "accelerators.json", {"machine": surroundings, "rows": found})
    tables = f"{accelerators.table(rows)}\n\n{schedules}"
    console.print(tables, soft_wrap=True, markup=False)


def _run_patterns(
    options: Options, surroundings: dict[str, str], scale: int, console: rich.console.Console
) -> None:
    """Sweep the length for every family of masks; writes JSON, a table and two plots a pass."""
    scale = min(scale, SCALE_OF_QUICK_PATTERNS)
    found = patterns.measure(scale, options.repeats)
    on = (
        f"{surroundings['cores']} cores of {surroundings['processor']}, jax {surroundings['jax']}, "
        f"load {surroundings['load']} to {load()}"
    )
    report = patterns.report(found, scale, on)
    write_text(options.out / "patterns.md", report)
    passes = jax.tree.map(
        lambda point: point._asdict(), found, is_leaf=lambda x: isinstance(x, patterns.Point)
    )
    result = {"machine": surroundings, "load": load(), "passes": passes}
    write_json(options.out / "patterns.json", result)
    units = {"milliseconds": "cpu ms", "mebibytes": "MiB"} if options.plots else {}
    for name, of_pass in found.items():
        console.print(f"{name}\n{patterns.table(of_pass, scale)}", soft_wrap=True)
        for cost, unit in units.items():
            curves = {
                family: [(point.length, getattr(point, cost)) for point in points]
                for family, points in of_pass.items()
            }
            path = options.out / f"patterns_{name.replace(' ', '_')}_{cost}"
            draw_plot(name.capitalize(), unit, curves, path)


def _run_inside(
    name: str, options: Options, surroundings: dict[str, str], console: rich.console.Console
) -> None:
    """Measure every normalizer over softmax, or every statistic over none; JSON and a table."""
    scale = SCALE_OF_QUICK_INSIDE if options.quick else 1
    is_statistics = name == "statistics"
    cases_of = inside.statistic_cases if is_statistics else inside.normalizer_cases
    rows = inside.measure(cases_of, scale, options.repeats)
    long = inside.at_length(scale) if is_statistics else {}
    on = (
        f"{surroundings['cores']} cores of {surroundings['processor']}, jax {surroundings['jax']}, "
        f"load {surroundings['load']} to {load()}"
    )
    report = (
        inside.report_of_statistics(rows, long, scale, on)
        if is_statistics
        else inside.report_of_normalizers(rows, scale, on)
    )
    write_text(options.out / f"{name}.md", report)
    found = {name: row._asdict() for name, row in rows.items()}
    at_length = {name: cost._asdict() for name, cost in long.items()}
    result = {"machine": surroundings, "load": load(), "rows": found, "long": at_length}
    write_json(options.out / f"{name}.json", result)
    console.print(inside.table(rows, long), soft_wrap=True, markup=False)


def machine() -> dict[str, str]:
    """Describe the machine and the versions that the numbers depend on."""
    names = ["jax", "jaxlib", "numpy"] + ["torch"] * HAS_TORCH
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
        "load": load(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def load() -> str:
    """Return the load average of the last minute."""
    return f"{os.getloadavg()[0]:.1f}"


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _measure(group: Group, repeats: int) -> dict[str, Any]:
    meter = METERS[group.unit]
    meters = {name: meter(program()) for name, program in group.programs.items()}
    costs = take_turns(meters, 1 if group.unit == "MiB" else repeats)
    rows = [
        row_of(c, compared(costs[c.ours], costs[c.peer]), group.unit) for c in group.comparisons
    ]
    return {"unit": group.unit, "costs": costs, "rows": rows}


def row_of(comparison: Comparison, found: Compared, unit: str) -> dict[str, Any]:
    """Return a row of the table, in the unit of what is measured."""
    power = -1 if unit in RATES else 1
    return comparison._asdict() | {
        "unit": unit,
        "ours_median": found.ours**power,
        "peer_median": found.peer**power,
        "ratio": found.ratio,
        "least": found.least,
        "most": found.most,
        "cpu_ratio": found.cpu_ratio,
        "met": found.ratio >= comparison.target,
    }


def _swept(sweep: Sweep, repeats: int) -> dict[str, list[tuple[int, float]]]:
    """Return the medians at every length, line by line; the lines take turns."""
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in sweep.lines}
    for length in sorted({s for _, lengths in sweep.lines.values() for s in lengths}):
        programs = {
            name: program(length)
            for name, (program, lengths) in sweep.lines.items()
            if length in lengths
        }
        meters = {name: METERS[sweep.unit](program) for name, program in programs.items()}
        for name, costs in take_turns(meters, repeats).items():
            found[name].append((length, statistics.median(cost.wall for cost in costs)))
    return found


def _table(title: str, rows: list[dict[str, Any]]) -> rich.table.Table:
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("case", "ours", "peer"):
        table.add_column(name, no_wrap=True)
    for name in ("", "", "ratio", "min..max", "cpu", "target", "met"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["case"],
            row["ours"],
            row["peer"],
            f"{shown(row['ours_median'])} {row['unit']}",
            f"{shown(row['peer_median'])} {row['unit']}",
            f"{row['ratio']:.2f}",
            f"{row['least']:.2f}..{row['most']:.2f}",
            f"{row['cpu_ratio']:.2f}",
            f">= {row['target']:g}",
            "yes" if row["met"] else "no",
        )
    return table


def shown(value: float) -> str:
    """Write a number with three significant digits, or as a whole number from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw_plot(
    title: str, unit: str, found: dict[str, list[tuple[int, float]]], path: pathlib.Path
) -> None:
    """Draw costs by length, a line for each name; writes `path`.png and `path`.svg."""
    figure = Figure(figsize=(6, 4) if len(found) < 8 else (8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(cycler(linestyle=["-", "--"]) * cycler(color=color_sequences["tab10"]))
    for name, points in found.items():
        lengths, costs = zip(*points, strict=True)
        axes.plot(lengths, costs, marker="o", markersize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(title=title, xlabel="sequence length S", ylabel=_UNITS[unit])
    axes.grid(alpha=0.3)
    beside = {"bbox_to_anchor": (1, 1), "loc": "upper left"} if len(found) >= 8 else {}
    axes.legend(frameon=False, **beside)
    save(figure, path)
