"""What a kernel computes of one tile of a head: its logits, its mask, and which pairs it keeps."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.base.finite import finite
from attention_jax.base.matmul import Products, times_transpose
from attention_jax.implementations.online import OnePass
from attention_jax.implementations.pallas import threefry
from attention_jax.implementations.pallas.blocks import Block
from attention_jax.implementations.pallas.slots import Inputs, Slots
from attention_jax.implementations.pallas.splitting import Looked, Split, split
from attention_jax.implementations.tile_passes import (
    Given,
    Operands,
    Tiles,
    one_pass,
    widened,
)
from attention_jax.masks.intervals import indices
from attention_jax.normalizers import Exponential, LogSum

Array = jax.Array


class Pairs(NamedTuple):
    """The indices of the queries [bt, 1] and keys [1, bk] of a tile."""

    q_idx: Array
    kv_idx: Array

    @classmethod
    def at(cls, i: Any, j: Any, tile: tuple[int, int]) -> Pairs:
        """Return those of the tile with the first query i and the first key j."""
        shapes = (tile[0], 1), (1, tile[1])
        return cls(
            *(
                start + lax.broadcasted_iota(jnp.int32, shape, axis)
                for axis, (start, shape) in enumerate(zip((i, j), shapes, strict=True))
            )
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """One head, its functions traced on a tile: all that its kernels are generated from.

    `leaves` are those of the functions of the score, of the bias and of the normalizer, with what
    they close over. `shares_keys` tells that other heads have the same keys and values, and
    `only_on` names the platform whose branch of a program this is.
    """

    tile: tuple[int, int]
    counts: tuple[int, int]
    products: Products
    operands: Operands
    given: Given
    how: OnePass
    leaves: list[Any]
    logits: Split
    weights: Split
    exponents: Split | None
    allowed: Split | None
    keep: Split | None
    shares_keys: bool
    only_on: str | None

    @classmethod
    def of(
        cls,
        tiles: Tiles,
        operands: Operands,
        given: Given,
        shares_keys: bool = False,
        only_on: str | None = None,
    ) -> Head:
        """Trace the functions of a head, whose sizes are multiples of the tile."""
        (rows,) = operands.captured
        tile = rows, tiles.key_size
        here = widened(tiles.slice(operands, 0, 0, rows))
        data = [here.query, here.key, here.value, *_bias(here)]  # they may vary over a mesh
        parameters = operands.functions, operands.captured[rows]
        leaves, structure = jax.tree.flatten(parameters)
        logits = functools.partial(_logits, tiles.logits[rows], structure)
        how = one_pass(operands.functions.normalizer)
        pairs = jax.ShapeDtypeStruct(tile, here.value.dtype)
        lengths = operands.query.shape[0], operands.key.shape[0]
        number, exponents, allowed, keep = math.prod(lengths), None, None, None
        if isinstance(how, LogSum):
            exponents = split(
                functools.partial(_exponents, structure), [pairs], tile, leaves, number
            )
        if rows in tiles.allowed:
            of_mask = given.mask, given.captured[rows]
            mask, mask_structure = jax.tree.flatten(of_mask)
            may = functools.partial(_allowed, tiles.allowed[rows], mask_structure)
            allowed = split(may, [], tile, mask, number)
        if given.dropout is not None:
            keep = split(threefry.function, [], tile, _dropout(given), number)
        counts = lengths[0] // rows, lengths[1] // tile[1]
        return cls(
            tile,
            counts,
            tiles.products,
            operands,
            given,
            how,
            leaves,
            split(logits, data, tile, leaves, number),
            split(functools.partial(_weights, structure), [pairs, pairs], tile, leaves, number),
            exponents,
            allowed,
            keep,
            shares_keys,
            only_on,
        )

    @property
    def indices(self) -> tuple[Array, Array]:
        """The indices of the queries and keys of all tiles, [tiles, bt, 1] and [tiles, 1, bk]."""
        (rows, columns), (down, across) = self.tile, self.counts
        return indices(rows * down).reshape(-1, rows, 1), indices(columns * across).reshape(
            -1, 1, columns
        )

    def looked_up(self, leaves: list[Any]) -> tuple[Looked, Looked]:
        """Compute what the kernels are given of the leaves, for logits and for weights."""
        return (
            self.logits.looked_up(leaves, self.indices),
            self.weights.looked_up(leaves, self.indices),
        )

    @functools.cached_property
    def moving(self) -> Moving:
        """Whole arrays of what derivatives are taken of."""
        query, key, value, bias = self.operands[:4]
        bias = [] if bias is None else [bias]
        return Moving(query, key, value, bias, *self.looked_up(self.leaves))


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """Where a kernel of a head finds its operands."""

    head: Head
    data: list[int]
    logits: Slots
    weights: Slots
    exponents: Slots | None
    allowed: Slots | None
    keep: Slots | None

    @classmethod
    def of(cls, inputs: Inputs, head: Head) -> Reader:
        """Add the operands of a head to those of a kernel."""
        operands, given, (rows, columns) = head.operands, head.given, head.tile
        data = [
            inputs.add(operands.query, Block((rows, operands.query.shape[1]), "q.")),
            inputs.add(operands.key, Block((columns, operands.key.shape[1]), "k.")),
            inputs.add(operands.value, Block((columns, operands.value.shape[1]), "k.")),
            *(inputs.add(bias, bias_block(bias, head.tile)) for bias in _bias(operands)),
        ]
        _, _, _, _, logits, weights = head.moving
        mask = jax.tree.leaves((given.mask, given.captured.get(rows)))
        slots = functools.partial(_slots, inputs, head)
        return cls(
            head,
            data,
            Slots.of(inputs, head.logits, logits, head.tile),
            Slots.of(inputs, head.weights, weights, head.tile),
            slots(head.exponents, head.leaves),
            slots(head.allowed, mask),
            slots(head.keep, [] if head.keep is None else _dropout(given)),
        )

    def may(self, masked: bool, values: Sequence[Array], pairs: Pairs) -> Array | None:
        """Return the mask of a tile, None where all is allowed."""
        if not masked or self.allowed is None:
            return None
        allowed = self.allowed.function([], *pairs, self.allowed.read(values))
        return jnp.broadcast_to(allowed, self.head.tile)

    def kept(self, values: Sequence[Array], pairs: Pairs) -> Array | None:
        """Return the factor of each pair under dropout, None without."""
        return self.keep and self.keep.function([], *pairs, self.keep.read(values))

    def query_poison(self, values: Sequence[Array]) -> Array:
        """Return NaN for each query that holds NaN or Inf, else 0, [bt, 1]."""
        query = values[self.data[0]].astype(jnp.float32)
        return jnp.sum(jnp.where(jnp.isfinite(query), 0.0, jnp.nan), axis=1, keepdims=True)

    def key_poison(self, values: Sequence[Array]) -> Array:
        """Return NaN for each key that holds NaN or Inf in itself or its value, else 0, [1, bk].

        They are counted by a product, which gives what is cheap to add to the columns of a tile.
        """
        count = jnp.zeros((1, self.head.tile[1]), jnp.float32)
        for rows in (values[n].astype(jnp.float32) for n in self.data[1:3]):
            bad = jnp.where(jnp.isfinite(rows), 0.0, 1.0)
            counts = times_transpose(jnp.ones((LEAST_ROWS, rows.shape[1])), bad)
            count = count + jnp.max(counts, axis=0, keepdims=True)
        return jnp.where(count > 0.0, jnp.nan, 0.0)

    def is_poisoned(self, values: Sequence[Array]) -> Array:
        """Tell whether NaN or Inf may be among the keys and values of a tile.

        Then their sum is neither finite; that of large numbers may not be either.
        """
        return ~jnp.isfinite(sum(_total(values[n].astype(jnp.float32)) for n in self.data[1:3]))

    def is_row_poisoned(self, values: Sequence[Array]) -> Array:
        """Tell the same of the queries of a tile."""
        return ~jnp.isfinite(_total(values[self.data[0]].astype(jnp.float32)))

    def read(self, values: Sequence[Array], poisoned: bool = True) -> Moving:
        """Return the blocks of a tile that derivatives are taken of, in float32.

        NaN and Inf are replaced; unless `poisoned`, keys and values hold none.
        """
        query, key, value, *bias = (values[n].astype(jnp.float32) for n in self.data)
        if poisoned:
            key, value = finite(key), finite(value)
        return Moving(
            finite(query), key, value, bias, self.logits.read(values), self.weights.read(values)
        )

    def logits_of(self, moving: Moving, pairs: Pairs) -> Array:
        """Return the logits of a tile."""
        data = [moving.query, moving.key, moving.value, *moving.bias]
        return self.logits.function(data, *pairs, moving.logits)

    def weights_of(self, logits: Array, base: Array, moving: Moving, pairs: Pairs) -> Array:
        """Return the weights of logits, given the statistics of rows, [bt, 1] or for each pair."""
        base = jnp.broadcast_to(base, logits.shape)
        return self.weights.function([logits, base], *pairs, moving.weights)

    def exponents_of(self, logits: Array, values: Sequence[Array], pairs: Pairs) -> Array:
        """Return the logarithms of what the weights add to the sums of their rows."""
        assert self.exponents is not None
        return self.exponents.function([logits], *pairs, self.exponents.read(values))


LEAST_ROWS = 16
"""Fewer rows are no operand of a product on every platform."""


class Moving(NamedTuple):
    """The blocks of a tile of which a kernel takes derivatives."""

    query: Any
    key: Any
    value: Any
    bias: list[Any]
    logits: Looked
    weights: Looked


def bias_block(bias: Array, tile: tuple[int, int]) -> Block:
    """Return how an array [T or 1, S or 1] is cut."""
    shape = tuple(size if full > 1 else 1 for size, full in zip(tile, bias.shape, strict=True))
    places = "".join(
        place if full > 1 else "." for place, full in zip("qk", bias.shape, strict=True)
    )
    return Block(shape, places)


def _total(x: Array) -> Array:
    """Return the sum of a block, whose rows are added in a few independent chains."""
    chains = math.gcd(len(x), CHAINS)
    rows = jnp.sum(x.reshape(chains, -1, x.shape[1]), axis=0)
    return jnp.sum(jnp.sum(rows, axis=0))


CHAINS = 8
"""Additions that wait for each other leave most of the units of a TPU idle."""


def _slots(inputs: Inputs, head: Head, function: Split | None, leaves: list[Any]) -> Slots | None:
    if function is None:
        return None
    return Slots.of(inputs, function, function.looked_up(leaves, head.indices), head.tile)


def _bias(operands: Operands) -> list[Array]:
    return [] if operands.bias is None else [operands.bias]


def _dropout(given: Given) -> list[Array]:
    assert given.dropout is not None
    words, rate = given.dropout
    return [*threefry.as_signed(words), rate]


def _logits(
    function: Any, structure: Any, data: Sequence[Array], q_idx: Array, kv_idx: Array, leaves: Any
) -> Array:
    functions, captured = jax.tree.unflatten(structure, leaves)
    query, key, value, *bias = data
    tile = Operands(
        query=query,
        key=key,
        value=value,
        bias=bias[0] if bias else None,
        functions=functions,
        captured={},
    )
    return function(tile, q_idx[:, 0], kv_idx[0], *captured)


def _weights(
    structure: Any, data: Sequence[Array], q_idx: Array, kv_idx: Array, leaves: Any
) -> Array:
    functions, _ = jax.tree.unflatten(structure, leaves)
    how = one_pass(functions.normalizer)
    logits, base = data
    if isinstance(how, Exponential):  # the same, without leaving the layout of a kernel
        return jnp.exp(logits - base)
    return how.weight(logits, base[:, 0])


def _exponents(
    structure: Any, data: Sequence[Array], q_idx: Array, kv_idx: Array, leaves: Any
) -> Array:
    functions, _ = jax.tree.unflatten(structure, leaves)
    how = one_pass(functions.normalizer)
    assert isinstance(how, LogSum)
    return how.exponent(data[0])


def _allowed(
    function: Any, structure: Any, data: Sequence[Array], q_idx: Array, kv_idx: Array, leaves: Any
) -> Array:
    mask, captured = jax.tree.unflatten(structure, leaves)
    return function(mask, q_idx[:, 0], kv_idx[0], *captured)
