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
    "llama3_frequencies",
    "longrope_frequencies",
    "longrope_gain",
    "rotary",
    "sinusoidal",
    "sinusoidal_step",
    "stretched_base",
    "yarn_frequencies",
    "yarn_gain",
]

Array = jax.Array


def sinusoidal(
    positions: Array,
    depth: int,
    base: float = 10_000.0,
    dtype: Any = None,
    halves: bool = False,
    frequencies: Any = None,
) -> Array:
    r"""Sinusoids: PE(p, 2i) = sin(p / base^(2i/D)), PE(p, 2i+1) = cos(p / base^(2i/D)).

    A step of k is a rotation whatever p is: PE(p + k) = R_k PE(p), with R_k from
    `sinusoidal_step`.

    Args:
      positions: p, any shape [...].
      depth: D, even.
      base: of the wavelengths, which run from 2 pi to 2 pi base.
      dtype: of the result; float32 unless given.
      halves: all sines before all cosines, as in the code of the paper, Transformer-XL, M2M-100
        and Whisper, rather than in pairs.
      frequencies: angles of one position, [D / 2], for those of `base`, which is then not used.
        `base ** -numpy.linspace(0, 1, depth // 2)` are those of the paper's code, M2M-100 and
        Whisper, whose last wavelength is 2 pi base.

    Returns:
      [..., D].

    Raises:
      ValueError: an odd depth, or not half as many frequencies.

    Vaswani et al. 2017, section 3.5.

    >>> sinusoidal(jnp.array([0]), 4)
    Array([[0., 1., 0., 1.]], dtype=float32)
    >>> sinusoidal(jnp.array([0]), 4, halves=True)
    Array([[0., 0., 1., 1.]], dtype=float32)
    """
    positions, dtype = jnp.asarray(positions), dtype or jnp.float32
    of_base = _frequencies("sinusoidal", depth, base)
    frequencies = of_base if frequencies is None else frequencies
    if np.shape(frequencies) != of_base.shape:
        raise ValueError(
            f"sinusoidal: frequencies must have the shape {of_base.shape} for a depth of {depth}, "
            f"got {np.shape(frequencies)}."
        )
    precise = at_least_float32(dtype)
    angles = _angles("sinusoidal", positions, depth, base, precise, frequencies)
    waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-2 if halves else -1)
    return waves.reshape(*positions.shape, depth).astype(dtype)


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
    frequencies: Any = None,
    gain: float = 1.0,
) -> Array:
    r"""Rotary positions: pair i of x_p turns by the angle p base^(-2i/R).

    (x_2i, x_2i+1) -> (x_2i cos - x_2i+1 sin, x_2i sin + x_2i+1 cos). Applied to queries and keys,
    q_m . k_n depends on n - m alone. With a cache, `positions` are those of the new tokens.

    Neighbours are paired, as in the paper and in GPT-J. Weights of most models since (GPT-NeoX,
    Llama, Mistral, Qwen, Gemma as converted for `transformers`) are for `halves=True`.

    Args:
      x: queries or keys of one head, [T, H].
      positions: p, [T].
      base: of the wavelengths; `stretched_base` for longer sequences than trained on.
      rotated: R, how many features turn, the others keep; even; H unless given.
      scale: of the positions; below one interpolates between those trained on.
      halves: pair feature i with i + R / 2 rather than 2i with 2i + 1.
      frequencies: angles of one position, [R / 2], for those of `base`, which is then not used:
        `llama3_frequencies`, `yarn_frequencies`, `longrope_frequencies`.
      gain: factor of what turns, as `yarn_gain`; the logits of features that turn grow by its
        square.

    Returns:
      [T, H].

    Raises:
      ValueError: R is odd or larger than H, or not twice the number of frequencies.

    Su et al. 2021 (RoFormer), equations 15 and 34; Chen et al. 2023 (scale); Black et al. 2022
    (partial rotation); Peng et al. 2024 (YaRN), section 3.4 (gain).

    >>> rotary(jnp.array([[1.0, 0.0]]), jnp.array([1])).round(4)
    Array([[0.5403, 0.8415]], dtype=float32)
    """
    sizes = checks.axes("rotary", x=(x, "TH"), positions=(positions, "T"))
    if frequencies is not None:
        of_pairs = 2 * checks.axes("rotary", frequencies=(frequencies, "F"))["F"]
        if rotated not in (None, of_pairs):
            raise ValueError(
                f"rotary: {of_pairs // 2} frequencies turn {of_pairs} features, got rotated "
                f"{rotated}; leave rotated out, or give {rotated // 2} frequencies."
            )
        rotated = of_pairs
    rotated = sizes["H"] if rotated is None else rotated
    if rotated > sizes["H"]:
        raise ValueError(f"rotary: rotated must be at most H = {sizes['H']}, got {rotated}.")
    dtype = at_least_float32(x.dtype)
    angles = _angles("rotary", positions.astype(dtype) * scale, rotated, base, dtype, frequencies)
    cos, sin = jnp.cos(angles) * gain, jnp.sin(angles) * gain
    turning, rest = x[:, :rotated].astype(dtype), x[:, rotated:]
    if halves:
        first, second = jnp.split(turning, 2, axis=1)
        turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=1)
    else:
        first, second = turning[:, 0::2], turning[:, 1::2]
        turned = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=2)
    return jnp.concatenate([turned.reshape(sizes["T"], rotated).astype(x.dtype), rest], axis=1)


