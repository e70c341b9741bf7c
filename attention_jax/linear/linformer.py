"""Linformer: keys and values projected along the sequence, from S down to R rows.

    context = softmax(Q (E K)^T / sqrt(H)) F V

The projections E and F are fixed (`random_projection`, `mean_pooling`) or learned, one for all
heads or one for each, and F may be E. A row of E K mixes all positions, so only
padding can be masked, before the sums; a causal mask has no meaning.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from attention_jax.attention import attend
from attention_jax.base import checks
from attention_jax.base.binding import Sliced
from attention_jax.base.finite import finite_rows
from attention_jax.base.typing import AnyScore, at_least_float32
from attention_jax.masks import MaskLike, Table, padding
from attention_jax.scores import scaled_dot

__all__ = ["linformer_attention", "mean_pooling", "random_projection"]

Array = jax.Array

_OF_ATTEND = ("normalizer", "dropout_rate", "dropout_key", "implementation")

projection_init = initializers.variance_scaling(0.5, "fan_avg", "uniform", in_axis=-1, out_axis=-2)
"""Of learned projections [R, S], as in the authors' code: Glorot's, with a gain of 1 / sqrt(2)."""


def linformer_attention(
    query: Array,
    key: Array,
    value: Array,
    key_projection: Array,
    value_projection: Array | None = None,
    *,
    score: AnyScore | Sliced = scaled_dot,
    mask: MaskLike = None,
    **options: Any,
) -> Any:
    r"""Linformer attention: context = softmax(score(Q, E K)) F V.

    A query gets zeros where it is padding, or where all keys are.

    Args:
      query: [B, T, N, Hq].
      key: [B, S, K, Hk]; K divides N, and each key head serves N / K query heads.
      value: [B, S, K, V].
      key_projection: E, [R, L], or [K, R, L] for each key head; the first S of L columns are used.
      value_projection: F, of the same two shapes; E unless given.
      score: as in `attend`, of a query and a row of E K.
      mask: padding by `masks.Lengths`, or by an array over the keys alone, [B, 1, 1, S]; others
        are refused.
      **options: normalizer, dropout_rate, dropout_key and implementation of `attend`, for weights
        of a query and a projected key.

    Returns:
      Context [B, T, N, V] in the dtype of `value`; time O((T + S) R) and no array of T x S.

    Raises:
      ShapeError: operands that do not fit each other, or a rank R larger than L.
      ValueError: a mask that cannot be honoured.

    Wang et al. 2020, section 4, equation 7.

    >>> x = jax.random.normal(jax.random.key(0), (2, 9, 4, 8))
    >>> projection = random_projection(jax.random.key(1), 3, 9)
    >>> linformer_attention(x, x, x, projection).shape
    (2, 9, 4, 8)
    """
    name = "linformer_attention"
    checks.floating(name, query=query, key=key, value=value)
    sizes = checks.axes(name, query=(query, "BTNQ"), key=(key, "BSKH"), value=(value, "BSKV"))
    checks.multiple(name, "query heads N", sizes["N"], "key heads K", sizes["K"])
    padding.refuse(name, options, *_OF_ATTEND)
    value_projection = key_projection if value_projection is None else value_projection
    projections = {"key_projection": key_projection, "value_projection": value_projection}
    for label, projection in projections.items():
        _check_projection(label, projection, sizes)
    if key_projection.shape[-2] != value_projection.shape[-2]:
        raise checks.ShapeError(
            f"{name}: key_projection and value_projection must have one rank R, got shapes "
            f"{key_projection.shape} and {value_projection.shape}."
        )

    found = padding.from_mask(
        name, mask, sizes, causal=False, reason="each projected key mixes all positions"
    )
    there = found.query & jnp.any(found.key, axis=1, keepdims=True)
    may_attend = None if mask is None else Table(there[:, None, :, None])
    dtype = at_least_float32(key.dtype)
    context = attend(
        jnp.where(there[:, :, None, None], query, 0.0).astype(dtype),
        _projected(key_projection, key.astype(dtype), found.key),
        _projected(value_projection, value.astype(dtype), found.key),
        score=score,
        mask=may_attend,
        **options,
    )
    return context.astype(value.dtype)


def random_projection(rng: Array, rank: int, length: int, dtype: Any = jnp.float32) -> Array:
    r"""A fixed projection with entries N(0, 1 / R): E^T E is the identity on average.

    For weights p and values v of S rows, p^T E^T E v is p . v on average, with a mean squared
    error of (|p|^2 |v|^2 + (p . v)^2) / R.

    Args:
      rng: a `jax.random` key.
      rank: R.
      length: S.
      dtype: of the result.

    Returns:
      [R, S].

    Raises:
      ValueError: a rank below 1 or above the length.

    Wang et al. 2020, theorems 1 and 2 (Johnson and Lindenstrauss 1984).

    >>> random_projection(jax.random.key(0), 3, 9).shape
    (3, 9)
    """
    check_rank("random_projection", rank, length)
    return jax.random.normal(rng, (rank, length), dtype) * rank**-0.5


def mean_pooling(rank: int, length: int, dtype: Any = jnp.float32) -> Array:
    r"""A fixed projection that averages R runs of neighbours, as equal in length as can be.

    Args:
      rank: R.
      length: S.
      dtype: of the result.

    Returns:
      [R, S], rows summing to one.

    Raises:
      ValueError: a rank below 1 or above the length.

    Wang et al. 2020, section 4 ("general projections").

    >>> mean_pooling(2, 4)
    Array([[0.5, 0.5, 0. , 0. ],
           [0. , 0. , 0.5, 0.5]], dtype=float32)
    """
    check_rank("mean_pooling", rank, length)
    run = jnp.arange(length) * rank // length
    members = (run[None, :] == jnp.arange(rank)[:, None]).astype(dtype)
    return members / jnp.sum(members, axis=1, keepdims=True)


def _projected(projection: Array, x: Array, present: Array) -> Array:
    """Project rows [B, S, K, H] that are present [B, S] to [B, R, K, H]."""
    x, poison = finite_rows(jnp.where(present[:, :, None, None], x, 0.0))
    projection = jnp.asarray(projection, x.dtype)[..., : x.shape[1]]
    each = "krs" if projection.ndim == 3 else "rs"
    mixed = jnp.einsum(f"{each},bskh->brkh", projection, x)
    return mixed + jnp.sum(poison, axis=1)[:, None, :, None]


def _check_projection(name: str, projection: Array, sizes: dict[str, int]) -> None:
    shape, heads, length = jnp.shape(projection), sizes["K"], sizes["S"]
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != heads):
        raise checks.ShapeError(
            f"linformer_attention: {name} must be [R, L], or [K, R, L] with K = {heads} key "
            f"heads, got shape {shape}."
        )
    if shape[-2] > shape[-1]:
        raise checks.ShapeError(
            f"linformer_attention: {name} must have a rank R of at most its length L, got shape "
            f"{shape}; there is nothing to gain from more rows than keys."
        )
    if shape[-1] < length:
        raise checks.ShapeError(
            f"linformer_attention: {name} serves up to {shape[-1]} keys, its last axis, got "
            f"S = {length}; make it longer."
        )


def check_rank(operation: str, rank: int, length: int) -> None:
    """Require a rank of a projection from 1 to its length."""
    if not 1 <= rank <= length:
        raise ValueError(
            f"{operation}: rank must be 1 or more and at most the length {length}, got {rank}."
        )
