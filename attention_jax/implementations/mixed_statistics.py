"""What statistics are told of heads that maps mix, and how those of all heads are one.

Logits belong to the M heads that are normalized, weights to the O heads of the context. A statistic
that reads logits and no weights is of the former, any other of the latter.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from attention_jax.implementations.mixed_heads import OfHeads
from attention_jax.masks.intervals import indices
from attention_jax.statistics import Pairs, Statistic
from attention_jax.statistics.protocol import reads, row_maximum

Array = jax.Array

AXES = Pairs(0, 0, 0, 0, None, None, 0)  # type: ignore[arg-type]
"""The axis of the heads in each field of the pairs of all heads."""


class MixedPairs(NamedTuple):
    """Pairs of all heads: all of them, or one tile.

    Attributes:
      weights: [O, T, S], final, after the map of weights and dropout.
      logits: [M, T, S], after the map of logits.
      allowed: [M, T, S], what each normalized head may attend to.
      attendable: [O, T, S], what each head of the context may attend to.
      q_idx: [T, 1], positions of the queries.
      kv_idx: [1, S], positions of the keys.
    """

    weights: Array
    logits: Array
    allowed: Array
    attendable: Array
    q_idx: Array
    kv_idx: Array

    @classmethod
    def of(
        cls,
        weights: Array,
        logits: Array,
        allowed: Array | None,
        attendable: Array | None,
        pair: tuple[Array, Array],
    ) -> MixedPairs:
        """Return the pairs, of which all may attend where None is given, or all heads alike."""
        may, reaches = (
            jnp.broadcast_to(True if of is None else of, like.shape)
            for of, like in ((allowed, logits), (attendable, weights))
        )
        return cls(weights, logits, may, reaches, *pair)

    @classmethod
    def none(cls, heads: tuple[int, int], queries: int, keys: int, dtype: Any) -> MixedPairs:
        """Return pairs of which none may attend, of M and O heads."""
        between, after = (jnp.zeros((number, queries, keys), dtype) for number in heads)
        allowed, attendable = (jnp.zeros(x.shape, bool) for x in (between, after))
        pair = indices(queries)[:, None], indices(keys)[None, :]
        return cls(after, between, allowed, attendable, *pair)

    def told(self, of_logits: bool) -> Pairs:
        """Return what statistics are told of each head, [M, T, S] of logits, else [O, T, S]."""
        logits = jnp.where(self.allowed, self.logits, 0.0)
        shown = jnp.where(self.allowed, self.logits, jnp.finfo(self.logits.dtype).min)
        largest, weights, allowed = jax.vmap(row_maximum)(shown), self.weights, self.attendable
        if of_logits:  # which reads no weights
            weights, allowed = jnp.zeros_like(logits), self.allowed
        elif len(logits) != len(weights):  # which reads no logits
            logits, largest = (jnp.zeros(weights.shape[:axes], weights.dtype) for axes in (3, 2))
        log_weights = jnp.log(jnp.where(weights != 0, jnp.abs(weights), 1.0))
        return Pairs(weights, log_weights, logits, allowed, self.q_idx, self.kv_idx, largest)


def of_all_heads(statistics: dict[str, OfHeads], dtype: Any) -> dict[str, Statistic]:
    """Return statistics of `MixedPairs`, whose sums [T, heads, ...] are those of all heads."""
    return {name: _of_all_heads(each, dtype) for name, each in statistics.items()}


def of_pairs(statistics: dict[str, OfHeads], pairs: Any) -> dict[str, Any]:
    """Return the statistics of all pairs of all heads, `MixedPairs`, by name."""
    of_heads = of_all_heads(statistics, pairs.weights.dtype)
    return {name: each.of_pairs(pairs) for name, each in of_heads.items()}


def _of_all_heads(of: OfHeads, dtype: Any) -> Statistic:
    one = of.build([_like_one(x, axis) for x, axis in zip(of.leaves, of.axes, strict=True)])
    of_logits = reads(one, dtype) == (True, False)
    of_tile = functools.partial(_of_tile, of_logits=of_logits)
    change = functools.partial(_change, of_logits=of_logits)
    joins = {} if one.is_added else {"merge": Partial(_merge, of)}
    return Statistic(
        Partial(of_tile, of),
        Partial(functools.partial(_finish, axis=one.axis), of),
        rescale=None,
        change=None if one.change is None else Partial(change, of),
        of=one.of,
        **joins,
    )


def _like_one(leaf: Any, axis: int | None) -> jax.ShapeDtypeStruct:
    shape = jnp.shape(leaf)
    return jax.ShapeDtypeStruct(shape if axis is None else shape[1:], jnp.result_type(leaf))


def _of_tile(of: OfHeads, pairs: MixedPairs, of_logits: bool) -> Any:
    return _rows_first(of.map(_sums, pairs.told(of_logits), axes=(AXES,)))


def _change(of: OfHeads, pairs: MixedPairs, merged: Any, of_logits: bool) -> Any:
    told = pairs.told(of_logits), _heads_first(merged)
    return _rows_first(of.map(_moved, *told, axes=(AXES, 0)))


def _merge(of: OfHeads, first: Any, second: Any) -> Any:
    return _rows_first(of.map(_joined, _heads_first(first), _heads_first(second)))


def _finish(of: OfHeads, sums: Any, axis: str) -> Any:
    found = of.map(_finished, _heads_first(sums))
    return _rows_first(found) if axis else found


def _heads_first(sums: Any) -> Any:
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), sums)


def _rows_first(sums: Any) -> Any:
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), sums)


def _sums(statistic: Statistic, pairs: Pairs) -> Any:
    return statistic.of_tile(pairs)


def _moved(statistic: Statistic, pairs: Pairs, merged: Any) -> Any:
    return statistic.moved(pairs, merged)


def _joined(statistic: Statistic, first: Any, second: Any) -> Any:
    return statistic.merge(first, second)


def _finished(statistic: Statistic, sums: Any) -> Any:
    return statistic.finish(sums)
