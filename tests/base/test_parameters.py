"""Declared parameters: names, shapes and the papers' initialisers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attend, bind, scores
from attention_jax.base.binding import rule
from attention_jax.base.parameters import (
    Parameter,
    bind_parameters,
    flat_names,
    initialize,
    learned,
    parameters_of,
)

DECLARED = {
    scores.bilinear: {"weight": (4, 6)},
    scores.low_rank_bilinear: {"query_weight": (4, 5), "key_weight": (6, 5)},
    scores.additive: {"query_weight": (4, 5), "key_weight": (6, 5), "value": (5,), "bias": (5,)},
    scores.concat: {"weights_0": (10, 5), "biases_0": (5,), "value": (5,)},
    scores.cosine: {"temperature": ()},
}
FREE = [scores.dot, scores.scaled_dot, scores.key_normalized_dot]


@pytest.mark.slow
@pytest.mark.parametrize("score", DECLARED, ids=lambda score: score.__name__)
def test_names_and_shapes_fit_the_score(score):
    declared = parameters_of(score, 4, 6, 5)
    assert {name: p.shape for name, p in flat_names(declared).items()} == DECLARED[score]
    key_depth = 4 if score is scores.cosine else 6
    values = initialize(jax.random.key(0), declared)
    logits = bind_parameters(score, values)(jnp.ones((3, 4)), jnp.ones((2, key_depth)))
    assert logits.shape == (3, 2)


@pytest.mark.parametrize("score", FREE, ids=lambda score: score.__name__)
def test_scores_without_parameters_declare_none(score):
    assert parameters_of(score, 4, 4) == {}
    assert bind_parameters(score, {}) is score


@pytest.mark.slow
def test_every_exported_score_declares_all_that_it_needs():
    constructors = {
        "positional",
        "separate",
        "scaled",
        "projected",
        "row_normalized",
        "soft_capped",
    }
    for name in set(scores.__all__) - constructors - {"Separated", "TanhBySines"}:
        score = getattr(scores, name)
        values = initialize(jax.random.key(0), parameters_of(score, 4, 4, 8))
        assert bind_parameters(score, values)(jnp.ones((3, 4)), jnp.ones((2, 4))).shape == (3, 2)


def test_the_layers_of_concat():
    declared = flat_names(parameters_of(scores.concat, 4, 6, (5, 3)))
    assert {name: p.shape for name, p in declared.items()} == {
        "weights_0": (10, 5),
        "weights_1": (5, 3),
        "biases_0": (5,),
        "biases_1": (3,),
        "value": (3,),
    }


def test_bahdanau_starts_with_small_projections_and_no_preference():
    values = initialize(jax.random.key(0), parameters_of(scores.additive, 300, 200, 100))
    for name in ("query_weight", "key_weight"):
        np.testing.assert_allclose(np.std(values[name]), 0.001, rtol=0.02)
        np.testing.assert_allclose(np.mean(values[name]), 0.0, atol=2e-5)
    assert not np.any(values["value"]) and not np.any(values["bias"])


@pytest.mark.parametrize("score", [scores.bilinear, scores.concat], ids=["bilinear", "concat"])
def test_luong_starts_uniform_in_a_tenth(score):
    values = flat_names(initialize(jax.random.key(0), parameters_of(score, 100, 100, 100)))
    weight = values.get("weight", values.get("weights_0"))
    assert -0.1 <= weight.min() < -0.0999 and 0.0999 < weight.max() <= 0.1
    np.testing.assert_allclose(np.std(weight), 0.2 / np.sqrt(12), rtol=0.02)


@pytest.mark.slow
def test_low_rank_logits_start_with_variance_one():
    values = initialize(jax.random.key(0), parameters_of(scores.low_rank_bilinear, 64, 32, 16))
    query = jax.random.normal(jax.random.key(1), (500, 64))
    key = jax.random.normal(jax.random.key(2), (500, 32))
    np.testing.assert_allclose(
        np.std(scores.low_rank_bilinear(query, key, **values)), 1.0, rtol=0.15
    )


def test_what_is_bound_already_is_not_declared():
    relu = bind(scores.additive, activation=jax.nn.relu)
    assert list(parameters_of(relu, 4, 4)) == ["query_weight", "key_weight", "value", "bias"]
    values = initialize(jax.random.key(0), parameters_of(relu, 4, 4))
    values = {**values, "value": jnp.ones(4)}
    score = bind_parameters(relu, values)
    query, key = jnp.ones((2, 4)), -jnp.ones((3, 4))
    expected = scores.additive(query, key, **values, activation=jax.nn.relu)
    np.testing.assert_array_equal(score(query, key), expected)
    fixed = bind(scores.bilinear, weight=jnp.eye(4))
    assert parameters_of(fixed, 4, 4) == {}


@pytest.mark.slow
def test_each_head_draws_its_own():
    declared = parameters_of(scores.bilinear, 4, 4)
    values = initialize(jax.random.key(0), declared, num_heads=3)
    assert values["weight"].shape == (3, 4, 4)
    assert not np.allclose(values["weight"][0], values["weight"][1])
    x = jax.random.normal(jax.random.key(1), (2, 5, 3, 4))
    by_head = attend(x, x, x, score=bind_parameters(scores.bilinear, values, heads=True))
    for n in range(3):
        head = x[:, :, n : n + 1]
        alone = attend(head, head, head, score=bind(scores.bilinear, weight=values["weight"][n]))
        np.testing.assert_allclose(by_head[:, :, n : n + 1], alone, atol=1e-6)


def test_a_users_score_declares_by_rule_or_by_learned():
    def gated(query, key, gate):
        return (query * gate[None, :]) @ key.T

    by_hand = learned(gated, gate=Parameter((4,), jax.nn.initializers.ones))
    assert parameters_of(by_hand)["gate"].shape == (4,)

    @rule(gated, "parameters")
    def _(query_depth, key_depth, attention_size):
        return {"gate": Parameter((query_depth,), jax.nn.initializers.ones)}

    assert parameters_of(gated, 7, 7)["gate"].shape == (7,)
    score = bind_parameters(by_hand, initialize(jax.random.key(0), parameters_of(by_hand)))
    x = jnp.arange(8.0).reshape(2, 4)
    np.testing.assert_array_equal(score(x, x), scores.dot(x, x))


def test_parameters_take_the_dtype_asked_for():
    values = initialize(jax.random.key(0), parameters_of(scores.concat, 4, 4), jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(values)} == {jnp.dtype(jnp.bfloat16)}


def test_a_missing_depth_is_named():
    with pytest.raises(ValueError, match=r"additive: its parameters need to know key_depth; give"):
        parameters_of(scores.additive, 4)
    with pytest.raises(ValueError, match=r"low_rank_bilinear: attention_size must be one number"):
        parameters_of(scores.low_rank_bilinear, 4, 4, (2, 3))
