import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from attention_jax import attend, bind, normalizers
from attention_jax.base import bind_parameters, initialize, parameters_of
from attention_jax.normalizers import Elementwise, Exponential, LogSum, log_normalizer, streaming
from tests.contract import examples

NORMALIZERS = sorted(examples.NORMALIZERS)
SIGNED = {"odd_power", "signed_softmax"}


def normalizer_of(name):
    """The normalizer, compiled as one program and not primitive by primitive."""
    return jax.jit(examples.NORMALIZERS[name].normalizer)


def rows(name, logits, allowed):
    of_row = examples.NORMALIZERS[name].of_row
    return np.stack([of_row(*row) for row in zip(logits, allowed, strict=True)])


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMALIZERS)
@given(data=st.data())
def test_equals_its_formula_row_by_row(name, data):
    seed = data.draw(st.integers(0, 999))
    size = data.draw(st.sampled_from([1, 6]))
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=data.draw(st.sampled_from([0.1, 1.0, 5.0])), size=(5, size))
    allowed = rng.random((5, size)) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    weights = normalizer_of(name)(jnp.asarray(logits, jnp.float32), jnp.asarray(allowed))
    np.testing.assert_allclose(weights, rows(name, logits, allowed), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMALIZERS)
def test_masked_entries_are_exact_zeros_whatever_they_hold(name):
    allowed = jnp.array([[True, False, True, False], [False] * 4])
    logits = jnp.array([[0.3, 0.0, -0.7, 0.0], [0.0] * 4])
    weights = normalizer_of(name)(logits, allowed)
    assert (np.asarray(weights)[~np.asarray(allowed)] == 0).all()
    for poison in (jnp.nan, jnp.inf, -jnp.inf, 3e38):
        spoiled = jnp.where(allowed, logits, poison)
        chex.assert_trees_all_equal(normalizer_of(name)(spoiled, allowed), weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMALIZERS)
def test_gradients_are_zero_where_nothing_is_attended_and_finite_beside_nan(name):
    allowed = jnp.array([[True, False, True, False], [False] * 4])
    logits = jnp.array([[0.3, jnp.nan, -0.7, jnp.inf], [jnp.nan, jnp.inf, -jnp.inf, 0.0]])
    weight = jnp.arange(8.0).reshape(2, 4)
    gradient = jax.grad(lambda x: (weight * normalizer_of(name)(x, allowed)).sum())(logits)
    np.testing.assert_array_equal(gradient[~np.asarray(allowed)], 0.0)
    clean = jax.grad(lambda x: (weight * normalizer_of(name)(x, allowed)).sum())(
        jnp.where(allowed, logits, 0.0)
    )
    chex.assert_trees_all_equal(gradient, clean)


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMALIZERS)
def test_gradients_against_finite_differences(name, x64):
    rng = np.random.default_rng(0)
    allowed = jnp.asarray(rng.random((3, 6)) < 0.7).at[1].set(False)
    weights = jax.jit(lambda x: normalizer_of(name)(x, allowed))
    logits = jnp.asarray(rng.normal(size=(3, 6)))
    check_grads(weights, (logits,), order=1, rtol=1e-6, atol=1e-8)
    curvature = jax.jit(jax.grad(lambda x: (weights(x) ** 3).sum()))
    check_grads(curvature, (logits,), order=1, modes=("rev",), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_huge_logits_stay_finite(name):
    logits = jnp.array([[1e4, -1e4, 9.9e3], [-1e4, -1e4, -1e4], [1e30, -1e30, 0.0]])
    weights = normalizer_of(name)(logits, jnp.ones((3, 3), bool))
    chex.assert_tree_all_finite(weights)
    if name not in SIGNED | {"stick_breaking"}:  # where the last key may take all
        np.testing.assert_array_equal(weights[0], [1.0, 0.0, float(name == "sigmoid")])


@pytest.mark.parametrize("name", NORMALIZERS)
def test_no_keys(name):
    weights = normalizer_of(name)(jnp.zeros((3, 0)), jnp.zeros((3, 0), bool))
    assert weights.shape == (3, 0)


def test_what_can_be_computed_tile_by_tile_says_so():
    assert streaming(normalizers.softmax) == Exponential(None)
    assert streaming(normalizers.softmax_plus_one) == Exponential(0.0)
    assert streaming(bind(normalizers.softmax_with_sink, sink=2.0)) == Exponential(2.0)
    assert isinstance(streaming(normalizers.sigmoid), Elementwise)
    assert streaming(lambda logits, allowed: logits) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMALIZERS)
