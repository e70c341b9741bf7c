"""The passes over tiles of all heads, [N, bt, bk], where maps mix heads.

A map of logits changes what is normalized, and no more. A map of weights needs each row's final
log-sum-exp L first: a second pass then adds up mix_weights(exp(e - L)) value tile by tile.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.base.matmul import Products, times
from attention_jax.base.trees import Rest, merge_floats, split_floats, varying_like
from attention_jax.base.typing import at_least_float32
from attention_jax.implementations import online
from attention_jax.implementations.mixed_heads import kept_of, repeated
from attention_jax.implementations.mixed_tiles import Given, MixedTiles, Operands, widened
from attention_jax.implementations.passes import Pass, over_visits, tangent_of_tile
from attention_jax.implementations.tile_passes import one_pass, rows_from
from attention_jax.masks.intervals import indices

Array = jax.Array


class Tile(NamedTuple):
    """What `online.Tile` holds, of all normalized heads; one head of it makes one."""

    logits: Array
    value: Array
    allowed: Array | None
    keep: Array | None
    poison: Array

    def of_head(self, products: Products) -> online.Tile:
        """Return the tile of one head; of its query, the logits are poisoned already."""
        query = jnp.zeros(self.logits.shape[0], self.logits.dtype)
        return online.Tile(
            self.logits, self.value, self.allowed, self.keep, query, self.poison, products
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Contexts:
    """The heads that are normalized: their sums over keys, with values or of rows alone."""

    tiles: MixedTiles
    with_values: bool

    def tile(self, here: Operands, given: Given, i: Any, j: Any, masked: bool) -> Tile:
        """Return the tile of all heads."""
        rows, size = here.query.shape[1] - sum(self.tiles.halo.queries), self.tiles.key_size
        logits = self.tiles.logits(here, given, i, j, masked).within(self.tiles.halos[1])
        numbers, allowed = logits
        if allowed is not None:
            allowed = jnp.broadcast_to(allowed, numbers.shape)
        heads = len(numbers)
        if not self.with_values:
            value = jnp.zeros((heads, size, 0), numbers.dtype)
            return Tile(numbers, value, allowed, None, jnp.zeros((heads, size), numbers.dtype))
        keep = None
        if given.dropout is not None:
            pair = (i + indices(rows))[:, None], (j + indices(size))[None, :]
            keep = kept_of(given.dropout, *pair, numbers.dtype)
        poison = rows_from(given.value_poison, j, size, axis=1)
        shared = heads // len(poison)
        return Tile(numbers, repeated(here.value, shared), allowed, keep, repeated(poison, shared))

    def accumulated(
        self, masked: bool, here: Operands, given: Given, sums: Any, i: Any, j: Any
    ) -> online.RunningSums:
        """Add a tile to the running sums of its rows."""
        here = widened(here)
        add = functools.partial(_accumulate, self.tiles.products)
        return here.normalizer.map(add, self.tile(here, given, i, j, masked), sums)

    def of_tile(
        self, masked: bool, here: Operands, given: Given, i: Any, j: Any
    ) -> tuple[Array, Array]:
        """Return what a tile adds to the sums of magnitudes [M, bt] and to the contexts."""
        add = functools.partial(_sums_given, self.tiles.products)
        return here.normalizer.map(add, self.tile(here, given, i, j, masked), here.rows)


@dataclasses.dataclass(frozen=True, eq=False)
class MixedContexts:
    """The heads after the map of weights: sums of weights times values, given the rows' own."""

    tiles: MixedTiles

    def of_tile(self, masked: bool, here: Operands, given: Given, i: Any, j: Any) -> tuple[Array]:
        """Return what a tile adds to the contexts [N, bt, V]."""
        weights, *_ = self.tiles.weighed(here, given, i, j, masked)
        value = repeated(here.value, len(weights) // len(here.value))
        products = self.tiles.products.of_derivatives
        return (jax.vmap(functools.partial(times, products=products))(weights, value),)


@dataclasses.dataclass(frozen=True, eq=False)
class Forward(Pass):
    """Let each tile add to the running sums of its query rows, in each normalized head."""

    contexts: Contexts
    operands: tuple[Operands]
    given: Given
    is_transposed = False

    def __call__(self, heads: int) -> tuple[Array, Array]:
        """Return context [M, T, V] and log-sum-exp [M, T], as `online.finished_finite` has it."""
        (operands,) = self.operands
        tiles = self.contexts.tiles
        depth = operands.value.shape[2] if self.contexts.with_values else 0
        length = operands.query.shape[1] - sum(tiles.halo.queries)
        dtype = at_least_float32(operands.value.dtype)
        start = online.RunningSums.start(length, depth, dtype)
        sums = jax.tree.map(lambda x: jnp.broadcast_to(x, (heads, *x.shape)), start)
        sums = varying_like(sums, operands, self.given.query_poison)
        sums = over_visits(self, tiles.visits, self.given.states, sums)
        return operands.normalizer.map(_finished, sums)

    def slice(self, operands: Operands, i: Any, j: Any, rows: int) -> Operands:
        return self.contexts.tiles.slice(operands, i, j, rows)

    def read(self, sums: Any, i: Any, rows: int) -> Any:
        return jax.tree.map(lambda x: rows_from(x, i, rows, axis=1), sums)

    def of_tile(self, masked: bool, here: Operands, sums: Any, i: Any, j: Any) -> Any:
        return self.contexts.accumulated(masked, here, self.given, sums, i, j)

    def of_empty_tile(self, here: Operands, sums: Any, *where: Any) -> Any:
        return sums

    def write(self, sums: Any, i: Any, computed: Any) -> Any:
        return jax.tree.map(functools.partial(_put, i), sums, computed)


@dataclasses.dataclass(frozen=True, eq=False)
class Sums(Pass):
    """Add up what tiles contribute, or the tangents of that, if operands move.

    Given the statistics of the rows, both are plain sums over tiles, and the second is linear in
    the tangents: each tile is recomputed where its transposition needs it. What has no tangent
    (`moves` is False) costs nothing.
    """

    contributed: Contexts | MixedContexts
    operands: tuple[Operands, ...]
    given: Given
    moves: list[bool] | None = None

    @property
    def is_transposed(self) -> bool:  # type: ignore[override]
        return self.moves is not None

    def __call__(self, *shapes: tuple[int, ...]) -> Any:
        """Return sums of these shapes, [N, T, ...]."""
        operands = self.operands[0]
        zeros = [jnp.zeros(shape, at_least_float32(operands.value.dtype)) for shape in shapes]
        sums = varying_like(tuple(zeros), operands, self.given.query_poison)
        return over_visits(self, self.contributed.tiles.visits, self.given.states, sums)

    def slice(self, operands: Operands, i: Any, j: Any, rows: int) -> Operands:
        return self.contributed.tiles.slice(operands, i, j, rows)

    def read(self, sums: Any, i: Any, rows: int) -> Any:
        """Return nothing but zeros of the shapes to add."""
        return jax.tree.map(lambda x: jnp.zeros_like(x[:, :rows]), sums)

    def of_tile(self, masked: bool, *tile: Any) -> Any:
        *operands, _, i, j = tile
        floats, rest = split_floats(widened(operands[0]))
        if self.moves is None:
            return self.of_floats((floats, rest), (masked, i, j), None, [])
        primal, direction = (
            [x for x, moves in zip(leaves, self.moves, strict=True) if moves]
            for leaves in (floats, split_floats(operands[1])[0])
        )
        of_moving = functools.partial(self.of_floats, (floats, rest), (masked, i, j), self.moves)
        return tangent_of_tile(of_moving, primal, direction)[1]

    def of_floats(
        self, here: tuple[list[Array], Rest], where: Any, moves: Any, moving: list[Array]
    ) -> Any:
        """Return what a tile contributes as a function of those of its numbers that move."""
        floats, rest = here
        masked, i, j = where
        if moves is not None:
            those = iter(moving)
            floats = [next(those) if m else x for x, m in zip(floats, moves, strict=True)]
        return self.contributed.of_tile(masked, merge_floats(floats, rest), self.given, i, j)

    def of_empty_tile(self, *tile: Any) -> Any:
        return tile[-3]

    def write(self, sums: Any, i: Any, computed: Any) -> Any:
        return jax.tree.map(functools.partial(added, i), sums, computed)


def _accumulate(products: Products, normalizer: Any, tile: Tile, sums: Any) -> online.RunningSums:
    return online.accumulate(one_pass(normalizer), sums, tile.of_head(products))


def _finished(normalizer: Any, sums: online.RunningSums) -> tuple[Array, Array]:
    return online.finished_finite(one_pass(normalizer), sums)


def _sums_given(
    products: Products, normalizer: Any, tile: Tile, rows: Array
) -> tuple[Array, Array]:
    """Return the sums of magnitudes and the context of one head, given the statistics."""
    how, of_head = one_pass(normalizer), tile.of_head(products)
    weights = online.weights_given(how, of_head, rows)
    total = jnp.sum(online.magnitude(how, weights), axis=1)
    return total, of_head.weighted(weights, products.of_derivatives)


def _put(i: Any, sums: Array, rows: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(sums, rows, i, 1, allow_negative_indices=False)


def added(i: Any, sums: Array, rows: Array) -> Array:
    """Add to the rows from query i on, of all heads; see `tile_passes.added`."""
    size = rows.shape[1]
    tiles = sums.reshape(len(sums), sums.shape[1] // size, *rows.shape[1:])
    which = lax.div(i, jnp.int32(size))
    found = tiles.at[:, which].add(rows, mode="promise_in_bounds", unique_indices=True)
    return found.reshape(sums.shape)
