"""Statistics of keys and of whole heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.base.binding import bind
from attention_jax.base.finite import infinite_where
from attention_jax.masks import Lookup, Mask, MaskLike, as_mask
from attention_jax.statistics.protocol import Pairs, Statistic, scaled
from attention_jax.statistics.queries import (
    distances,
    largest_logit,
    largest_weight,
    over_keys,
    where,
)

__all__ = [
    "Induction",
    "diagonal",
    "head_largest_logit",
    "induction_score",
    "mass_by_distance",
    "mean_mass",
    "previous_token",
    "previous_token_score",
    "received_mass",
    "saturated_rows",
]

Array = jax.Array


def diagonal(q_idx: Any, kv_idx: Any) -> Any:
    """Say whether a key is the query's own position; a mask for `mass`.

    >>> from attention_jax import masks
    >>> print(masks.draw(masks.as_mask(diagonal), 2))
    █·
    ·█
    """
    return q_idx == kv_idx


def previous_token(q_idx: Any, kv_idx: Any) -> Any:
    """Say whether a key is the position before the query; a mask for `mass`.

    >>> from attention_jax import masks
    >>> print(masks.draw(masks.as_mask(previous_token), 2))
    ··
    █·
    """
    return q_idx - 1 == kv_idx


@dataclasses.dataclass(frozen=True)
class Induction(Mask):
    """Positions that follow the query's token where it occurred before.

    That is tokens[j - 1] = tokens[i] and 1 <= j <= i for query i and key j.

    `tokens` are integers [T], or [B, T].

    >>> from attention_jax import masks
    >>> print(masks.draw(Induction([7, 8, 7, 8]), 4))
    ····
    ····
    ·█··
    ··█·
    """

    tokens: Any
    example_rank: ClassVar[dict[str, int]] = {"tokens": 1}

    def entries(self, field: str, query_length: int, key_length: int) -> dict[str, int]:
        return {"T": query_length, "S": key_length}

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        tokens = Lookup(self.tokens)
        return (tokens[q_idx] == tokens[kv_idx - 1]) & (kv_idx >= 1) & (kv_idx <= q_idx)


def mean_mass(mask: MaskLike) -> Statistic:
    r"""Return the statistic of how much weight goes where a mask is true, of a head.

    The mean of `mass(mask)` over the queries that may attend to a key for which it is true.

    Args:
      mask: as in `mass`.

    Returns:
      A statistic of a head, [B, N]; 0 where there is no such query.

    >>> from attention_jax import attend, masks
    >>> x = jnp.zeros((1, 3, 1, 2))
    >>> on_itself = mean_mass(diagonal)
    >>> found = attend(x, x, x, mask=masks.Causal(), statistics={"diagonal": on_itself})
    >>> found.statistics["diagonal"]  # (1 + 1/2 + 1/3) / 3
    Array([[0.611]], dtype=float32)
    """
    return Statistic(bind(_counted_mass, mask=as_mask(mask)), _mean, _rescaled_mass, of="head")


def induction_score(tokens: Any) -> Statistic:
    """Return the statistic of an induction head: the `mean_mass` of `Induction(tokens)`.

    Args:
      tokens: integers [T], or [B, T], of self-attention.

    Returns:
      A statistic of a head, [B, N], between 0 and 1.

    Elhage et al. 2021 and Olsson et al. 2022, section "induction heads" (prefix matching score).

    >>> from attention_jax import attend, masks
    >>> x = jnp.zeros((1, 4, 1, 2))
    >>> score = induction_score(jnp.array([7, 8, 7, 8]))
    >>> found = attend(x, x, x, mask=masks.Causal(), statistics={"induction": score})
    >>> found.statistics["induction"]  # (1/3 + 1/4) / 2
    Array([[0.292]], dtype=float32)
    """
    return mean_mass(Induction(tokens))


def mass_by_distance(edges: Sequence[int]) -> Statistic:
    r"""Return the statistic of a head's share of weight by distance |i - j|.

    Bucket b holds the distances from edges[b] up to, not including, edges[b + 1]; the last all
    from edges[-1] on. A weight counts by its magnitude.

    Args:
      edges: increasing distances; those less than the first are in no bucket.

    Returns:
      A statistic of a head, [B, N, buckets]; sums to one if the first edge is 0, and is 0 where
      no query attends to anything.

    Raises:
      ValueError: no edges, or edges that do not increase.

    >>> from attention_jax import attend
    >>> x = jnp.zeros((1, 3, 1, 2))
    >>> shares = mass_by_distance([0, 1, 2])
    >>> attend(x, x, x, statistics={"shares": shares}).statistics["shares"]
    Array([[[0.333, 0.444, 0.222]]], dtype=float32)
    """
    known = np.asarray(edges)
    if known.ndim != 1 or known.size == 0 or np.any(known[1:] <= known[:-1]):
        raise ValueError(
            f"mass_by_distance: edges must be increasing distances, at least one, got {edges}."
        )
    return Statistic(bind(_by_distance, edges=known.astype(np.int32)), _shares, of="head")


def saturated_rows(threshold: float = 0.95) -> Statistic:
    """Return the statistic of the share of queries whose largest weight exceeds a threshold.

    Args:
      threshold: of the largest weight.

    Returns:
      A statistic of a head, [B, N], over the queries with a positive weight; 0 where none has one.

    >>> from attention_jax import attend
    >>> x = jnp.array([9.0, 0.0]).reshape(1, 2, 1, 1)
    >>> attend(x, x, x, statistics={"saturated": saturated_rows()}).statistics["saturated"]
    Array([[0.5]], dtype=float32)
    """
    return dataclasses.replace(
        largest_weight, finish=bind(_saturated, threshold=threshold), of="head"
    )


class _Mass(NamedTuple):
    """Weight where a mask is true, and for how many allowed keys it is, [T] each."""

    mass: Array
    number: Array


def _counted_mass(pairs: Pairs, mask: Any) -> _Mass:
    is_true = where(mask, pairs)
    return _Mass(
        over_keys(jnp.where(is_true, pairs.weights, 0.0)),
        jnp.sum(is_true & pairs.allowed, axis=1, dtype=jnp.int32),
    )


def _rescaled_mass(sums: _Mass, log_factor: Array) -> _Mass:
    return sums._replace(mass=scaled(sums.mass, log_factor))


def _mean(sums: _Mass) -> Array:
    number = jnp.sum(sums.number > 0, axis=0, dtype=jnp.int32)
    return jnp.sum(sums.mass, axis=0) / jnp.maximum(number, 1).astype(sums.mass.dtype)


def _by_distance(pairs: Pairs, edges: Array) -> tuple[Array, Array]:
    distance = distances(pairs)
    beyond = jnp.iinfo(jnp.int32).max
    magnitudes, masses = jnp.abs(pairs.weights), []
    for number in range(len(edges)):
        least, end = edges[number], edges[number + 1] if number + 1 < len(edges) else beyond
        is_in = (distance >= least) & (distance < end)
        masses.append(over_keys(jnp.where(is_in, magnitudes, 0.0)))
    return jnp.stack(masses, axis=1), jnp.sum(magnitudes, axis=1)


def _shares(sums: tuple[Array, Array]) -> Array:
    masses, total = (jnp.sum(x, axis=0) for x in sums)
    is_some = total != 0
    return jnp.where(is_some, masses / jnp.where(is_some, total, 1.0), 0.0)


def _largest_of_all(largest: Any) -> Array:
    lowest = jnp.finfo(largest.value.dtype).min
    value = jnp.max(largest.value, axis=0, initial=lowest)
    return infinite_where(value == lowest, value)


def _saturated(largest: Any, threshold: Any) -> Array:
    weights = largest.value
    exceeds = jnp.sum(weights > jnp.asarray(threshold, weights.dtype), axis=0, dtype=jnp.int32)
    attends = jnp.sum(weights > 0, axis=0, dtype=jnp.int32)
    return exceeds.astype(weights.dtype) / jnp.maximum(attends, 1).astype(weights.dtype)


def _received(pairs: Pairs) -> Array:
    return jnp.sum(pairs.weights, axis=0)


received_mass = Statistic(_received, rescale=None, of="key")
r"""The weight that each key receives from all queries, [B, S, N]: sum_i w_ij.

Of sinks it is large (Xiao et al. 2024, section 3.1); it is what eviction from a cache by "heavy
hitters" counts (Zhang et al. 2023, H2O, equation 3).
"""

head_largest_logit = dataclasses.replace(largest_logit, finish=bind(_largest_of_all), of="head")
r"""The largest logit of a head over all its pairs, [B, N]: what QK-clip needs.

-inf where no pair is allowed. Kimi Team 2025, section 2.1 (MuonClip).
"""

previous_token_score = mean_mass(previous_token)
r"""The `mean_mass` of the previous token, [B, N]: near 1 for a previous-token head.

Elhage et al. 2021, section "induction heads".
"""
