"""Log-log plots against the sequence length."""

from __future__ import annotations

import pathlib

from matplotlib.figure import Figure

from experiments.benchmark.suites import Sweep

_LABELS = {"ms": "milliseconds", "MiB": "MiB"}


def plot(sweep: Sweep, found: dict[str, list[tuple[int, float]]], path: pathlib.Path) -> None:
    """Draw every line of a sweep; writes `path`.png and `path`.svg."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in found.items():
        lengths, costs = zip(*points, strict=True)
        axes.plot(lengths, costs, marker="o", markersize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(title=sweep.title, xlabel="sequence length S", ylabel=_LABELS[sweep.unit])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for kind in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{kind}"), dpi=150)
