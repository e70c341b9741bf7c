"""Which pairs dropout keeps, computed pair by pair inside a kernel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def kept(words: tuple[Array, Array], rate: Array, q_idx: Array, kv_idx: Array) -> Array:
    """Return 0 for the pairs that are dropped and 1 / (1 - rate) for those that are kept.

    The hash of `implementations.head.kept`, in signed integers, which every kernel can add, shift
    and compare: Threefry-2x32 of 20 rounds (Salmon et al. 2011, section 3.3).

    Args:
      words: two int32 [1, 1].
      rate: float32 [1, 1].
      q_idx: [bt, 1].
      kv_idx: [1, bk].
    """
    shape = q_idx.shape[0], kv_idx.shape[1]
    first, second = words
    schedule = first, second, first ^ second ^ jnp.int32(_PARITY)
    x, y = (jnp.broadcast_to(index, shape) for index in (q_idx, kv_idx))
    x, y = x + schedule[0], y + schedule[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = x ^ _rotated(y, rotation)
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + jnp.int32(group + 1)
    uniform = lax.shift_right_logical(x, jnp.full(shape, 8, jnp.int32))
    threshold = jnp.ceil(rate * 2.0**24).astype(jnp.int32)
    return jnp.where(uniform >= threshold, 1.0 / (1.0 - rate), jnp.zeros((), jnp.float32))


def _rotated(x: Array, by: int) -> Array:
    left = lax.shift_left(x, jnp.full(x.shape, by, jnp.int32))
    return left | lax.shift_right_logical(x, jnp.full(x.shape, 32 - by, jnp.int32))


def as_signed(words: Array) -> list[Array]:
    """Return the words [2] of dropout as two int32."""
    signed = lax.bitcast_convert_type(words, jnp.int32)
    return [signed[0], signed[1]]


def function(data: Any, q_idx: Array, kv_idx: Array, leaves: list[Any]) -> Array:
    """Return what is kept of a tile; the leaves are two words and the rate, all of rank 0."""
    first, second, rate = (leaf.reshape(1, 1) for leaf in leaves)
    return kept((first, second), rate, q_idx, kv_idx)
