"""Where a kernel finds its operands: what is looked up for a tile, stored as it can be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.implementations.pallas.blocks import Block
from attention_jax.implementations.pallas.splitting import Looked, Split

Array = jax.Array


class Inputs:
    """The operands of a kernel, as they are collected: whole arrays, and their blocks."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []
        self.blocks: list[Block] = []

    def add(self, array: Array, block: Block) -> int:
        """Add an operand, and return its number."""
        self.arrays.append(array)
        self.blocks.append(block)
        return len(self.arrays) - 1

    def copy(self) -> Inputs:
        """Return the same operands, to add others to."""
        copied = Inputs()
        copied.arrays, copied.blocks = [*self.arrays], [*self.blocks]
        return copied


ROWS_OF = jnp.float32, jnp.int32, jnp.bool_
"""Numbers of queries that a kernel reads side by side: below each other, each takes a whole row."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a kernel finds an array of any rank and dtype, stored as a kernel can read it."""

    number: int
    shape: tuple[int, ...]
    is_boolean: bool

    @classmethod
    def of(cls, inputs: Inputs, array: Array, place: str = ".") -> Slot:
        """Add an array: all of it, or one entry a tile if `place` is q or k."""
        shape = array.shape if place == "." else array.shape[1:]
        is_boolean = array.dtype == jnp.bool_
        stored = (1,) * (2 - len(shape)) + shape
        if place == "q" and shape[1:] == (1,) and array.dtype in ROWS_OF:
            stored = (1, shape[0])
        block = Block(stored, "." * len(stored))
        if place != ".":
            block = Block((1, *stored), place + block.places)
            stored = (array.shape[0], *stored)
        array = array.astype(jnp.int32) if is_boolean else array
        return cls(inputs.add(array.reshape(stored), block), shape, is_boolean)

    @classmethod
    def of_pairs(cls, inputs: Inputs, array: Array, tile: tuple[int, int]) -> Slot:
        """Add an array [T, S] that is cut in tiles."""
        is_boolean = array.dtype == jnp.bool_
        array = array.astype(jnp.int8) if is_boolean else array
        return cls(inputs.add(array, Block(tile, "qk")), tile, is_boolean)

    def read(self, values: Sequence[Array]) -> Array:
        """Return the array, from the blocks of all operands."""
        array = values[self.number].reshape(self.shape)
        array = array.astype(jnp.int32) if self.is_boolean else array
        return array != 0 if self.is_boolean else array


class Slots(NamedTuple):
    """A function of a tile, and where a kernel finds what was looked up for it."""

    function: Split
    looked: Looked

    @classmethod
    def of(cls, inputs: Inputs, function: Split, looked: Looked, tile: tuple[int, int]) -> Slots:
        whole, of_query, of_key = (
            [Slot.of(inputs, jnp.asarray(array), place) for array in arrays]
            for arrays, place in zip(looked[:3], ".qk", strict=True)
        )
        of_pair = [Slot.of_pairs(inputs, array, tile) for array in looked.of_pair]
        return cls(function, Looked(whole, of_query, of_key, of_pair))

    def read(self, values: Sequence[Array]) -> Looked:
        return jax.tree.map(
            lambda slot: slot.read(values), self.looked, is_leaf=lambda x: isinstance(x, Slot)
        )
