"""Feature maps against their formulas, and what is left of them far from zero."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import bind
from attention_jax.base.parameters import bind_parameters, initialize, parameters_of
from attention_jax.linear import feature_maps, performer
from attention_jax.linear.feature_maps import split_scale

DEPTH = 4


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def projected(function):
    return bind(function, projection=normal(6, DEPTH, seed=3))


MAPS = {
    "elu_plus_one": feature_maps.elu_plus_one,
    "relu": feature_maps.relu,
    "exponential": feature_maps.exponential,
    "hedgehog": bind(feature_maps.hedgehog, weight=normal(DEPTH, 3), bias=normal(3)),
    "squared": feature_maps.squared,
    "taylor": feature_maps.taylor,
    "identity": feature_maps.identity,
    "positive": projected(performer.positive),
    "hyperbolic": projected(performer.hyperbolic),
    "trigonometric": projected(performer.trigonometric),
}
OF_ANY_SIGN = {"squared", "taylor", "identity", "trigonometric"}
LOGARITHMIC = {"exponential", "hedgehog", "positive", "hyperbolic"}


def test_elu_plus_one_is_its_formula_and_smooth_at_zero():
    x = jnp.linspace(-5, 5, 21)[:, None]
    np.testing.assert_allclose(feature_maps.elu_plus_one(x), jax.nn.elu(x) + 1, atol=1e-6)
    gradient = jax.grad(lambda x: feature_maps.elu_plus_one(x)[0, 0])(jnp.zeros((1, 1)))
    np.testing.assert_allclose(gradient, 1.0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_elu_plus_one_does_not_round_to_zero_in_half_precision(dtype):
    x = jnp.array([[-8.0, -6.0, 3.0]], dtype)
    features = feature_maps.elu_plus_one(x)
    assert features.dtype == dtype
    np.testing.assert_allclose(
        features.astype(jnp.float32), [[np.exp(-8.0), np.exp(-6.0), 4.0]], rtol=1e-2
    )
    naive = jax.nn.elu(x) + jnp.ones((), dtype)
    assert dtype != jnp.bfloat16 or naive[0, 0] == 0.0, "the mistake that this avoids"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(MAPS) - OF_ANY_SIGN))
def test_positive_features(name):
    assert np.all(MAPS[name](3.0 * normal(50, DEPTH)) > 0)


@pytest.mark.slow
def test_kernels():
    query, key = normal(5, DEPTH), normal(7, DEPTH, seed=1)
    logits = query @ key.T / DEPTH**0.5
    for name, kernel in (
        ("squared", logits**2),
        ("taylor", 1 + logits + logits**2 / 2),
        ("identity", query @ key.T),
        ("exponential", jnp.exp(query) @ jnp.exp(key).T),
    ):
        phi = MAPS[name]
        np.testing.assert_allclose(phi(query) @ phi(key).T, kernel, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAPS)
def test_scaled_features_are_the_features(name):
    x, phi = normal(5, DEPTH), MAPS[name]
    features, log_scale = split_scale(phi, x)
    np.testing.assert_allclose(features * jnp.exp(log_scale)[:, None], phi(x), rtol=1e-5)
    assert np.max(np.abs(features)) <= 1 + 1e-6
    weights = normal(*features.shape)

    def total(function, x):
        return jnp.sum(weights * function(x))

    def rescaled(x):
        features, log_scale = split_scale(phi, x)
        return features * jnp.exp(log_scale)[:, None]

    expected = jax.grad(functools.partial(total, phi))(x)
    chex.assert_trees_all_close(
        jax.grad(functools.partial(total, rescaled))(x), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", sorted(LOGARITHMIC))
def test_far_from_zero_the_scale_is_in_the_logarithm(name):
    x = 1000.0 * normal(5, DEPTH)
    features, log_scale = split_scale(MAPS[name], x)
    chex.assert_tree_all_finite((features, log_scale))
    np.testing.assert_array_equal(features.max(axis=1), 1.0)
    assert np.all(features > 0)


def test_a_row_without_features_has_no_scale():
    features, log_scale = split_scale(bind(feature_maps.relu, epsilon=0.0), -jnp.ones((1, 3)))
    np.testing.assert_array_equal(features, 0.0)
    np.testing.assert_array_equal(log_scale, -jnp.inf)


def test_only_the_identity_is_signed():
    assert {name for name, phi in MAPS.items() if feature_maps.is_signed(phi)} == {"identity"}


def test_hedgehog_starts_as_exponentials_of_the_features():
    declared = parameters_of(feature_maps.hedgehog, DEPTH, DEPTH)
    values = initialize(jax.random.key(0), declared)
    phi, x = bind_parameters(feature_maps.hedgehog, values), normal(5, DEPTH)
    np.testing.assert_allclose(phi(x), jnp.exp(jnp.concatenate([x, -x], axis=1)), rtol=1e-6)
