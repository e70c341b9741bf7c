"""Statistics against formulas on the matrix, under every implementation, and their derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import ShapeError, attend, masks, normalizers, parallel, statistics
from attention_jax.statistics import Statistic
from tests import oracle
from tests.statistics.examples import LENGTH, NOT_STATISTICS, STATISTICS

BATCH, HEADS, KEY_HEADS, DEPTH = 2, 2, 1, 4
EVERY = {name: example.statistic for name, example in STATISTICS.items()}
RAGGED = np.array([LENGTH, 4])
MASKS = {
    "ragged": (
        masks.Causal() & masks.Lengths(RAGGED, RAGGED),
        lambda b, n, i, j: j <= i and max(i, j) < RAGGED[b],
    ),
    "all": (None, lambda b, n, i, j: True),
    "late": (masks.Causal(offset=-3), lambda b, n, i, j: j <= i - 3),
}
NORMALIZERS = {
    "softmax": (normalizers.softmax, oracle.softmax),
    "plus one": (
        normalizers.softmax_plus_one,
        lambda logits, allowed: oracle.softmax(np.append(logits, 0), np.append(allowed, True))[:-1],
    ),
    "sigmoid": (
        normalizers.sigmoid,
        lambda logits, allowed: np.where(allowed, 1 / (1 + np.exp(-logits)), 0),
    ),
}


def arrays(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(BATCH, LENGTH, heads, DEPTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [jnp.asarray(2 * rng.standard_normal(shape), dtype) for shape in shapes]


def expected(query, key, value, rule, normalizer=oracle.softmax, keep=None):
    """Return every statistic of the loops over pairs, as `attend` lays them out."""

    def formula(q, k):
        return q @ k / np.sqrt(DEPTH)

    _, weights = oracle.attention(query, key, value, formula, rule, None, normalizer, keep)
    rows, columns = np.indices((LENGTH, LENGTH))
    found = {}
    for name, example in STATISTICS.items():
        examples = []
        for b in range(BATCH):
            heads = []
            for n in range(HEADS):
                logits = oracle.logits_of(query[b, :, n], key[b, :, 0], formula)
                allowed = np.vectorize(functools.partial(rule, b, n))(rows, columns)
                heads.append(example.formula(weights[b, n], logits, allowed))
            axis = 0 if example.statistic.of == "head" else 1
            examples.append(jax.tree.map(lambda *x, axis=axis: np.stack(x, axis), *heads))
        found[name] = jax.tree.map(lambda *x: np.stack(x), *examples)
    return found


def assert_alike(actual, wanted, rtol=1e-12):
    """Compare statistics by name: a named tuple of the one is a tuple of the other."""
    assert actual.keys() == wanted.keys()
    for name, one in actual.items():
        for first, second in zip(*map(jax.tree.leaves, (one, wanted[name])), strict=True):
            assert first.shape == second.shape, name
            np.testing.assert_allclose(first, second, rtol, rtol, err_msg=name)


def tiled(**options):
    return {"implementation": "tiled", "tile_sizes": (4, 3)} | options


def test_every_export_has_an_example():
    missing = set(statistics.__all__) - set(STATISTICS) - NOT_STATISTICS
    assert not missing, f"add to tests/statistics/examples.py: {sorted(missing)}"


@pytest.mark.parametrize(
    ("mask", "normalizer", "options"),
    [
        pytest.param("ragged", "softmax", {"implementation": "dense"}, marks=pytest.mark.slow),
        ("ragged", "softmax", tiled()),
        pytest.param("all", "sigmoid", tiled(), marks=pytest.mark.slow),
        pytest.param("late", "plus one", tiled(), marks=pytest.mark.slow),
    ],
)
def test_values_are_those_of_the_matrix(mask, normalizer, options, x64):
    query, key, value = arrays()
    (attended, rule), (normalized, of_row) = MASKS[mask], NORMALIZERS[normalizer]
    found = attend(
        query, key, value, mask=attended, normalizer=normalized, statistics=EVERY, **options
    )
    assert_alike(found.statistics, expected(query, key, value, rule, of_row))
    plain = attend(query, key, value, mask=attended, normalizer=normalized, **options)
    np.testing.assert_allclose(found.context, plain, rtol=1e-13, atol=1e-13)


@pytest.mark.slow
def test_values_after_dropout_are_those_of_the_weights_after_dropout(x64):
    query, key, value = arrays()
    options = {"dropout_rate": 0.4, "dropout_key": jax.random.key(3), "statistics": EVERY}
    dense = attend(query, key, value, return_weights=True, **options)
    plain = attend(query, key, value, return_weights=True).weights
    keep = np.asarray(dense.weights / plain)
    found = attend(query, key, value, **tiled(**options))
    wanted = expected(query, key, value, MASKS["all"][1], keep=keep)
    assert_alike(dense.statistics, wanted)
    assert_alike(found.statistics, wanted)


def penalty(options, chosen, query, key, value):
    """Return a number that depends on every entry of the statistics, and on the context."""
    found = attend(query, key, value, statistics=chosen, **options)
    floats = [
        jnp.where(jnp.isfinite(leaf), leaf, 0.0)
        for leaf in jax.tree.leaves(found.statistics)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    waves = [
        jnp.sin(jnp.arange(leaf.size).astype(leaf.dtype)).reshape(leaf.shape) for leaf in floats
    ]
    return jnp.sum(found.context**2) + sum(
        jnp.sum(leaf * wave) for leaf, wave in zip(floats, waves, strict=True)
    )


def derivatives(chosen, options, operands, directions):
    """Return the penalty and its gradient, and how both change along a direction."""
    function = jax.value_and_grad(functools.partial(penalty, options, chosen), (0, 1, 2))
    return jax.jit(lambda x, change: jax.jvp(function, x, change))(operands, directions)


@pytest.mark.slow
def test_gradients_of_every_statistic_are_those_of_the_matrix(x64):
    options = {"mask": MASKS["ragged"][0]}
    ways = [tiled(**options), {"implementation": "dense"} | options]
    found = [
        jax.jit(
            jax.grad(functools.partial(penalty, way, EVERY), (0, 1, 2)),
            # A large program of few numbers: to compile it takes the time.
            compiler_options={"xla_backend_optimization_level": 0},
        )(*arrays())
        for way in ways
    ]
    for first, second in zip(*found, strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-12, atol=1e-12)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_every_derivative_is_that_of_the_matrix(x64):
    operands, directions = tuple(arrays()), tuple(arrays(seed=1))
    names = "entropy", "largest_logit", "distance_spread", "heaviest"
    chosen = {name: EVERY[name] for name in names}
    options = {"mask": MASKS["ragged"][0], "normalizer": normalizers.softmax_plus_one}
    ways = [tiled(**options), {"implementation": "dense"} | options]
    found = [derivatives(chosen, way, operands, directions) for way in ways]
    for first, second in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-10, atol=1e-11)
    step = 1e-6
    plus, minus = (
        penalty(ways[1], chosen, *(x + sign * y for x, y in zip(operands, directions, strict=True)))
        for sign in (step, -step)
    )
    np.testing.assert_allclose(found[1][1][0], (plus - minus) / (2 * step), rtol=1e-6)


ONES = jnp.ones((1, 4, 1, 2))


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        (
            [statistics.entropy],
            {},
            TypeError,
            "attend: statistics must be a dict from names to statistics, such as {'entropy': "
            "statistics.entropy}, got list.",
        ),
        (
            {"mass": statistics.mass},
            {},
            TypeError,
            "attend: statistics['mass'] must be one of attention_jax.statistics, got mass; call it "
            "with its arguments, or wrap your own function of a tile in statistics.Statistic.",
        ),
        (
            {0: statistics.entropy},
            {},
            TypeError,
            "attend: the names of statistics must be strings, got 0.",
        ),
        (
            {"own": Statistic(lambda pairs: pairs.weights.sum(axis=0))},
            {},
            ShapeError,
            "attend: statistics['own'] must return sums with the leading axis T, got shape (5,) "
            "for a tile of 3 queries and 5 keys; sum over axis 1.",
        ),
        (
            {"entropy": statistics.entropy},
            {"implementation": "tiled", "normalizer": normalizers.stick_breaking},
            ValueError,
            "attend: implementation 'tiled' computes no statistics of stick_breaking, whose "
            "weights depend on the keys before them; use implementation='dense'.",
        ),
        (
            {"entropy": statistics.entropy},
            {"implementation": "pallas"},
            ValueError,
            "attend: implementation 'pallas' computes no statistics of the weights; use "
            "implementation='tiled'.",
        ),
    ],
)
def test_what_attend_refuses(given, options, error, message):
    with pytest.raises(error) as caught:
        attend(ONES, ONES, ONES, statistics=given, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: Statistic(3),
            TypeError,
            "Statistic: of_tile must be a function `of_tile(pairs) -> sums`, got 3.",
        ),
        (
            lambda: Statistic(lambda pairs: pairs, rescale=lambda sums: sums),
            TypeError,
            "Statistic: rescale must be a function `rescale(sums, log_factor [T]) -> sums`, got "
            "<lambda>(sums): too many positional arguments.",
        ),
        (
            lambda: Statistic(lambda pairs: pairs, of="row"),
            ValueError,
            "Statistic: of must be query, key or head, got 'row'.",
        ),
        (
            lambda: statistics.over_queries(statistics.received_mass),
            ValueError,
            "over_queries: give a statistic of queries, got one of 'key'.",
        ),
        (
            lambda: statistics.mass_by_distance([0, 2, 2]),
            ValueError,
            "mass_by_distance: edges must be increasing distances, at least one, got [0, 2, 2].",
        ),
        (lambda: statistics.heaviest(0), ValueError, "heaviest: k must be 1 or more, got 0."),
        (
            lambda: parallel.attend(ONES, ONES, ONES, axis="x", statistics=EVERY),
            TypeError,
            "parallel.attend: statistics cannot be given for a split sequence; it takes score, "
            "mask, bias, normalizer, dropout_rate, dropout_key, tile_sizes, return_logsumexp.",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


FEW = {
    name: EVERY[name]
    for name in ("entropy", "heaviest", "largest_logit", "head_largest_logit", "received_mass")
}


def both(*operands, **options):
    """Return the statistics of both implementations."""
    ways = tiled(), {"implementation": "dense"}
    return [attend(*operands, statistics=FEW, **options, **way).statistics for way in ways]


@pytest.mark.slow
def test_poison_reaches_what_attends_to_it_and_nothing_else(x64):
    query, key, value = arrays()
    query = query.at[0, 2].set(jnp.nan)
    key, value = key.at[1, 5, 0, 1].set(jnp.inf), value.at[0, 8, 0, 0].set(jnp.nan)
    first, second = both(query, key, value, mask=masks.Causal())
    assert_alike(first, second)
    rows = [[i == 2 or i >= 8 for i in range(LENGTH)], [i >= 5 for i in range(LENGTH)]]
    for name in ("entropy", "largest_logit"):
        np.testing.assert_array_equal(np.isnan(first[name]).all(axis=2), rows)
    is_poisoned = np.isnan(first["heaviest"].weights)
    np.testing.assert_array_equal(is_poisoned.any(axis=(2, 3)), rows)
    assert (first["heaviest"].keys[is_poisoned] == -1).all()


@pytest.mark.slow
def test_what_attends_to_nothing_has_the_values_that_are_named(x64):
    query, key, value = arrays()
    for nothing in ((query, key, value), (query, key[:, :0], value[:, :0])):
        for found in both(*nothing, mask=masks.Lengths(0)):
            assert not found["entropy"].any() and not found["received_mass"].any()
            assert not found["heaviest"].weights.any() and (found["heaviest"].keys == -1).all()
            assert (found["largest_logit"] == -jnp.inf).all()
            assert (found["head_largest_logit"] == -jnp.inf).all()


@pytest.mark.slow
def test_what_is_known_at_run_time_and_closed_over(x64):
    query, key, value = arrays()

    def loss(options, query, tokens):
        def of_token(pairs):
            return jnp.log1p(pairs.weights) @ tokens[pairs.kv_idx[0]].astype(pairs.weights.dtype)

        own = {
            "mass": statistics.mass(lambda q_idx, kv_idx: tokens[q_idx] == tokens[kv_idx]),
            "segments": statistics.mass(masks.Segment(tokens[None] // 2)),
            "final": Statistic(of_token, rescale=None),
        }
        mask = masks.Segment(tokens // 2) & masks.Causal()
        found = attend(query, key, value, mask=mask, statistics=own, **options)
        return sum(jnp.sum(jnp.sin(x)) for x in found.statistics.values())

    tokens = jnp.arange(LENGTH) // 3
    ways = tiled(), {"implementation": "dense"}
    found = [
        jax.value_and_grad(jax.jit(functools.partial(loss, way)))(query, tokens) for way in ways
    ]
    for first, second in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-12, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "mask", "most"),
    [(8192, masks.Causal(), 8192**2), (65536, masks.Window(1023, 0), 200 * 2**20)],
)
def test_no_array_of_pairs_is_held(length, mask, most):
    x = jax.ShapeDtypeStruct((1, length, 1, 8), "float32")

    def loss(x):
        asked = {name: EVERY[name] for name in ("entropy", "heaviest", "received_mass")}
        found = attend(x, x, x, mask=mask, statistics=asked)
        leaves = jax.tree.leaves((found.context, found.statistics))
        return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in leaves)

    compiled = jax.jit(jax.grad(loss)).lower(x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < most


@pytest.mark.slow
def test_a_tile_is_computed_once_for_the_derivatives_of_context_and_statistics():
    options = tiled(score=lambda query, key: jnp.cbrt(query @ key.T))

    def computed(loss):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(ONES, ONES, ONES).as_text()
        return text.count("stablehlo.cbrt")

    few = {name: EVERY[name] for name in ("entropy", "largest_logit")}
    plain = computed(lambda *operands: jnp.sum(attend(*operands, **options) ** 2))
    assert computed(functools.partial(penalty, options, few)) == plain > 0
