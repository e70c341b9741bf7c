import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import ShapeError, attend, bind, masks, per_head, scores
from attention_jax.scores import (
    Separated,
    composition,
    cosine,
    dot,
    projected,
    row_normalized,
    scaled,
    scaled_dot,
    separate,
    soft_capped,
)
from attention_jax.scores.composition import finished, identity, mapped, positional, unit_rows


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


QUERY, KEY = normal(0, 5, 4), normal(1, 7, 4)
LEFT, RIGHT = normal(2, 4, 3), normal(3, 4, 3)


def assert_same(score, other):
    chex.assert_trees_all_close(score(QUERY, KEY), other(QUERY, KEY), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_laws():
    """Compositions that must be the same function."""
    assert_same(scaled(dot, 0.5), scaled_dot)  # H = 4
    assert_same(scaled(scaled(dot, 2.0), 3.0), scaled(dot, 6.0))
    assert_same(projected(dot, LEFT @ RIGHT.T), bind(scores.bilinear, weight=LEFT @ RIGHT.T))
    assert_same(
        projected(dot, LEFT, RIGHT),
        bind(scores.low_rank_bilinear, query_weight=LEFT, key_weight=RIGHT),
    )
    assert_same(projected(scaled_dot, LEFT, LEFT), bind(scores.shared_projection, weight=LEFT))
    assert_same(row_normalized(dot), cosine)
    assert_same(scaled(row_normalized(dot), 1 / 0.3), bind(cosine, temperature=0.3))
    assert_same(row_normalized(dot, query=False), scores.key_normalized_dot)
    assert_same(row_normalized(row_normalized(dot)), cosine)
    assert_same(scaled(dot, 1.0), dot)


@pytest.mark.slow
def test_order_of_composition():
    """The outermost map meets query and key first, the outermost map of logits comes last."""
    outer_projection = projected(row_normalized(dot), LEFT, RIGHT)
    chex.assert_trees_all_close(outer_projection(QUERY, KEY), cosine(QUERY @ LEFT, KEY @ RIGHT))
    inner_projection = row_normalized(projected(dot, LEFT, RIGHT))
    chex.assert_trees_all_close(
        inner_projection(QUERY, KEY), (unit_rows(QUERY) @ LEFT) @ (unit_rows(KEY) @ RIGHT).T
    )
    capped_last = soft_capped(scaled(dot, 10.0), 2.0)(QUERY, KEY)
    assert jnp.abs(capped_last).max() <= 2.0
    scaled_last = scaled(soft_capped(dot, 2.0), 10.0)(QUERY, KEY)
    chex.assert_trees_all_close(scaled_last, 20.0 * jnp.tanh(QUERY @ KEY.T / 2.0), rtol=1e-5)


def test_soft_cap_is_the_identity_for_small_logits_and_bounds_large_ones():
    score = soft_capped(dot, 50.0)
    one = jnp.ones((1, 1))
    np.testing.assert_allclose(score(0.1 * one, one), [[0.1]], rtol=1e-5)
    np.testing.assert_allclose(score(1e6 * one, one), [[50.0]])
    np.testing.assert_allclose(score(-1e6 * one, one), [[-50.0]])


@pytest.mark.parametrize("side", ["query_weight", "key_weight"])
def test_one_side_may_stay_as_it_is(side):
    weight = normal(4, 2, 4)
    short = normal(5, 3, 2)
    score = projected(dot, **{side: weight})
    operands = (short, KEY) if side == "query_weight" else (QUERY, short)
    expected = short @ weight @ KEY.T if side == "query_weight" else QUERY @ (short @ weight).T
    chex.assert_trees_all_close(score(*operands), expected, rtol=1e-5, atol=1e-6)


def test_separate_moves_what_concerns_a_row_into_the_maps():
    parts = separate(bind(scores.bilinear, weight=LEFT))
    chex.assert_shape(parts.query_map(QUERY), (5, 3))
    assert parts.key_map is identity
    parts = separate(
        bind(
            scores.additive,
            query_weight=LEFT,
            key_weight=RIGHT,
            value=jnp.ones(3),
            bias=jnp.ones(3),
        )
    )
    chex.assert_trees_all_close(parts.key_map(KEY), KEY @ RIGHT + 1.0)
    chex.assert_trees_all_close(parts.query_map(QUERY), QUERY @ LEFT)
    assert separate(parts) is parts


@pytest.mark.slow
def test_maps_applied_once_serve_every_tile_and_step():
    score = scaled(projected(cosine, LEFT, RIGHT), 3.0)
    query, key = score.query_map(QUERY), score.key_map(KEY)
    step = score.paired(query[2:3], key, jnp.array([2]), jnp.arange(7))
    chex.assert_trees_all_close(step, score(QUERY, KEY)[2:3], rtol=1e-6)


def test_a_score_without_rule_pairs_rows_as_they_are():
    def manhattan(query, key):
        return -jnp.abs(query[:, None, :] - key[None, :, :]).sum(axis=-1)

    parts = separate(manhattan)
    assert parts.query_map is identity and parts.key_map is identity
    chex.assert_trees_all_equal(parts(QUERY, KEY), manhattan(QUERY, KEY))
    assert_same(scaled(manhattan, 2.0), lambda q, k: 2.0 * manhattan(q, k))
    assert_same(projected(manhattan, LEFT, RIGHT), lambda q, k: manhattan(q @ LEFT, k @ RIGHT))


@pytest.mark.slow
def test_unit_rows():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [-1e-37, 0.0], [1e37, 1e37]])
    expected = np.array([[0.6, 0.8], [0.0, 0.0], [-1.0, 0.0], [0.5**0.5, 0.5**0.5]])
    np.testing.assert_allclose(unit_rows(x), expected, rtol=1e-6)
    assert unit_rows(jnp.zeros((3, 0))).shape == (3, 0)
    gradient = jax.grad(lambda x: unit_rows(x)[0, 0])(x)
    np.testing.assert_allclose(gradient[0], [0.64 / 5, -0.48 / 5], rtol=1e-6)
    np.testing.assert_array_equal(gradient[1], [0.0, 0.0])


