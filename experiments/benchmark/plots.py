"""Log-log plots against the sequence length."""

from __future__ import annotations

import pathlib

from cycler import cycler
from matplotlib import color_sequences
from matplotlib.figure import Figure

from attention_jax.diagnostics.plots import save

_LABELS = {"cpu ms": "milliseconds of processor time", "ms": "milliseconds", "MiB": "MiB"}


def plot(
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
    axes.set(title=title, xlabel="sequence length S", ylabel=_LABELS[unit])
    axes.grid(alpha=0.3)
    beside = {"bbox_to_anchor": (1, 1), "loc": "upper left"} if len(found) >= 8 else {}
    axes.legend(frameon=False, **beside)
    save(figure, path)
