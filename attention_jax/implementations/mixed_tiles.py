"""A tile of all heads, [N, bt, bk], where maps mix heads: its logits, mixed, and its weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.base.matmul import PLAIN, Products
from attention_jax.base.trees import hoisted
from attention_jax.base.typing import at_least_float32
from attention_jax.head_maps import Halo
from attention_jax.implementations import online
from attention_jax.implementations.mixed_heads import (
    OfHeads,
    allowed_of,
    attendable_of,
    bias_of,
    kept_of,
    repeated,
)
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

    def weighed(
        self, here: Operands, given: Given, i: Any, j: Any, masked: bool
    ) -> tuple[Array, Logits, Array | None]:
        """Return the final weights of a tile, [N, bt, bk], given the statistics of its rows.

        That is, mixed and after dropout; with the logits behind them, and what each head may attend
        to, [1 or N, bt, bk], None for all.
        """
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
        logits, attendable = logits.within(self.halos[1]), None
        if logits.allowed is None:
            weights = weights + poison
        else:
            attendable = attendable_of(logits.allowed, here.mix_weights, len(weights))
            weights = jnp.where(attendable, weights + poison, 0.0)
        if given.dropout is not None:
            pair = (i + indices(rows))[:, None], (j + indices(self.key_size))[None, :]
            weights = weights * kept_of(given.dropout, *pair, weights.dtype)
        return weights, logits, attendable


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


def _weights(normalizer: Any, logits: Array, allowed: Array | None, rows: Array) -> Array:
    """Return the weights of one head, given the statistics of its rows."""
    nothing = jnp.zeros((0,), logits.dtype)
    tile = online.Tile(logits, nothing, allowed, None, nothing, nothing)
    return online.weights_given(one_pass(normalizer), tile, rows)