@pytest.mark.slow
def test_second_derivative_of_unit_rows_is_that_of_the_formula(x64):
    point = jnp.array([[0.3, -0.7, 0.2]])
    weight = jnp.array([1.0, 2.0, -1.0])

    def plain(x):
        return (x / jnp.sqrt((x * x).sum())) @ weight

    expected = jax.jit(jax.hessian(lambda x: plain(x)[0]))(point)
    hessian = jax.jit(jax.hessian(lambda x: (unit_rows(x) @ weight)[0]))(point)
    chex.assert_trees_all_close(hessian, expected, rtol=1e-12)


@positional
def penalized(query, key, q_idx, kv_idx, slope=1.0):
    distance = jnp.abs(q_idx[:, None] - kv_idx[None, :]).astype(query.dtype)
    return query @ key.T - slope * distance


def test_a_positional_score_is_told_where_its_rows_stand():
    distance = np.abs(np.arange(5)[:, None] - np.arange(7)[None, :])
    expected = np.asarray(QUERY @ KEY.T) - distance
    for score in (penalized, bind(penalized, slope=1.0)):
        assert composition.is_positional(score)
        np.testing.assert_allclose(separate(score)(QUERY, KEY), expected, rtol=1e-5, atol=1e-5)
    moved = separate(penalized).at(QUERY, KEY, jnp.arange(5) + 10, jnp.arange(7) + 10)
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-5)
    assert not composition.is_positional(dot)


@pytest.mark.slow
def test_a_positional_score_composes_and_attends():
    expected = 2.0 * penalized(QUERY @ LEFT, KEY @ RIGHT, jnp.arange(5), jnp.arange(7))
    score = scaled(projected(penalized, LEFT, RIGHT), 2.0)
    chex.assert_trees_all_close(score(QUERY, KEY), expected, rtol=1e-5, atol=1e-5)
    attended = attend(
        QUERY[None, :, None],
        KEY[None, :, None],
        KEY[None, :, None],
        score=score,
        mask=masks.Full(),
        return_logsumexp=True,
    )
    expected = jax.nn.logsumexp(expected, axis=1)
    chex.assert_trees_all_close(attended.logsumexp[0, :, 0], expected, rtol=1e-5, atol=1e-5)


