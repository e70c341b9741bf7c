"""Maps across heads in which each pair of a query and a key stands alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from attention_jax.base import checks
from attention_jax.base.binding import rule
from attention_jax.base.matmul import times
from attention_jax.base.parameters import Parameter, initializer, require_depths

__all__ = ["difference", "differential", "grouped", "talking"]

Array = jax.Array


def talking(pairs: Array, weight: Array) -> Array:
    r"""Every head hears every other: e'_n = sum_m P_mn e_m.

    Args:
      pairs: logits or weights of all heads, [M, T, S].
      weight: P, [M, N].

    Returns:
      Those of N heads, [N, T, S].

    Raises:
      ShapeError: a weight for another number of heads.

    Shazeer et al. 2020, "Talking-heads attention", section 3: before the softmax by `mix_logits`
    (P_l), after it by `mix_weights` (P_w).

    >>> talking(jnp.ones((2, 1, 3)), jnp.array([[1.0], [0.5]]))
    Array([[[1.5, 1.5, 1.5]]], dtype=float32)
    """
    checks.axes("talking", pairs=(pairs, "MTS"), weight=(weight, "MN"))
    rows = pairs.reshape(len(pairs), pairs.shape[1] * pairs.shape[2])
    return times(weight.T, rows).reshape(weight.shape[1], *pairs.shape[1:])


def grouped(pairs: Array, weight: Array) -> Array:
    r"""Heads of a group hear each other: e'_gd = sum_c P_gcd e_gc.

    Args:
      pairs: logits or weights of all heads, [M, T, S], M = G C.
      weight: P, [G, C, D], for G groups of C heads, of which D become.

    Returns:
      Those of N = G D heads, [N, T, S].

    Raises:
      ShapeError: a weight for another number of heads.

    The head mixing convolution of Golovneva et al. 2025, "Multi-token attention", section 3.2.

    >>> grouped(jnp.ones((4, 1, 1)), jnp.array([[[1.0], [2.0]], [[3.0], [4.0]]]))[:, 0, 0]
    Array([3., 7.], dtype=float32)
    """
    sizes = checks.axes("grouped", pairs=(pairs, "MTS"), weight=(weight, "GCD"))
    if sizes["G"] * sizes["C"] != sizes["M"]:
        raise checks.ShapeError(
            f"grouped: weight [G, C, D] = {weight.shape} is for {sizes['G'] * sizes['C']} heads, "
            f"got pairs of {sizes['M']}; give G groups of C heads each, G C = {sizes['M']}."
        )
    # One axis after the other, as arrays on an explicit mesh need it.
    rows = pairs.reshape(len(pairs), pairs.shape[1] * pairs.shape[2])
    mixed = jax.vmap(times)(weight.mT, rows.reshape(sizes["G"], sizes["C"], rows.shape[1]))
    return mixed.reshape(sizes["G"] * sizes["D"], rows.shape[1]).reshape(-1, *pairs.shape[1:])


def difference(pairs: Array, scale: Any) -> Array:
    r"""One head of two: w'_n = w_2n - scale_n w_{2n+1}.

    Args:
      pairs: weights of all heads, [2 N, T, S].
      scale: lambda, a number, or [N].

    Returns:
      Those of N heads, [N, T, S].

    Raises:
      ShapeError: an odd number of heads, or a scale for another number of them.

    Ye et al. 2024, "Differential Transformer", equation 1: queries and keys of 2 N heads, values of
    N, and this as `mix_weights`.

    >>> difference(jnp.array([[[1.0]], [[0.5]]]), 0.5)
    Array([[[0.75]]], dtype=float32)
    """
    heads, odd = divmod(checks.axes("difference", pairs=(pairs, "MTS"))["M"], 2)
    if odd:
        raise checks.ShapeError(
            f"difference: axis M (number 0) of pairs [M, T, S] must be even, got {len(pairs)} "
            "heads; give queries of 2 N heads."
        )
    scale = jnp.asarray(scale, pairs.dtype)
    if scale.shape not in ((), (heads,)):
        raise checks.ShapeError(
            f"difference: scale must be one number or [N] = [{heads}], half of {len(pairs)} heads, "
            f"got shape {scale.shape}."
        )
    both = pairs.reshape(heads, 2, *pairs.shape[1:])
    return both[:, 0] - jnp.reshape(scale, (-1, 1, 1)) * both[:, 1]


def differential(
    pairs: Array,
    query_1: Array,
    key_1: Array,
    query_2: Array,
    key_2: Array,
    initial: Any = 0.8,
) -> Array:
    r"""The difference whose scale is exp(query_1 . key_1) - exp(query_2 . key_2) + initial.

    Args:
      pairs: weights of all heads, [2 N, T, S].
      query_1: [H], shared by all heads of a layer.
      key_1: likewise.
      query_2: likewise.
      key_2: likewise.
      initial: lambda_init, where training begins; 0.8 - 0.6 exp(-0.3 (l - 1)) in layer l from 1.

    Returns:
      Those of N heads, [N, T, S].

    Raises:
      ShapeError: an odd number of heads, or vectors of different sizes.

    Ye et al. 2024, "Differential Transformer", equation 2.

    >>> differential(jnp.ones((2, 1, 1)), *jnp.zeros((4, 8)), initial=0.25)
    Array([[[0.75]]], dtype=float32)
    """
    vectors = {"query_1": query_1, "key_1": key_1, "query_2": query_2, "key_2": key_2}
    checks.axes("differential", **{name: (vector, "H") for name, vector in vectors.items()})
    scale = jnp.exp(jnp.sum(query_1 * key_1)) - jnp.exp(jnp.sum(query_2 * key_2))
    return difference(pairs, scale + jnp.asarray(initial, scale.dtype))


@rule(talking, "group")
def _(weight: Array) -> int:
    return len(weight)


@rule(talking, "head_parameters")
def _(num_heads: int, depth: int | None) -> dict[str, Parameter]:
    """Begin with heads that each hear themselves, and the others a little."""
    return {"weight": Parameter((num_heads, num_heads), near_identity)}


@rule(grouped, "group")
def _(weight: Array) -> int:
    return weight.shape[1]


@rule(grouped, "head_parameters")
def _(num_heads: int, depth: int | None) -> dict[str, Parameter]:
    """Pairs of heads, each of which hears itself at first."""
    checks.multiple("grouped", "num_heads", num_heads, "the size of a group", 2)
    return {"weight": Parameter((num_heads // 2, 2, 2), identity)}


@rule(difference, "group")
@rule(differential, "group")
def _(*parameters: Any, **named: Any) -> int:
    return 2


@rule(difference, "head_parameters")
def _(num_heads: int, depth: int | None) -> dict[str, Parameter]:
    checks.multiple("difference", "num_heads", num_heads, "heads of a difference", 2)
    return {"scale": Parameter((num_heads // 2,), initializer(initializers.constant, 0.5))}


@rule(differential, "head_parameters")
def _(num_heads: int, depth: int | None) -> dict[str, Parameter]:
    """Vectors of normal numbers, of deviation 0.1, as in the paper's own code."""
    require_depths("differential", depth=depth)
    drawn = Parameter((depth or 0,), initializer(initializers.normal, 0.1))
    return dict.fromkeys(("query_1", "key_1", "query_2", "key_2"), drawn)


def identity(rng: Array, shape: Any, dtype: Any = jnp.float32) -> Array:
    """Return unit matrices, [..., M, N]."""
    return jnp.broadcast_to(jnp.eye(*shape[-2:], dtype=dtype), shape)


def near_identity(rng: Array, shape: Any, dtype: Any = jnp.float32) -> Array:
    """Return a unit matrix [M, N] with normal numbers of deviation 0.1 / sqrt(M) added."""
    noise = jax.random.normal(rng, shape, dtype)
    return identity(rng, shape, dtype) + 0.1 * shape[0] ** -0.5 * noise
