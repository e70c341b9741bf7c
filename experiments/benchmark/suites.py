"""The suites: cases, the programs that they compare, and target ratios."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from attention_jax import masks
from experiments.benchmark import programs
from experiments.benchmark.measure import Program
from experiments.benchmark.programs import HAS_TORCH, Shape


class Comparison(NamedTuple):
    """Two programs; `target` is the least ratio of the peer's cost to ours."""

    case: str
    ours: str
    peer: str
    target: float


class Group(NamedTuple):
    """Programs that take turns, by name, the unit of what is measured, and what is compared."""

    unit: str
    programs: dict[str, Callable[[], Program]]
    comparisons: list[Comparison]


class Sweep(NamedTuple):
    """Programs by name, each for a length; a line stops at its longest length."""

    unit: str
    title: str
    lines: dict[str, tuple[Callable[[int], Program], list[int]]]


class Suite(NamedTuple):
    """Groups of cases and the sweep that is plotted; `scale` divides every length."""

    groups: Callable[[int], Iterator[Group]]
    sweep: Callable[[int], Sweep] | None = None


def attention_groups(scale: int) -> Iterator[Group]:
    """Dot products: full against the peers, sparse masks against full ones."""
    short, long = 4096 // scale, 16384 // scale
    causal = masks.Causal()
    window = causal & masks.Window(256 // scale, 0)
    for backward, name, faster in ((False, "forward", 3.5), (True, "forward + backward", 2.3)):
        case = f"S={short} full, {name}"
        alone = (
            {} if backward else {"products alone": lambda: programs.products_alone(Shape(short))}
        )
        yield Group(
            "ms",
            alone
            | {
                "attend": lambda backward=backward: programs.ours(Shape(short), backward),
                "jax.nn": lambda backward=backward: programs.jax_nn(Shape(short), backward),
            }
            | _torch("PyTorch", lambda b=backward: programs.torch_dot(Shape(short), b)),
            [
                Comparison(case, "attend", "jax.nn", faster),
                *[Comparison(case, "attend", name, 0.85) for name in alone],
                *_against_torch(Comparison(case, "attend", "PyTorch", 0.9)),
            ],
        )
        yield Group(
            "ms",
            {
                "causal": lambda b=backward: programs.ours(Shape(short), b, mask=causal),
                "full": lambda b=backward: programs.ours(Shape(short), b),
            },
            [Comparison(f"S={short} causal, {name}", "causal", "full", 1.7)],
        )
    for backward, name in ((False, "forward"), (True, "forward + backward")):
        yield Group(
            "ms",
            {
                "window": lambda b=backward: programs.ours(Shape(long), b, mask=window),
                "causal": lambda b=backward: programs.ours(Shape(long), b, mask=causal),
                "window, S/2": lambda b=backward: programs.ours(Shape(long // 2), b, mask=window),
            },
            [
                Comparison(f"S={long} window, {name}", "window", "causal", 12),
                Comparison(f"S={long} from {long // 2}, {name}", "window", "window, S/2", 0.45),
            ],
        )
    yield Group(
        "ms",
        {
            "documents": lambda: programs.packed(Shape(long), document=1024 // scale),
            "full": lambda: programs.ours(Shape(long)),
        },
        [Comparison(f"S={long} documents, forward", "documents", "full", 8)],
    )


def additive_groups(scale: int) -> Iterator[Group]:
    """The additive score against the textbook formula."""
    shape = Shape(1024 // scale, heads=4)
    for backward, name, textbook, torch in (
        (False, "forward", 8, 20),
        (True, "forward + backward", 5, 5),
    ):
        case = f"additive S={shape.length}, {name}"
        peers = {
            "textbook": lambda b=backward: programs.additive_textbook(shape, b),
        } | _torch("PyTorch", lambda b=backward: programs.torch_additive(shape, b))
        yield Group(
            "ms",
            {"attend": lambda b=backward: programs.additive_ours(shape, b)} | peers,
            [
                Comparison(case, "attend", "textbook", textbook),
                *_against_torch(Comparison(case, "attend", "PyTorch", torch)),
            ],
        )
        yield Group(
            "MiB",
            {
                "attend": lambda b=backward: programs.additive_ours(shape, b),
                "textbook": lambda b=backward: programs.additive_textbook(shape, b),
            },
            [Comparison(case, "attend", "textbook", 20)],
        )


def memory_groups(scale: int) -> Iterator[Group]:
    """Temporaries of the backward pass."""
    shape = Shape(8192 // scale)
    yield Group(
        "MiB",
        {
            "attend": lambda: programs.ours(shape, backward=True),
            "jax.nn": lambda: programs.jax_nn(shape, backward=True),
        },
        [Comparison(f"S={shape.length} forward + backward", "attend", "jax.nn", 20)],
    )


def compile_groups(scale: int) -> Iterator[Group]:
    """Time to trace and compile, which must not grow with the length."""
    short, long = 1024 // scale, 16384 // scale
    for backward, name in ((False, "forward"), (True, "forward + backward")):
        yield Group(
            "s",
            {
                "attend": lambda b=backward: programs.ours(Shape(long), b),
                "jax.nn": lambda b=backward: programs.jax_nn(Shape(long), b),
                "attend, short": lambda b=backward: programs.ours(Shape(short), b),
            },
            [
                Comparison(f"S={long}, {name}", "attend", "jax.nn", 0.5),
                Comparison(f"S={short} to {long}, {name}", "attend", "attend, short", 0.8),
            ],
        )


def time_sweep(scale: int) -> Sweep:
    """Time of the forward pass; jax.nn stops where its logits fill 2 GiB."""
    lengths = [2**power // scale for power in range(9, 15)]
    window = masks.Causal() & masks.Window(256 // scale, 0)
    return Sweep("ms", "Forward pass", _lines(lengths, False, window))


def bytes_sweep(scale: int) -> Sweep:
    """Temporaries of forward and backward pass."""
    lengths = [2**power // scale for power in range(9, 15)]
    window = masks.Causal() & masks.Window(256 // scale, 0)
    return Sweep("MiB", "Temporaries of forward and backward pass", _lines(lengths, True, window))


def additive_sweep(scale: int) -> Sweep:
    """Time of additive attention; the textbook formula stops at 4 GiB of features."""
    lengths = [2**power // scale for power in range(7, 13)]
    lines = {
        "attend": (lambda s: programs.additive_ours(Shape(s, heads=4)), lengths),
        "textbook": (lambda s: programs.additive_textbook(Shape(s, heads=4)), lengths[:-1]),
    }
    return Sweep("ms", "Additive attention, forward pass", lines)


SUITES = {
    "attention": Suite(attention_groups, time_sweep),
    "memory": Suite(memory_groups, bytes_sweep),
    "compile": Suite(compile_groups),
    "additive": Suite(additive_groups, additive_sweep),
}


def _lines(lengths: list[int], backward: bool, window: masks.Mask) -> dict[str, Any]:
    masked = {"full": None, "causal": masks.Causal(), "causal window": window}
    lines: dict[str, Any] = {
        f"attend, {name}": (
            lambda s, mask=mask: programs.ours(Shape(s), backward, mask=mask),
            lengths,
        )
        for name, mask in masked.items()
    }
    lines["jax.nn"] = (lambda s: programs.jax_nn(Shape(s), backward), lengths[:-1])
    return lines


def _torch(name: str, program: Callable[[], Program]) -> dict[str, Callable[[], Program]]:
    return {name: program} if HAS_TORCH else {}


def _against_torch(comparison: Comparison) -> list[Comparison]:
    return [comparison] if HAS_TORCH else []
