"""Online softmax: sums over the keys of one query tile that grow tile by tile."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.base.finite import infinite_where
from attention_jax.base.matmul import PLAIN, Products, computed_once, times
from attention_jax.normalizers import Elementwise, LogSum, Streaming

Array = jax.Array

OnePass = LogSum | Elementwise
"""What is computed in one pass: the statistics of a row grow along with its context."""


class Tile(NamedTuple):
    """One tile of logits [bt, bk] with what belongs to it.

    `allowed` is None where every pair may attend, `keep` None without dropout. The poison is NaN
    for a query [bt] or key [bk] that holds NaN or Inf, else zero.
    """

    logits: Array
    value: Array
    allowed: Array | None
    keep: Array | None
    query_poison: Array
    key_poison: Array
    products: Products = PLAIN

    def hidden(self, masked: float) -> Array:
        """Return the logits, and where some may not attend, poison and `masked` among them."""
        if self.allowed is None:
            return self.logits
        poison = self.query_poison[:, None] + self.key_poison[None, :]
        return jnp.where(self.allowed, self.logits + poison, masked)

    def poisoned(self, hidden: Array, base: Array) -> tuple[Array, Array]:
        """Return both with the poison that hidden logits do not have yet."""
        if self.allowed is None:
            return hidden + self.key_poison[None, :], base + self.query_poison
        return hidden, base

    def row_poison(self) -> Array:
        """Return the poison of each row that need not be added to every logit, [bt]."""
        if self.allowed is not None:
            return jnp.zeros_like(self.query_poison)
        return self.query_poison + jnp.sum(self.key_poison)

    def used(self, weights: Array) -> Array:
        """Return the weights after dropout."""
        return weights if self.keep is None else weights * self.keep

    def weighted(self, weights: Array, products: Products) -> Array:
        """Return the values of the tile times the weights after dropout, [bt, V]."""
        return times(self.used(weights), self.value, products)


class RunningSums(NamedTuple):
    """Largest logit [bt], sum of exponentials [bt] and context [bt, V] so far.

    For a normalizer without sum, `total` holds the poison of the rows.
    """

    maximum: Array
    total: Array
    context: Array

    @classmethod
    def start(cls, rows: int, depth: int, dtype: jnp.dtype) -> RunningSums:
        """Return the sums over no keys: exponentials less a finite maximum, and none of them.

        The smallest number is none of the logits and less than no other; -inf would be a constant
        of the loop, which `jax.debug_infs` refuses.
        """
        maximum = jnp.full(rows, jnp.finfo(dtype).min, dtype)
        return cls(maximum, jnp.zeros(rows, dtype), jnp.zeros((rows, depth), dtype))


def accumulate(how: OnePass, sums: RunningSums, tile: Tile) -> RunningSums:
    """Add a tile to the sums."""
    if isinstance(how, Elementwise):
        # Like those of a derivative, such weights may leave the range of float16.
        weights = how.weight(tile.hidden(masked=0.0), None)
        if tile.allowed is not None:
            weights = jnp.where(tile.allowed, weights, 0.0)
        context = sums.context + tile.weighted(weights, tile.products.of_derivatives)
        return RunningSums(sums.maximum, sums.total + tile.row_poison(), context)

    logits = tile.hidden(masked=-jnp.inf)
    maximum = jnp.maximum(sums.maximum, jnp.max(how.exponent(logits), axis=1))
    shrink = jnp.exp(sums.maximum - maximum)
    weights = how.weight(*tile.poisoned(logits, maximum))
    added, used = jnp.sum(magnitude(how, weights), axis=1), tile.used(weights)
    used, added = computed_once(used, added, tile.products)
    total = sums.total * shrink + added
    context = sums.context * shrink[:, None] + times(used, tile.value, tile.products)
    return RunningSums(maximum, total, context)


def finished(how: OnePass, sums: RunningSums) -> tuple[Array, Array]:
    """Return context [bt, V] and log-sum-exp [bt]; for a normalizer without sum, the poison."""
    context, logsumexp = finished_finite(how, sums)
    return context, with_empty(logsumexp)


def finished_finite(how: OnePass, sums: RunningSums) -> tuple[Array, Array]:
    """Return the same, but for the largest number there is as the log of an empty sum.

    The backward pass keeps it, and `jax.debug_infs` refuses infinite numbers among the results of
    a program. No other is as large; the log of a sum may be the smallest number there is, under a
    bias that hides.
    """
    if isinstance(how, Elementwise):
        return sums.context + sums.total[..., None], sums.total
    empty = sums.total == 0
    total = jnp.where(empty, 1.0, sums.total)
    largest = jnp.finfo(total.dtype).max
    logsumexp = jnp.where(empty, largest, sums.maximum + jnp.log(total))
    return sums.context / total[..., None], logsumexp


def weights_given(how: Streaming, tile: Tile, base: Any) -> Array:
    """Return the weights [bt, bk] of a tile, given the statistics of its rows."""
    # Without sum, the poison of the rows has no other way into the weights.
    logits = tile.logits + base[:, None] if isinstance(how, Elementwise) else tile.logits
    if tile.allowed is None:
        return how.weight(logits, base)
    return jnp.where(tile.allowed, how.weight(jnp.where(tile.allowed, logits, 0.0), base), 0.0)


def magnitude(how: Streaming, weights: Array) -> Array:
    """Return what the weights add to the sum of their row, [bt, bk]."""
    return jnp.abs(weights) if isinstance(how, LogSum) and how.signed else weights


def magnitude_change(how: Streaming, weights: Array, change: Array) -> Array:
    """Return the tangent of that."""
    signed = isinstance(how, LogSum) and how.signed
    return jnp.sign(weights) * change if signed else change


def changes(how: OnePass, total: Array, context: Array, at: Array) -> tuple[Array, Array]:
    """Return the tangents of context and statistics, given the sums of `Tangent` and the context.

    The statistics were fixed in those sums. Of a log-sum-exp L, L' = sum_j |w_ij|'; and as each
    weight is a multiple of exp(-L), the context changes by -L' times itself.
    """
    if isinstance(how, LogSum):
        return context - total[..., None] * at, total
    return context, jnp.zeros_like(total)


def finite_or_zero(logsumexp: Array) -> Array:
    """Replace the log of an empty sum, in either form, by a number that can be subtracted."""
    is_empty = (logsumexp == -jnp.inf) | (logsumexp == jnp.finfo(logsumexp.dtype).max)
    return jnp.where(is_empty, 0.0, logsumexp)


def with_empty(logsumexp: Array) -> Array:
    """Return -inf where `finished_finite` has the largest number."""
    return infinite_where(logsumexp == jnp.finfo(logsumexp.dtype).max, logsumexp)
