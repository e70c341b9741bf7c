"""The two passes of tiled attention: the forward sums, and their tangent.

Both compute one tile at a time: its logits and mask, and from these what it adds to the sums over
the keys of each query.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.base.finite import finite
from attention_jax.base.matmul import PLAIN, Products, times
from attention_jax.base.trees import Rest, hoisted, merge_floats, split_floats, varying_like
from attention_jax.base.typing import AnyNormalizer, Bias, at_least_float32
from attention_jax.implementations import online
from attention_jax.implementations.head import kept
from attention_jax.implementations.moving import is_symbolic_zero
from attention_jax.implementations.passes import Pass, over_visits, tangent_of_tile
from attention_jax.implementations.tiles import Visits
from attention_jax.masks import Mask
from attention_jax.masks.intervals import indices
from attention_jax.normalizers import (
    Elementwise,
    LogSum,
    Selection,
    Streaming,
    name_of,
    streaming,
)
from attention_jax.scores import Separated
from attention_jax.scores.composition import identity

Array = jax.Array


class Functions(NamedTuple):
    """The bound functions of the head; `bias` is None unless it is a function."""

    score: Separated
    bias: Bias | None
    normalizer: AnyNormalizer


class Operands(NamedTuple):
    """What the result is differentiated with respect to; of all rows, or of one tile.

    Query, key and value may be in half precision; a tile of them is computed in float32.
    `captured` holds what score and bias close over, by the number of rows of a tile.
    """

    query: Array
    key: Array
    value: Array
    bias: Any
    functions: Functions
    captured: dict[int, list[Any]]


class Given(NamedTuple):
    """What the result is not differentiated with respect to: mask, states, dropout, poison.

    `states` says what the tiles are where only run time knows, else it is None. `captured` holds
    what the mask closes over, by the number of rows of a tile. `positions` are those of queries and
    keys in the sequence; None where a row stands at its own number. `selection` says which keys are
    kept of those that are allowed, where a normalizer keeps only some.
    """

    mask: Mask
    captured: dict[int, list[Any]]
    states: Any
    dropout: tuple[Array, Array] | None
    query_poison: Array
    key_poison: Array
    positions: tuple[Array, Array] | None = None
    selection: Selection | None = None

    def at(self, i: Any, j: Any, rows: int, columns: int) -> tuple[Array, Array]:
        """Return the positions of the tile whose first query is i and first key j."""
        if self.positions is None:
            return i + indices(rows), j + indices(columns)
        query, key = self.positions
        return rows_from(query, i, rows), rows_from(key, j, columns)


def streamed(normalizer: AnyNormalizer) -> Streaming:
    """Return how a normalizer is computed tile by tile.

    Raises:
      ValueError: it needs a whole row of logits.
    """
    how = streaming(normalizer)
    if how is None:
        raise ValueError(f"tiled: {name_of(normalizer)} needs a whole row of logits; use dense.")
    return how


def one_pass(normalizer: AnyNormalizer) -> online.OnePass:
    """Return how a normalizer is computed in one pass over the tiles.

    Raises:
      ValueError: it is not.
    """
    how = streamed(normalizer)
    if not isinstance(how, LogSum | Elementwise):
        raise ValueError(f"tiled: {name_of(normalizer)} is not computed in one pass; use dense.")
    return how


@dataclasses.dataclass(frozen=True, eq=False)
class Tiles:
    """How a tile is computed from operands; holds only what is known while tracing.

    `logits[rows](tile, q_idx, kv_idx, *captured)` are the logits of a tile of so many rows, with
    what score and bias close over made arguments, so that it has gradients too;
    `allowed[rows](mask, q_idx, kv_idx, *captured)` is the mask of that tile. `products` says how
    weights and values are multiplied; logits say so themselves. `apart`
    tells to add up gradients of keys and values by query head; see `by_query_head`.
    """

    key_size: int
    visits: list[Visits]
    products: Products = PLAIN
    apart: bool = False
    logits: dict[int, Callable[..., Array]] = dataclasses.field(default_factory=dict)
    allowed: dict[int, Callable[..., Array]] = dataclasses.field(default_factory=dict)

    def traced(self, operands: Operands, given: Given) -> tuple[Tiles, Operands, Given]:
        """Trace logits and mask for each height of a tile, and take out what they close over.

        As new functions, because JAX would take a known one from its cache, whatever has become
        of what they close over.
        """
        logits, captured, allowed, of_mask = {}, {}, {}, {}
        for rows in sorted({visits.rows for visits in self.visits}):
            q_idx, kv_idx = given.at(0, 0, rows, self.key_size)
            tile = widened(self.slice(operands, 0, 0, rows))
            logits[rows], captured[rows] = hoisted(functools.partial(_logits), tile, q_idx, kv_idx)
            if any(visits.masked and visits.rows == rows for visits in self.visits):
                allowed[rows], of_mask[rows] = hoisted(
                    functools.partial(_allowed), given.mask, q_idx, kv_idx
                )
        return (
            dataclasses.replace(self, logits=logits, allowed=allowed),
            operands._replace(captured=captured),
            given._replace(captured=of_mask),
        )

    def slice(self, operands: Operands, i: Any, j: Any, rows: int) -> Operands:
        """Return the operands of the tile whose first query is i and first key j."""
        bias = operands.bias
        if bias is not None:
            bias = bias if bias.shape[0] == 1 else rows_from(bias, i, rows)
            bias = bias if bias.shape[1] == 1 else rows_from(bias, j, self.key_size, axis=1)
        return operands._replace(
            query=rows_from(operands.query, i, rows),
            key=rows_from(operands.key, j, self.key_size),
            value=rows_from(operands.value, j, self.key_size),
            bias=bias,
        )

    def compute(self, here: Operands, given: Given, i: Any, j: Any, masked: bool) -> online.Tile:
        """Return the tile of the operands `here`, whose first query is i and first key j."""
        rows = here.query.shape[0]
        q_idx, kv_idx = given.at(i, j, rows, self.key_size)
        pair = q_idx[:, None], kv_idx[None, :]
        allowed = None
        if masked:
            allowed = self.allowed[rows](given.mask, q_idx, kv_idx, *given.captured[rows])
        usable = _usable(here)
        logits = self.logits[rows](
            usable._replace(captured={}), q_idx, kv_idx, *here.captured[rows]
        )
        if given.selection is not None:
            of_rows = (rows_from(x, i, rows) for x in given.selection)
            # Computed in one way, wherever a tile is computed again.
            same = lax.optimization_barrier(lax.stop_gradient(logits))
            is_kept = Selection(*of_rows).keeps(same, j + indices(self.key_size))
            allowed = is_kept if allowed is None else allowed & is_kept
        return online.Tile(
            logits=logits,
            value=usable.value,
            allowed=allowed,
            keep=None if given.dropout is None else kept(given.dropout, *pair, usable.value.dtype),
            query_poison=rows_from(given.query_poison, i, rows),
            key_poison=rows_from(given.key_poison, j, self.key_size),
            products=self.products,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Forward(Pass):
    """Let each tile add to the running sums of its query rows."""

    tiles: Tiles
    operands: tuple[Operands]
    given: Given
    is_transposed = False

    def __call__(self) -> tuple[Array, Array]:
        """Return context [T, V] and log-sum-exp [T], as `online.finished_finite` has it."""
        (operands,) = self.operands
        length, depth = operands.query.shape[0], operands.value.shape[1]
        dtype = at_least_float32(operands.value.dtype)
        start = online.RunningSums.start(length, depth, dtype)
        sums = varying_like(start, operands, self.given.query_poison)
        sums = over_visits(self, self.tiles.visits, self.given.states, sums)
        how = one_pass(operands.functions.normalizer)
        return online.finished_finite(how, sums)

    def slice(self, operands: Operands, i: Any, j: Any, rows: int) -> Operands:
        return self.tiles.slice(operands, i, j, rows)

    def read(self, sums: Any, i: Any, rows: int) -> online.RunningSums:
        return jax.tree.map(functools.partial(rows_from, start=i, size=rows), sums)

    def of_tile(
        self, masked: bool, here: Operands, sums: online.RunningSums, i: Any, j: Any
    ) -> online.RunningSums:
        tile = self.tiles.compute(here, self.given, i, j, masked)
        return online.accumulate(one_pass(here.functions.normalizer), sums, tile)

    def of_empty_tile(
        self, here: Operands, sums: online.RunningSums, *where: Any
    ) -> online.RunningSums:
        return sums

    def write(self, sums: Any, i: Any, computed: Any) -> Any:
        return jax.tree.map(functools.partial(put, i), sums, computed)


@dataclasses.dataclass(frozen=True, eq=False)
class Tangent(Pass):
    """Sum w'_ij over j, and w'_ij v_j + w_ij v'_j, linear in the tangents.

    Each tile is recomputed where its transposition needs it; nothing of it is stored. What
    has no tangent (`moves` is False) costs nothing; products with zeros are also what XLA's CPU
    compiler may fuse wrongly.
    """

    tiles: Tiles
    operands: tuple[Operands, Operands]
    given: Given
    base: Any
    moves: list[bool]
    is_transposed = True

    def __call__(self) -> tuple[Array, Array]:
        """Return both sums, [T] and [T, V]; `base` are the statistics of the rows."""
        sums = self.zeros(self.base)
        return over_visits(self, self.tiles.visits, self.given.states, sums)

    def slice(self, operands: Operands, i: Any, j: Any, rows: int) -> Operands:
        return self.tiles.slice(operands, i, j, rows)

    def read(self, sums: Any, i: Any, rows: int) -> Any:
        return jax.tree.map(functools.partial(rows_from, start=i, size=rows), self.base)

    def of_tile(
        self, masked: bool, here: Operands, change: Operands, base: Any, i: Any, j: Any
    ) -> tuple[Array, Array]:
        weigh = functools.partial(self.weigh, where=(base, i, j), masked=masked)
        return self.summed(here, change, *self.along(weigh, here, change))

    def along(
        self, weigh: Callable[..., tuple[Any, Any]], here: Operands, change: Operands
    ) -> tuple[Any, Any, Any]:
        """Return what `weigh` makes of a tile, how that changes along the tangents, and the tile.

        No change, None, where at most the values move.
        """
        floats, rest = split_floats(widened(here))
        primal, direction = (
            [x for x, moves in zip(leaves, self.moves, strict=True) if moves]
            for leaves in (floats, split_floats(change)[0])
        )
        weigh = functools.partial(weigh, (floats, rest))
        if sum(self.moves) > merge_floats(self.moves, rest).value:
            return tangent_of_tile(weigh, primal, direction, True)
        weighed, tile = weigh(primal)
        return weighed, None, tile

    def summed(
        self,
        here: Operands,
        change: Operands,
        weights: Array,
        weights_change: Array | None,
        tile: online.Tile,
    ) -> tuple[Array, Array]:
        """Return what a tile adds to both sums."""
        products = self.tiles.products.of_derivatives
        if weights_change is None:
            total, context = self.zeros(weights[:, 0])
        else:
            how = streamed(here.functions.normalizer)
            total = jnp.sum(online.magnitude_change(how, weights, weights_change), axis=1)
            context = tile.weighted(weights_change, products)
        if merge_floats(self.moves, split_floats(change)[1]).value:
            value_change = jnp.where(jnp.isfinite(here.value), change.value, 0.0)
            context = context + times(tile.used(weights), value_change, products)
        return total, context

    def weigh(
        self,
        here: tuple[list[Array], Rest],
        moving: list[Array],
        where: tuple[Any, Any, Any],
        masked: bool,
    ) -> tuple[Array, online.Tile]:
        """Return the weights of a tile and the tile, as a function of what moves."""
        base, i, j = where
        operands = self.moved(here, moving)
        tile = self.tiles.compute(operands, self.given, i, j, masked)
        how = streamed(operands.functions.normalizer)
        return online.weights_given(how, tile, base), tile

    def moved(self, here: tuple[list[Array], Rest], moving: list[Array]) -> Operands:
        """Return the operands of a tile, with those that move."""
        floats, rest = here
        those = iter(moving)
        leaves = [next(those) if m else x for x, m in zip(floats, self.moves, strict=True)]
        return merge_floats(leaves, rest)

    def of_empty_tile(
        self, here: Operands, change: Operands, base: Any, *where: Any
    ) -> tuple[Array, Array]:
        return self.zeros(base)

    def zeros(self, base: Any) -> tuple[Array, Array]:
        """Return sums over no keys for the rows of `base`."""
        depth = self.operands[0].value.shape[1]
        rows = jax.tree.leaves(base)[0]
        zeros = jnp.zeros((rows.size, depth), rows.dtype)
        return jnp.zeros_like(rows), varying_like(zeros, rows)

    def write(self, sums: Any, i: Any, computed: Any) -> Any:
        return jax.tree.map(functools.partial(added, i), sums, computed)


def rows_from(x: Array, start: Any, size: int, axis: int = 0) -> Array:
    """Return `size` rows of an array from `start` on."""
    return lax.dynamic_slice_in_dim(x, start, size, axis, allow_negative_indices=False)


def tangents_of(tangents: list[Any], rest: Rest) -> tuple[Any, list[bool]]:
    """Return tangents as operands, with zeros for those that do not move, and which do."""
    arrays, moves = arrays_of(tangents)
    return merge_floats(arrays, rest), moves


def by_query_head(change: Operands, base: Any) -> Operands:
    """Give each query head changes of keys and values of its own, though they are shared.

    Transposed, the gradients of all query heads are added up after the loop over tiles. Where
    devices have different query heads of one key head, they would else be so at every tile: an
    automatic axis of a mesh has no arrays that are still to be summed. `base` are statistics of
    rows, which each query head has of its own.
    """
    first = jax.tree.leaves(base)[0][0]
    always = (first == 0) | (first != 0)
    key, value = (jnp.where(always, x, 0.0) for x in (change.key, change.value))
    return change._replace(key=key, value=value)


def arrays_of(tangents: list[Any]) -> tuple[list[Array], list[bool]]:
    """Return tangents as arrays, and which of them may be other than zero."""
    moves = [not is_symbolic_zero(x) for x in tangents]
    pairs = zip(tangents, moves, strict=True)
    return [x if m else jnp.zeros(x.shape, x.dtype) for x, m in pairs], moves


def _logits(tile: Operands, q_idx: Array, kv_idx: Array) -> Array:
    score, bias, _ = tile.functions
    logits = score.paired(tile.query, tile.key, q_idx, kv_idx)
    if bias is None and tile.bias is None:
        return logits
    added = tile.bias if bias is None else bias(q_idx[:, None], kv_idx[None, :])
    return logits + jnp.asarray(added, logits.dtype)


def _allowed(mask: Mask, q_idx: Array, kv_idx: Array) -> Array:
    return mask(q_idx[:, None], kv_idx[None, :])


def widened(operands: Operands) -> Operands:
    """Return query, key and value in float32 or better."""
    rows = operands.query, operands.key, operands.value
    query, key, value = (x.astype(at_least_float32(x.dtype)) for x in rows)
    return operands._replace(query=query, key=key, value=value)


def _usable(tile: Operands) -> Operands:
    """Replace NaN and Inf where no map of the score has done so; see `poison`."""
    tile = widened(tile)
    score = tile.functions.score
    return tile._replace(
        query=finite(tile.query) if score.query_map.func is identity.func else tile.query,
        key=finite(tile.key) if score.key_map.func is identity.func else tile.key,
        value=finite(tile.value),
    )


def put(i: Any, sums: Array, rows: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(sums, rows, i, 0, allow_negative_indices=False)


def added(i: Any, sums: Array, rows: Array) -> Array:
    """Add to the rows from query i on.

    As a scatter, whose transposition reads the rows and leaves the sums alone; that of a
    slice that is read, added to and written back would copy all rows at every tile.
    """
    tiles = sums.reshape(sums.shape[0] // rows.shape[0], *rows.shape)
    which = lax.div(i, jnp.int32(rows.shape[0]))
    added = tiles.at[which].add(rows, mode="promise_in_bounds", unique_indices=True)
    return added.reshape(sums.shape)
