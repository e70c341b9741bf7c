"""Kernels for TPU, by Mosaic: a grid over the live tiles, one after the other.

Which tile is next is read before the kernel runs (scalar prefetch), so that its operands are on
their way; what is added up over a row stays in vector memory.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attention_jax.base.trees import varying_like
from attention_jax.implementations.pallas.blocks import Block, Kernel, Level, Sum
from attention_jax.implementations.pallas.replay import in_kernel
from attention_jax.masks import EMPTY, FULL, PARTIAL

Array = jax.Array


def run(kernel: Kernel, interpret: bool, levels: Sequence[Level], *arrays: Array) -> list[Array]:
    """Run a kernel over whole arrays; its blocks are cut from the last two axes only."""
    function = functools.partial(_run, kernel, interpret)
    for level in levels:
        function = functools.partial(_batched, function, level)
    return function(*arrays)


def _batched(function: Callable[..., list[Array]], level: Level, *arrays: Array) -> list[Array]:
    """Vectorise over an axis, which is moved to the front and back."""
    axes = [None if axis is None else 0 for axis in level.operands]
    moved = [
        x if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(arrays, level.operands, strict=True)
    ]
    results = jax.vmap(function, axes)(*moved)
    return [jnp.moveaxis(x, 0, axis) for x, axis in zip(results, level.results, strict=True)]


def _run(kernel: Kernel, interpret: bool, *arrays: Array) -> list[Array]:
    live = kernel.live
    prefetched = live.row, live.column, live.first, live.last, live.state
    places = functools.partial(_spec, kernel)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(prefetched),
        grid=(len(live.row),),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM) if n == kernel.states else places(block)
            for n, block in enumerate(kernel.blocks)
        ],
        out_specs=[places(block) for block, _ in kernel.results],
        scratch_shapes=[pltpu.VMEM(_stored(kernel, one), jnp.float32) for one in kernel.sums],
    )
    return pl.pallas_call(
        functools.partial(_body, kernel),
        out_shape=kernel.shapes_like((), *arrays),
        grid_spec=grid,
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
    )(*varying_like([*map(jnp.asarray, prefetched), *arrays], *arrays))


LANES = 128
"""Numbers side by side in a register: one for each row is cheapest where all of them are equal."""


def _stored(kernel: Kernel, one: Sum) -> tuple[int, ...]:
    """Return the shape that a sum has in vector memory."""
    widths = [kernel.tile[1], *(sum_.shape[1] for sum_ in kernel.sums if not sum_.is_of_rows)]
    fits = all(width % LANES == 0 for width in widths)
    return (one.shape[0], LANES) if one.is_of_rows and fits else one.shape


def _spec(kernel: Kernel, block: Block) -> pl.BlockSpec:
    return pl.BlockSpec(block.shape, functools.partial(_place, kernel.by, block.places))


def _place(by: str, places: str, step: Any, rows: Any, columns: Any, *_: Any) -> tuple[Any, ...]:
    """Return which block of an array a step of the grid reads or writes."""
    other = "k" if by == "q" else "q"
    where = {by: rows[step], other: columns[step], ".": np.int32(0)}
    return tuple(where[place] for place in places)


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """One step of the grid: the references of a tile."""

    kernel: Kernel
    operands: Sequence[Any]
    results: Sequence[Any]
    sums: Sequence[Any]
    i: Any
    j: Any

    def begin(self) -> None:
        for reference, start in zip(self.sums, self.kernel.sums, strict=True):
            reference[...] = jnp.full(reference.shape, start.start, jnp.float32)

    def is_poisoned(self) -> Any:
        """Tell whether a tile is computed with care for NaN and Inf, which costs a lot."""
        if self.kernel.is_poisoned is None:
            return None
        return in_kernel(self.kernel.is_poisoned, self.values())

    def visit(self, masked: bool, poisoned: bool) -> None:
        step = functools.partial(self.kernel.step, masked, poisoned)
        values = self.values()
        sums, pairs = in_kernel(step, [x[...] for x in self.sums], values, self.i, self.j)
        _write(self.sums, sums)
        _write(self.results[len(self.results) - len(pairs) :], pairs)

    def skip(self) -> None:
        for reference, (block, _) in zip(self.results, self.kernel.results, strict=True):
            if self.kernel.is_of_pairs(block):
                reference[...] = jnp.zeros(reference.shape, reference.dtype)

    def end(self) -> None:
        values = self.values()
        _write(self.results, in_kernel(self.kernel.finish, [x[...] for x in self.sums], values))

    def values(self) -> list[Any]:
        states = self.kernel.states
        return [None if n == states else x[...] for n, x in enumerate(self.operands)]


def _write(references: Sequence[Any], values: Sequence[Array]) -> None:
    for reference, value in zip(references, values, strict=False):
        reference[...] = value.astype(reference.dtype)


def _body(kernel: Kernel, rows: Any, columns: Any, first: Any, last: Any, state: Any, *rest: Any):
    now = pl.program_id(0)
    operands, rest = rest[: len(kernel.blocks)], rest[len(kernel.blocks) :]
    results, sums = rest[: len(kernel.results)], rest[len(kernel.results) :]
    here = {kernel.by: rows[now], "qk".replace(kernel.by, ""): columns[now]}
    step = _Step(
        kernel, operands, results, sums, here["q"] * kernel.tile[0], here["k"] * kernel.tile[1]
    )
    pl.when(first[now] == 1)(step.begin)
    states = kernel.states
    this = state[now] if states is None else operands[states][0, now]
    poisoned = step.is_poisoned()
    for kind, visit in _cases(kernel, step).items():
        is_kind = this == kind
        pl.when(is_kind if poisoned is None else is_kind & ~poisoned)(visit)
    if poisoned is not None:
        pl.when((this != EMPTY) & poisoned)(functools.partial(step.visit, True, True))
    pl.when(last[now] == 1)(step.end)


def _cases(kernel: Kernel, step: _Step) -> dict[int, Callable[[], None]]:
    """Return what is done with tiles of each kind, as far as there are such tiles."""
    cases = {
        EMPTY: step.skip,
        PARTIAL: functools.partial(step.visit, True, False),
        FULL: functools.partial(step.visit, False, False),
    }
    if kernel.states is not None:
        return cases
    return {kind: cases[kind] for kind in (PARTIAL, FULL) if kind in kernel.live.state}
