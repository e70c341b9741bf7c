"""Figures of a sweep: quality against each swept number, and loss against the learning rate."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from attention_jax.diagnostics.plots import save
from experiments.translate.figures import COLORS, style
from experiments.translate.workdir import Record
from experiments.translate_sweep.config import RATE, Point, shown

_PANELS = {"bleu": "BLEU on test", "exact_match": "Exact match on test (%)"}
_MAX_COLUMNS = 3


def draw_all(results: Record, folder: Path) -> list[str]:
    """Draw all figures of a sweep from its results, as PNG and SVG, and return their names."""
    figures: dict[str, Figure] = {}
    with style():
        for name in results["axes"]:
            figures[name] = quality(results, name)
        if len(results["rates"]) > 1:
            figures[RATE] = learning_rates(results)
        for name, figure in figures.items():
            save(figure, folder / name)
    return list(figures)


def quality(results: Record, name: str) -> Figure:
    """Draw quality against one swept field, in a row for each point of the others."""
    others = {other: values for other, values in results["axes"].items() if other != name}
    points = [dict(zip(others, p, strict=True)) for p in itertools.product(*others.values())]
    figure = Figure(figsize=(10, 3.8 * len(points)), layout="constrained")
    rows = figure.subplots(len(points), len(_PANELS), squeeze=False, sharex=True)
    values = results["axes"][name]
    for row, point in zip(rows, points, strict=True):
        for axes, (metric, title) in zip(row, _PANELS.items(), strict=True):
            for score, color in _scores(results):
                found = [
                    (x, m["metrics"][metric])
                    for x in values
                    for m in results["mechanisms"]
                    if m["score"] == score and m["point"] == {**point, name: x}
                ]
                _line(axes, values, dict(found), score, color)
            axes.set(title=f"{title}, {shown(point)}" if point else title, xlabel=name)
            _finish(axes, values)
    rows[0, 0].legend(loc="best")
    chosen = "each score at the learning rate with the lowest validation loss"
    _explain(figure, results, chosen if len(results["rates"]) > 1 else "")
    return figure


def learning_rates(results: Record) -> Figure:
    """Draw the validation loss against the learning rate, in a panel for each point."""
    points: list[Point] = []
    for found in results["mechanisms"]:
        if found["point"] not in points:
            points.append(found["point"])
    across = min(_MAX_COLUMNS, max(1, len(points)))
    down = -(-len(points) // across) or 1
    figure = Figure(figsize=(3.4 * across + 1, 2.8 * down + 0.4), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    for axes in grid.flat[len(points) :]:
        axes.set_visible(False)
    for axes, point in zip(grid.flat, points, strict=False):
        for score, color in _scores(results):
            here = [m for m in results["mechanisms"] if (m["score"], m["point"]) == (score, point)]
            found = {r[RATE]: r["valid_loss"] for m in here for r in m["rates"] if r["valid_loss"]}
            _line(axes, results["rates"], found, score, color)
        axes.set(title=shown(point), xlabel=RATE)
        _finish(axes, results["rates"])
    for axes in grid[:, 0]:
        axes.set_ylabel("validation loss")
    if points:
        grid[0, 0].legend(loc="best")
    _explain(figure, results)
    return figure


def _scores(results: Record) -> list[tuple[str, str]]:
    return list(zip(results["config"]["scores"], itertools.cycle(COLORS), strict=False))


def _line(
    axes: Axes, values: Sequence[float], found: dict[float, Record], label: str, color: str
) -> None:
    """Draw means with a band, and a cross at values where every run diverged."""
    nan = {"mean": float("nan"), "low": None, "high": None}
    at = sorted(values)
    summaries = [found.get(x, nan) for x in at]
    means = [summary["mean"] for summary in summaries]
    axes.plot(at, means, "o-", label=label, color=color, linewidth=1.8, markersize=4)
    # One seed has no interval.
    low, high = (
        [s["mean"] if s[side] is None else s[side] for s in summaries] for side in ("low", "high")
    )
    axes.fill_between(at, low, high, color=color, alpha=0.18, linewidth=0)
    for x in at:
        if x not in found:
            axes.plot(x, 0.02, "x", color=color, transform=axes.get_xaxis_transform())


def _explain(figure: Figure, results: Record, chosen: str = "") -> None:
    """Explain the points in a line below the figure."""
    seeds = results["config"]["seeds"]
    over = "One seed" if seeds == 1 else f"Mean and 95% interval over {seeds} seeds"
    crossed = any(r["valid_loss"] is None for m in results["mechanisms"] for r in m["rates"])
    cross = "a cross: diverged" if crossed or results["diverged"] else ""
    text = "; ".join(filter(None, (over, chosen, cross)))
    figure.supxlabel(text, fontsize=8.5, color="#5f6670")


def _finish(axes: Axes, values: Sequence[float]) -> None:
    if min(values) > 0:
        axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(True)
    axes.set_axisbelow(True)
