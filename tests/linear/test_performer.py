"""FAVOR+ against its theory: unbiased, with the error of lemma 2, less when orthogonal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attend, bind, masks
from attention_jax.linear import feature_maps, linear_attention, performer

KINDS = ["positive", "hyperbolic", "trigonometric"]
DEPTH, FEATURES, DRAWS = 4, 4, 20_000


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def pairs():
    """Two queries and two keys whose products are positive and negative."""
    query = jnp.array([[0.6, -0.4, 0.5, 0.1], [-0.3, 0.2, 0.8, -0.5]])
    return query, jnp.array([[0.5, 0.1, 0.4, -0.6], [-0.7, 0.3, -0.2, 0.4]])


@functools.cache
def errors(kind, orthogonal):
    """Return phi(q) . phi(k) - exp(q . k / sqrt(H)) for many draws, [draws, 2, 2]."""
    query, key = pairs()

    def one(random_key):
        projection = performer.random_features(random_key, FEATURES, DEPTH, orthogonal=orthogonal)
        phi = bind(getattr(performer, kind), projection=projection)
        return phi(query) @ phi(key).T - jnp.exp(query @ key.T * DEPTH**-0.5)

    keys = jax.random.split(jax.random.key(0), DRAWS)
    return np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_unbiased_and_with_the_mean_squared_error_of_the_paper(kind):
    error = errors(kind, False)
    phi = bind(getattr(performer, kind), projection=jnp.zeros((FEATURES, DEPTH)))
    expected = performer.variance(phi, *pairs())
    standard_error = np.sqrt(expected / DRAWS)
    assert np.all(np.abs(error.mean(axis=0)) < 4 * standard_error)
    np.testing.assert_allclose(np.mean(error**2, axis=0), expected, rtol=0.08)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_orthogonal_directions_are_unbiased_and_err_less(kind):
    error = errors(kind, True)
    independent = errors(kind, False)
    mean, squared = error.mean(axis=0), np.mean(error**2, axis=0)
    assert np.all(np.abs(mean) < 4 * np.sqrt(squared / DRAWS))
    assert np.mean(squared / np.mean(independent**2, axis=0)) < 0.97


@pytest.mark.slow
def test_directions_are_at_right_angles_within_blocks_and_as_long_as_gaussian_ones():
    draw = functools.partial(performer.random_features, num_features=19, depth=8)
    projection = draw(jax.random.key(0))
    assert projection.shape == (19, 8)
    for block in (projection[:8], projection[8:16], projection[16:]):
        products = np.asarray(block @ block.T)
        np.testing.assert_allclose(products, np.diag(np.diag(products)), atol=1e-4)
    many = performer.random_features(jax.random.key(1), 8000, 8)
    square = jnp.sum(many**2, axis=-1)
    np.testing.assert_allclose(np.mean(square), 8, rtol=0.02)
    np.testing.assert_allclose(np.var(square), 16, rtol=0.1)
    np.testing.assert_allclose(np.mean(many, axis=0), 0, atol=0.05)
    np.testing.assert_array_equal(projection, draw(jax.random.key(0)))


def favor(kind, num_features, depth, seed=0):
    projection = performer.random_features(jax.random.key(seed), num_features, depth)
    return bind(getattr(performer, kind), projection=projection)


@pytest.mark.slow
def test_a_tiny_change_of_the_data_changes_the_answer_a_tiny_bit():
    query, key, value = (normal(1, 9, 2, 8, seed=seed) for seed in range(3))
    attention = jax.jit(functools.partial(linear_attention, feature_map=favor("positive", 32, 8)))
    moved = attention(query + 1e-7, key, value)
    np.testing.assert_allclose(moved, attention(query, key, value), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["positive", "hyperbolic"])
def test_no_last_key_changes_an_earlier_output_by_one_bit(kind):
    """Neither a huge key among small ones, nor one whose features dwarf those of all the past."""
    query, key, value = (normal(1, 13, 2, 8, seed=seed) for seed in range(3))
    attention = jax.jit(
        functools.partial(
            linear_attention, feature_map=favor(kind, 16, 8), mask=masks.Causal(), chunk_size=5
        )
    )
    for past in (1.0, 100.0):
        context = attention(query, past * key, value)
        for last in (0.0, 1.0, 1e4):
            changed = (past * key).at[:, -1].set(last), value.at[:, -1].multiply(-2.0)
            again = attention(query, *changed)
            np.testing.assert_array_equal(again[:, :-1], context[:, :-1])
            assert np.all(np.isfinite(again))
            if last < past:
                assert not np.array_equal(again[:, -1], context[:, -1])
        assert np.all(np.any(np.asarray(context) != 0, axis=-1))


@pytest.mark.slow
@pytest.mark.parametrize("mask", [None, masks.Causal()], ids=["full", "causal"])
def test_large_queries_and_keys_stay_averages_of_values(mask):
    """Where query and key have no large feature in common, too: the first query has one key."""
    value = normal(1, 13, 2, 8, seed=2)
    attention = jax.jit(
        functools.partial(
            linear_attention, feature_map=favor("positive", 64, 8), mask=mask, chunk_size=5
        )
    )
    for size in (30.0, 1e4):
        query, key = (size * normal(1, 13, 2, 8, seed=seed) for seed in range(2))
        context = attention(query, key, value)
        low, high = (bound(value, axis=1, keepdims=True) for bound in (jnp.min, jnp.max))
        assert np.all((context >= low - 1e-4) & (context <= high + 1e-4))
        if mask is not None:
            np.testing.assert_allclose(context[:, 0], value[:, 0], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_more_features_come_closer_to_softmax_attention_than_the_mean_of_the_values(kind):
    query, key = (0.5 * normal(1, 32, 2, 8, seed=seed) for seed in range(2))
    value = normal(1, 32, 2, 8, seed=2)
    exact = attend(query, key, value)
    baseline = jnp.linalg.norm(exact - jnp.mean(value, axis=1, keepdims=True))

    @functools.partial(jax.jit, static_argnums=0)
    def error(num_features):
        approximate = linear_attention(query, key, value, feature_map=favor(kind, num_features, 8))
        return jnp.linalg.norm(exact - approximate)

    few, many = error(64), error(4096)
    print(f"{kind}: 64 features {few:.2f}, 4096 features {many:.2f}, the mean {baseline:.2f}")
    assert many < 0.3 * baseline
    assert 3 < few / many < 24, "the error falls with the square root of the features"


@pytest.mark.slow
def test_at_unit_normal_inputs_it_is_further_off_than_the_mean_of_the_values():
    """What a table without this baseline hides: depth 16, 128 keys, 256 independent features."""

    def errors(key):
        keys = jax.random.split(key, 4)
        query, key, value = (jax.random.normal(k, (1, 128, 1, 16)) for k in keys[:3])
        features = performer.random_features(keys[3], 256, 16, orthogonal=False)
        phi = bind(performer.positive, projection=features)
        exact = attend(query, key, value, implementation="dense")
        found = linear_attention(query, key, value, feature_map=phi)
        norm = jnp.linalg.norm(exact)
        mean = jnp.mean(value, axis=1, keepdims=True)
        return jnp.linalg.norm(found - exact) / norm, jnp.linalg.norm(exact - mean) / norm

    found, baseline = jax.jit(lambda keys: jax.lax.map(errors, keys))(
        jax.random.split(jax.random.key(0), 20)
    )
    print(f"256 features {found.mean():.2f}, the mean {baseline.mean():.2f}")
    np.testing.assert_allclose(found.mean(), 1.21, rtol=0.15)
    np.testing.assert_allclose(baseline.mean(), 0.80, rtol=0.05)


def test_what_cannot_be_drawn_or_known_is_explained():
    with pytest.raises(ValueError, match="random_features: num_features must be 1 or more, got 0"):
        performer.random_features(jax.random.key(0), 0, 4)
    with pytest.raises(ValueError, match=r"axis H \(number 1\) of projection \[M, H\] must be 4"):
        performer.positive(jnp.ones((2, 4)), jnp.ones((8, 5)))
    with pytest.raises(ValueError, match="known for positive, hyperbolic and trigonometric"):
        performer.variance(feature_maps.relu, jnp.ones((1, 4)), jnp.ones((1, 4)))


@pytest.mark.slow
def test_epsilon_is_added_to_the_exponentials():
    x = 3 * normal(5, 4)
    projection = normal(6, 4)
    plain = performer.positive(x, projection)
    found = performer.positive(x, projection, epsilon=0.1)
    np.testing.assert_allclose(found, plain + 0.1 / np.sqrt(6), rtol=1e-5)
    feature_map = bind(performer.positive, projection=projection, epsilon=0.1)
    query, key, value = (normal(1, 5, 1, depth)[:, :, :, :4] for depth in (4, 5, 6))
    weights = found_of(query, projection) @ found_of(key, projection).T
    expected = weights @ value[0, :, 0] / weights.sum(axis=1, keepdims=True)
    context = linear_attention(query, key, value, feature_map=feature_map)
    np.testing.assert_allclose(context[0, :, 0], expected, rtol=1e-4)
    with pytest.raises(ValueError, match=r"positive: epsilon must be 0 or more, got -1\.0"):
        performer.positive(x, projection, epsilon=-1.0)
    with pytest.raises(ValueError, match="variance: known for positive features of epsilon 0"):
        performer.variance(feature_map, x, x)


def found_of(x, projection):
    return performer.positive(x[0, :, 0], projection, epsilon=0.1)
