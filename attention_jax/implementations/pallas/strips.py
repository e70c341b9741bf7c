"""A scan over features on a TPU, for a strip of rows of a tile at a time.

A tile of 512 x 512 sums is 256 vector registers, where there are 64. A loop over features that
carries a tile loads and stores all of it at every turn, and the unit that stores sets the pace. So
where rows do not depend on each other, all features are added up for a few rows, whose sums stay in
registers, then for the next few. What strips read and write waits in vector memory.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attention_jax.implementations.pallas import loops
from attention_jax.implementations.pallas.cutting import COLUMN, SHARED, TILE, Step
from attention_jax.implementations.pallas.loops import Replayed

Array = jax.Array

SUBLANES, LANES = 8, 128
"""Rows and columns of a vector register."""

REGISTERS = 16
"""Vector registers that the sums of a strip take."""

TOGETHER = 16
"""Features of one turn of a loop: the more, the less is waited for the first of them."""


def scan(replayed: Replayed, params: dict[str, Any], *arguments: Any) -> list[Any]:
    """Evaluate a scan by strips if it only adds up features of a tile, else as it is.

    One that stacks as well, as a backward pass does, would add up each strip along its rows: that
    takes longer than to load and store sums.
    """
    step = Step.of(replayed, params, _rows_of_strip)
    if step is None:
        return loops.scan(replayed, params, *arguments)
    features = _Features(step, params["length"], params["reverse"])
    waiting = jax.eval_shape(features.waiting, arguments)
    scratch = [pltpu.VMEM(x.shape, x.dtype) for x in waiting]
    return pl.run_scoped(functools.partial(features.of_tile, arguments), *scratch)


def _rows_of_strip(tile: tuple[int, int]) -> int:
    """Return how many rows have their sums in registers, a divisor of those of a tile."""
    rows, columns = tile
    most = max(1, REGISTERS // -(-columns // LANES))
    fits = (n for n in range(most, 0, -1) if rows % (n * SUBLANES) == 0)
    return SUBLANES * next(fits, 0) or rows


class _Features(NamedTuple):
    """The features of a tile, in the order of a scan."""

    step: Step
    length: int
    reverse: bool

    def waiting(self, arguments: Sequence[Array]) -> list[Array]:
        """Return what strips read, laid out for it: a column of theirs is one in memory, too."""
        return [
            x if kind == TILE else x.T if kind == COLUMN else x.reshape(self.length, -1)
            for kind, x in zip(self.step.given, arguments, strict=True)
            if kind != SHARED
        ]

    def of_tile(self, arguments: Sequence[Array], *references: Any) -> list[Array]:
        """Return what a scan carries, given references to what waits."""
        step = self.step
        for reference, x in zip(references, self.waiting(arguments), strict=True):
            reference[...] = x
        those = iter(references)
        given = [
            x if kind == SHARED else next(those)
            for kind, x in zip(step.given, arguments, strict=True)
        ]
        pl.loop(0, step.tile[0] // step.rows)(functools.partial(self.of_strip, given))
        return [x[...] for x in given[step.constants : step.fixed]]

    def of_strip(self, given: list[Any], strip: Array) -> None:
        """Add up all features of a strip, and store the sums."""
        step = self.step
        at = pl.ds(pl.multiple_of(strip * step.rows, step.rows), step.rows)
        here = [
            x[at, :] if kind in (TILE, COLUMN) else x
            for kind, x in zip(step.given, given, strict=True)
        ]
        turns, left = divmod(self.length, TOGETHER)
        turn = functools.partial(self.of_turn, here, TOGETHER)
        sums = lax.fori_loop(0, turns, turn, here[step.constants : step.fixed])
        sums = self.of_turn(here, left, turns, sums)
        for reference, x in zip(given[step.constants : step.fixed], sums, strict=True):
            reference[at, :] = x

    def of_turn(self, here: list[Any], number: int, turn: Any, sums: list[Array]) -> list[Array]:
        """Add some features that follow each other; those before took as many turns."""
        step = self.step
        for n in range(number):
            taken = self.taken(here[step.fixed :], turn * TOGETHER + n)
            sums = step(*here[: step.constants], *sums, *taken)
        return sums

    def taken(self, split: list[Any], n: Any) -> list[Array]:
        """Return the part of each array that belongs to a feature."""
        step = self.step
        n = jnp.asarray(self.length - 1 - n if self.reverse else n, jnp.int32)
        chosen = lax.broadcasted_iota(jnp.int32, (step.rows, self.length), 1) == n
        return [
            jnp.sum(jnp.where(chosen, x, 0.0), axis=1)
            if kind == COLUMN
            else x[pl.ds(n, 1), :].reshape(shape)
            for kind, x, shape in zip(step.given[step.fixed :], split, step.parts, strict=True)
        ]
