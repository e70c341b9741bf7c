"""Kernels for GPU, by Triton: a program for every row of tiles, with a loop over its live tiles."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from attention_jax.base.trees import varying_like
from attention_jax.implementations.pallas.blocks import Block, Kernel, Level, layout, sizes_of
from attention_jax.implementations.pallas.replay import in_kernel
from attention_jax.masks import EMPTY, FULL, PARTIAL

Array = jax.Array


def run(kernel: Kernel, interpret: bool, levels: Sequence[Level], *arrays: Array) -> list[Array]:
    """Run a kernel over whole arrays, whose vectorised axes are axes of the grid."""
    live = _by_kind(kernel)
    bounds = jnp.asarray(live.bounds), jnp.asarray(live.column), jnp.asarray(live.number)
    whole = [_whole(x.shape) for x in bounds]
    of_operands = [
        _spec(kernel, block, [level.operands[n] for level in levels])
        for n, block in enumerate(kernel.blocks)
    ]
    of_results = [
        _spec(kernel, block, [level.results[n] for level in levels])
        for n, (block, _) in enumerate(kernel.results)
    ]
    return pl.pallas_call(
        functools.partial(_body, kernel, live.kinds),
        out_shape=kernel.shapes_like(levels, *arrays),
        grid=(kernel.counts["qk".index(kernel.by)], *sizes_of(levels, arrays)),
        in_specs=[*whole, *of_operands],
        out_specs=of_results,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
    )(*varying_like([*bounds, *arrays], *arrays))


@dataclasses.dataclass(frozen=True, eq=False)
class _ByKind:
    """The columns of the live tiles, for each row those of one kind after those of another.

    `bounds [kinds, rows + 1]` are where the tiles of a row begin in `column [n]`.
    """

    kinds: tuple[int, ...]
    bounds: np.ndarray
    column: np.ndarray
    number: np.ndarray


def _by_kind(kernel: Kernel) -> _ByKind:
    live = kernel.live
    exists = live.number >= 0
    row, column, state = live.row[exists], live.column[exists], live.state[exists]
    number = np.flatnonzero(exists).astype(np.int32)
    kinds = (EMPTY,) if kernel.states is not None else (PARTIAL, FULL)
    state = np.zeros_like(state) if kernel.states is not None else state
    kinds = tuple(kind for kind in kinds if kind in state)
    rows = kernel.counts["qk".index(kernel.by)]
    bounds, order = [], []
    for kind in kinds:
        of_kind = np.flatnonzero(state == kind)
        bounds.append(
            len(np.concatenate([*order, []])) + np.searchsorted(row[of_kind], np.arange(rows + 1))
        )
        order.append(of_kind)
    order = np.concatenate([*order, []]).astype(int)
    column, number = (np.append(x[order], 0).astype(np.int32) for x in (column, number))
    return _ByKind(kinds, np.array(bounds, np.int32).reshape(-1, rows + 1), column, number)


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, functools.partial(_nowhere, len(shape)))


def _nowhere(rank: int, *_: Any) -> tuple[int, ...]:
    return (0,) * rank


def _spec(kernel: Kernel, block: Block, positions: Sequence[int | None]) -> pl.BlockSpec:
    """Cut an array along the rows of the grid; along the columns all of it can be reached.

    `positions` are those of the vectorised axes.
    """
    many = dict(zip("qk", kernel.counts, strict=True))
    shape = [
        (size if place in (kernel.by, ".") else size * many[place],)
        for size, place in zip(block.shape, block.places, strict=True)
    ]
    sizes = [size[0] if isinstance(size, tuple) else None for size in layout(shape, positions)]
    places = tuple(layout(block.places, positions))
    return pl.BlockSpec(tuple(sizes), functools.partial(_row_block, kernel.by, places))


def _row_block(by: str, places: tuple[Any, ...], row: Any, *levels: Any) -> tuple[Any, ...]:
    """Return which block a program reads or writes, given its places in the grid."""
    where = {by: row, **dict(enumerate(levels))}
    return tuple(where.get(place, 0) for place in places)


@dataclasses.dataclass(frozen=True, eq=False)
class _Row:
    """A row of tiles: the references of its operands and results."""

    kernel: Kernel
    operands: Sequence[Any]
    results: Sequence[Any]
    row: Any

    def at(self, block: Block, column: Any) -> tuple[Any, ...]:
        """Return where in a reference the block of a column is."""
        return tuple(
            slice(None) if place in (self.kernel.by, ".") else pl.ds(column * size, size)
            for size, place in zip(block.shape, block.places, strict=True)
        )

    def visit(self, masked: bool, column: Any, sums: list[Array]) -> list[Array]:
        kernel = self.kernel
        first = {kernel.by: self.row, "qk".replace(kernel.by, ""): column}
        first = {side: first[side] * size for side, size in zip("qk", kernel.tile, strict=True)}
        values = [
            None if n == kernel.states else reference[self.at(block, column)]
            for n, (reference, block) in enumerate(zip(self.operands, kernel.blocks, strict=True))
        ]
        step = functools.partial(kernel.step, masked, kernel.is_poisoned is not None)
        sums, pairs = in_kernel(step, sums, values, first["q"], first["k"])
        self.write(pairs, column)
        return sums

    def skip(self, column: Any, sums: list[Array]) -> list[Array]:
        self.write(
            [
                jnp.zeros(block.shape, dtype)
                for block, dtype in self.kernel.results
                if self.kernel.is_of_pairs(block)
            ],
            column,
        )
        return sums

    def write(self, pairs: list[Array], column: Any) -> None:
        behind = len(self.results) - len(pairs)
        for value, reference, (block, _) in zip(
            pairs, self.results[behind:], self.kernel.results[behind:], strict=True
        ):
            reference[self.at(block, column)] = value.astype(reference.dtype)

    def visit_any(self, state: Any, column: Any, sums: list[Array]) -> list[Array]:
        return lax.switch(
            state,
            [
                self.skip,
                functools.partial(self.visit, True),
                functools.partial(self.visit, False),
            ],
            column,
            sums,
        )


def _body(
    kernel: Kernel, kinds: Sequence[int], bounds: Any, columns: Any, numbers: Any, *rest: Any
) -> None:
    row = pl.program_id(0)
    operands, results = rest[: len(kernel.blocks)], rest[len(kernel.blocks) :]
    here = _Row(kernel, operands, results, row)
    sums = [jnp.full(one.shape, one.start, jnp.float32) for one in kernel.sums]
    for n, kind in enumerate(kinds):
        visit = functools.partial(_visit, here, kind, columns, numbers)
        sums = lax.fori_loop(bounds[n, row], bounds[n, row + 1], visit, sums)
    values = [
        reference[...] if kernel.by in block.places and not kernel.is_of_pairs(block) else None
        for reference, block in zip(operands, kernel.blocks, strict=True)
    ]
    finished = in_kernel(kernel.finish, sums, values)
    for reference, value in zip(results, finished, strict=False):
        reference[...] = value.astype(reference.dtype)


def _visit(
    here: _Row, kind: int, columns: Any, numbers: Any, n: Any, sums: list[Array]
) -> list[Array]:
    if here.kernel.states is None:
        return here.visit(kind == PARTIAL, columns[n], sums)
    state = here.operands[here.kernel.states][0, numbers[n]]
    return here.visit_any(state, columns[n], sums)
