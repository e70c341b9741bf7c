"""The passes over tiles of all heads, [N, bt, bk], where maps mix heads.

A map of logits changes what is normalized, and no more. A map of weights needs each row's final
log-sum-exp L first: a second pass then adds up mix_weights(exp(e - L)) value tile by tile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.base.matmul import PLAIN, Products, times
from attention_jax.base.trees import Rest, hoisted, merge_floats, split_floats, varying_like
from attention_jax.base.typing import at_least_float32
from attention_jax.head_maps import Halo
from attention_jax.implementations import online
from attention_jax.implementations.mixed import (
    OfHeads,
    allowed_of,
    bias_of,
    kept_of,
    repeated,
)
from attention_jax.implementations.passes import Pass, over_visits, tangent_of_tile
from attention_jax.implementations.tile_passes import one_pass, rows_from
from attention_jax.implementations.tiles import Visits
from attention_jax.masks.intervals import indices

Array = jax.Array


class Operands(NamedTuple):
    """What the result is differentiated with respect to; of all rows, or of one tile.

    query [N, T, A] and key [K, S, A] are mapped rows, value [L, S, V], all finite; query, key and
    bias reach beyond the pairs by the halo. `captured` holds what functions close over, by the
    number of rows of a tile. `rows` are the statistics of each row [M, T], or None.
    """

    query: Array
    key: Array
    value: Array
    bias: Array | OfHeads | None
    score: OfHeads
    normalizer: OfHeads
    mix_logits: Any
    mix_weights: Any
    captured: dict[int, dict[str, list[Any]]]
    rows: Array | None = None


class Given(NamedTuple):
    """What the result is not differentiated with respect to; see `tile_passes.Given`.

    The poison is NaN for a row of query [N, T], key [K, S] or value [L, S] that holds NaN or Inf.
    """

    mask: OfHeads
    captured: dict[int, list[Any]]
    states: Any
    dropout: OfHeads | None
    query_poison: Array
    key_poison: Array
    value_poison: Array


class Logits(NamedTuple):
    """Mixed logits [M, bt, bk] with what may be attended to: [1 or M, bt, bk], None for all."""

    numbers: Array
    allowed: Array | None

    def within(self, halo: Halo) -> Logits:
        """Leave the halo out."""
        numbers, allowed = self.numbers[halo.inside(self.numbers.shape)], self.allowed
        return Logits(numbers, allowed if allowed is None else allowed[halo.inside(allowed.shape)])


@dataclasses.dataclass(frozen=True, eq=False)
class MixedTiles:
    """How a tile of all heads is computed; holds only what is known while tracing.

    `halos` are those of the map of logits and of that of weights. `functions[rows]` are the score
    with bias, the mask and the two maps for tiles of so many rows, with what they close over made
    arguments.
    """

    pairs: tuple[int, int]
    key_size: int
    visits: list[Visits]
    halos: tuple[Halo, Halo]
    products: Products = PLAIN
    functions: dict[int, dict[str, Callable[..., Any]]] = dataclasses.field(default_factory=dict)

    @property
    def halo(self) -> Halo:
        """The neighbours whose logits the weights of a tile depend on."""
        return self.halos[0] + self.halos[1]

    @property
    def has_halo(self) -> bool:
        """Whether tiles need the logits of neighbours."""
        return self.halo != Halo()

    def traced(self, operands: Operands, given: Given) -> tuple[MixedTiles, Operands, Given]:
        """Trace the functions for each height of a tile, and take out what they close over."""
        functions, captured, of_mask = {}, {}, {}
        for rows in sorted({visits.rows for visits in self.visits}):
            of, out = {}, {}
            tile = widened(self.slice(operands, 0, 0, rows))
            pair = self.places(0, 0, rows)
            pair = pair[0][0], pair[1][0]
            scored = functools.partial(_logits, self.products)
            of["logits"], out["logits"] = hoisted(scored, tile, *pair)
            logits = jax.eval_shape(scored, tile, *pair)
            if operands.mix_logits is not None:
                mix = functools.partial(_mixed)
                of["mix_logits"], out["mix_logits"] = hoisted(mix, operands.mix_logits, logits)
                logits = jax.eval_shape(mix, operands.mix_logits, logits)
            if operands.mix_weights is not None:
                mix = functools.partial(_mixed)
                of["mix_weights"], out["mix_weights"] = hoisted(mix, operands.mix_weights, logits)
            of["allowed"], of_mask[rows] = hoisted(functools.partial(_allowed), given.mask, *pair)
            functions[rows], captured[rows] = of, out
        return (
            dataclasses.replace(self, functions=functions),
            operands._replace(captured=captured),
            given._replace(captured=of_mask),
        )

    def places(self, i: Any, j: Any, rows: int) -> tuple[tuple[Array, Array], ...]:
        """Return the positions of the tile and its halo, and which lie in the sequence.

        Positions outside are replaced by the nearest inside, so that no function sees them.
        """
        found = []
        starts = zip((i, j), (rows, self.key_size), self.halo, self.pairs, strict=True)
        for start, size, (before, after), length in starts:
            index = start - before + indices(before + size + after)
            inside = (index >= 0) & (index < length)
            found.append((jnp.clip(index, 0, length - 1) if self.has_halo else index, inside))
        return tuple(found)

    def slice(self, operands: Operands, i: Any, j: Any, rows: int) -> Operands:
        """Return the operands of the tile whose first query is i and first key j."""
        high, wide = (
            size + sum(more) for size, more in zip((rows, self.key_size), self.halo, strict=True)
        )
        bias = operands.bias
        if bias is not None and not isinstance(bias, OfHeads):
            bias = bias if bias.shape[1] == 1 else rows_from(bias, i, high, axis=1)
            bias = bias if bias.shape[2] == 1 else rows_from(bias, j, wide, axis=2)
        of_rows = operands.rows
        if of_rows is not None:
            around = of_rows.shape[1] - (operands.query.shape[1] - sum(self.halo.queries))
            of_rows = rows_from(of_rows, i, rows + around, axis=1)
        return operands._replace(
            query=rows_from(operands.query, i, high, axis=1),
            key=rows_from(operands.key, j, wide, axis=1),
            value=rows_from(operands.value, j, self.key_size, axis=1),
            bias=bias,
            rows=of_rows,
        )

    def logits(self, here: Operands, given: Given, i: Any, j: Any, masked: bool) -> Logits:
        """Return the mixed logits of a tile, with the halo of the map of weights around it."""
        rows = here.query.shape[1] - sum(self.halo.queries)
        functions, captured = self.functions[rows], here.captured[rows]
        (q_idx, q_inside), (kv_idx, kv_inside) = self.places(i, j, rows)
        allowed = None
        if masked:
            allowed = functions["allowed"](given.mask, q_idx, kv_idx, *given.captured[rows])
            if self.has_halo:
                allowed = allowed & (q_inside[:, None] & kv_inside[None, :])[None]
        bare = here._replace(captured={}, rows=None)
        numbers = functions["logits"](bare, q_idx, kv_idx, *captured["logits"])
        groups = len(here.query) // len(here.key)
        query = rows_from(given.query_poison, i, len(q_idx), axis=1)
        key = repeated(rows_from(given.key_poison, j, len(kv_idx), axis=1), groups)
        numbers = numbers + query[:, :, None] + key[:, None, :]
        if here.mix_logits is None:
            return Logits(numbers, allowed)
        shown = numbers if allowed is None else jnp.where(allowed, numbers, 0.0)
        mixed = functions["mix_logits"](here.mix_logits, shown, *captured["mix_logits"])
        halo = self.halos[0]
        return Logits(mixed, None if allowed is None else allowed[halo.inside(allowed.shape)])

    def weights(self, here: Operands, given: Given, i: Any, j: Any, masked: bool) -> Array:
        """Return the mixed weights of a tile after dropout, [N, bt, bk], from those of its rows."""
        rows = here.query.shape[1] - sum(self.halo.queries)
        logits = self.logits(here, given, i, j, masked)
        numbers, allowed = logits
        if allowed is not None:
            allowed = jnp.broadcast_to(allowed, numbers.shape)
        weights = here.normalizer.map(_weights, numbers, allowed, here.rows)
        if here.mix_weights is not None:
            captured = here.captured[rows]["mix_weights"]
            weights = self.functions[rows]["mix_weights"](here.mix_weights, weights, *captured)
        poison = rows_from(given.value_poison, j, self.key_size, axis=1)
        poison = repeated(poison, len(weights) // len(poison))[:, None, :]
        allowed = logits.within(self.halos[1]).allowed
        if allowed is None:
            weights = weights + poison
        else:
            attendable = jnp.any(allowed, axis=0, keepdims=True)
            weights = jnp.where(attendable, weights + poison, 0.0)
        if given.dropout is None:
            return weights
        pair = (i + indices(rows))[:, None], (j + indices(self.key_size))[None, :]
        return weights * kept_of(given.dropout, *pair, weights.dtype)


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
        weights = self.tiles.weights(here, given, i, j, masked)
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
        return jax.tree.map(functools.partial(_added, i), sums, computed)


def widened(operands: Operands) -> Operands:
    """Return query, key and value in float32 or better."""
    rows = operands.query, operands.key, operands.value
    query, key, value = (x.astype(at_least_float32(x.dtype)) for x in rows)
    return operands._replace(query=query, key=key, value=value)


def _logits(products: Products, tile: Operands, q_idx: Array, kv_idx: Array) -> Array:
    """Return the logits of all heads of a tile, before any map."""
    score = functools.partial(_paired, products)
    key = repeated(tile.key, len(tile.query) // len(tile.key))
    logits = tile.score.map(score, tile.query, key, q_idx, kv_idx, axes=(0, 0, None, None))
    return logits + bias_of(tile.bias, logits.dtype, q_idx[:, None], kv_idx[None, :])


def _paired(
    products: Products, score: Any, query: Array, key: Array, q_idx: Array, kv_idx: Array
) -> Array:
    return score.multiplied(products).paired(query, key, q_idx, kv_idx)


def _allowed(mask: OfHeads, q_idx: Array, kv_idx: Array) -> Array:
    return allowed_of(mask, q_idx[:, None], kv_idx[None, :])


def _mixed(head_map: Any, pairs: Array) -> Array:
    return head_map(pairs)


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


def _weights(normalizer: Any, logits: Array, allowed: Array | None, rows: Array) -> Array:
    """Return the weights of one head, given the statistics of its rows."""
    nothing = jnp.zeros((0,), logits.dtype)
    tile = online.Tile(logits, nothing, allowed, None, nothing, nothing)
    return online.weights_given(one_pass(normalizer), tile, rows)


def _put(i: Any, sums: Array, rows: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(sums, rows, i, 1, allow_negative_indices=False)


def _added(i: Any, sums: Array, rows: Array) -> Array:
    """Add to the rows from query i on, of all heads; see `tile_passes.added`."""
    size = rows.shape[1]
    tiles = sums.reshape(len(sums), sums.shape[1] // size, *rows.shape[1:])
    which = lax.div(i, jnp.int32(size))
    found = tiles.at[:, which].add(rows, mode="promise_in_bounds", unique_indices=True)
    return found.reshape(sums.shape)
