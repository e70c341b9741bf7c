"""Rows that a score maps before its kernels: what NaN and Inf among them reach."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attend, bind, masks, normalizers, scores
from attention_jax.base.matmul import PLAIN
from attention_jax.implementations import interpreted
from attention_jax.implementations.head import Head
from attention_jax.implementations.pallas.rows import with_rows_mapped
from attention_jax.scores import separate

S, H, F = 6, 4, 3
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


SCORES = {
    "a product": lambda weight, bias: bind(
        scores.low_rank_bilinear, query_weight=weight, key_weight=weight
    ),
    "a product and a bias": lambda weight, bias: bind(
        scores.additive, query_weight=weight, key_weight=weight, value=jnp.ones(F), bias=bias
    ),
    "other maps": lambda weight, bias: scores.row_normalized(
        scores.projected(scores.dot, weight, weight)
    ),
}


@pytest.mark.parametrize("name", ["a product", pytest.param("other maps", marks=pytest.mark.slow)])
def test_no_number_of_a_mapped_row_of_nan_is_finite_nor_its_derivative_anything(name):
    key = normal(S, H).at[1, 2].set(jnp.nan).at[3, 0].set(jnp.inf)
    usable = jnp.delete(key, jnp.asarray([1, 3]), axis=0)

    def rows(key, weight, bias):
        score = separate(SCORES[name](weight, bias))
        head = Head(key, key, key, score, masks.Lengths(S), None, normalizers.softmax, None)
        mapped = with_rows_mapped(head, PLAIN).key
        return jnp.where(jnp.isfinite(mapped), mapped, 0.0), mapped

    parameters = normal(H, F), normal(F)
    found, pull, mapped = jax.vjp(rows, key, *parameters, has_aux=True)
    is_finite = np.isfinite(mapped)
    np.testing.assert_array_equal(is_finite.any(1), [True, False, True, False, True, True])
    np.testing.assert_array_equal(is_finite.all(1), is_finite.any(1))
    expected, pull_usable, _ = jax.vjp(rows, usable, *parameters, has_aux=True)
    np.testing.assert_allclose(found[is_finite.all(1)], expected, rtol=1e-6)
    of_key, *of_parameters = pull(jnp.cos(found))
    assert np.isfinite(of_key).all()
    of_usable = pull_usable(jnp.cos(expected))
    for ours, theirs in zip(of_parameters, of_usable[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_parameters_have_their_gradients_where_keys_that_are_masked_are_nan(platform):
    query, key, value = (normal(1, S, 1, H) for _ in range(3))
    poisoned = key.at[:, 4].set(jnp.nan).at[:, 5, :, 1].set(-jnp.inf)

    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(weight, bias, key, implementation):
        context = attend(
            query,
            key,
            value,
            score=SCORES["a product and a bias"](weight, bias),
            mask=masks.Lengths(4),
            implementation=implementation,
            tile_sizes=(3, 3),
        )
        return jnp.sum(jnp.sin(context))

    given = normal(H, F), normal(F)
    with interpreted(platform):
        ours = jax.jit(gradients, static_argnums=3)(*given, poisoned, "pallas")
    exact = gradients(*given, key, "dense")
    for found, expected in zip(ours, exact, strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)
