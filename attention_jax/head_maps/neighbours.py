"""A small convolution over neighbouring pairs of queries and keys, in each head."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.base import checks
from attention_jax.base.binding import rule
from attention_jax.base.parameters import Parameter
from attention_jax.base.transposition import linear_call
from attention_jax.base.trees import varying_like
from attention_jax.head_maps.protocol import Halo

__all__ = ["neighbours"]

Array = jax.Array
KERNEL = (6, 11)
"""Queries and keys of the kernel in the paper's language models."""

STRIP = 16
"""Queries of a strip in which the gradient of a kernel is added up; measured on a CPU."""


def neighbours(pairs: Array, kernel: Array) -> Array:
    r"""Convolve with earlier queries and near keys: e'_ij = sum_ab kernel_ab e_{i-a, j-b+c}.

    The sum is over a from 0 to P - 1 and b from 0 to R - 1, with c = (R - 1) // 2 keys after j.

    Args:
      pairs: logits or weights with their neighbours, [M, P - 1 + T, R - 1 + S]; zeros where
        nothing may be attended.
      kernel: of each head, [M, P, R].

    Returns:
      Those of the pairs within, [M, T, S].

    Raises:
      ShapeError: a kernel for another number of heads.

    Golovneva et al. 2025, "Multi-token attention", equations 3 and 4: with
    Mask_0 before and the mask again after, so that a causal mask stays causal.

    >>> neighbours(jnp.array([[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]]), jnp.array([[[1.0], [10.0]]]))
    Array([[[ 3., 14., 25.]]], dtype=float32)
    """
    checks.axes("neighbours", pairs=(pairs, "MTS"), kernel=(kernel, "MPR"))
    return linear_call(_of_kernel, _toward_pairs, kernel, pairs)


def _of_kernel(kernel: Array, pairs: Array) -> Array:
    return linear_call(_convolved, _toward_kernel, pairs, kernel)


def _convolved(pairs: Array, kernel: Array) -> Array:
    """Convolve, as one sum of moved pairs, which a compiler makes one loop of."""
    (_, high, wide), (_, queries, keys) = pairs.shape, kernel.shape
    rows, columns = high - queries + 1, wide - keys + 1
    total = jnp.zeros((len(pairs), rows, columns), pairs.dtype)
    for a, b in itertools.product(range(queries), range(keys)):
        first = queries - 1 - a, keys - 1 - b
        moved = pairs[:, first[0] : first[0] + rows, first[1] : first[1] + columns]
        total = total + kernel[:, a, b, None, None] * moved
    return total


def _toward_pairs(kernel: Array, cotangent: Array) -> Array:
    """Convolve with the kernel turned round; as JAX transposes a sum of parts, each were padded."""
    _, queries, keys = kernel.shape
    around = jnp.pad(cotangent, ((0, 0), (queries - 1,) * 2, (keys - 1,) * 2))
    return neighbours(around, jnp.flip(kernel, (1, 2)))


def _toward_kernel(pairs: Array, cotangent: Array) -> Array:
    """Add up the products of pairs and cotangents that each number of the kernel joins.

    In strips of queries, and for each key apart until the end: a sum over a whole tile of each
    product would be added number by number on a CPU.
    """
    heads, rows, columns = cotangent.shape
    queries, keys = pairs.shape[1] - rows + 1, pairs.shape[2] - columns + 1
    strip = max(min(rows, STRIP), 1)
    rest = (0, 0), (0, max(-rows % strip, strip - rows)), (0, 0)  # one strip at least
    whole = jnp.pad(pairs, rest), jnp.pad(cotangent, rest)
    start = [jnp.zeros((heads, queries, columns), pairs.dtype) for _ in range(keys)]
    sums = varying_like(start, pairs, cotangent)
    starts = jnp.arange(0, rows, strip, dtype=jnp.int32)
    sums, _ = lax.scan(functools.partial(_with_strip, strip, whole), sums, starts)
    return jnp.flip(jnp.sum(jnp.stack(sums, axis=2), axis=3), (1, 2))


def _with_strip(
    strip: int, whole: tuple[Array, Array], sums: list[Array], start: Array
) -> tuple[list[Array], None]:
    """Add what a strip of queries adds, for each key of the kernel [M, P, S]."""
    pairs, cotangent = whole
    _, queries, columns = sums[0].shape
    part = functools.partial(
        lax.dynamic_slice_in_dim, start_index=start, axis=1, allow_negative_indices=False
    )
    near, change = part(pairs, slice_size=strip + queries - 1), part(cotangent, slice_size=strip)
    added = []
    for key, total in enumerate(sums):
        moved = near[:, :, key : key + columns]
        for row in range(strip):
            total = total + change[:, row, None] * moved[:, row : row + queries]
        added.append(total)
    return added, None


@rule(neighbours, "halo")
def _(kernel: Array) -> Halo:
    queries, keys = kernel.shape[1:]
    return Halo((queries - 1, 0), (keys // 2, (keys - 1) // 2))


@rule(neighbours, "head_parameters")
def _(num_heads: int, depth: int | None) -> dict[str, Parameter]:
    """A kernel of 6 queries and 11 keys, as in the paper, that begins as the identity."""
    return {"kernel": Parameter((num_heads, *KERNEL), unit)}


def unit(rng: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    """Return kernels [..., P, R] that leave the pairs as they are."""
    return jnp.zeros(shape, dtype).at[..., 0, (shape[-1] - 1) // 2].set(1)
