"""Statistics of queries: how broadly, how far and to what each of them attends."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.base.binding import bind
from attention_jax.base.checks import at_least
from attention_jax.base.finite import infinite_where
from attention_jax.masks import MaskLike, as_mask
from attention_jax.statistics.protocol import Pairs, Statistic, row_maximum, scaled

__all__ = [
    "Heaviest",
    "distance_spread",
    "effective_support",
    "entropy",
    "expected_distance",
    "heaviest",
    "jacobian_trace",
    "largest_logit",
    "largest_weight",
    "mass",
]

Array = jax.Array


class Heaviest(NamedTuple):
    """The keys with the largest weights, and their weights, [T, k] for one head.

    The largest comes first, and of equal ones the first key; a place without a weight above zero
    has key -1 and weight 0, and where a weight is NaN all keys are -1 and all weights NaN.
    """

    keys: Array
    weights: Array


def heaviest(k: int) -> Statistic:
    """Return the statistic of the k keys with the largest weights of each query.

    Args:
      k: how many.

    Returns:
      A statistic whose result is `Heaviest`, keys and weights [B, T, N, k]. The weights have a
      derivative, with the keys held fixed.

    Raises:
      ValueError: k is not positive.

    >>> from attention_jax import attend, statistics
    >>> x = jnp.array([1.0, 3.0, 2.0]).reshape(1, 3, 1, 1)
    >>> attend(x, x, x, statistics={"top": heaviest(2)}).statistics["top"].keys[0, :, 0]
    Array([[1, 2],
           [1, 2],
           [1, 2]], dtype=int32)
    """
    at_least("heaviest", 1, k=k)
    return Statistic(
        bind(_heaviest, k=int(k)),
        _known_keys,
        merge=bind(_heavier, k=int(k)),
        change=_heaviest_again,
    )


def mass(mask: MaskLike) -> Statistic:
    r"""Return the statistic of how much weight goes where a mask is true: sum_j w_ij mask(i, j).

    Args:
      mask: as in `attend`: a mask, a function (q_idx, kv_idx) -> bool or a boolean array that
        broadcasts to [B, N, T, S]. What may not be attended to has no weight, whatever it says.

    Returns:
      A statistic of queries, [B, T, N].

    >>> from attention_jax import attend, statistics
    >>> x = jnp.zeros((1, 4, 1, 2))
    >>> on_sink = mass(lambda q_idx, kv_idx: kv_idx < 1)
    >>> attend(x, x, x, statistics={"sink": on_sink}).statistics["sink"][0, :, 0]
    Array([0.25, 0.25, 0.25, 0.25], dtype=float32)
    """
    return Statistic(bind(_mass, mask=as_mask(mask)))


def where(mask: Any, pairs: Pairs) -> Array:
    """Return a mask for the pairs of a tile, [T, S]."""
    return jnp.broadcast_to(mask(pairs.q_idx, pairs.kv_idx), pairs.weights.shape)


def distances(pairs: Pairs) -> Array:
    """Return |i - j| for the pairs of a tile, [T, S] int32."""
    return jnp.abs(pairs.q_idx - pairs.kv_idx)


def over_keys(x: Array) -> Array:
    """Sum over keys, [T, S] -> [T].

    As a product, since XLA's CPU compiler adds up the numbers of a row one after the other.
    """
    return jnp.dot(x, jnp.ones(x.shape[1], x.dtype), precision="highest")


def _mass(pairs: Pairs, mask: Any) -> Array:
    return over_keys(jnp.where(where(mask, pairs), pairs.weights, 0.0))


class _Surprise(NamedTuple):
    """Sums of |w| ln |w| and of |w|."""

    surprise: Array
    total: Array


def _surprise(pairs: Pairs) -> _Surprise:
    magnitudes = jnp.abs(pairs.weights)
    return _Surprise(over_keys(magnitudes * pairs.log_weights), jnp.sum(magnitudes, axis=1))


def _rescaled_surprise(sums: _Surprise, log_factor: Array) -> _Surprise:
    factor = jnp.exp(log_factor)
    # Where the factor is 0 its logarithm may be as small as numbers go; their product is 0.
    return _Surprise(
        sums.surprise * factor + (factor * log_factor) * sums.total, sums.total * factor
    )


def _entropy(sums: _Surprise) -> Array:
    attends = sums.total != 0
    total = jnp.where(attends, sums.total, 1.0)
    return jnp.where(attends, jnp.log(total) - sums.surprise / total, 0.0)


def _support(sums: _Surprise) -> Array:
    return jnp.where(sums.total != 0, jnp.exp(_entropy(sums)), 0.0)


class _Largest(NamedTuple):
    """The largest number of each query, and the first key of the tile that has it."""

    value: Array
    tile: Array


def _largest_logit(pairs: Pairs) -> _Largest:
    return _in_tile(pairs, pairs.largest_logit)


def _largest_weight(pairs: Pairs) -> _Largest:
    return _in_tile(pairs, jnp.maximum(row_maximum(pairs.weights), 0.0))


def _in_tile(pairs: Pairs, value: Array) -> _Largest:
    first = jnp.min(pairs.kv_idx, initial=jnp.iinfo(jnp.int32).max)
    return _Largest(value, jnp.full(value.shape, first))


def _larger(first: _Largest, second: _Largest) -> _Largest:
    is_second = (second.value > first.value) | (
        (second.value == first.value) & (second.tile < first.tile)
    )
    return _Largest(
        jnp.maximum(first.value, second.value),  # NaN stays
        jnp.where(is_second, second.tile, first.tile),
    )


def _rescaled_largest(sums: _Largest, log_factor: Array) -> _Largest:
    return sums


def _largest_again(of_tile: Any, pairs: Pairs, merged: _Largest) -> _Largest:
    """Return the largest number of the tile that has it, and zero of the others."""
    here = of_tile(pairs)
    return here._replace(value=jnp.where(here.tile == merged.tile, here.value, 0.0))


def _finished_logit(largest: _Largest) -> Array:
    return infinite_where(largest.value == jnp.finfo(largest.value.dtype).min, largest.value)


def _finished_weight(largest: _Largest) -> Array:
    return largest.value


def _squares(pairs: Pairs) -> tuple[Array, Array]:
    return jnp.sum(pairs.weights, axis=1), over_keys(pairs.weights**2)


def _rescaled_squares(sums: tuple[Array, Array], log_factor: Array) -> tuple[Array, Array]:
    return scaled(sums[0], log_factor), scaled(sums[1], 2 * log_factor)


def _trace(sums: tuple[Array, Array]) -> Array:
    return sums[0] - sums[1]


class _Moments(NamedTuple):
    """Sum of magnitudes, mean distance, and weighted sum of squared distances from the mean.

    Joined as Chan, Golub and LeVeque 1983 do, so that no large squares are subtracted.
    """

    total: Array
    mean: Array
    squares: Array


def _moments(pairs: Pairs) -> _Moments:
    distance = distances(pairs).astype(pairs.weights.dtype)
    magnitudes = jnp.abs(pairs.weights)
    total = jnp.sum(magnitudes, axis=1)
    mean = _ratio(over_keys(magnitudes * distance), total)
    return _Moments(total, mean, over_keys(magnitudes * (distance - mean[:, None]) ** 2))


def _joined_moments(first: _Moments, second: _Moments) -> _Moments:
    total = first.total + second.total
    share = _ratio(second.total, total)
    apart = second.mean - first.mean
    return _Moments(
        total,
        first.mean + share * apart,
        first.squares + second.squares + share * first.total * apart**2,
    )


def _rescaled_moments(sums: _Moments, log_factor: Array) -> _Moments:
    total, squares = scaled((sums.total, sums.squares), log_factor)
    return _Moments(total, sums.mean, squares)


def _moments_again(pairs: Pairs, merged: _Moments) -> _Moments:
    """Return the sums around the mean of all keys."""
    distance = distances(pairs).astype(pairs.weights.dtype) - merged.mean[:, None]
    magnitudes = jnp.abs(pairs.weights)
    mean = _ratio(jnp.sum(magnitudes * distance, axis=1), merged.total)
    return _Moments(jnp.sum(magnitudes, axis=1), mean, jnp.sum(magnitudes * distance**2, axis=1))


def _spread(sums: _Moments) -> Array:
    variance = _ratio(sums.squares, sums.total)
    spreads = variance != 0
    return jnp.where(spreads, jnp.sqrt(jnp.where(spreads, variance, 1.0)), 0.0)


def _distance(pairs: Pairs) -> tuple[Array, Array]:
    distance = distances(pairs).astype(pairs.weights.dtype)
    magnitudes = jnp.abs(pairs.weights)
    return over_keys(magnitudes * distance), jnp.sum(magnitudes, axis=1)


def _mean_distance(sums: tuple[Array, Array]) -> Array:
    return _ratio(*sums)


def _ratio(part: Array, total: Array) -> Array:
    is_some = total != 0
    return jnp.where(is_some, part / jnp.where(is_some, total, 1.0), 0.0)


def _heaviest(pairs: Pairs, k: int) -> Heaviest:
    missing = max(k - pairs.weights.shape[1], 0)
    weights = jnp.pad(pairs.weights, ((0, 0), (0, missing)))
    weights, places = jax.lax.top_k(jnp.maximum(weights, 0.0) + _poison(weights), k)
    kv_idx = jnp.pad(pairs.kv_idx[0], (0, missing))
    keys = jnp.where(weights == 0, -1, kv_idx[places])
    return Heaviest(keys, weights)


def _heavier(first: Heaviest, second: Heaviest, k: int) -> Heaviest:
    keys, weights = (jnp.concatenate(pair, axis=1) for pair in zip(first, second, strict=True))
    # Keys that are missing come last: they have the weight zero, and no others have.
    negative, keys = jax.lax.sort((-weights, keys), num_keys=2)
    return Heaviest(keys[:, :k], -negative[:, :k] + _poison(weights))


def _poison(weights: Array) -> Array:
    """Return NaN for each row [T, 1] with NaN in it, and zero for others."""
    return jnp.where(jnp.any(jnp.isnan(weights), axis=1, keepdims=True), jnp.nan, 0.0)


def _known_keys(sums: Heaviest) -> Heaviest:
    return sums._replace(keys=jnp.where(jnp.isnan(sums.weights), -1, sums.keys))


def _heaviest_again(pairs: Pairs, merged: Heaviest) -> Heaviest:
    """Return the weights of the keys that are the heaviest, and zero of those of other tiles."""
    is_chosen = pairs.kv_idx[:, None, :] == merged.keys[:, :, None]
    return merged._replace(
        weights=jnp.sum(jnp.where(is_chosen, pairs.weights[:, None, :], 0.0), axis=2)
    )


entropy = Statistic(_surprise, _entropy, _rescaled_surprise)
r"""Entropy of each query in nats, [B, T, N]: H_i = -sum_j p_ij ln p_ij.