def test_the_streaming_rule_says_the_same_as_the_formula(name):
    normalizer, how = normalizer_of(name), streaming(examples.NORMALIZERS[name].normalizer)
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    allowed = jnp.asarray(rng.random((4, 6)) < 0.7)
    if isinstance(how, LogSum):
        statistics = log_normalizer(how.exponent(logits), allowed, how.sink)
    elif isinstance(how, Elementwise):
        statistics = None
    else:
        pytest.skip("has another test, over tiles")
    weights = jnp.where(allowed, how.weight(logits, statistics), 0.0)
    chex.assert_trees_all_close(weights, normalizer(logits, allowed), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_log_normalizer():
    allowed = jnp.array([[True, True, False], [False] * 3])
    logits = jnp.log(jnp.array([[1.0, 3.0, 9.0], [1.0, 1.0, 1.0]]))
    np.testing.assert_allclose(log_normalizer(logits, allowed), [np.log(4.0), -np.inf], rtol=1e-6)
    np.testing.assert_allclose(
        log_normalizer(logits, allowed, sink=jnp.log(2.0)), np.log([6.0, 2.0]), rtol=1e-6
    )
    gradient = jax.grad(lambda x: log_normalizer(x, allowed)[0])(logits)
    np.testing.assert_allclose(gradient, [[0.25, 0.75, 0.0], [0.0] * 3], rtol=1e-6)


def test_log_normalizer_of_an_empty_row_has_zero_gradient():
    gradient = jax.grad(lambda x: jnp.exp(log_normalizer(x, jnp.zeros((1, 3), bool)))[0])
    np.testing.assert_array_equal(gradient(jnp.ones((1, 3))), jnp.zeros((1, 3)))


@pytest.mark.parametrize("name", ["softmax_with_sink", "softmax_plus_one"])
def test_a_sink_takes_everything_when_nothing_else_is_allowed(name):
    weights = normalizer_of(name)(jnp.zeros((1, 2)), jnp.zeros((1, 2), bool))
    np.testing.assert_array_equal(weights, [[0.0, 0.0]])


@pytest.mark.slow
def test_a_learned_sink_gets_its_gradient(x64):
    logits, allowed = jnp.array([[0.5, -1.0, 2.0]]), jnp.array([[True, True, False]])

    def context(sink):
        return normalizers.softmax_with_sink(logits, allowed, sink)

    check_grads(jax.jit(context), (jnp.float64(0.3),), order=1, rtol=1e-6)
    assert abs(jax.grad(lambda sink: context(sink).sum())(jnp.float64(0.3))) > 0.01


def assert_projects(weights, logits, gradient_of_regularizer):
    """The conditions of optimality of max <w, e> - R(w) on the simplex, for its support."""
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-12)
    assert (weights >= 0).all()
    marginal = logits - gradient_of_regularizer(weights)
    for row, value in zip(weights, marginal, strict=True):
        np.testing.assert_allclose(value[row > 0], value[row > 0][0], atol=1e-9)
        assert (value[row == 0] <= value[row > 0][0] + 1e-9).all()


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
def test_sparsemax_and_entmax_are_optimal(scale, x64):
    """For R the negative Gini entropy and the negative Tsallis entropy of order 1.5."""
    logits = jnp.asarray(np.random.default_rng(0).normal(scale=scale, size=(20, 50)))
    allowed = jnp.ones(logits.shape, bool)
    assert_projects(normalizers.sparsemax(logits, allowed), np.asarray(logits), lambda w: w)
    assert_projects(
        normalizers.entmax15(logits, allowed), np.asarray(logits), lambda w: 2 * np.sqrt(w)
    )


