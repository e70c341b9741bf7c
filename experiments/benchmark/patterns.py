"""Time and bytes of every family of masks against the length, beside the tiles that are live.

An exponent is the slope of a straight line through the points of a log-log plot. The work is the
number of pairs in live tiles: where time grows like the work, empty tiles cost nothing.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax import attend, explain, masks
from attention_jax.masks import algebra
from attention_jax.masks.intervals import indices
from experiments.benchmark.measure import (
    Program,
    compiled,
    mebibytes_of,
    milliseconds_of,
    take_turns,
)
from experiments.benchmark.programs import Shape, inputs, with_gradients

LENGTHS = (1024, 2048, 4096, 8192)
PASSES = {"forward pass": lambda function: function, "forward and backward pass": with_gradients}
HEADS, DEPTH = 2, 64
WINDOW, BLOCK, GRID_WINDOW, TOKENS = 256, 64, 8, 16
# The name of a family, and a length.
Case = tuple[str, int]


class Family(NamedTuple):
    """A mask for every length, and its code."""

    mask: Callable[[int], Any]
    written: str


class Point(NamedTuple):
    """What a family costs at one length; shares are of all pairs of queries and keys.

    Milliseconds are processor time of all threads, which depends little on other work.
    """

    length: int
    milliseconds: float
    mebibytes: float
    live: float
    allowed: float


def families(scale: int = 1) -> dict[str, Family]:
    """Return all families; `scale` divides their windows and blocks.

    >>> families(4)["window"].written
    'Causal() & Window(64, 0)'
    """
    window, block, tokens = WINDOW // scale, max(BLOCK // scale, 1), max(TOKENS // scale, 1)
    causal, rng = masks.Causal(), jax.random.key(0)

    def documents(length: int) -> Any:
        return masks.Segment(np.arange(length, dtype=np.int32) // window)

    def swin(length: int) -> masks.GridWindow:
        width = 2 ** round(math.log2(length) / 2)
        return masks.swin(length // width, width, GRID_WINDOW)

    def strided(length: int) -> Any:
        return masks.sparse_strided(math.isqrt(length))

    def fixed(length: int) -> Any:
        return masks.sparse_fixed(math.isqrt(length))

    def same(mask: Any) -> Callable[[int], Any]:
        return lambda length: mask

    return {
        "full": Family(same(None), "None"),
        "causal": Family(same(causal), "Causal()"),
        "prefix": Family(same(masks.Prefix(window) | causal), f"Prefix({window}) | Causal()"),
        "window": Family(same(causal & masks.Window(window, 0)), f"Causal() & Window({window}, 0)"),
        "segment": Family(documents, f"Segment(ids), documents of {window}"),
        "chunked": Family(same(masks.Chunked(window, 1)), f"Chunked({window}, before=1)"),
        "block": Family(
            same(masks.Block(masks.Window(1, 1), block)), f"Block(Window(1, 1), {block})"
        ),
        "dilated": Family(same(masks.Dilated(block, block, 2)), f"Dilated({block}, {block}, 2)"),
        "global tokens": Family(same(masks.GlobalTokens(tokens)), f"GlobalTokens({tokens})"),
        "longformer": Family(
            same(masks.longformer(window, tokens)), f"longformer({window}, {tokens})"
        ),
        "bigbird": Family(
            lambda length: masks.bigbird(rng, length, block), f"bigbird(key, S, {block})"
        ),
        "strided": Family(strided, "sparse_strided(sqrt(S))"),
        "fixed": Family(fixed, "sparse_fixed(sqrt(S))"),
        "swin": Family(swin, f"swin(H, W, {GRID_WINDOW})"),
        "swin in order": Family(
            lambda length: masks.window_order(swin(length))[1],
            f"window_order(swin(H, W, {GRID_WINDOW}))",
        ),
    }


def measure(scale: int, repeats: int) -> dict[str, dict[str, list[Point]]]:
    """Measure all families in all passes at all lengths; of one pass, all take turns."""
    chosen, lengths = families(scale), [length // scale for length in LENGTHS]
    cases = {(name, s): chosen[name].mask(s) for name in chosen for s in lengths}
    shares = {
        case: (live_share(m, case[1]), allowed_share(m, case[1])) for case, m in cases.items()
    }
    found = {}
    for name, of_pass in PASSES.items():
        points = _points(of_pass, cases, shares, repeats)
        found[name] = {family: [points[family, s] for s in lengths] for family in chosen}
    return found


def _points(
    of_pass: Callable[..., Any],
    cases: Mapping[Case, Any],
    shares: Mapping[Case, tuple[float, float]],
    repeats: int,
) -> dict[Case, Point]:
    """Measure one pass of all cases, each the mask of a family at a length."""
    arguments = {length: inputs(Shape(length, HEADS, DEPTH)) for _, length in cases}
    calls = {
        case: compiled(Program(of_pass(_attended(mask)), arguments[case[1]]))
        for case, mask in cases.items()
    }
    meters = {case: milliseconds_of(call, arguments[case[1]]) for case, call in calls.items()}
    return {
        case: Point(
            case[1],
            statistics.median(cost.cpu for cost in costs),
            mebibytes_of(calls[case]),
            *shares[case],
        )
        for case, costs in take_turns(meters, repeats).items()
    }


def live_share(mask: Any, length: int) -> float:
    """Return the share of all pairs that lie in live tiles.

    >>> live_share(masks.Causal() & masks.Window(128, 0), 8192) < 0.07
    True
    """
    x = jax.ShapeDtypeStruct((1, length, HEADS, DEPTH), "float32")
    found = explain(x, x, x, mask=mask, implementation="tiled")
    return (found.partial + found.full) * math.prod(found.tile) / length**2


def allowed_share(mask: Any, length: int) -> float:
    """Return the share of all pairs that a mask allows.

    >>> allowed_share(masks.Causal(), 99)
    0.505...
    """
    mask = algebra.with_int32(algebra.as_mask(mask))

    def of_row(row: jax.Array) -> jax.Array:
        allowed = mask(row[None, None], indices(length)[None, :])
        return jnp.sum(jnp.broadcast_to(allowed, (1, length)))

    allowed = jax.jit(lambda rows: jax.lax.map(of_row, rows, batch_size=64))(indices(length))
    return int(np.asarray(allowed, np.int64).sum()) / length**2


def slope(lengths: Sequence[float], costs: Sequence[float]) -> float:
    """Return the exponent a of the curve c S^a nearest to the points, in logarithms.

    >>> slope([1, 2, 4], [3, 12, 48])
    2.0
    """
    return float(np.polyfit(np.log(lengths), np.log(costs), 1)[0])


def report(found: dict[str, dict[str, list[Point]]], scale: int, machine: str) -> str:
    """Write the table of every pass and what its columns mean, as Markdown."""
    points = next(iter(next(iter(found.values())).values()))
    tables = "\n\n".join(
        f"## {name.capitalize()}\n\n{table(of, scale)}" for name, of in found.items()
    )
    return f"""\
