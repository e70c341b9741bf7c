"""The threshold of alpha-entmax, against bisection and over the range of alpha."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attend, bind, normalizers

ROWS, KEYS = 6, 48


def rows():
    """Logits of rows that are spread, peaked, equal, tied, beside huge ones, and empty."""
    rng = np.random.default_rng(0)
    logits = np.stack([rng.normal(size=KEYS) for _ in range(ROWS)])
    logits[1] *= 40.0
    logits[2] = 3.0
    logits[3] = np.round(logits[3])
    logits[4] += 1e6
    allowed = rng.random((ROWS, KEYS)) < 0.8
    allowed[5] = False
    return logits, allowed


def by_bisection(logits, allowed, alpha):
    """The weights of one row, w = max((alpha - 1) e - t, 0)^(1 / (alpha - 1))."""
    if not allowed.any():
        return np.zeros_like(logits)
    scaled = np.where(allowed, (alpha - 1.0) * (logits - logits[allowed].max()), -np.inf)
    low, high = -1.0, 0.0
    for _ in range(100):
        middle = 0.5 * (low + high)
        is_low = (np.maximum(scaled - middle, 0.0) ** (1.0 / (alpha - 1.0))).sum() >= 1.0
        low, high = (middle, high) if is_low else (low, middle)
    return np.maximum(scaled - low, 0.0) ** (1.0 / (alpha - 1.0))


@functools.partial(jax.jit, static_argnames="implementation")
def weighted(logits, allowed, alpha, implementation):
    """The weights of rows, by attention with logits as bias, over an identity of values."""
    zeros = jnp.zeros((1, ROWS, 1, 1), logits.dtype), jnp.zeros((1, KEYS, 1, 1), logits.dtype)
    values = jnp.eye(KEYS, dtype=logits.dtype)[None, :, None]
    context = attend(
        *zeros,
        values,
        bias=logits[None, None],
        mask=allowed[None, None],
        normalizer=bind(normalizers.entmax, alpha=alpha),
        implementation=implementation,
        tile_sizes=(4, 16) if implementation == "tiled" else None,
    )
    return context[0, :, 0]


@pytest.mark.parametrize("implementation", ["dense", pytest.param("tiled", marks=pytest.mark.slow)])
def test_weights_are_those_of_bisection_for_every_alpha(implementation, x64):
    """Above 2, where only a learned alpha gets, powers below one are steep at the threshold."""
    logits, allowed = rows()
    for alpha in (1.05, 1.3, 1.5, 1.8, 2.0, 2.5, 4.0):
        found = weighted(*map(jnp.asarray, (logits, allowed, alpha)), implementation)
        expected = [by_bisection(*row, alpha) for row in zip(logits, allowed, strict=True)]
        steep = max(alpha - 1.0, 1.0)  # as many digits as the threshold has
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-12 ** (1.0 / steep))


@pytest.mark.parametrize("alpha", [1.1, 1.5, pytest.param(2.0, marks=pytest.mark.slow)])
def test_rows_sum_to_one_in_float32(alpha):
    logits, allowed = rows()
    single = jnp.asarray(logits, jnp.float32), jnp.asarray(allowed), jnp.float32(alpha)
    total = jnp.sum(weighted(*single, "tiled"), axis=1)
    np.testing.assert_allclose(total, allowed.any(axis=1), atol=2e-6)
