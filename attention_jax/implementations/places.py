"""The part of a whole array at one place of its mapped axes: read it, write it."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from attention_jax.base.transposition import linear_call

Array = jax.Array


def each_place(counts: dict[str, int]) -> dict[str, Any]:
    """Return the place of each head along every axis, [heads], the last axis varying fastest."""
    if all(isinstance(count, int) for count in counts.values()):
        grid = np.indices(tuple(counts.values()), np.int32)
        return {letter: along.ravel() for letter, along in zip(counts, grid, strict=True)}
    # A size is a symbol where the program is exported for all of them.
    rest = jnp.arange(math.prod(counts.values()), dtype=jnp.int32)
    found = {}
    for letter, count in reversed(counts.items()):
        count = jnp.asarray(count, jnp.int32)
        found[letter], rest = rest % count, rest // count
    return {letter: found[letter] for letter in counts}


def read(whole: Any, letters: str, where: dict[str, Any]) -> Any:
    """Return the part of an array, with those of its axes that have a place taken away."""
    mapped = [axis for axis, letter in enumerate(letters) if letter in where]
    if not mapped:
        return whole
    starts = [where.get(letter, np.int32(0)) for letter in letters.ljust(whole.ndim)]
    sizes = [1 if axis in mapped else size for axis, size in enumerate(whole.shape)]
    part = lax.dynamic_slice(whole, starts, sizes, allow_negative_indices=False)
    return lax.squeeze(part, mapped)


def write(whole: Array, part: Array, letters: str, where: dict[str, Any]) -> Array:
    """Write a part of a result, where there are zeros, or what is not differentiated.

    That is to add it, so the cotangent of the whole stays what it is. Transposed as JAX would do,
    it had zeros written into it for each head, into a copy of all heads.
    """
    mapped = [axis for axis, letter in enumerate(letters) if letter in where]
    starts = [where.get(letter, np.int32(0)) for letter in letters.ljust(whole.ndim)]
    part = lax.expand_dims(part, mapped)
    if not jnp.issubdtype(whole.dtype, jnp.floating):
        return _put(starts, (whole, part))
    return linear_call(_put, functools.partial(_taken, part.shape), starts, (whole, part))


def zeros(part: Any, letters: str, sizes: dict[str, int]) -> Array:
    """Return zeros for all heads, which vary over a mesh and are sharded as the parts are."""
    rest = iter(part.shape)
    front = [sizes[letter] if letter in sizes else next(rest) for letter in letters]
    whole = jnp.zeros_like(part, shape=(*front, *rest))
    split = [] if part.sharding is None else list(part.sharding.spec)
    if not any(split):
        return whole
    for place in [axis for axis, letter in enumerate(letters) if letter in sizes]:
        split.insert(place, None)
    return jax.reshard(whole, PartitionSpec(*split))


def _put(starts: Any, arrays: tuple[Array, Array]) -> Array:
    return lax.dynamic_update_slice(*arrays, starts, allow_negative_indices=False)


def _taken(sizes: tuple[int, ...], starts: Any, whole: Array) -> tuple[Array, Array]:
    return whole, lax.dynamic_slice(whole, starts, sizes, allow_negative_indices=False)
