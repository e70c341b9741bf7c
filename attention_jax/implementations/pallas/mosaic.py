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
from attention_jax.implementations.pallas import strips
from attention_jax.implementations.pallas.blocks import Block, Kernel, Level
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
    # One list in place of three: each would be copied for itself.
    steps = jnp.asarray(np.concatenate([live.row, live.column, _flags(kernel)]))
    places = functools.partial(_spec, kernel)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(len(live.row),),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM) if n == kernel.states else places(block)
            for n, block in enumerate(kernel.blocks)
        ],
        out_specs=[
            _whole_of(kernel, block) if kernel.is_of_column(block) else places(block)
            for block, _ in kernel.results
        ],
        scratch_shapes=[
            *(pltpu.VMEM(shape, jnp.float32) for shape in _stored(kernel)),
            pltpu.SMEM((1 + _columns(kernel),), jnp.int32),
        ],
    )
    return pl.pallas_call(
        functools.partial(_body, kernel),
        out_shape=kernel.shapes_like((), *arrays),
        grid_spec=grid,
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
    )(*varying_like([steps, *arrays], *arrays))


def _flags(kernel: Kernel) -> np.ndarray:
    """Return what each step begins and ends, and what its tile is, as bits of one number."""
    live = kernel.live
    bits = np.stack([live.first, live.last, live.opens, live.closes, live.state])
    return (bits.astype(np.int32) << np.arange(len(bits))[:, None]).sum(axis=0, dtype=np.int32)


FIRST, LAST, OPENS, CLOSES, STATE = range(5)


def _columns(kernel: Kernel) -> int:
    return kernel.counts["kq".index(kernel.by)]


LANES = 128
"""Numbers side by side in a register: one for each row is cheapest where all of them are equal."""


def _stored(kernel: Kernel) -> list[tuple[int, ...]]:
    """Return the shapes that the sums have in vector memory."""
    widths = [kernel.tile[1], *(sum_.shape[1] for sum_ in kernel.sums if not sum_.is_of_rows)]
    fits = all(width % LANES == 0 for width in widths)
    shapes = [
        (one.shape[0], LANES) if one.is_of_rows and fits else one.shape for one in kernel.sums
    ]
    own = len(shapes) - kernel.of_columns
    return [*shapes[:own], *((_columns(kernel), *shape) for shape in shapes[own:])]


def _spec(kernel: Kernel, block: Block) -> pl.BlockSpec:
    number = len(kernel.live.row)
    return pl.BlockSpec(block.shape, functools.partial(_place, kernel.by, block.places, number))


def _whole_of(kernel: Kernel, block: Block) -> pl.BlockSpec:
    """Keep all columns of a result in vector memory, until the last of them is written."""
    shape = kernel.whole(block)
    return pl.BlockSpec(shape, functools.partial(_nowhere, len(shape)))


def _nowhere(rank: int, *_: Any) -> tuple[Any, ...]:
    return (np.int32(0),) * rank


