"""Contextual positions against loops over their definition, and tiled against dense in float64."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from attention_jax import (
    attend,
    bind,
    explain,
    head_maps,
    linen,
    masks,
    normalizers,
    per_example,
    per_head,
    scores,
    statistics,
)
from attention_jax.base import ShapeError, rule
from attention_jax.cache import attend_cached, extend, init
from attention_jax.nnx import MultiHeadAttention
from attention_jax.normalizers.contextual import ContextualPositions
from attention_jax.scores.prepared import attend_prepared, prepare
from tests.implementations.derivatives import of_squares
from tests.implementations.test_tiled import largest_intermediate

B, T, S, N, K, H = 2, 21, 26, 2, 1, 5
X = jnp.ones((1, 3, 1, 4))


def draw(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng([seed, *shape]).normal(size=shape)


def of(table):
    return bind(normalizers.contextual_positions, table=table)


def expected(logits, allowed, query, table):
    """The weights of the paper, a pair at a time."""
    terms, last = np.zeros(logits.shape), len(table) - 1
    for i, j in np.argwhere(allowed):
        later = [k for k in range(j, logits.shape[1]) if allowed[i, k]]
        position = min(sum(1 / (1 + np.exp(-logits[i, k])) for k in later), last)
        below, share = int(np.floor(position)), position - np.floor(position)
        embedding = (1 - share) * table[below] + share * table[min(below + 1, last)]
        terms[i, j] = np.exp(logits[i, j] + query[i] @ embedding)
    totals = terms.sum(axis=1, keepdims=True)
    return np.divide(terms, totals, out=np.zeros(terms.shape), where=totals > 0)


@pytest.mark.parametrize("positions", [1, 2, 4, 30])
def test_equals_its_definition(positions, x64):
    logits, allowed = draw(6, 17), np.random.default_rng(0).random((6, 17)) < 0.8
    allowed[2] = False
    query, table = draw(6, H), draw(positions, H)
    weights = jax.jit(of(table))(jnp.asarray(logits), jnp.asarray(allowed), query=query)
    np.testing.assert_allclose(weights, expected(logits, allowed, query, table), atol=1e-15)


@pytest.mark.slow
def test_attend_counts_gates_of_the_last_logits_and_gives_the_queries_before_the_score(x64):
    query, key, table = draw(1, 9, 1, H), draw(1, 9, 1, H, seed=1), draw(4, H)
    bias = draw(9, 9)
    score = scores.soft_capped(scores.projected(scores.dot, query_weight=draw(H, H)), 2.0)
    logits = np.asarray(score(jnp.asarray(query[0, :, 0]), jnp.asarray(key[0, :, 0]))) + bias
    wanted = expected(logits, np.tri(9, dtype=bool), query[0, :, 0], table)
    for way in ({"implementation": "dense"}, {"implementation": "tiled", "tile_sizes": (4, 4)}):
        context = attend(
            *map(jnp.asarray, (query, key, np.eye(9)[None, :, None])),
            score=score,
            bias=jnp.asarray(bias),
            mask=masks.Causal(),
            normalizer=of(table),
            **way,
        )
        np.testing.assert_allclose(context[0, :, 0], wanted, atol=1e-14)


@pytest.mark.slow
def test_a_table_of_zeros_is_softmax_and_one_of_distances_counts_keys(x64):
    logits, allowed = jnp.asarray(draw(5, 8)), jnp.tri(5, 8, k=3, dtype=bool)
    query = jnp.ones((5, 1))
    np.testing.assert_allclose(
        of(np.zeros((3, 1)))(logits, allowed, query=query),
        normalizers.softmax(logits, allowed),
        rtol=1e-14,
    )
    far = jnp.full((5, 8), 60.0)  # gates that are open: keys are counted
    table = np.log(np.arange(9.0) + 1)[:, None]
    distance = np.arange(5)[:, None] + 4 - np.arange(8)[None, :]
    counted = np.where(allowed, distance + 1.0, 0.0)
    np.testing.assert_allclose(
        of(table)(far, allowed, query=query),
        counted / counted.sum(axis=1, keepdims=True),
        rtol=1e-12,
    )


@pytest.mark.slow
def test_what_is_masked_changes_nothing_and_a_nan_is_not_hidden():
    normalizer = jax.jit(of(draw(4, 3).astype(np.float32)))
    logits, query = jnp.asarray(draw(4, 9), jnp.float32), jnp.asarray(draw(4, 3), jnp.float32)
    allowed = jnp.asarray(np.random.default_rng(0).random((4, 9)) < 0.6).at[2].set(False)
    weights = normalizer(logits, allowed, query=query)
    assert (np.asarray(weights)[~np.asarray(allowed)] == 0).all()
    for poison in (jnp.nan, jnp.inf, -jnp.inf, 3e38):
        spoiled = jnp.where(allowed, logits, poison)
        np.testing.assert_array_equal(normalizer(spoiled, allowed, query=query), weights)
    hidden = logits.at[0, 3].set(-jnp.inf), allowed.at[0, 3].set(True)
    masked = logits, allowed.at[0, 3].set(False)
    np.testing.assert_array_equal(
        normalizer(*hidden, query=query), normalizer(*masked, query=query)
    )
    spoiled = normalizer(logits.at[0, 4].set(jnp.nan), allowed.at[0, 4].set(True), query=query)
    assert jnp.isnan(spoiled[0]).any() and jnp.isfinite(spoiled[1:]).all()
    huge = jnp.array([[1e4, -1e4, 9.9e3], [-1e4, -1e4, -1e4], [1e30, -1e30, 0.0], [0.0, 0.0, 0.0]])
    chex.assert_tree_all_finite(normalizer(huge, jnp.ones((4, 3), bool), query=query))
    assert normalizer(jnp.zeros((4, 0)), jnp.zeros((4, 0), bool), query=query).shape == (4, 0)


@pytest.mark.slow
def test_gradients_against_finite_differences(x64):
    allowed = jnp.asarray(np.random.default_rng(0).random((3, 7)) < 0.8).at[1].set(False)

    @jax.jit
    def weights(logits, query, table):
        return of(table)(logits, allowed, query=query)

    at = draw(3, 7), draw(3, 4), draw(3, 4)
    check_grads(weights, at, order=1, rtol=1e-6, atol=1e-8)
    curvature = jax.jit(jax.grad(lambda *x: (weights(*x) ** 3).sum(), (0, 1, 2)))
    check_grads(curvature, at, order=1, modes=("rev",), rtol=1e-5, atol=1e-7)


def segments(length, seed):
    return jnp.sort(jnp.asarray(np.random.default_rng(seed).integers(0, 4, (B, length))))


CASES = {
    "causal": lambda: {"mask": masks.Causal(-3)},  # the first queries attend to nothing
    "window": lambda: {"mask": masks.Window(9, 4) & ~masks.Causal(-7)},
    "segments": lambda: {
        "mask": masks.Segment(segments(T, 0), segments(S, 1)),
        "bias": jnp.asarray(draw(N, 1, S)),
    },
    "all": lambda: {
        "mask": masks.Segment(segments(T, 0), segments(S, 1)),
        "score": scores.soft_capped(scores.scaled_dot, 3.0),
        "bias": jnp.asarray(draw(N, T, S)),
        "dropout_rate": 0.3,
        "dropout_key": jax.random.key(0),
    },
}


def loss(arrays, table, positions, implementation, options):
    context = attend(
        *arrays,
        normalizer=per_head(of(table[:, :positions])),
        implementation=implementation,
        tile_sizes=(8, 8) if implementation == "tiled" else None,
        **options,
    )
    return jnp.sum(jnp.sin(context)), context


def gradients(arrays, table, **way):
    """The context and all gradients."""
    return jax.grad(functools.partial(loss, **way), (0, 1), has_aux=True)(arrays, table)


def second(arrays, table, **way):
    """The same, and derivatives of the squares of the gradients."""
    return of_squares(functools.partial(gradients, **way), arrays, table)


def along(arrays, table, **way):
    """Context and gradients, and their changes along a direction."""
    change = jax.tree.map(jnp.cos, (arrays, table))
    return jax.jvp(functools.partial(gradients, **way), (arrays, table), change)


def of_examples(arrays, table, **way):
    """Gradients of each of two problems, which are one batch."""
    two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), (arrays, table))
    return jax.vmap(functools.partial(gradients, **way))(*two)


def inputs():
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, 3)
    arrays = [jnp.asarray(draw(*shape, seed=seed)) for seed, shape in enumerate(shapes)]
    return arrays, jnp.asarray(draw(N, 6, H))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "derivatives", "positions"),
    [
        pytest.param("all", gradients, 6, marks=pytest.mark.exhaustive),
        ("window", gradients, 6),
        # Most keys share the last position.
        pytest.param("causal", along, 3, marks=pytest.mark.exhaustive),
        pytest.param("causal", of_examples, 2, marks=pytest.mark.exhaustive),
        pytest.param("segments", gradients, 1, marks=pytest.mark.exhaustive),
        pytest.param("all", second, 6, marks=pytest.mark.exhaustive),
    ],
)
def test_tiled_has_the_values_and_derivatives_of_dense(name, derivatives, positions, x64):
    ours, theirs = (
        jax.jit(
            functools.partial(
                derivatives,
                positions=positions,
                implementation=implementation,
                options=CASES[name](),
            )
        )(*inputs())
        for implementation in ("tiled", "dense")
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 7, 129])
def test_odd_lengths_and_parameters_of_each_example(length, x64):
    query, key, value = (jnp.asarray(draw(2, length, 1, 4, seed=seed)) for seed in range(3))
    each = per_example(of(jnp.asarray(draw(2, 5, 4))))
    tiled, dense = (
        attend(query, key, value, normalizer=each, mask=masks.Causal(), **way)
        for way in (
            {"implementation": "tiled", "tile_sizes": (32, 16)},
            {"implementation": "dense"},
        )
    )
    np.testing.assert_allclose(tiled, dense, rtol=1e-12, atol=1e-13)


@pytest.mark.slow
def test_half_precision_is_that_of_its_inputs():
    """A count in half precision would be at its end after some hundred keys."""
    x = [jnp.asarray(draw(1, 700, 1, 8, seed=seed), jnp.bfloat16) for seed in range(3)]
    normalizer = of(jnp.asarray(draw(600, 8), jnp.bfloat16))
    exact = attend(*(one.astype(jnp.float32) for one in x), normalizer=normalizer)
    context = attend(*x, normalizer=normalizer, implementation="tiled", tile_sizes=(128, 128))
    assert context.dtype == jnp.bfloat16
    np.testing.assert_allclose(context.astype(jnp.float32), exact, atol=0.02)


@pytest.mark.slow
def test_keys_that_share_the_last_position_leave_gates_alone(x64):
    """Only as far as the positions reach does a logit change the weights of earlier keys."""
    table, query = draw(2, 3), jnp.asarray(draw(1, 3))

    @jax.jit
    def ratio(logits):  # of two keys, both past the last position
        weights = of(table)(logits, jnp.ones(logits.shape, bool), query=query)
        return jnp.log(weights[0, 0] / weights[0, 1])

    gradient = jax.grad(ratio)(jnp.asarray(draw(1, 9)))
    np.testing.assert_allclose(gradient, [[1.0, -1.0] + 7 * [0.0]], atol=1e-14)


@pytest.mark.slow
def test_a_nan_in_a_query_or_key_reaches_those_alone_that_attend_to_it():
    query, key, value = (jnp.asarray(draw(1, 9, 1, 4, seed=seed), jnp.float32) for seed in range(3))
    for way in ({"implementation": "dense"}, {"implementation": "tiled", "tile_sizes": (4, 4)}):
        found = attend(
            query.at[0, 5, 0, 1].set(jnp.inf),
            key.at[0, 7, 0, 1].set(jnp.nan),
            value,
            normalizer=of(jnp.ones((3, 4))),
            mask=masks.Causal(),
            **way,
        )
        is_nan = np.isnan(found[0, :, 0]).all(axis=1)
        np.testing.assert_array_equal(is_nan, [False] * 5 + [True, False, True, True])
        assert np.isfinite(np.asarray(found)[0, ~is_nan]).all()


@pytest.mark.slow
def test_no_array_is_as_large_as_the_plane():
    x, table = jnp.zeros((1, 96, 1, 2)), jnp.zeros((3, 2))

    def loss(x, table):
        way = {"implementation": "tiled", "tile_sizes": (8, 8)}
        return jnp.sum(attend(x, x, x, normalizer=of(table), **way))

    assert largest_intermediate(jax.grad(loss, (0, 1)), x, table) <= 96 * 96 / 8
    x = jax.ShapeDtypeStruct((1, 4096, 1, 2), "float32")
    described = str(explain(x, x, x, normalizer=of(table)))
    assert described.endswith("forward; one pass, along the keys in order")


@pytest.mark.slow
def test_modules_of_both_apis_create_the_table_and_train_it():
    x = jnp.asarray(draw(2, 7, 12), jnp.float32)
    module = MultiHeadAttention(
        3, 12, normalizer=normalizers.contextual_positions, rngs=nnx.Rngs(0)
    )
    gradient = nnx.grad(lambda module: jnp.sum(module(x, mask=masks.Causal()) ** 2))(module)
    assert gradient["normalizer"]["table"].shape == (3, 64, 4)
    assert np.abs(gradient["normalizer"]["table"][...]).max() > 0
    chex.assert_trees_all_close(module(x), MultiHeadAttention(3, 12, rngs=nnx.Rngs(0))(x))
    twin = linen.MultiHeadAttention(3, 12, normalizer=of(jnp.ones((5, 4))))
    output, variables = twin.init_with_output(jax.random.key(0), x, mask=masks.Causal())
    assert output.shape == x.shape and "normalizer" not in variables["params"]
    decoder = linen.DecoderAttention(
        scores.dot, 12, memory_features=12, normalizer=of(jnp.ones((5, 12)))
    )
    (_, weights), _ = decoder.init_with_output(jax.random.key(0), x[:, 0], x)
    assert weights.shape == (2, 7)


@pytest.mark.slow
def test_a_step_of_a_decoder_has_the_weights_of_its_query(x64):
    query, key, value = (jnp.asarray(draw(1, 6, 1, 4, seed=seed)) for seed in range(3))
    normalizer = of(jnp.asarray(draw(3, 4)))
    whole = attend(query, key, value, normalizer=normalizer, mask=masks.Causal())
    window = masks.Causal() & masks.Window(2, 0)

    def step(cache, token):  # in a ring, slots are not in the order of positions
        token_query, *new = (x[None, None] for x in token)
        cache, view = extend(cache, *new)
        return cache, attend_cached(token_query, view, normalizer=normalizer, mask=window)[0, 0]

    ring = init(1, 3, 1, 4, window=2, dtype=jnp.float64)
    _, steps = jax.lax.scan(step, ring, (query[0], key[0], value[0]))
    expected = attend(query, key, value, normalizer=normalizer, mask=window)
    np.testing.assert_allclose(steps, expected[0], rtol=1e-12)
    memory = prepare(scores.scaled_dot, key[:, :, 0], value[:, :, 0])
    step, _ = attend_prepared(scores.scaled_dot, query[:, -1, 0], memory, normalizer=normalizer)
    np.testing.assert_allclose(step, whole[:, -1, 0], rtol=1e-12)


@normalizers.queried
def sharpened(logits, allowed, gain, *, query):
    return jnp.where(allowed, gain * jax.nn.sigmoid(logits * query[:, :1]), 0.0)


@rule(sharpened, "streaming")
def _(gain, query=None):
    return normalizers.Elementwise(jax.nn.sigmoid)


TABLE = jnp.ones((3, 4))
REFUSED = {
    "pallas": (
        {"implementation": "pallas"},
        ValueError,
        "attend: implementation 'pallas' cannot compute contextual_positions, which needs more "
        "than one pass over the keys; use implementation='tiled'.",
    ),
    "statistics": (
        {"implementation": "tiled", "statistics": {"entropy": statistics.entropy}},
        ValueError,
        "attend: implementation 'tiled' computes no statistics of contextual_positions, whose "
        "weights depend on the keys before them; use implementation='dense'.",
    ),
    "log-sum-exp": (
        {"return_logsumexp": True},
        ValueError,
        "attend: return_logsumexp needs a normalizer of the softmax family; contextual_positions "
        "has no log-sum-exp.",
    ),
    "mixed heads": (
        {"mix_logits": bind(head_maps.talking, weight=jnp.ones((1, 1)))},
        ValueError,
        "attend: contextual_positions needs the query of each row of logits, and mix_logits or "
        "mix_weights mixes heads; leave the maps out, or use another normalizer.",
    ),
    "no table": (
        {"normalizer": normalizers.contextual_positions},
        TypeError,
        "attend: normalizer still waits for table; give them with bind(normalizer, table=...).",
    ),
    "another depth": (
        {"normalizer": of(jnp.ones((3, 5)))},
        ShapeError,
        "contextual_positions: axis H (number 1) of table [P, H] must be 4 as in query, got 5; "
        "give both the same H.",
    ),
    "no positions": (
        {"normalizer": of(jnp.ones((0, 4)))},
        ValueError,
        "contextual_positions: positions P of table must be 1 or more, got 0.",
    ),
    "another kind": (
        {"normalizer": bind(sharpened, gain=2.0), "implementation": "tiled"},
        ValueError,
        "attend: implementation 'tiled' gives no queries to sharpened, whose rule \"streaming\" is "
        "not an Ordered; use implementation='dense'.",
    ),
    "no query": (
        {"normalizer": normalizers.queried(lambda logits, allowed: logits)},
        TypeError,
        "attend: normalizer must be a function `normalizer(logits [T, S], allowed [T, S], "
        "query=[T, Hq]) -> weights [T, S]`, got ",
    ),
}


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_said(options, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        attend(X, X, X, **({"normalizer": of(TABLE)} | options))


def test_a_normalizer_of_ones_own_is_given_the_queries():
    normalizer = bind(sharpened, gain=2.0)
    found = attend(2 * X, X, X, normalizer=normalizer, return_weights=True).weights
    np.testing.assert_allclose(found, np.full((1, 1, 3, 3), 2 / (1 + np.exp(-8.0))), rtol=1e-6)
    assert normalizers.is_queried(normalizer) and not normalizers.is_queried(normalizers.softmax)
    rows = normalizers.streaming(normalizers.with_query(of(TABLE), jnp.ones((5, 4))))
    assert isinstance(rows, ContextualPositions) and rows.of_positions.shape == (5, 3)
