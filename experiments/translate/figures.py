"""Figures of a run: learning curves with bands, and attention weights with gold alignments."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from attention_jax.diagnostics.plots import draw_weights, save
from experiments.data.alignments import parse_alignment
from experiments.data.corpus import Links
from experiments.significance import interval
from experiments.translate.workdir import Record

# The colour-blind-safe palette of Okabe and Ito, without yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GOLD = "#D55E00"
_END = "<eos>"
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": "#888888",
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}
_MAX_COLUMNS = 4
# Up to so many validations, each is drawn as a point with a bar.
_MAX_POINTS = 6


def style() -> AbstractContextManager[Any]:
    """Return the style of all programs' figures."""
    return mpl.rc_context(cast("Any", _STYLE))


def draw_all(
    outcomes: Sequence[Record], log: Mapping[str, Sequence[Record]], folder: Path
) -> list[str]:
    """Draw all figures of a run, each as PNG and SVG, and return their names."""
    with style():
        figures = {"learning_curves": learning_curves(log)}
        # Without attention there are no weights to draw.
        attending = [o for o in outcomes if np.any(o["pictures"][0]["weights"])] or outcomes
        scores = [outcome["score"] for outcome in attending]
        pictures = zip(*(outcome["pictures"] for outcome in attending), strict=True)
        for number, panels in enumerate(pictures, 1):
            figures[f"alignment_{number}"] = alignments(scores, panels)
        for name, figure in figures.items():
            save(figure, folder / name)
    return list(figures)


def learning_curves(log: Mapping[str, Sequence[Record]]) -> Figure:
    """Draw exact match and loss on the validation set against steps, with bands over seeds."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (score, records), color in zip(log.items(), itertools.cycle(COLORS), strict=False):
        validated = [record for record in records if "exact_match" in record]
        for axes, name in ((left, "exact_match"), (right, "valid_loss")):
            _curve(axes, validated, name, score, color)
    left.set(title="Exact match on validation (%)", xlabel="training step")
    exact = [e for records in log.values() for r in records for e in r.get("exact_match", ())]
    reached = max(exact, default=0) >= 90
    if reached:
        left.axhline(90, color="#888888", linewidth=0.8, linestyle=(0, (4, 3)))
        left.set_ylim(-2, 102)
    else:
        left.set_ylim(bottom=0)
    right.set(title="Loss on validation (nats a token)", xlabel="training step", yscale="log")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    right.yaxis.set_minor_locator(NullLocator())
    left.legend(loc="lower right" if reached else "best")
    for axes in (left, right):
        axes.grid(True)
        axes.set_axisbelow(True)
    return figure


def alignments(scores: Sequence[str], panels: Sequence[Record]) -> Figure:
    """Draw the weights of each mechanism for one reference, next to the gold alignment."""
    source = [*panels[0]["source"], _END]
    target = [*panels[0]["target"], _END]
    gold = panels[0]["gold"]
    links = None if gold is None else parse_alignment(gold, len(source), len(target))
    titles = list(scores) if links is None else ["gold", *scores]
    across = min(_MAX_COLUMNS, len(titles))
    down = -(-len(titles) // across)
    width, height = 0.26 * len(source) + 0.3, 0.26 * len(target) + 0.5
    # Room for the longest words: targets left of the panels, sources below them.
    beside, below = (0.4 + 0.08 * max(map(len, words)) for words in (target, source))
    size = across * width + max(1.2, beside), down * height + max(0.9, below)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(titles) :]:
        axes.set_visible(False)
    for axes, title in zip(grid.flat, titles, strict=False):
        if title == "gold" and links is not None:
            weights = _gold_weights(*links, (len(target), len(source)))
        else:
            weights = np.array(panels[scores.index(title)]["weights"])
            _outline(axes, *(links or (frozenset(), frozenset())))
        draw_weights(axes, weights, target, source, title)
    return figure


def _curve(axes: Axes, validated: Sequence[Record], name: str, label: str, color: str) -> None:
    """Draw means with a band, or few of them as points with bars."""
    found = [interval(record[name]) for record in validated]
    steps = [record["step"] for record in validated]
    means, low, high = (np.array([getattr(i, of) for i in found]) for of in ("mean", "low", "high"))
    if len(steps) > _MAX_POINTS:
        axes.plot(steps, means, label=label, color=color, linewidth=1.8)
        axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
        return
    # One seed has no interval.
    bars = np.nan_to_num(np.stack([means - low, high - means])).clip(0)
    line: Any = {"color": color, "linewidth": 1.8, "elinewidth": 1, "capsize": 3, "markersize": 5}
    axes.errorbar(steps, means, bars, label=label, fmt="o-", clip_on=False, **line)


def _gold_weights(sure: Links, possible: Links, shape: tuple[int, int]) -> np.ndarray:
    weights = np.zeros(shape)
    for links, darkness in ((possible, 0.35), (sure, 1.0)):
        for i, j in links:
            weights[j, i] = darkness
    return weights


def _outline(axes: Axes, sure: Links, possible: Links) -> None:
    for i, j in possible:
        style = "-" if (i, j) in sure else ":"
        box = Rectangle((i - 0.44, j - 0.44), 0.88, 0.88, fill=False, edgecolor=_GOLD, ls=style)
        axes.add_patch(box)