def _place(by: str, places: str, number: int, step: Any, steps: Any) -> tuple[Any, ...]:
    """Return which block of an array one of so many steps of the grid reads or writes."""
    other = "k" if by == "q" else "q"
    where = {by: steps[step], other: steps[number + step], ".": np.int32(0)}
    return tuple(where[place] for place in places)


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """One step of the grid: the references of a tile, which has the given row and column."""

    kernel: Kernel
    operands: Sequence[Any]
    results: Sequence[Any]
    sums: Sequence[Any]
    poisoned: Any
    row: Any
    column: Any

    @property
    def own(self) -> int:
        """The number of sums of a row."""
        return len(self.sums) - self.kernel.of_columns

    def begin(self) -> None:
        for reference, start in zip(self.sums[: self.own], self.kernel.sums, strict=False):
            reference[...] = jnp.full(reference.shape, start.start, jnp.float32)
        self.look(0, self.kernel.is_row_poisoned)

    def open(self) -> None:
        for reference in self.sums[self.own :]:
            reference[self.column] = jnp.zeros(reference.shape[1:], jnp.float32)
        self.look(1 + self.column, self.kernel.is_poisoned)

    def look(self, place: Any, is_poisoned: Callable[..., Array] | None) -> None:
        """Note whether NaN or Inf is among the operands of a row or column, which takes a while."""
        if is_poisoned is not None:
            self.poisoned[place] = in_kernel(is_poisoned, self.values()).astype(jnp.int32)

    def is_poisoned(self) -> Any:
        """Tell whether a tile is computed with care for NaN and Inf, which costs a lot."""
        if self.kernel.is_poisoned is None:
            return None
        found = self.poisoned[1 + self.column]
        if self.kernel.is_row_poisoned is not None:
            found = found + self.poisoned[0]
        return found > 0

    def visit(self, masked: bool, poisoned: bool) -> None:
        step = functools.partial(self.kernel.step, masked, poisoned)
        i, j = (self.row, self.column) if self.kernel.by == "q" else (self.column, self.row)
        i, j = (place * size for place, size in zip((i, j), self.kernel.tile, strict=True))
        places = [...] * self.own + [self.column] * self.kernel.of_columns
        before = [x[place] for x, place in zip(self.sums, places, strict=True)]
        sums, pairs = in_kernel(step, before, self.values(), i, j, scan=strips.scan)
        for reference, place, value in zip(self.sums, places, sums, strict=True):
            reference[place] = value
        _write(self.results[len(self.results) - len(pairs) :], pairs)

    def skip(self) -> None:
        for reference, (block, _) in zip(self.results, self.kernel.results, strict=True):
            if self.kernel.is_of_pairs(block):
                reference[...] = jnp.zeros(reference.shape, reference.dtype)

    def end(self) -> None:
        sums = [x[...] for x in self.sums[: self.own]]
        _write(self.results, in_kernel(self.kernel.finish, sums, self.values()))

    def close(self) -> None:
        kernel = self.kernel
        assert kernel.finish_column is not None
        sums = [x[self.column] for x in self.sums[self.own :]]
        results = [
            (reference, block)
            for reference, (block, _) in zip(self.results, kernel.results, strict=True)
            if kernel.is_of_column(block)
        ]
        found = in_kernel(kernel.finish_column, sums, self.values())
        for (reference, block), value in zip(results, found, strict=True):
            place = tuple(
                slice(None) if letter == "." else pl.ds(self.column * size, size)
                for size, letter in zip(block.shape, block.places, strict=True)
            )
            reference[place] = value.astype(reference.dtype)

    def values(self) -> list[Any]:
        states = self.kernel.states
        return [None if n == states else x[...] for n, x in enumerate(self.operands)]


def _write(references: Sequence[Any], values: Sequence[Array]) -> None:
    for reference, value in zip(references, values, strict=False):
        reference[...] = value.astype(reference.dtype)


def _body(kernel: Kernel, steps: Any, *rest: Any):
    now = pl.program_id(0)
    row, column, flags = (steps[n * len(kernel.live.row) + now] for n in range(3))
    operands, rest = rest[: len(kernel.blocks)], rest[len(kernel.blocks) :]
    results, (*sums, poisoned) = rest[: len(kernel.results)], rest[len(kernel.results) :]
    step = _Step(kernel, operands, results, sums, poisoned, row, column)
    is_now = functools.partial(_bit, flags)
    pl.when(is_now(FIRST))(step.begin)
    if kernel.of_columns or kernel.is_poisoned is not None:
        pl.when(is_now(OPENS))(step.open)
    states = kernel.states
    this = flags >> STATE if states is None else operands[states][0, now]
    careful = step.is_poisoned()
    for kind, visit in _cases(kernel, step).items():
        is_kind = this == kind
        pl.when(is_kind if careful is None else is_kind & ~careful)(visit)
    if careful is not None:
        pl.when((this != EMPTY) & careful)(functools.partial(step.visit, True, True))
    if kernel.of_columns:
        pl.when(is_now(CLOSES))(step.close)
    pl.when(is_now(LAST))(step.end)


def _bit(flags: Any, number: int) -> Any:
    return (flags >> number) & 1 == 1


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
