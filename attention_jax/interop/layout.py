"""From Flax's layout [*batch, T, N, H] to that of `attend` with one batch axis, and positions."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.base import checks
from attention_jax.base.binding import PerHead, bind, per_head
from attention_jax.base.typing import at_least_float32
from attention_jax.masks import Mask, Shift, Table, as_mask
from attention_jax.request import function_of
from attention_jax.scores import separate
from attention_jax.scores.composition import is_positional, positional

Array = jax.Array


def is_array(part: Any) -> bool:
    """Tell an array from a mask or a function."""
    return hasattr(part, "dtype") and hasattr(part, "shape")


def batch_axes(**tensors: Array) -> tuple[int, ...]:
    """Return the batch axes that query, key and value [*batch, length, heads, depth] share.

    Raises:
      ShapeError: they do not share them, or lack an axis.
    """
    batch = tensors["query"].shape[:-3]
    for name, tensor in tensors.items():
        if tensor.ndim < 3 or tensor.shape[:-3] != batch:
            raise checks.ShapeError(
                f"attention_fn: {name} must be [*batch, length, heads, depth] with the batch axes "
                f"{batch} of query, got shape {tensor.shape}."
            )
    return batch


def joined(x: Array) -> Array:
    """Join the batch axes: [*batch, T, N, H] to [B, T, N, H]."""
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def as_masked(part: Any, batch: tuple[int, ...], pairs: tuple[int, ...]) -> Mask | None:
    """Read a mask, a function, or an array [*batch, N, T, S] whose nonzero entries may attend.

    Raises:
      ShapeError: an array that does not broadcast to that shape.
    """
    if is_array(part):
        return Table(_fitted("mask", part, batch, pairs).astype(bool))
    return None if part is None else as_mask(part)


def as_bias(part: Any, batch: tuple[int, ...], pairs: tuple[int, ...], dtype: Any) -> Any:
    """Read a bias: a function is left as it is, an array [*batch, N, T, S] becomes [B, N, T, S].

    Raises:
      ShapeError: an array that does not broadcast to that shape.
    """
    if is_array(part):
        return _fitted("bias", part, batch, pairs).astype(at_least_float32(dtype))
    return part


def _fitted(name: str, array: Array, batch: tuple[int, ...], pairs: tuple[int, ...]) -> Array:
    """Bring an array [*batch, N, T, S] to [B, N, T, S], or [1, N, T, S] where the batch shares."""
    full = (*batch, *pairs)
    shape = (1,) * (len(full) - array.ndim) + array.shape
    if array.ndim > len(full) or any(
        got not in (1, size) for got, size in zip(shape, full, strict=True)
    ):
        raise checks.ShapeError(
            f"attention_fn: {name} must broadcast to [*batch, N, T, S] = {full}, got shape "
            f"{array.shape}."
        )
    is_shared = all(size == 1 for size in shape[:-3])
    own = shape[:-3] if is_shared else batch
    return joined(jnp.broadcast_to(array.reshape(shape), (*own, *shape[-3:])))


def last_allowed(mask: Table, key_length: int) -> Array:
    """Return the last key that the mask allows to any query; 0 if there is none."""
    allowed = jnp.any(mask.allowed, axis=(0, 1, 2))
    return jnp.max(jnp.where(allowed, jnp.arange(key_length, dtype=jnp.int32), 0))


def placed(part: Any, position: Array | None, num_heads: int) -> Any:
    """Ask a mask or bias where the first query stands at a position other than 0."""
    if position is None or part is None:
        return part
    if isinstance(part, Mask):
        return Shift(part, query=position)
    if not is_array(part):
        by = _by_head(part, position, num_heads)
        return _like(part, bind(_bias_further_on, function=function_of(part), by=by))
    if part.ndim < 2 or part.shape[-2] == 1:
        return part
    return jax.lax.dynamic_slice_in_dim(jnp.asarray(part), position, 1, axis=-2)


def placed_score(score: Any, position: Array | None, num_heads: int) -> Any:
    """Ask a score that knows positions where the first query stands at another than 0."""
    parts = separate(function_of(score))
    if position is None or not is_positional(parts.pairs):
        return score
    by = _by_head(score, position, num_heads)
    return _like(score, parts._replace(pairs=bind(_pairs_further_on, pairs=parts.pairs, by=by)))


def _by_head(part: Any, position: Array, num_heads: int) -> Array:
    return jnp.broadcast_to(position, (num_heads,)) if isinstance(part, PerHead) else position


def _like(part: Any, function: Any) -> Any:
    return per_head(function) if isinstance(part, PerHead) else function


def _bias_further_on(q_idx: Array, kv_idx: Array, function: Any, by: Array) -> Array:
    return function(q_idx + by, kv_idx)


@positional
def _pairs_further_on(
    query: Array, key: Array, *, q_idx: Array, kv_idx: Array, pairs: Any, by: Array
) -> Array:
    return pairs(query, key, q_idx=q_idx + by, kv_idx=kv_idx)
