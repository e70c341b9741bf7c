"""Generated kernels compiled for every accelerator, score, mask and pass, and what they may cost.

    python -m experiments.benchmark --suites=matrix --out=DIR

compiles what `DIR/matrix.jsonl` does not hold yet and writes the table of all of it.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax import attend, bind, masks, scores
from experiments.benchmark import accelerators, compilers
from experiments.benchmark.compilers import Cost
from experiments.files import write_text

LENGTH, HEADS, DEPTH, FEATURES = 1024, 2, 128, 16
ROWS = HEADS * LENGTH * DEPTH
"""Numbers of one operand."""

SECONDS = 20.0
"""Of processor time, to compile one program."""

TRAFFIC = 1.3
"""Times operands plus results."""

SMALL = 2**18
"""Bytes for lists of tiles, and what a compiler reserves whatever the program."""

MAPPED_ROWS = {"cosine": 2, "additive": 2, "bilinear": 1}
"""Scores that give the kernel other queries and keys than they were given: how many of both."""

MASKS: dict[str, Callable[[jax.Array], masks.Mask | None]] = {
    "none": lambda ids: None,
    "causal": lambda ids: masks.Causal(),
    "window": lambda ids: masks.Causal() & masks.Window(200, 0),
    "segments": masks.Segment,
    "prefix or window": lambda ids: masks.Prefix(100) | masks.Window(200, 0),
}

SCORES = ("scaled dot", "cosine", "additive", "bilinear", "soft cap", "a user's own")


class Cell(NamedTuple):
    """One program: its target of `compilers.TARGETS`, score, mask, and which pass."""

    target: str
    score: str
    mask: str
    is_gradient: bool

    @property
    def name(self) -> str:
        """What a person calls it."""
        passed = "gradients" if self.is_gradient else "forward"
        return f"{self.target}, {self.score}, {self.mask}, {passed}"


def cells() -> Iterator[Cell]:
    """Yield every program; those that are asked for most come first.

    >>> len(list(cells()))
    360
    """
    every = [
        Cell(target, score, mask, is_gradient)
        for score in SCORES
        for mask in MASKS
        for target in compilers.TARGETS
        for is_gradient in (False, True)
    ]
    first = [
        cell
        for cell in every
        if cell.score in ("scaled dot", "additive", "a user's own")
        and cell.mask in ("none", "causal")
    ]
    yield from dict.fromkeys(first + every)


def measure(cell: Cell) -> Cost:
    """Compile one program, of operands as its kernels take them."""
    platform = compilers.TARGETS[cell.target].platform
    shape = (1, HEADS, LENGTH, DEPTH) if platform == "tpu" else (1, LENGTH, HEADS, DEPTH)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3
    ids = jax.ShapeDtypeStruct((LENGTH,), jnp.int32)
    function = functools.partial(_attended, cell.score, cell.mask, platform)
    measured = accelerators.gradient(function) if cell.is_gradient else function
    return compilers.cost(measured, [*arrays, ids], cell.target)


def _attended(
    score: str, mask: str, platform: str, query: Any, key: Any, value: Any, ids: jax.Array
) -> jax.Array:
    # A TPU holds heads outside of positions; the transposed view costs nothing.
    swapped = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
    arrays = [swapped(x) if platform == "tpu" else x for x in (query, key, value)]
    context = attend(
        *arrays,
        score=_score(score),
        mask=MASKS[mask](ids),
        tile_sizes=accelerators.TILES[platform],
        implementation="pallas",
    )
    return swapped(context) if platform == "tpu" else context


def _score(name: str) -> Any:
    weights = jnp.full((DEPTH, FEATURES), 1.0 / DEPTH)
    of_features = {"value": jnp.ones(FEATURES), "bias": jnp.zeros(FEATURES)}
    additive = {"query_weight": weights, "key_weight": 2 * weights} | of_features
    return {
        "scaled dot": scores.scaled_dot,
        "cosine": bind(scores.cosine, temperature=0.1),
        "additive": bind(scores.additive, **additive),
        "bilinear": bind(scores.bilinear, weight=jnp.eye(DEPTH)),
        "soft cap": scores.soft_capped(scores.scaled_dot, 30.0),
        "a user's own": accelerators.log_square,
    }[name]


class Bound(NamedTuple):
    """A cost, what it may be, and in what unit."""

    what: str
    found: float
    most: float
    unit: str

    @property
    def holds(self) -> bool:
        """Whether the cost is within its bound."""
        return self.found <= self.most

    def __str__(self) -> str:
        return f"{self.what} {self.found:.4g} of at most {self.most:.4g} {self.unit}"


def bounds(cell: Cell, cost: Cost) -> list[Bound]:
    """Return what a program costs beside what it may cost.

    Temporaries of a forward pass are bounded by log-sum-exp and mapped rows in float32, the
    traffic by what is read and written at least, mapped rows written and read once more.
    """
    mapped = MAPPED_ROWS.get(cell.score, 0) * 4 * ROWS
    traffic = math.inf if cost.traffic is None else cost.traffic
    at_least = cost.operands + cost.results
    found = [
        Bound("compiled in", cost.seconds, SECONDS, "s"),
        Bound("traffic", traffic / at_least, TRAFFIC + 2 * mapped / at_least, "times operands"),
        Bound("copies of layouts", cost.copied, 0, "bytes"),
    ]
    if cell.is_gradient:
        return found
    log_sums = 4 * HEADS * LENGTH
    most = log_sums + mapped + SMALL
    return [*found, Bound("temporaries", cost.temporaries, most, "bytes")]


def beyond(cell: Cell, found: Cost | str) -> list[str]:
    """Say in what a program is beyond its bounds, or why there is none."""
    if isinstance(found, str):
        return [found]
    return [str(bound) for bound in bounds(cell, found) if not bound.holds]


def resumed(path: pathlib.Path, wanted: Iterable[Cell]) -> Iterator[tuple[Cell, Cost | str]]:
    """Compile those programs that a file does not hold, add them to it, and yield all.

    A line of the file is one program, so that whoever is stopped goes on where he was. In place of
    a cost is the sentence that says why there is none.
    """
    known = _read(path)
    for cell in wanted:
        found = known.get(cell)
        if found is None:
            found = _cost_or_reason(cell)
            line = {"cell": cell, "found": found if isinstance(found, str) else found._asdict()}
            before = path.read_text(encoding="utf-8") if path.exists() else ""
            write_text(path, f"{before}{json.dumps(line)}\n")
        yield cell, found


def _read(path: pathlib.Path) -> dict[Cell, Cost | str]:
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {
        Cell(*line["cell"]): line["found"]
        if isinstance(line["found"], str)
        else Cost(**line["found"])
        for line in lines
    }


def _cost_or_reason(cell: Cell) -> Cost | str:
    try:
        return measure(cell)
    except Exception as error:  # each compiler has its own
        return accelerators.in_one_line(error)


def table(rows: Iterable[tuple[Cell, Cost | str]]) -> str:
    """Write a line for each target, score and pass: the least and the most over the masks."""
    groups: dict[tuple[str, str, str], list[tuple[Cell, Cost | str]]] = {}
    for cell, found in rows:
        passed = "gradients" if cell.is_gradient else "forward"
        groups.setdefault((cell.target, cell.score, passed), []).append((cell, found))
    head = ["target", "score", "pass", "masks", "compiled, s", "temporaries, KiB"]
    head += ["traffic, times operands", "copies of layouts, KiB", "beyond its bound"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for group, members in groups.items():
        costs = [found for _, found in members if not isinstance(found, str)]
        refused = sorted({found for _, found in members if isinstance(found, str)})
        beyond = sorted(
            {
                bound.what
                for cell, found in members
                if not isinstance(found, str)
                for bound in bounds(cell, found)
                if not bound.holds
            }
        )
        cells_of_row = [
            *group,
            ", ".join(cell.mask for cell, _ in members),
            _range([cost.seconds for cost in costs], 1),
            _range([cost.temporaries / 2**10 for cost in costs], 0),
            _range([(cost.traffic or math.nan) / _touched(cost) for cost in costs], 2),
            _range([cost.copied / 2**10 for cost in costs], 0),
            "; ".join([*beyond, *refused]),
        ]
        lines.append(f"| {' | '.join(cells_of_row)} |")
    return "\n".join(lines)


def run(folder: pathlib.Path, most: int | None = None) -> str:
    """Compile what this machine has compilers for, or the first `most`; return the report.

    Beside it, `beyond_bounds.json` tells by name what a program costs beyond its bounds.
    """
    wanted = [cell for cell in cells() if compilers.lacks(cell.target) is None][:most]
    rows = list(resumed(folder / "matrix.jsonl", wanted))
    found = {cell.name: "; ".join(beyond(cell, cost)) for cell, cost in rows}
    names = {name: reasons for name, reasons in sorted(found.items()) if reasons}
    text = json.dumps(names, indent=1) + "\n"
    write_text(folder / "beyond_bounds.json", text)
    written = report(rows)
    write_text(folder / "matrix.md", written)
    return written


def report(rows: list[tuple[Cell, Cost | str]]) -> str:
    """Write how many programs were compiled, and their table, as Markdown."""
    missing = [lack for name in compilers.TARGETS if (lack := compilers.lacks(name))]
    compiled = sum(not isinstance(found, str) for _, found in rows)
    said = f"{compiled} of {len(list(cells()))} programs were compiled, and none was run"
    return f"{'. '.join([said, *missing])}.\n\n{table(rows)}\n"


def _touched(cost: Cost) -> int:
    return cost.operands + cost.results


def _range(values: list[float], digits: int) -> str:
    if not values:
        return ""
    least, most = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return least if least == most else f"{least} to {most}"