# Time and bytes of every family of masks against the length

Made by `python -m experiments.benchmark --suites=patterns`: `attend`, alone and with the gradients
of query, key and value, `implementation="tiled"`, S from {points[0].length} to {points[-1].length},
{HEADS} heads of depth {DEPTH}, float32, on {machine}.

"Allowed" are the pairs of queries and keys that the mask allows, "live" those in tiles that are
visited, in percent of all pairs at S={points[-1].length}. Milliseconds are processor time of all
threads at that length, bytes temporaries; exponents are slopes of a log-log plot over all lengths.
Where the exponents of time and of live pairs agree, empty tiles cost nothing. A pattern
that touches every tile (a stride below the edge of a tile) saves no work, however few pairs it
allows: put side by side what attends to each other, as `masks.window_order` does for a grid.

{tables}
"""


def table(found: dict[str, list[Point]], scale: int) -> str:
    """Write shares and costs at the longest length, and the exponents over all lengths."""
    written = families(scale)
    lines = [
        "| family | mask | allowed % | live % | exponent of live pairs | ms | exponent of time "
        "| MiB | exponent of bytes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, points in found.items():
        lengths, milliseconds, mebibytes, live, _ = zip(*points, strict=True)
        pairs = [share * length**2 for share, length in zip(live, lengths, strict=True)]
        cells = (
            name,
            f"`{written[name].written}`",
            f"{100 * points[-1].allowed:.3g}",
            f"{100 * points[-1].live:.3g}",
            f"{slope(lengths, pairs):.2f}",
            f"{milliseconds[-1]:.3g}",
            f"{slope(lengths, milliseconds):.2f}",
            f"{mebibytes[-1]:.3g}",
            f"{slope(lengths, mebibytes):.2f}",
        )
        # A | inside a cell would end it.
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _attended(mask: Any) -> Callable[..., Any]:
    return functools.partial(attend, mask=mask, implementation="tiled")
