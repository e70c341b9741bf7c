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

import inspect
from typing import Any, Protocol

import jax
import jax.numpy as jnp

Array = jax.Array


def at_least_float32(dtype: Any) -> Any:
    """Return the dtype to compute in: float64 stays, what is narrower than float32 is widened."""
    return jnp.dtype(dtype if jnp.finfo(dtype).bits > 32 else jnp.float32)


class Score(Protocol):
    """`score(query [T, Hq], key [S, Hk]) -> logits [T, S]`.

    Entry (i, j) may depend on query row i and key row j alone: that is what lets the
    same function serve a tile, a whole sequence and one decoding step.
    """

    def __call__(self, query: Array, key: Array, /) -> Array: ...


class PositionalScore(Protocol):
    """`score(query [T, Hq], key [S, Hk], q_idx=[T], kv_idx=[S]) -> logits [T, S]`.

    Entry (i, j) may depend on the positions of its rows too; marked by `scores.positional`.
    """

    def __call__(self, query: Array, key: Array, /, *, q_idx: Array, kv_idx: Array) -> Array: ...


AnyScore = Score | PositionalScore


class MaskFunction(Protocol):
    """`mask(q_idx [T, 1], kv_idx [1, S]) -> allowed [T, S]`, True where it may attend."""

    def __call__(self, q_idx: Any, kv_idx: Any, /) -> Any: ...


class Bias(Protocol):
    """`bias(q_idx [T, 1], kv_idx [1, S]) -> [T, S]`, added to the logits."""

    def __call__(self, q_idx: Array, kv_idx: Array, /) -> Array: ...


class Normalizer(Protocol):
    """`normalizer(logits [T, S], allowed [T, S]) -> weights [T, S]`, zero where not allowed."""

    def __call__(self, logits: Array, allowed: Array, /) -> Array: ...


class QueriedNormalizer(Protocol):
    """`normalizer(logits [T, S], allowed [T, S], query=[T, Hq]) -> weights [T, S]`.

    A row of weights may depend on its query too; marked by `normalizers.queried`.
    """

    def __call__(self, logits: Array, allowed: Array, /, *, query: Array) -> Array: ...


AnyNormalizer = Normalizer | QueriedNormalizer


class HeadMap(Protocol):
    """`head_map(pairs [M, T, S]) -> [N, T, S]`, logits or weights of M heads to those of N.

    Entry (i, j) of the result may depend on entry (i, j) of every head alone, or on those of the
    neighbours that the rule "halo" declares, which the map is then given around the tile.
    """

    def __call__(self, pairs: Array, /) -> Array: ...


class FeatureMap(Protocol):
    """`feature_map(x [T, H]) -> features [T, M]`, so that phi(q) . phi(k) stands for a kernel."""

    def __call__(self, x: Array, /) -> Array: ...


def require_callable(label: str, function: Any, kind: type) -> None:
    """Require a function that can be called as a type of this module says.

    Args:
      label: operation and argument, that the message begins with.
      function: what was given for it.
      kind: `Score`, `PositionalScore`, `MaskFunction`, `Bias`, `Normalizer`,
        `QueriedNormalizer`, `HeadMap` or `FeatureMap`.

    Raises:
      TypeError: no function, or one of other arguments.

    >>> require_callable("attend: score", lambda query, key: query @ key.T, Score)
    """
    formula = (kind.__doc__ or "").split("`")[1]
    if not callable(function):
        raise TypeError(f"{label} must be a function `{formula}`, got {function!r}.")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins do not tell
        return
    _, *expected = inspect.signature(kind.__call__).parameters.values()
    by_name = {one.name: one for one in expected if one.kind is one.KEYWORD_ONLY}
    by_place = [one for one in expected if one.name not in by_name]
    try:
        signature.bind(*by_place, **by_name)
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise TypeError(
            f"{label} must be a function `{formula}`, got {name}{signature}: {error}."
        ) from None
