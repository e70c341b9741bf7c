import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from attention_jax import attend, bind, scores
from attention_jax.base.binding import as_pytree
from attention_jax.base.checks import ShapeError
from attention_jax.masks import edges
from tests import oracle
from tests.contract import examples

QUERY_DEPTH, KEY_DEPTH = 4, 5
LENGTHS = (5, 129)


def example_of(name, rng):
    key_depth = KEY_DEPTH if name in examples.DIFFERENT_DEPTHS else QUERY_DEPTH
    example = examples.score_example(
        name, lambda *shape: rng.normal(size=shape), QUERY_DEPTH, key_depth
    )
    return example, key_depth


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), as_pytree(tree))


HAND = [  # values worked out by hand
    ("dot", {}, [[3.0, 4.0]], [[1.0, 2.0], [0.0, -1.0]], [[11.0, -4.0]]),
    ("scaled_dot", {}, [[3.0, 4.0, 0.0, 0.0]], [[1.0, 2.0, 9.0, 9.0]], [[5.5]]),
    (
        "bilinear",
        {"weight": np.array([[1.0], [2.0]])},
        [[3.0, 4.0]],
        [[2.0], [-1.0]],
        [[22.0, -11.0]],
    ),
    (
        "low_rank_bilinear",
        {"query_weight": np.array([[1.0], [2.0]]), "key_weight": np.array([[3.0]])},
        [[3.0, 4.0]],
        [[2.0]],
        [[66.0]],
    ),
    (
        "shared_projection",
        {"weight": np.array([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])},
        [[3.0, 4.0]],
        [[1.0, 2.0]],
        [[11.0]],  # 2 (3 + 8) / sqrt(4)
    ),
    (
        "additive",
        {
            "query_weight": np.array([[1.0, 0.0]]),
            "key_weight": np.array([[1.0, 0.0]]),
            "value": np.array([2.0, 3.0]),
            "bias": np.array([0.0, 50.0]),
        },
        [[0.5]],
        [[-0.5], [-50.0]],
        [[3.0, 1.0]],  # 2 tanh(0) + 3 tanh(50), 2 tanh(-49.5) + 3 tanh(50)
    ),
    (
        "concat",
        {
            "weights": [np.array([[1.0], [1.0]]), np.array([[40.0]])],
            "biases": [np.array([0.0]), np.array([20.0])],
            "value": np.array([2.0]),
        },
        [[50.0]],
        [[50.0], [-150.0]],
        [[2.0, -2.0]],  # 2 tanh(40 + 20), 2 tanh(-40 + 20)
    ),
    (
        "normalized_additive",
        {
            "query_weight": np.array([[1.0, 0.0]]),
            "key_weight": np.array([[0.0, 50.0]]),
            "value": np.array([6.0, 8.0]),
            "bias": np.array([50.0, 0.0]),
            "gain": np.array(10.0),
            "offset": np.array(-2.0),
        },
        [[0.0]],
        [[1.0], [-1.0], [0.0]],
        [[12.0, -4.0, 4.0]],  # 10 (6 tanh(50) + 8 tanh(50 k)) / 10 - 2
    ),
    (
        "trilinear",
        {
            "query_weight": np.array([1.0, 0.0]),
            "key_weight": np.array([0.0, 10.0]),
            "product_weight": np.array([100.0, 0.0]),
        },
        [[2.0, 3.0]],
        [[5.0, 7.0], [0.0, 0.0]],
        [[1072.0, 2.0]],
    ),
    ("gaussian", {"width": 5.0}, [[1.0, 2.0]], [[4.0, 6.0], [1.0, 2.0]], [[-0.5, 0.0]]),
    ("location", {"weight": np.array([[1.0, 0.0], [0.0, 2.0]])}, [[3.0, 4.0]], [[9.0]], [[3.0]]),
    ("cosine", {"temperature": 0.5}, [[3.0, 4.0]], [[8.0, 6.0], [0.0, 0.0]], [[1.92, 0.0]]),
    ("key_normalized_dot", {}, [[3.0, 4.0]], [[8.0, 6.0], [0.0, 0.0]], [[4.8, 0.0]]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parameters", "query", "key", "expected"), HAND)
def test_hand_computed(name, parameters, query, key, expected):
    score = cast(bind(getattr(scores, name), **parameters), jnp.float32)
    logits = score(jnp.array(query), jnp.array(key))
    np.testing.assert_allclose(logits, expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", examples.SCORES)
def test_equals_the_formula_pair_by_pair(name, x64):
    rng = np.random.default_rng(0)
    example, key_depth = example_of(name, rng)
    query = rng.normal(size=(LENGTHS[0], QUERY_DEPTH))
    key = rng.normal(size=(LENGTHS[1], key_depth))
    expected = oracle.logits_of(query, key, example.formula)
    for score in (example.score, scores.separate(example.score)):
        logits = score(jnp.asarray(query), jnp.asarray(key))
        assert logits.dtype == jnp.float64
        np.testing.assert_allclose(logits, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("name", examples.SCORES)
def test_a_bound_score_is_a_pytree(name):
    """Round trip, jit as an argument, one parameter set per head by vmap, an optimizer step."""
    rng = np.random.default_rng(1)
    example, key_depth = example_of(name, rng)
    score = cast(scores.separate(example.score), jnp.float32)
    query = jnp.asarray(rng.normal(size=(7, QUERY_DEPTH)), jnp.float32)
    key = jnp.asarray(rng.normal(size=(9, key_depth)), jnp.float32)
    logits = score(query, key)

    leaves, structure = jax.tree.flatten(score)
    chex.assert_trees_all_equal(jax.tree.unflatten(structure, leaves)(query, key), logits)
    apply = jax.jit(chex.assert_max_traces(lambda score, query, key: score(query, key), n=1))
    chex.assert_trees_all_close(apply(score, query, key), logits, rtol=1e-5, atol=1e-6)
    if not leaves:
        return

    loss_and_gradient = jax.jit(jax.value_and_grad(lambda score: jnp.mean(score(query, key) ** 2)))
    optimizer = optax.sgd(1e-3)
    loss, gradient = loss_and_gradient(score)
    updates, _ = optimizer.update(gradient, optimizer.init(score), score)
    updated = optax.apply_updates(score, updates)
    assert jax.tree.structure(updated) == structure
    assert loss_and_gradient(updated)[0] < loss

    heads = jax.tree.map(lambda *leaf: jnp.stack(leaf), score, updated)
    mapped = jax.vmap(apply, in_axes=(0, None, None))(heads, query, key)
    chex.assert_trees_all_close(mapped[0], logits, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(mapped[1], apply(updated, query, key), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", examples.SCORES)
def test_gradients_against_finite_differences(name, x64):
    rng = np.random.default_rng(2)
    example, key_depth = example_of(name, rng)
    query, key = rng.normal(size=(2, QUERY_DEPTH)), rng.normal(size=(3, key_depth))
    leaves, structure = jax.tree.flatten(cast(example.score, jnp.float64))

    @jax.jit
    def logits(query, key, leaves):
        return jax.tree.unflatten(structure, leaves)(query, key)

    arguments = (jnp.asarray(query), jnp.asarray(key), leaves)
    check_grads(logits, arguments, order=1, modes=("fwd", "rev"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "key_normalized_dot", "row_normalized"])
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_the_length_of_a_row_may_be_tiny_or_huge(name, magnitude):
    example, _ = example_of(name, np.random.default_rng(3))
    row = jnp.array([[3.0, 4.0]])
    expected = example.formula(np.array([3.0, 4.0]), np.array([4.0, 3.0]))
    logits = example.score(row, jnp.float32(magnitude) * row[:, ::-1])
    np.testing.assert_allclose(logits, [[expected]], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cosine", "key_normalized_dot", "row_normalized"])
def test_a_zero_row_gives_zero_logits_and_finite_gradients(name):
    example, _ = example_of(name, np.random.default_rng(4))
    score, query, zero = example.score, jnp.ones((1, 3)), jnp.zeros((1, 3))
    np.testing.assert_array_equal(score(query, zero), [[0.0]])
    gradients = jax.grad(lambda q, k: score(q, k).sum(), argnums=(0, 1))(query, zero)
    chex.assert_tree_all_finite(gradients)


def test_additive_is_bounded_by_the_l1_norm_of_v():
    rng = np.random.default_rng(5)
    example, key_depth = example_of("additive", rng)
    score = cast(example.score, jnp.float32)
    query = jnp.asarray(1e3 * rng.normal(size=(7, QUERY_DEPTH)), jnp.float32)
    key = jnp.asarray(1e3 * rng.normal(size=(9, key_depth)), jnp.float32)
    bound = jnp.abs(score.keywords["value"]).sum()
    assert float(jnp.abs(score(query, key)).max()) <= float(bound) * (1 + 1e-6)


def test_one_layer_of_concat_is_additive():
    """With W_1 = [W_q; W_k] the two are the same function; a second layer makes them differ."""
    rng = np.random.default_rng(6)
    example, key_depth = example_of("additive", rng)
    additive = cast(example.score, jnp.float32)
    parameters = additive.keywords
    weight = jnp.concatenate([parameters["query_weight"], parameters["key_weight"]])
    concat = bind(
        scores.concat, weights=[weight], biases=[parameters["bias"]], value=parameters["value"]
    )
    query = jnp.asarray(rng.normal(size=(3, QUERY_DEPTH)), jnp.float32)
    key = jnp.asarray(rng.normal(size=(4, key_depth)), jnp.float32)
    chex.assert_trees_all_close(concat(query, key), additive(query, key), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("activation", [jnp.tanh, jax.nn.relu, jax.nn.leaky_relu, jnp.sin])
@pytest.mark.parametrize("name", ["additive", "concat"])
def test_any_activation(name, activation, x64):
    rng = np.random.default_rng(7)
    weights, value = [rng.normal(size=(3, 4)), rng.normal(size=(3, 4))], rng.normal(size=4)
    bias = rng.normal(size=4)
    score = {
        "additive": bind(
            scores.additive,
            query_weight=weights[0],
            key_weight=weights[1],
            value=value,
            bias=bias,
            activation=activation,
        ),
        "concat": bind(
            scores.concat,
            weights=[np.concatenate(weights)],
            biases=[bias],
            value=value,
            activation=activation,
        ),
    }[name]
    query, key = rng.normal(size=(2, 3)), rng.normal(size=(5, 3))
    hidden = (query @ weights[0])[:, None, :] + (key @ weights[1])[None, :, :] + bias
    expected = np.asarray(activation(jnp.asarray(hidden))) @ value
    for form in (score, scores.separate(score)):
        logits = form(jnp.asarray(query), jnp.asarray(key))
        np.testing.assert_allclose(logits, expected, rtol=1e-12, atol=1e-13)


def test_deep_concat_holds_nothing_of_size_pairs_times_features():
    """T x S x A numbers would be 64 MB here; the layers run one query row at a time."""
    length, features = 512, 64
    score = bind(
        scores.concat,
        weights=[jnp.ones((4, features)), jnp.ones((features, features))],
        biases=[jnp.zeros(features), jnp.zeros(features)],
        value=jnp.ones(features),
    )
    x = jnp.ones((length, 2))
    gradient = jax.jit(jax.grad(lambda score, x: score(x, x).sum())).lower(score, x).compile()
    assert gradient.memory_analysis().temp_size_in_bytes < 8e6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: scores.dot(jnp.ones((2, 3)), jnp.ones((2, 4))),
            "dot: axis H (number 1) of key [S, H] must be 3 as in query, got 4; give both the "
            "same H.",
        ),
        (
            lambda: scores.dot(jnp.ones((1, 2, 3)), jnp.ones((2, 3))),
            "dot: query must have the 2 axes [T, H], got shape (1, 2, 3); reshape it, or lift "
            "the function with jax.vmap.",
        ),
        (
            lambda: scores.bilinear(jnp.ones((2, 3)), jnp.ones((2, 4)), jnp.ones((3, 5))),
            "bilinear: axis H (number 1) of weight [Q, H] must be 4 as in key, got 5; give both "
            "the same H.",
        ),
        (
            lambda: scores.location(jnp.ones((2, 3)), jnp.ones((5, 4)), jnp.ones((3, 4))),
            "location: weight [Q, L] has L = 4 positions, too few for S = 5 keys; give it a column "
            "for every position.",
        ),
        (
            lambda: scores.trilinear(
                jnp.ones((2, 3)), jnp.ones((5, 3)), jnp.ones(3), jnp.ones(3), jnp.ones(4)
            ),
            "trilinear: axis H (number 0) of product_weight [H] must be 3 as in query, got 4; "
            "give both the same H.",
        ),
        (
            lambda: scores.concat(jnp.ones((2, 3)), jnp.ones((2, 4)), [], [], jnp.ones(1)),
            "concat: give one bias for every weight and at least one layer, got 0 weights and 0 "
            "biases.",
        ),
        (
            lambda: scores.concat(
                jnp.ones((2, 3)), jnp.ones((2, 4)), [jnp.ones((8, 5))], [jnp.ones(5)], jnp.ones(5)
            ),
            "concat: axis 0 of weights[0] must be Hq + Hk = 3 + 4, got 8.",
        ),
        (
            lambda: scores.concat(
                jnp.ones((2, 3)), jnp.ones((2, 4)), [jnp.ones((7, 5))], [jnp.ones(5)], jnp.ones(6)
            ),
            "concat: axis A (number 0) of value [A] must be 5 as in weights[0], got 6; give both "
            "the same A.",
        ),
        (
            lambda: scores.concat(
                jnp.ones((2, 3)),
                jnp.ones((2, 4)),
                [jnp.ones((7, 5)), jnp.ones((4, 3))],
                [jnp.ones(5), jnp.ones(3)],
                jnp.ones(3),
            ),
            "concat: axis A (number 0) of weights[1] [A, B] must be 5 as in weights[0], got 4; "
            "give both the same A.",
        ),
    ],
)
def test_errors_name_operation_tensor_and_axis(call, message):
    with pytest.raises(ShapeError) as error:
        call()
    assert str(error.value) == message


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["dot", "scaled_dot", "bilinear", "low_rank_bilinear", "additive", "cosine", "concat"],
)
def test_no_rows_give_no_logits(name):
    example, key_depth = example_of(name, np.random.default_rng(8))
    score = cast(example.score, jnp.float32)
    for form in (score, scores.separate(score)):
        assert form(jnp.zeros((0, QUERY_DEPTH)), jnp.zeros((3, key_depth))).shape == (0, 3)
        assert form(jnp.zeros((3, QUERY_DEPTH)), jnp.zeros((0, key_depth))).shape == (3, 0)


NODES = 6
GRAPH = [(i, i) for i in range(NODES)] + [(0, 1), (0, 2), (1, 3), (3, 1), (4, 0), (5, 4), (5, 0)]


def leaky_relu(x):
    return np.where(x > 0, x, 0.2 * x)


def graph_attention(features, left, right, vector, version):
    """GAT and GATv2 as their papers write them, one node at a time; W is [left; right] for v2."""
    out = np.zeros((NODES, right.shape[1]))
    for i in range(NODES):
        neighbors = [j for a, j in GRAPH if a == i]
        if version == 1:
            pairs = [np.concatenate([features[i] @ right, features[j] @ right]) for j in neighbors]
            logits = [leaky_relu(vector @ pair) for pair in pairs]
        else:
            weight = np.concatenate([left, right])
            pairs = [np.concatenate([features[i], features[j]]) for j in neighbors]
            logits = [vector[: len(vector) // 2] @ leaky_relu(pair @ weight) for pair in pairs]
        weights = np.exp(logits) / np.exp(logits).sum()
        out[i] = sum(w * (features[j] @ right) for w, j in zip(weights, neighbors, strict=True))
    return out


def graph_score(left, right, vector, version):
    slope = functools.partial(jax.nn.leaky_relu, negative_slope=0.2)
    if version == 2:
        half = vector[: len(vector) // 2]
        weights = {"query_weight": left, "key_weight": right, "value": half, "bias": 0.0 * half}
        return bind(scores.additive, **weights, activation=slope)
    beside = np.zeros_like(right)
    return bind(
        scores.additive,
        query_weight=np.concatenate([right, beside], axis=1),
        key_weight=np.concatenate([beside, right], axis=1),
        value=vector,
        bias=0.0 * vector,
        activation=None,
        after_sum=slope,
    )


def graph_inputs(nodes):
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=shape) for shape in ((nodes, 3), (3, 4), (3, 4), 8))


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_graph_attention_is_additive_attention_under_edges(version, implementation, x64):
    features, left, right, vector = graph_inputs(NODES)
    x = jnp.asarray(features)[None, :, None]
    context = attend(
        x,
        x,
        jnp.asarray(features @ right)[None, :, None],
        score=graph_score(left, right, vector, version),
        mask=edges(GRAPH, NODES),
        **implementation,
    )
    expected = graph_attention(features, left, right, vector, version)
    np.testing.assert_allclose(context[0, :, 0], expected, rtol=1e-9)


def test_gat_ranks_the_keys_alike_for_all_queries_and_gatv2_does_not(x64):
    """The static attention of Brody, Alon and Yahav 2022, theorem 1, and its repair."""
    features, *parameters = graph_inputs(20)
    x = jnp.asarray(features)
    rankings = {
        version: np.argsort(graph_score(*parameters, version)(x, x), axis=1) for version in (1, 2)
    }
    assert (rankings[1] == rankings[1][0]).all()
    assert not (rankings[2] == rankings[2][0]).all()


def test_additive_without_activation_is_a_sum_of_two_numbers():
    """No pair touches the features: GAT costs a number for each row."""
    _, *parameters = graph_inputs(NODES)
    score = cast(graph_score(*parameters, version=1), jnp.float32)
    parts = scores.separate(score)
    assert parts.query_map(jnp.ones((5, 3))).shape == (5, 1)


@pytest.mark.parametrize("activation", [jnp.tanh, None])
def test_after_sum(activation, x64):
    rng = np.random.default_rng(3)
    weights = {"query_weight": rng.normal(size=(3, 4)), "key_weight": rng.normal(size=(2, 4))}
    value, bias = rng.normal(size=4), rng.normal(size=4)
    score = bind(
        scores.additive,
        **weights,
        value=value,
        bias=bias,
        activation=activation,
        after_sum=jax.nn.softplus,
    )
    query, key = rng.normal(size=(5, 3)), rng.normal(size=(7, 2))
    hidden = (query @ weights["query_weight"])[:, None] + (key @ weights["key_weight"])[None] + bias
    total = (np.tanh(hidden) if activation else hidden) @ value
    logits = score(jnp.asarray(query), jnp.asarray(key))
    np.testing.assert_allclose(logits, np.log1p(np.exp(total)), rtol=1e-10)


@pytest.mark.slow
def test_the_gain_of_normalized_additive_sets_its_range():
    """|e - r| <= |g| sqrt(A), however long v is."""
    rng = np.random.default_rng(4)
    example, key_depth = example_of("normalized_additive", rng)
    score = cast(example.score, jnp.float32)
    query = jnp.asarray(99.0 * rng.normal(size=(7, QUERY_DEPTH)), jnp.float32)
    key = jnp.asarray(99.0 * rng.normal(size=(9, key_depth)), jnp.float32)
    logits = score(query, key)
    longer = bind(
        scores.normalized_additive, **(score.keywords | {"value": 1e3 * score.keywords["value"]})
    )
    chex.assert_trees_all_close(longer(query, key), logits, rtol=1e-4)
    assert float(jnp.abs(logits + 0.5).max()) <= 1.5 * np.sqrt(6) * (1 + 1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_gaussian_does_not_lose_small_distances_far_from_the_origin(offset):
    query = jnp.array([[offset, offset]], jnp.float32)
    key = query + jnp.array([[0.0, 0.0], [0.25, 0.0], [0.0, -0.5]])
    np.testing.assert_allclose(scores.gaussian(query, key), [[0.0, -0.03125, -0.125]], rtol=1e-6)


@pytest.mark.slow
def test_location_ignores_the_keys_and_knows_where_they_stand(implementation, x64):
    rng = np.random.default_rng(5)
    query, key, value = (jnp.asarray(rng.normal(size=(1, n, 1, 4))) for n in (5, 7, 7))
    weight = rng.normal(size=(4, 9))
    score = bind(scores.location, weight=weight)
    context = attend(query, key, value, score=score, **implementation)
    other = attend(query, 3.0 * key[:, ::-1], value, score=score, **implementation)
    np.testing.assert_array_equal(context, other)
    logits = np.asarray(query[0, :, 0]) @ weight[:, :7]
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(context[0, :, 0], weights @ value[0, :, 0], rtol=1e-9)
    with pytest.raises(ShapeError, match=r"location: weight .* too few for S = 7 keys"):
        attend(query, key, value, score=bind(scores.location, weight=weight[:, :6]))