def test_separated_is_a_pytree_that_learns():
    score = scaled(projected(dot, LEFT, RIGHT), jnp.float32(2.0))
    assert len(jax.tree.leaves(score)) == 3
    gradient = jax.grad(lambda score: score(QUERY, KEY).sum())(score)
    assert isinstance(gradient, Separated)
    chex.assert_trees_all_close(
        jax.tree.leaves(gradient.finish)[0], (QUERY @ LEFT @ RIGHT.T @ KEY.T).sum(), rtol=1e-4
    )


def test_finished_and_mapped_extend_any_score():
    negated = finished(dot, jax.tree_util.Partial(jnp.negative))
    assert_same(negated, lambda q, k: -(q @ k.T))
    doubled = mapped(dot, jax.tree_util.Partial(lambda x: 2.0 * x), identity)
    assert_same(doubled, scaled(dot, 2.0))


def negated(logits):
    return -logits


COMPOSITIONS = {
    "separate": separate,
    "scaled": lambda score: scaled(score, 0.5),
    "scaled by a whole number": lambda score: scaled(score, 2),
    "scaled by an array": lambda score: scaled(score, np.float32(0.5)),
    "soft_capped": lambda score: soft_capped(score, jnp.float32(2.0)),
    "projected": lambda score: projected(score, LEFT, RIGHT),
    "row_normalized": lambda score: row_normalized(score, key=False),
    "finished": lambda score: finished(score, bind(negated)),
    "mapped": lambda score: mapped(score, bind(unit_rows), identity),
    "several": lambda score: scaled(soft_capped(projected(score, LEFT), 2.0), 3.0),
}


@pytest.mark.parametrize("compose", COMPOSITIONS.values(), ids=COMPOSITIONS)
def test_a_score_with_parameters_for_each_head_composes(compose):
    depths = {COMPOSITIONS["projected"]: (3, 3), COMPOSITIONS["several"]: (3, 4)}
    weights = normal(6, 2, *depths.get(compose, (4, 4)))
    composed = compose(per_head(bind(scores.bilinear, weight=weights)))
    x = normal(7, 1, 5, 2, 4)
    both = attend(x, x, x, score=composed)
    for n in range(2):
        score = compose(bind(scores.bilinear, weight=weights[n]))
        alone = jax.nn.softmax(score(x[0, :, n], x[0, :, n])) @ x[0, :, n]
        np.testing.assert_allclose(both[0, :, n], alone, rtol=1e-5, atol=1e-6)


def test_every_composition_takes_a_score_of_heads():
    tested = {"separate", "scaled", "soft_capped", "projected", "row_normalized"}
    signatures = {name: inspect.signature(getattr(scores, name)) for name in scores.__all__}
    made_of_scores = {name for name, of in signatures.items() if "score" in of.parameters}
    assert made_of_scores - {"positional"} == tested


def test_a_positional_score_of_heads_composes():
    slopes = jnp.array([0.5, 2.0])
    x = normal(8, 1, 5, 2, 4)
    both = attend(x, x, x, score=scaled(per_head(bind(penalized, slope=slopes)), 0.5))
    for n in range(2):
        head = x[:, :, n : n + 1]
        alone = attend(head, head, head, score=scaled(bind(penalized, slope=slopes[n]), 0.5))
        np.testing.assert_allclose(both[:, :, n : n + 1], alone, rtol=1e-5, atol=1e-6)


def test_a_score_of_heads_without_parameters_composes():
    x = normal(9, 1, 5, 2, 4)
    expected = attend(x, x, x, score=scaled(dot, 2))
    np.testing.assert_array_equal(attend(x, x, x, score=scaled(per_head(dot), 2)), expected)


def test_parameters_of_heads_that_differ_in_number_are_refused():
    score = bind(scores.low_rank_bilinear, query_weight=np.ones((2, 4, 3)), key_weight=LEFT)
    with pytest.raises(
        ShapeError, match=r"same leading axis N, got the shapes \(4, 3\), \(2, 4, 3\)"
    ):
        scaled(per_head(score), 0.5)
