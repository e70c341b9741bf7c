"""Pictures of claims, in the style of the translator's."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.significance import interval
from experiments.translate.figures import COLORS

# A number, or one for every seed or draw.
Point = float | Sequence[float]


def lines(
    x: Sequence[float],
    series: Mapping[str, Sequence[Point]],
    *,
    xlabel: str,
    ylabel: str,
    marks: Mapping[str, float] | None = None,
    xmarks: Mapping[str, float] | None = None,
    **axes_options: Any,
) -> Figure:
    """Draw a line for each name, with a band where a point is several seeds or draws.

    Args:
      x: where the points are.
      series: for each name a point for each x.
      xlabel: of the axis.
      ylabel: of the axis.
      marks: dashed horizontal lines by name, such as a theory.
      xmarks: dashed vertical lines by name.
      **axes_options: of matplotlib's `Axes.set`, such as xscale="log".
    """
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, points), color in zip(series.items(), itertools.cycle(COLORS), strict=False):
        found = [interval(np.atleast_1d(np.asarray(point, float))) for point in points]
        mean = [of_x.mean for of_x in found]
        axes.plot(x, mean, "o-", label=name, color=color, linewidth=1.6, markersize=4)
        low, high = [of_x.low for of_x in found], [of_x.high for of_x in found]
        axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    dashes: Any = {"color": "#888888", "linewidth": 0.9, "linestyle": (0, (4, 3))}
    for name, at in (marks or {}).items():
        axes.axhline(at, **dashes)
        axes.annotate(
            name,
            (1, at),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
            color="#555555",
        )
    for name, at in (xmarks or {}).items():
        axes.axvline(at, **dashes)
        axes.annotate(
            name,
            (at, 1),
            (4, -3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            fontsize=8,
            color="#555555",
        )
    axes.set(xlabel=xlabel, ylabel=ylabel, **axes_options)
    if axes_options.get("xscale") in ("log", "symlog"):
        axes.set_xticks(list(x), [f"{at:g}" for at in x], minor=False)
        axes.minorticks_off()
    axes.grid(True)
    axes.set_axisbelow(True)
    if len(series) > 1:
        axes.legend(fontsize=8)
    return figure


def bars(
    values: Mapping[str, Point],
    *,
    xlabel: str,
    marks: Mapping[str, float] | None = None,
    **axes_options: Any,
) -> Figure:
    """Draw a bar for each name, with its interval where it is several seeds or draws."""
    figure = Figure(figsize=(6.4, 0.7 + 0.36 * len(values)), layout="constrained")
    axes = figure.subplots()
    found = [interval(np.atleast_1d(np.asarray(point, float))) for point in values.values()]
    means = np.array([of_name.mean for of_name in found])
    low = np.array([of_name.low for of_name in found])
    high = np.array([of_name.high for of_name in found])
    errors = np.nan_to_num(np.stack([means - low, high - means])).clip(0)
    axes.barh(range(len(values)), means, xerr=errors, color=COLORS[0], ecolor="#333333", height=0.6)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    for name, at in (marks or {}).items():
        axes.axvline(at, color="#888888", linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(name, (at, 1), xycoords=("data", "axes fraction"), va="bottom", fontsize=8)
    axes.set(xlabel=xlabel, **axes_options)
    return figure


def maps(panels: Mapping[str, Any], *, xlabel: str = "key", ylabel: str = "query") -> Figure:
    """Draw matrices beside each other, from white (0) to dark blue (their largest entry)."""
    figure = Figure(figsize=(2.9 * len(panels), 3.1), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, matrix) in zip(grid, panels.items(), strict=True):
        axes.imshow(np.asarray(matrix, float), cmap="Blues", interpolation="nearest")
        axes.set(title=name, xlabel=xlabel, ylabel=ylabel)
    return figure