With p_ij = |w_ij| / sum_k |w_ik|, so that weights may be negative. Between 0 (one key) and the
logarithm of the number of allowed keys; 0 where a query attends to nothing. Shannon 1948, section
6; Zhai et al. 2023, section 3 (its collapse precedes divergence).
"""

effective_support = Statistic(_surprise, _support, _rescaled_surprise)
r"""The number of keys that a query attends to, as if to each alike, [B, T, N]: exp(H_i).

0 where a query attends to nothing.
"""

largest_logit = Statistic(
    _largest_logit,
    _finished_logit,
    _rescaled_largest,
    _larger,
    functools.partial(_largest_again, _largest_logit),
)
r"""The largest logit of each query over the keys that it may attend to, [B, T, N].

-inf where it may attend to nothing. Where several are the largest, the derivative is that of the
first of them. Dehghani et al. 2023, section 3.1; Kimi Team 2025, section 2.1 (QK-clip).
"""

largest_weight = Statistic(
    _largest_weight,
    _finished_weight,
    bind(scaled),
    _larger,
    functools.partial(_largest_again, _largest_weight),
)
r"""The largest weight of each query, [B, T, N]; 0 where none is positive.

Where several are the largest, the derivative is that of the first of them.
"""

jacobian_trace = Statistic(_squares, _trace, _rescaled_squares)
r"""Trace of the softmax Jacobian of each query, [B, T, N]: sum_j w_ij - sum_j w_ij^2.

What is left of the gradient to the logits: 0 where one key has all weight.
"""

expected_distance = Statistic(_distance, _mean_distance)
r"""Mean distance of the keys from the query, [B, T, N]: sum_j p_ij |i - j|.

With p_ij = |w_ij| / sum_k |w_ik|; 0 where a query attends to nothing.
"""

distance_spread = Statistic(_moments, _spread, _rescaled_moments, _joined_moments, _moments_again)
r"""Standard deviation of the distance of the keys from the query, [B, T, N].

The root of sum_j p_ij (|i - j| - mean_i)^2, with p_ij = |w_ij| / sum_k |w_ik|; 0 where a query
attends to one key or to nothing, where its derivative is 0 as well.
"""