def llama3_frequencies(
    rotated: int,
    base: float = 500_000.0,
    factor: float = 8.0,
    length: int = 8192,
    low: float = 1.0,
    high: float = 4.0,
) -> np.ndarray:
    r"""Frequencies for sequences `factor` times as long: only slow pairs turn slower.

    With n_i = L base^(-2i/R) / (2 pi) turns over the L = `length` positions trained on and
    s_i = clip((n_i - low) / (high - low), 0, 1), pair i has the frequency
    base^(-2i/R) (s_i + (1 - s_i) / factor).

    Args:
      rotated: R, even.
      base: of the wavelengths.
      factor: how many times as long.
      length: L, positions that the model was trained on at first.
      low: of fewer turns, a pair turns 1 / factor as fast.
      high: of more turns, a pair turns as before; between both it is interpolated.

    Returns:
      [R / 2], float64, for `rotary(frequencies=)`.

    Raises:
      ValueError: an odd R, or high that is not more than low.

    Grattafiori et al. 2024 (Llama 3), section 3.4.1, and the code of Llama 3.1.

    >>> llama3_frequencies(4, base=100.0, factor=8.0, length=100)
    array([1.        , 0.02975353])
    """
    if high <= low:
        raise ValueError(f"llama3_frequencies: high must be more than low, got {high} and {low}.")
    before = _frequencies("llama3_frequencies", rotated, base)
    kept = np.clip((length * before / (2 * np.pi) - low) / (high - low), 0.0, 1.0)
    return before * (kept + (1 - kept) / factor)


def yarn_frequencies(
    rotated: int,
    base: float = 10_000.0,
    factor: float = 4.0,
    length: int = 4096,
    slow: float = 1.0,
    fast: float = 32.0,
    rounded: bool = True,
) -> np.ndarray:
    r"""Frequencies for sequences `factor` times as long, interpolated by the number of the pair.

    The pair that turns n times over the L = `length` positions trained on has the number
    i(n) = R ln(L / (2 pi n)) / (2 ln base). Pair i has the frequency
    base^(-2i/R) (1 - r_i + r_i / factor), r_i = clip((i - floor i(fast)) / (ceil i(slow) -
    floor i(fast)), 0, 1), both bounds within 0 and R - 1.

    Args:
      rotated: R, even.
      base: of the wavelengths.
      factor: how many times as long.
      length: L.
      slow: of fewer turns, a pair turns 1 / factor as fast.
      fast: of more turns, a pair turns as before.
      rounded: with floor and ceil, as in the paper's code; False leaves both bounds as they are
        (OpenAI 2025, gpt-oss).

    Returns:
      [R / 2], float64, for `rotary(frequencies=)`; `yarn_gain` is the gain.

    Raises:
      ValueError: an odd R.

    Peng et al. 2024 (YaRN), definition 2, with the bounds of its code.

    >>> yarn_frequencies(4, base=100.0, factor=4.0, length=400)
    array([1.    , 0.0625])
    """
    before = _frequencies("yarn_frequencies", rotated, base)
    first, last = (
        rotated * np.log(length / (2 * np.pi * turns)) / (2 * np.log(base))
        for turns in (fast, slow)
    )
    if rounded:
        first, last = np.floor(first), np.ceil(last)
    first, last = max(first, 0.0), min(last, rotated - 1.0)
    slowed = np.clip((np.arange(len(before)) - first) / max(last - first, 1e-3), 0.0, 1.0)
    return before * (1 - slowed + slowed / factor)


def yarn_gain(factor: float) -> float:
    r"""The gain of YaRN for queries and for keys: 0.1 ln(factor) + 1, for `rotary(gain=)`.

    Peng et al. 2024 (YaRN), equation 22.

    >>> round(yarn_gain(4.0), 4)
    1.1386
    """
    return float(0.1 * np.log(factor) + 1.0) if factor > 1 else 1.0


def longrope_frequencies(factors: Any, base: float = 10_000.0) -> np.ndarray:
    r"""Frequencies for longer sequences, each pair slowed by a factor of its own that was searched.

    Pair i has the frequency base^(-2i/R) / factors_i.

    Args:
      factors: by which each pair turns slower, [R / 2].
      base: of the wavelengths.

    Returns:
      [R / 2], float64, for `rotary(frequencies=)`; `longrope_gain` is the gain.

    Ding et al. 2024 (LongRoPE), section 3.2; Abdin et al. 2024 (Phi-3).

    >>> longrope_frequencies([1.0, 4.0], base=100.0)
    array([1.   , 0.025])
    """
    factors = np.asarray(factors, np.float64)
    return _frequencies("longrope_frequencies", 2 * len(factors), base) / factors


def longrope_gain(factor: float, length: int) -> float:
    r"""The gain of LongRoPE for queries and for keys: sqrt(1 + ln(factor) / ln(length)).

    `factor` is how many times as long sequences are as the `length` trained on.

    Ding et al. 2024 (LongRoPE), and the code of Phi-3.

    >>> round(longrope_gain(32.0, 4096), 4)
    1.1902
    """
    return float(np.sqrt(1 + np.log(factor) / np.log(length))) if factor > 1 else 1.0


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


def _angles(
    operation: str,
    positions: Array,
    depth: int,
    base: float,
    dtype: Any,
    frequencies: Any = None,
) -> Array:
    """Return p base^(-2i/D), or p times the frequencies, [..., D / 2]."""
    frequencies = _frequencies(operation, depth, base) if frequencies is None else frequencies
    frequencies = jnp.asarray(frequencies, dtype)
    frequencies = jnp.expand_dims(frequencies, tuple(range(positions.ndim)))
    return positions[..., None].astype(dtype) * frequencies


def _frequencies(operation: str, depth: int, base: float) -> np.ndarray:
    if depth % 2 or depth < 0:
        raise ValueError(f"{operation}: depth must be even, got {depth}.")
    return base ** (-np.arange(0, depth, 2) / max(depth, 1))