@pytest.mark.slow
@pytest.mark.parametrize("normalizer", [normalizers.sparsemax, normalizers.entmax15])
def test_sparse_weights_under_ties_and_large_offsets(normalizer):
    allowed = jnp.ones((1, 5), bool)
    for offset in (0.0, 1e4, -1e4):
        weights = normalizer(jnp.full((1, 5), offset), allowed)
        np.testing.assert_allclose(weights, np.full((1, 5), 0.2), rtol=1e-6)
    tied = normalizer(jnp.array([[1.0, 1.0, -5.0, 1.0, -5.0]]), allowed)
    np.testing.assert_allclose(tied, [[1 / 3, 1 / 3, 0.0, 1 / 3, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("name", ["sparsemax", "entmax15", "top_k", "hard", "softmax"])
def test_a_logit_of_minus_infinity_is_as_good_as_masked(name):
    logits = jnp.array([[0.5, -jnp.inf, 0.1], [-jnp.inf, -jnp.inf, -jnp.inf]])
    weights = normalizer_of(name)(logits, jnp.ones((2, 3), bool))
    expected = normalizer_of(name)(jnp.nan_to_num(logits, neginf=0.0), ~jnp.isneginf(logits))
    np.testing.assert_array_equal(weights, expected)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_an_allowed_nan_is_not_hidden(name):
    logits = jnp.array([[0.5, jnp.nan, 0.1], [0.5, 0.2, 0.1]])
    weights = np.asarray(normalizer_of(name)(logits, jnp.ones((2, 3), bool)))
    assert np.isnan(weights[0]).any() and np.isfinite(weights[1]).all()


def test_top_k_attends_to_exactly_k():
    logits = jnp.array([[2.0, 2.0, 2.0, 2.0], [0.0, 3.0, 1.0, 2.0]])
    for k in (1, 2, 3, 4, 9):
        weights = normalizers.top_k(logits, jnp.ones((2, 4), bool), k=k)
        np.testing.assert_array_equal((weights > 0).sum(axis=1), min(k, 4))
        np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(
        normalizers.hard(logits, jnp.ones((2, 4), bool)), np.eye(4)[[0, 1]]
    )
    with pytest.raises(ValueError, match=r"^top_k: k must be 1 or more, got 0\.$"):
        normalizers.top_k(logits, jnp.ones((2, 4), bool), k=0)


def test_top_p_keeps_the_fewest_keys_that_have_the_share():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]))
    for p, kept in ((0.3, (1, 2)), (0.5, (2, 2)), (0.95, (4, 4)), (1.0, (4, 4))):
        weights = normalizers.top_p(logits, jnp.ones((2, 4), bool), p=p)
        np.testing.assert_array_equal((weights > 0).sum(axis=1), kept)
        np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-6)
        np.testing.assert_array_equal(weights[1, : kept[1]] > 0, True)  # the first of equal ones
    for p in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"^top_p: p must be above 0 and at most 1, got {p}"):
            normalizers.top_p(logits, jnp.ones((2, 4), bool), p=p)


@pytest.mark.parametrize(
    ("normalizer", "name"),
    [
        (bind(normalizers.top_k, k=2), "top_k"),
        (bind(normalizers.top_p, p=0.5), "top_p"),
        (normalizers.hard, "hard"),
        (normalizers.sparsemax, "sparsemax"),
        (normalizers.stick_breaking, "stick_breaking"),
        (normalizers.sigmoid, "sigmoid"),
    ],
)
def test_parts_without_log_sum_exp_are_refused_by_name(normalizer, name):
    x = jnp.ones((1, 4, 1, 2))
    message = f"needs a normalizer of the softmax family; {name} has no log-sum-exp"
    with pytest.raises(ValueError, match=message):
        attend(x, x, x, normalizer=normalizer, return_logsumexp=True)


@pytest.mark.parametrize("name", ["softmax", "softmax_plus_one"])
def test_small_differences_of_huge_logits_count(name):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 64)), jnp.float32) + 1e4
    allowed = jnp.ones(logits.shape, bool)
    exact = np.asarray(logits, np.float64)
    exact = np.exp(exact - exact.max(axis=1, keepdims=True))
    exact /= exact.sum(axis=1, keepdims=True)
    found = getattr(normalizers, name)(logits, allowed)
    np.testing.assert_allclose(found, exact, rtol=3e-6)


def test_a_sink_is_declared_and_asked_for():
    declared = parameters_of(normalizers.softmax_with_sink)
    assert declared["sink"].shape == ()
    bound = bind_parameters(normalizers.softmax_with_sink, initialize(jax.random.key(0), declared))
    logits, allowed = jnp.ones((2, 3)), jnp.ones((2, 3), bool)
    np.testing.assert_allclose(
        bound(logits, allowed), normalizers.softmax_plus_one(logits, allowed), rtol=1e-6
    )
    x = jnp.ones((1, 2, 1, 3))
    with pytest.raises(TypeError, match="normalizer still waits for sink; give them with"):
        attend(x, x, x, normalizer=normalizers.softmax_with_sink)


@pytest.mark.parametrize(
    "normalizer",
    [
        bind(normalizers.top_k, k=2),
        bind(normalizers.top_p, p=0.5),
        normalizers.hard,
    ],
    ids=["top_k", "top_p", "hard"],
)
@pytest.mark.slow
def test_a_selection_streams_as_over_whole_rows(normalizer):
    x = jax.random.normal(jax.random.key(0), (1, 7, 1, 3))
    found, expected = (
        attend(x, x, x, normalizer=normalizer, implementation=name) for name in ("tiled", "dense")
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)
