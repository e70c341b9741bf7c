"""Absolute positions: added to the input, or rotating queries and keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from attention_jax.base import checks
from attention_jax.base.integers import as_int32
from attention_jax.base.parameters import Learned, Parameter, initializer, learned
from attention_jax.base.typing import at_least_float32

__all__ = [
    "embedded",
    "learned_table",
    "rotary",
    "sinusoidal",
    "sinusoidal_step",
    "stretched_base",
]

Array = jax.Array


def sinusoidal(positions: Array, depth: int, base: float = 10_000.0, dtype: Any = None) -> Array:
    r"""Sinusoids: PE(p, 2i) = sin(p / base^(2i/D)), PE(p, 2i+1) = cos(p / base^(2i/D)).

    A step of k is a rotation whatever p is: PE(p + k) = R_k PE(p), with R_k from
    `sinusoidal_step`.

    Args:
      positions: p, any shape [...].
      depth: D, even.
      base: of the wavelengths, which run from 2 pi to 2 pi base.
      dtype: of the result; float32 unless given.

    Returns:
      [..., D].

    Raises:
      ValueError: an odd depth.

    Vaswani et al. 2017, section 3.5.

    >>> sinusoidal(jnp.array([0]), 4)
    Array([[0., 1., 0., 1.]], dtype=float32)
    """
    positions, dtype = jnp.asarray(positions), dtype or jnp.float32
    angles = _angles("sinusoidal", positions, depth, base, at_least_float32(dtype))
    pairs = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return pairs.reshape(*positions.shape, depth).astype(dtype)


def sinusoidal_step(step: Any, depth: int, base: float = 10_000.0, dtype: Any = None) -> Array:
    r"""The matrix R_k with PE(p + k) = R_k PE(p) for every p: one 2 x 2 rotation a frequency.

    Args:
      step: k.
      depth: D, even.
      base: as in `sinusoidal`.
      dtype: of the result; float32 unless given.

    Returns:
      [D, D], block-diagonal and orthogonal.

    Raises:
      ValueError: an odd depth.

    Vaswani et al. 2017, section 3.5 ("can be represented as a linear function").

    >>> sinusoidal_step(jnp.pi / 2, 2).round(3) + 0.0
    Array([[ 0.,  1.],
           [-1.,  0.]], dtype=float32)
    """
    dtype = dtype or jnp.float32
    step = jnp.asarray(step)
    angle = _angles("sinusoidal_step", step, depth, base, at_least_float32(dtype))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    blocks = jnp.stack([jnp.stack([cos, sin], -1), jnp.stack([-sin, cos], -1)], -2)
    return jax.scipy.linalg.block_diag(*blocks).astype(dtype)


def embedded(positions: Array, table: Array) -> Array:
    r"""Learned positions: row p of a table.

    Args:
      positions: p, any shape [...].
      table: [L, D] for positions 0 to L - 1.

    Returns:
      [..., D]; NaN for a position that the table does not have.

    Gehring et al. 2017, section 3.1; Devlin et al. 2019 (BERT).

    >>> embedded(jnp.array([1]), jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    Array([[3., 4.]], dtype=float32)
    """
    positions = jnp.asarray(as_int32("embedded: positions", positions))
    return table.at[positions].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def learned_table(length: int, depth: int) -> Learned:
    """`embedded` with a table for positions 0 to length - 1, for `position=` of an embedding.

    Raises:
      ValueError: a length or depth below 1.

    >>> learned_table(512, 64).parameters["table"].shape
    (512, 64)
    """
    checks.at_least("learned_table", 1, length=length, depth=depth)
    return learned(
        embedded, table=Parameter((length, depth), initializer(initializers.normal, 0.02))
    )


def rotary(
    x: Array,
    positions: Array,
    base: float = 10_000.0,
    rotated: int | None = None,
    scale: float = 1.0,
    halves: bool = False,
) -> Array:
    r"""Rotary positions: pair i of x_p turns by the angle p base^(-2i/R).

    (x_2i, x_2i+1) -> (x_2i cos - x_2i+1 sin, x_2i sin + x_2i+1 cos). Applied to queries and keys,
    q_m . k_n depends on n - m alone. With a cache, `positions` are those of the new tokens.

    Args:
      x: queries or keys of one head, [T, H].
      positions: p, [T].
      base: of the wavelengths; `stretched_base` for longer sequences than trained on.
      rotated: R, how many features turn, the others keep; even; H unless given.
      scale: of the positions; below one interpolates between those trained on.
      halves: pair feature i with i + R / 2 (GPT-NeoX, Llama) rather than 2i with 2i + 1.

    Returns:
      [T, H].

    Raises:
      ValueError: R is odd or larger than H.

    Su et al. 2021 (RoFormer), equations 15 and 34; Chen et al. 2023 (scale); Black et al. 2022
    (partial rotation).

    >>> rotary(jnp.array([[1.0, 0.0]]), jnp.array([1])).round(4)
    Array([[0.5403, 0.8415]], dtype=float32)
    """
    sizes = checks.axes("rotary", x=(x, "TH"), positions=(positions, "T"))
    rotated = sizes["H"] if rotated is None else rotated
    if rotated > sizes["H"]:
        raise ValueError(f"rotary: rotated must be at most H = {sizes['H']}, got {rotated}.")
    dtype = at_least_float32(x.dtype)
    angles = _angles("rotary", positions.astype(dtype) * scale, rotated, base, dtype)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turning, rest = x[:, :rotated].astype(dtype), x[:, rotated:]
    if halves:
        first, second = jnp.split(turning, 2, axis=1)
        turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=1)
    else:
        first, second = turning[:, 0::2], turning[:, 1::2]
        turned = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=2)
    return jnp.concatenate([turned.reshape(sizes["T"], rotated).astype(x.dtype), rest], axis=1)


def stretched_base(base: float, factor: float, rotated: int) -> float:
    r"""The base for sequences `factor` times as long: base factor^(R / (R - 2)).

    The slowest pair then turns 1 / factor as fast, the fastest as before.

    Raises:
      ValueError: two rotated features or fewer.

    Peng et al. 2024 (YaRN), definition 1 ("NTK-aware" interpolation).

    >>> stretched_base(10_000.0, 8.0, 64).__round__()
    85550
    """
    if rotated <= 2:
        raise ValueError(f"stretched_base: rotated must be more than 2, got {rotated}.")
    return base * factor ** (rotated / (rotated - 2))


def _angles(operation: str, positions: Array, depth: int, base: float, dtype: Any) -> Array:
    """Return p base^(-2i/D), [..., D / 2]."""
    if depth % 2 or depth < 0:
        raise ValueError(f"{operation}: depth must be even, got {depth}.")
    frequencies = base ** (-np.arange(0, depth, 2) / max(depth, 1))
    frequencies = np.expand_dims(frequencies, tuple(range(positions.ndim)))
    return positions[..., None].astype(dtype) * jnp.asarray(frequencies, dtype)
