"""Tiled attention of heads that maps mix, with statistics, and the derivatives of both.

Given the statistics of the rows, as the first pass finds them, the second computes the final
weights of each tile, and adds up what they make of values and of statistics.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from attention_jax.base.matmul import times
from attention_jax.base.trees import Rest, merge_floats, split_floats, varying_like
from attention_jax.base.typing import at_least_float32
from attention_jax.implementations.head import SAVED
from attention_jax.implementations.measured import (
    joined,
    moved_by,
    part_of,
    with_integers,
    without_padding,
)
from attention_jax.implementations.mixed_heads import Heads, repeated
from attention_jax.implementations.mixed_passes import Sums, added
from attention_jax.implementations.mixed_statistics import MixedPairs, of_all_heads, of_pairs
from attention_jax.implementations.mixed_tiles import Given, MixedTiles, Operands, widened
from attention_jax.implementations.moving import Moving
from attention_jax.implementations.passes import over_visits
from attention_jax.implementations.tile_passes import tangents_of
from attention_jax.implementations.tile_statistics import Asked, Measures
from attention_jax.masks.intervals import indices

Array = jax.Array


def of_no_pairs(heads: Heads, counts: tuple[int, int, int]) -> dict[str, Any] | None:
    """Return the statistics of heads without queries or without keys."""
    if not heads.statistics:
        return None
    dtype = at_least_float32(heads.value.dtype)
    lengths = heads.query.shape[1], heads.key.shape[1]
    return of_pairs(heads.statistics, MixedPairs.none(counts[1:], *lengths, dtype))


def measure(
    tiles: MixedTiles, operands: Operands, given: Given, heads: Heads, counts: tuple[int, int, int]
) -> tuple[Array, dict[str, Any]]:
    """Return the context [O, T, V] and statistics by name; visits are of single tiles.

    `operands` hold the statistics of the rows.
    """
    dtype = at_least_float32(operands.value.dtype)
    statistics = of_all_heads(heads.statistics, dtype)
    none = functools.partial(MixedPairs.none, counts[1:], dtype=dtype)
    measures, asked = Measures.traced(statistics, tiles, none, (operands, given.query_poison))
    how = Measured(tiles, measures, counts[2])
    context, sums = _measure(how, *split_floats(operands), given, asked)
    sums = without_padding(statistics, sums, tiles.pairs)
    return context, {name: each.finish(sums[name]) for name, each in statistics.items()}


class Measured(NamedTuple):
    """What is known while tracing: tiles, how statistics are computed, and the number of heads."""

    tiles: MixedTiles
    measures: Measures
    heads: int


@dataclasses.dataclass(frozen=True, eq=False)
class MeasuredContexts:
    """The heads after the map of weights: what a tile adds to contexts and to statistics.

    With the `merged` sums held fixed, where they are given, what it adds to their derivatives.
    """

    how: Measured
    asked: Asked
    merged: Any = None
    asked_moving: Moving | None = None

    @property
    def tiles(self) -> MixedTiles:
        """How a tile is computed."""
        return self.how.tiles

    def of_tile(
        self, masked: bool, here: Operands, given: Given, i: Any, j: Any
    ) -> tuple[Array, Any]:
        """Return what a tile adds to the contexts [O, bt, V] and to statistics."""
        measures = self.how.measures
        context, pairs = self.weighed(masked, here, given, i, j)
        if self.merged is None:
            return context, measures.of_pairs(self.asked, pairs)
        merged = self.part(len(pairs.q_idx), i, j)
        return context, measures.moving(self.asked, pairs, merged)

    def with_asked(
        self, masked: bool, here: Operands, given: Given, where: tuple[Any, Any], moved: list[Array]
    ) -> list[Array]:
        """Add to the tangents of a tile those that the statistics themselves cause."""
        if self.asked_moving is None or not self.asked_moving.primal:
            return moved
        _, pairs = self.weighed(masked, here, given, *where)
        merged = self.part(len(pairs.q_idx), *where)
        return self.how.measures.with_asked(self.asked_moving, pairs, merged, moved)

    def weighed(
        self, masked: bool, here: Operands, given: Given, i: Any, j: Any
    ) -> tuple[Array, MixedPairs]:
        """Return the contexts and the pairs of a tile; queries beyond the last attend to none."""
        tiles = self.tiles
        weights, logits, attendable = tiles.weighed(here, given, i, j, masked)
        value = repeated(here.value, len(weights) // len(here.value))
        multiplied = functools.partial(times, products=tiles.products.of_derivatives)
        context = jax.vmap(multiplied)(weights, value)
        rows, length = weights.shape[1], tiles.pairs[0]
        q_idx, kv_idx = i + indices(rows), j + indices(tiles.key_size)
        pair = q_idx[:, None], kv_idx[None, :]
        pairs = MixedPairs.of(weights, *logits, attendable, pair)
        if length % rows:
            is_query = (pair[0] < length)[None]
            pairs = pairs._replace(
                weights=jnp.where(is_query, weights, 0.0),
                allowed=pairs.allowed & is_query,
                attendable=pairs.attendable & is_query,
            )
        return context, pairs

    def of_nothing(self, rows: int, i: Any, j: Any) -> Any:
        """Return what a tile adds to statistics of which no pair may attend."""
        if self.merged is None:
            return self.how.measures.of_no_pairs(self.asked, rows, self.tiles.key_size)
        return [jnp.zeros_like(x) for x in split_floats(self.part(rows, i, j))[0]]

    def part(self, rows: int, i: Any, j: Any) -> Any:
        """Return the merged sums of the queries, or of the keys, of a tile."""
        like = self.how.measures.of_no_pairs(self.asked, rows, self.tiles.key_size)
        return part_of(self.asked, self.merged, i, j, like)


@dataclasses.dataclass(frozen=True, eq=False)
class MeasuredSums(Sums):
    """Add up contexts and join statistics, or add up the tangents of both, if operands move."""

    contributed: MeasuredContexts

    def __call__(self) -> tuple[Array, Any]:
        """Return both sums."""
        operands, each = self.operands[0], self.contributed
        halo, asked = each.tiles.halo, each.asked
        length, keys = (
            x.shape[1] - sum(more)
            for x, more in zip((operands.query, operands.key), halo, strict=True)
        )
        dtype, depth = at_least_float32(operands.value.dtype), operands.value.shape[2]
        context = jnp.zeros((each.how.heads, length, depth), dtype)
        sums: Any = each.how.measures.of_no_pairs(asked, length, keys)
        if each.merged is not None:
            sums = [jnp.zeros_like(x) for x in split_floats(each.merged)[0]]
        sums = varying_like((context, sums), operands, self.given.query_poison)
        return over_visits(self, each.tiles.visits, self.given.states, sums)

    def read(self, sums: Any, i: Any, rows: int) -> Any:
        """Return nothing but zeros of the contexts of a visit."""
        return jnp.zeros_like(sums[0][:, :rows])

    def of_tile(self, masked: bool, *tile: Any) -> Any:
        here, where = widened(tile[0]), tile[-2:]
        context, found = super().of_tile(masked, *tile)
        found = self.contributed.with_asked(masked, here, self.given, where, found)
        return tile[-1], (context, found)

    def of_empty_tile(self, *tile: Any) -> Any:
        *_, zeros, i, j = tile
        return j, (zeros, self.contributed.of_nothing(zeros.shape[1], i, j))

    def write(self, sums: Any, i: Any, computed: Any) -> Any:
        (context, measured), (j, (more, found)) = sums, computed
        asked, like = self.contributed.asked, self.contributed.merged
        if like is None:
            measured = joined(asked, measured, found, i, j)
        else:
            measured = moved_by(asked, like, (measured, found), i, j)
        return added(i, context, more), measured


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _measure(
    how: Measured, floats: list[Array], rest: Rest, given: Given, asked: Asked
) -> tuple[Array, Any]:
    return MeasuredSums(MeasuredContexts(how, asked), (merge_floats(floats, rest),), given)()


@functools.partial(_measure.defjvp, symbolic_zeros=True)
def _measure_jvp(how: Measured, primals: Any, tangents: Any) -> Any:
    floats, rest, given, asked = primals
    context, sums = _measure(how, floats, rest, given, asked)
    sums = jax.tree.map(functools.partial(checkpoint_name, name=SAVED[2]), sums)
    change, moves = tangents_of(tangents[0], rest)
    both = merge_floats(floats, rest), widened(change)
    contributed = MeasuredContexts(how, asked, sums, Moving.of(asked, tangents[3]))
    of_tangents = MeasuredSums(contributed, both, given, moves)
    context_change, moved = of_tangents()
    return (context, sums), (context_change, with_integers(moved, sums))
