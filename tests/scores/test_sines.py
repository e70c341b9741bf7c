"""tanh by sines: its error, certified and measured, and additive attention by it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from attention_jax import attend, bind, masks, scores
from attention_jax.scores import TanhBySines

pytestmark = pytest.mark.usefixtures("x64")

SINES = TanhBySines(limit=1.5, terms=3)


@functools.cache
def parameters(dtype=jnp.float64, features=5):
    rng = np.random.default_rng(0)
    shapes = {"query_weight": (4, features), "key_weight": (4, features)}
    shapes |= {"value": (features,), "bias": (features,)}
    return {name: jnp.asarray(rng.normal(size=size), dtype) for name, size in shapes.items()}


def rows(number, scale=1.0, dtype=jnp.float64, seed=1):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=(number, 4)), dtype)


def additive(activation, **changes):
    return bind(scores.additive, **parameters() | changes, activation=activation)


def clipped_oracle(query, key, limit, weights=None):
    """The formula in NumPy, with projected rows clipped to the limit."""
    query_weight, key_weight, value, bias = map(np.asarray, (weights or parameters()).values())
    query = np.clip(np.asarray(query) @ query_weight, -limit, limit)
    key = np.clip(np.asarray(key) @ key_weight + bias, -limit, limit)
    return np.tanh(query[:, None] + key[None]) @ value


@pytest.mark.parametrize(("limit", "terms"), [(1.0, 1), (2.0, 5), (4.0, 9), (8.0, 17)])
def test_the_error_holds_everywhere_and_is_reached(limit, terms):
    sines = TanhBySines(limit, terms)
    x = np.linspace(-2 * limit, 2 * limit, 20_011)
    error = np.abs(np.asarray(jax.jit(sines)(x)) - np.tanh(x)).max()
    assert 0.9 * sines.error < error <= sines.error


def test_the_defaults_are_within_the_spacing_of_bfloat16():
    assert TanhBySines().error < float(jnp.finfo(jnp.bfloat16).eps) / 2


@pytest.mark.parametrize("scale", [0.3, 1.0, 100.0])
def test_logits_are_within_the_error_of_additive_scores_of_clipped_features(scale):
    query, key = rows(7, scale), rows(9, scale, seed=2)
    found = jax.jit(additive(SINES))(query, key)
    most = SINES.error * float(jnp.sum(jnp.abs(parameters()["value"])))
    assert np.abs(found - clipped_oracle(query, key, SINES.limit)).max() <= most


def test_rounded_to_bfloat16_logits_are_off_by_its_rounding():
    sines, many = TanhBySines(), parameters(features=32)
    query, key = rows(50, 0.4), rows(60, 0.4, seed=2)
    separated = scores.separate(bind(scores.additive, **many, activation=sines))

    @jax.jit
    def rounded(query, key):
        maps = separated.query_map(query), separated.key_map(key)
        left, right = (x.astype(jnp.bfloat16).astype(jnp.float64) for x in maps)
        return left @ right.T

    weight = float(jnp.sum(jnp.abs(many["value"])))
    exact = clipped_oracle(query, key, jnp.inf, many)
    assert np.abs(rounded(query, key) - exact).max() <= 2 * sines.error * weight


@pytest.mark.slow
def test_tiles_are_products_and_agree_with_dense_in_value_and_gradients():
    arrays = [jax.random.normal(key, (1, 40, 2, 4)) for key in jax.random.split(jax.random.key(0))]
    arrays.append(arrays[0] + 1.0)

    def total(weights, arrays, **how):
        score = bind(scores.additive, **weights, activation=SINES)
        return jnp.sum(jnp.sin(attend(*arrays, score=score, mask=masks.Causal(), **how)))

    of_both = jax.jit(jax.grad(total, (0, 1)), static_argnames=("implementation", "tile_sizes"))
    tiled = of_both(parameters(), arrays, implementation="tiled", tile_sizes=(16, 16))
    dense = of_both(parameters(), arrays, implementation="dense")
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), tiled, dense)
    text = str(
        jax.make_jaxpr(functools.partial(total, implementation="tiled"))(parameters(), arrays)
    )
    assert "tile_product" in text
    assert "tanh" not in text


@pytest.mark.exhaustive
@pytest.mark.slow
def test_derivatives_of_both_orders():
    query, key = rows(2, 0.3), rows(3, 0.3, seed=2)
    check_grads(additive(SINES), (query, key), order=2, modes=("fwd", "rev"))


def test_as_a_layer_of_a_network_it_is_elementwise():
    weights, biases = [jnp.ones((8, 3)), jnp.ones((3, 2))], [jnp.zeros(3), jnp.ones(2)]
    network = {"weights": weights, "biases": biases, "value": jnp.ones(2)}
    query, key = rows(2, 0.1), rows(3, 0.1, seed=2)
    both = [bind(scores.concat, **network, activation=f)(query, key) for f in (SINES, jnp.tanh)]
    np.testing.assert_allclose(*both, atol=20 * SINES.error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0.0}, "TanhBySines: limit must be a number above 0, got 0.0."),
        ({"limit": float("inf")}, "TanhBySines: limit must be a number above 0, got inf."),
        ({"terms": 0}, "TanhBySines: terms must be a whole number of at least 1, got 0."),
        ({"terms": 2.5}, "TanhBySines: terms must be a whole number of at least 1, got 2.5."),
    ],
)
def test_options_out_of_range_are_refused_in_one_sentence(options, message):
    with pytest.raises(ValueError, match="TanhBySines") as refused:
        TanhBySines(**options)
    assert str(refused.value) == message
