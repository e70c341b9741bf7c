"""The axis letters, and every callable type with its shapes.

| letter | axis |
|---|---|
| B | batch |
| T | query length |
| S | key and value length |
| N | query heads |
| K | key/value heads; N is a multiple of K (grouped-query attention) |
| G | query heads that share one key/value head, G = N / K |
| H | depth of a query or key head (Hq and Hk where they differ) |
| V | depth of a value head |
| D | model features |
| A | attention features of an additive or multi-layer score |

Public operators take `query [B, T, N, H]`, `key [B, S, K, H]`, `value [B, S, K, V]`.
Scores, masks, biases and normalizers are written for one head.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

Array = jax.Array


def at_least_float32(dtype: Any) -> Any:
    """Return the dtype to compute in: float64 stays, what is narrower than float32 is widened."""
    return jnp.dtype(dtype if jnp.finfo(dtype).bits > 32 else jnp.float32)


@runtime_checkable
class Score(Protocol):
    """`score(query [T, Hq], key [S, Hk]) -> logits [T, S]`.

    Entry (i, j) may depend on query row i and key row j alone: that is what lets the
    same function serve a tile, a whole sequence and one decoding step.
    """

    def __call__(self, query: Array, key: Array, /) -> Array: ...


@runtime_checkable
class PositionalScore(Protocol):
    """`score(query [T, Hq], key [S, Hk], q_idx=[T], kv_idx=[S]) -> logits [T, S]`.

    Entry (i, j) may depend on the positions of its rows too; marked by `scores.positional`.
    """

    def __call__(self, query: Array, key: Array, /, *, q_idx: Array, kv_idx: Array) -> Array: ...


AnyScore = Score | PositionalScore


@runtime_checkable
class Predicate(Protocol):
    """`predicate(q_idx, kv_idx) -> bool`: True where the query may attend to the key."""

    def __call__(self, q_idx: Any, kv_idx: Any, /) -> Any: ...


@runtime_checkable
class Bias(Protocol):
    """`bias(q_idx [T, 1], kv_idx [1, S]) -> [T, S]`, added to the logits."""

    def __call__(self, q_idx: Array, kv_idx: Array, /) -> Array: ...


@runtime_checkable
class Normalizer(Protocol):
    """`normalizer(logits [T, S], allowed [T, S]) -> weights [T, S]`, zero where not allowed."""

    def __call__(self, logits: Array, allowed: Array, /) -> Array: ...


@runtime_checkable
class FeatureMap(Protocol):
    """`feature_map(x [T, H]) -> features [T, M]`, so that phi(q) . phi(k) stands for a kernel."""

    def __call__(self, x: Array, /) -> Array: ...
