"""A small convolution over neighbouring pairs of queries and keys, in each head."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from attention_jax.base import checks
from attention_jax.base.binding import rule
from attention_jax.base.parameters import Parameter
from attention_jax.head_maps.protocol import Halo

__all__ = ["neighbours"]

Array = jax.Array
KERNEL = (6, 11)
"""Queries and keys of the kernel in the paper's language models."""


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
    sizes = checks.axes("neighbours", pairs=(pairs, "MTS"), kernel=(kernel, "MPR"))
    rows, columns = sizes["T"] - sizes["P"] + 1, sizes["S"] - sizes["R"] + 1
    total = jnp.zeros((len(pairs), rows, columns), pairs.dtype)
    for a, b in itertools.product(range(sizes["P"]), range(sizes["R"])):
        first = sizes["P"] - 1 - a, sizes["R"] - 1 - b
        moved = pairs[:, first[0] : first[0] + rows, first[1] : first[1] + columns]
        total = total + kernel[:, a, b, None, None] * moved
    return total


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
