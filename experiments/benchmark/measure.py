"""Measure programs in turn, and the ratio of two in every turn."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from jax.experimental.compilation_cache import compilation_cache


class Program(NamedTuple):
    """A function and its arguments, compiled unless `jit` is False.

    A call that does not return JAX arrays must not return before its results are computed.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    jit: bool = True


class Cost(NamedTuple):
    """What one turn took; `cpu` is the processor time of all threads, if `wall` is a time.

    Processor time is more reliable than wall time on a machine that is shared.
    """

    wall: float
    cpu: float


Meter = Callable[[], Cost]
Name = TypeVar("Name", bound=Hashable)


def milliseconds(program: Program) -> Meter:
    """Compile a program; return a meter of the milliseconds of a call."""
    call = compiled(program) if program.jit else program.function
    return milliseconds_of(call, program.arguments)


def milliseconds_of(call: Callable[..., Any], arguments: tuple[Any, ...]) -> Meter:
    """Call a function once to warm up; return a meter of the milliseconds of a call."""
    jax.block_until_ready(call(*arguments))
    return lambda: _timed(lambda: jax.block_until_ready(call(*arguments)), 1e3)


def compile_seconds(program: Program) -> Meter:
    """Return a meter of the seconds to trace and compile a program, with cleared caches."""

    def measure() -> Cost:
        jax.clear_caches()
        with _no_compilation_cache():
            return _timed(lambda: compiled(program), 1)

    return measure


@contextlib.contextmanager
def _no_compilation_cache() -> Iterator[None]:
    """Switch off the persistent compilation cache."""
    flag = "jax_enable_compilation_cache"
    before = getattr(jax.config, flag)
    jax.config.update(flag, False)
    # JAX reads the flag only once.
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update(flag, before)
        compilation_cache.reset_cache()


def mebibytes(program: Program) -> Meter:
    """Return a meter of the memory of temporaries in MiB, by the compiler's analysis."""
    held = mebibytes_of(compiled(program))
    return lambda: Cost(held, held)


def mebibytes_of(compiled: Any) -> float:
    """Return the memory of temporaries of a compiled function in MiB; NaN where it is unknown."""
    analysis = compiled.memory_analysis()
    return float("nan") if analysis is None else analysis.temp_size_in_bytes / 2**20


def seconds_a_token(program: Program) -> Meter:
    """Return a meter of seconds a token, for a program that returns its number of tokens."""
    program.function()

    def measure() -> Cost:
        tokens: list[int] = []
        cost = _timed(lambda: tokens.append(program.function()), 1)
        return Cost(cost.wall / tokens[0], cost.cpu / tokens[0])

    return measure


def compiled(program: Program) -> Any:
    """Compile a program for its arguments."""
    return jax.jit(program.function).lower(*program.arguments).compile()


METERS = {
    "ms": milliseconds,
    "s": compile_seconds,
    "MiB": mebibytes,
    "tokens/s": seconds_a_token,
}
RATES = ("tokens/s",)
"""Units that are one over the cost."""


def take_turns(meters: Mapping[Name, Meter], repeats: int) -> dict[Name, list[Cost]]:
    """Measure all in turn, `repeats` times, each turn beginning with another one.

    >>> costs = take_turns({"a": lambda: Cost(1, 1), "b": lambda: Cost(2, 2)}, repeats=2)
    >>> compared(costs["a"], costs["b"]).ratio
    2.0
    """
    names = list(meters)
    costs: dict[Name, list[Cost]] = {name: [] for name in names}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            costs[name].append(meters[name]())
    return costs


class Compared(NamedTuple):
    """Medians of two programs and how many times more the second costs, turn by turn."""

    ours: float
    peer: float
    ratio: float
    least: float
    most: float
    cpu_ratio: float


def compared(ours: list[Cost], peer: list[Cost]) -> Compared:
    """Compare the turns of two programs."""
    pairs = list(zip(ours, peer, strict=True))
    ratios = [theirs.wall / mine.wall for mine, theirs in pairs]
    return Compared(
        statistics.median(cost.wall for cost in ours),
        statistics.median(cost.wall for cost in peer),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        statistics.median(theirs.cpu / mine.cpu for mine, theirs in pairs),
    )


def _timed(call: Callable[[], Any], scale: float) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Cost((time.perf_counter() - wall) * scale, (time.process_time() - cpu) * scale)
