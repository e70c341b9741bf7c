"""Statistics of heads that maps mix: against formulas on the matrix, and tiles against dense."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from attention_jax import (
    attend,
    bind,
    explain,
    head_maps,
    masks,
    normalizers,
    per_example,
    per_head,
    statistics,
)
from attention_jax.statistics import Statistic, fields_read
from tests import oracle
from tests.contract import examples
from tests.oracle import sample
from tests.statistics.examples import LENGTH, STATISTICS

pytestmark = pytest.mark.usefixtures("x64")

BATCH, DEPTH = 2, 3
EVERY = {name: example.statistic for name, example in STATISTICS.items()}
FEW = {
    name: EVERY[name]
    for name in ("entropy", "largest_logit", "distance_spread", "heaviest", "received_mass")
}
OF_LOGITS = "largest_logit", "head_largest_logit"
TILED = {"implementation": "tiled", "tile_sizes": (4, 3)}
DENSE = {"implementation": "dense"}
WAYS = {"dense": DENSE, "tiled": TILED}
STEP = 1e-6


def qkv(heads, key_heads=1, value_heads=1):
    shapes = [(BATCH, LENGTH, number, DEPTH) for number in (heads, key_heads, value_heads)]
    return tuple(jnp.asarray(2 * sample(*shape, seed=n)) for n, shape in enumerate(shapes))


def expected(query, key, allowed, mix_logits=None, mix_weights=None):
    """Return every statistic of plain attention with maps of [M, T, S], as `attend` lays it out."""
    found = {name: [] for name in STATISTICS}
    for q, k in zip(np.asarray(query), np.asarray(key), strict=True):
        logits, weights = oracle.mixed_heads(q, k, allowed, mix_logits, mix_weights)
        for name, example in STATISTICS.items():
            axis = 0 if example.statistic.of == "head" else 1
            # No formula of logits looks at weights, nor any other at logits.
            of = logits if name in OF_LOGITS else weights
            heads = [example.formula(one, one, allowed) for one in of]
            found[name].append(jax.tree.map(lambda *x, axis=axis: np.stack(x, axis), *heads))
    return {name: jax.tree.map(lambda *x: np.stack(x), *each) for name, each in found.items()}


def assert_alike(actual, wanted, tolerance=1e-12):
    assert actual.keys() == wanted.keys()
    for name, one in actual.items():
        for first, second in zip(*map(jax.tree.leaves, (one, wanted[name])), strict=True):
            assert first.shape == second.shape, name
            np.testing.assert_allclose(first, second, tolerance, tolerance, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "way"),
    [
        ("neighbours", "talking", "dense"),
        ("neighbours", "talking", "tiled"),
        (None, "difference", "tiled"),
        pytest.param("talking", None, "tiled", marks=pytest.mark.exhaustive),
        pytest.param(None, "grouped", "tiled", marks=pytest.mark.exhaustive),
        pytest.param(None, "differential", "tiled", marks=pytest.mark.exhaustive),
    ],
)
def test_values_are_those_of_the_mixed_matrix(before, after, way):
    named = {"mix_logits": before, "mix_weights": after}
    given = {
        place: examples.head_map_example(name, sample) for place, name in named.items() if name
    }
    maps = {place: example.head_map for place, example in given.items()}
    formulas = {place: example.of_pairs for place, example in given.items()}
    query, key, value = qkv(next(iter(given.values())).heads)
    mask = masks.Causal(-1)
    found = attend(query, key, value, mask=mask, **maps, statistics=EVERY, **WAYS[way])
    allowed = np.asarray(mask.to_dense(LENGTH, LENGTH))
    assert not allowed[0].any()
    assert_alike(found.statistics, expected(query, key, allowed, **formulas))
    plain = attend(query, key, value, mask=mask, **maps, **WAYS[way])
    np.testing.assert_allclose(found.context, plain, rtol=1e-12, atol=1e-13)


def everything(way, asked, query, key, value, parameters):
    """Attend with both maps and all that goes with them, to what is known at run time alone."""
    kernel, weight, sinks, bias = parameters
    return attend(
        query,
        key,
        value,
        mask=masks.Causal() & masks.Lengths(jnp.array([LENGTH, 4])),
        bias=bias,
        normalizer=per_head(bind(normalizers.softmax_with_sink, sink=sinks)),
        mix_logits=bind(head_maps.neighbours, kernel=kernel),
        mix_weights=per_example(bind(head_maps.talking, weight=weight)),
        dropout_rate=0.3,
        dropout_key=jax.random.key(0),
        statistics=asked,
        **way,
    )


def mixed_arrays():
    """Return operands and parameters of `everything`, for weights of 2 heads that become 3."""
    shapes = (2, 2, 3), (BATCH, 2, 3), (2,), (2, LENGTH, LENGTH)
    return *qkv(2), tuple(jnp.asarray(sample(*shape)) for shape in shapes)


def penalty(of, *arrays):
    """Return a number that depends on every entry of the statistics, and on the context."""
    found = of(*arrays)
    total = jnp.sum(found.context**2)
    for leaf in jax.tree.leaves(found.statistics):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = jnp.where(jnp.isfinite(leaf), leaf, 0.0)
            wave = jnp.cos(jnp.arange(leaf.size).astype(leaf.dtype)).reshape(leaf.shape)
            total = total + jnp.sum(leaf * wave)
    return total


@pytest.mark.exhaustive
@pytest.mark.slow
def test_all_derivatives_are_those_of_the_matrix_with_everything_else():
    arrays = mixed_arrays()
    directions = jax.tree.map(lambda x: jnp.sin(3.0 * x), arrays)
    asked = {name: EVERY[name] for name in ("entropy", "largest_logit", "received_mass")}
    found = {}
    for name, way in WAYS.items():
        loss = functools.partial(penalty, functools.partial(everything, way, asked))
        gradients = jax.value_and_grad(loss, (0, 1, 2, 3))
        found[name] = jax.jit(functools.partial(jax.jvp, gradients))(arrays, directions)
        if name == "dense":
            plus, minus = (
                loss(*jax.tree.map(lambda x, y, s=sign: x + s * STEP * y, arrays, directions))
                for sign in (1, -1)
            )
    for ours, dense in zip(*map(jax.tree.leaves, (found["tiled"], found["dense"])), strict=True):
        np.testing.assert_allclose(ours, dense, rtol=1e-9, atol=1e-10)
    slope = (plus - minus) / (2 * STEP)
    np.testing.assert_allclose(found["dense"][1][0], slope, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "signed_softmax"])
def test_masks_and_statistics_that_differ_between_heads(normalizer):
    allowed = sample(1, 4, LENGTH, LENGTH) > -0.5
    allowed[:, 1, 2] = False
    where = jnp.asarray(sample(1, 4, LENGTH, LENGTH, seed=1) > 0)

    def of_tile(pairs, weight):
        return jnp.sum(jnp.tanh(weight * pairs.weights) * pairs.logits, axis=1)

    own = Statistic(bind(of_tile, weight=jnp.asarray(1.5)), rescale=None)
    asked = FEW | {"where": statistics.mass(where), "both": own}
    weights = jnp.asarray(sample(2, 2, 2)), jnp.asarray(sample(4, 4))
    options = {
        "mask": jnp.asarray(allowed),
        "normalizer": getattr(normalizers, normalizer),
        "mix_logits": bind(head_maps.grouped, weight=weights[0]),
        "mix_weights": bind(head_maps.talking, weight=weights[1]),
        "statistics": asked,
    }
    dense, tiled = (attend(*qkv(4, 2, 2), **options, **way) for way in WAYS.values())
    np.testing.assert_allclose(tiled.context, dense.context, rtol=1e-11, atol=1e-12)
    assert_alike(tiled.statistics, dense.statistics, 1e-11)


@pytest.mark.slow
def test_poison_reaches_the_queries_that_attend_to_it_and_nothing_else():
    query, key, value = qkv(2, 2, 2)
    query, key = query.at[0, 2, 0].set(jnp.nan), key.at[1, 5, 1].set(jnp.inf)
    apart = bind(head_maps.grouped, weight=np.ones((2, 1, 1)))
    maps = {"mix_logits": apart, "mix_weights": apart}
    found = [
        attend(query, key, value, mask=masks.Causal(), statistics=FEW, **maps, **way).statistics
        for way in WAYS.values()
    ]
    assert_alike(found[1], found[0])
    is_nan = np.isnan(found[0]["entropy"])
    rows = np.arange(LENGTH)
    np.testing.assert_array_equal(is_nan[0], np.stack([rows == 2, rows < 0], axis=1))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_what_attends_to_nothing_has_the_values_that_are_named(way):
    query, key, value = qkv(4)
    maps = {"mix_weights": bind(head_maps.difference, scale=0.5)}
    for nothing in ((query, key, value), (query, key[:, :0], value[:, :0])):
        options = {"mask": masks.Lengths(0), "statistics": FEW}
        found = attend(*nothing, **options, **maps, **WAYS[way]).statistics
        assert found["entropy"].shape == (BATCH, LENGTH, 2) and not found["entropy"].any()
        assert found["largest_logit"].shape == (BATCH, LENGTH, 4)
        assert (found["largest_logit"] == -jnp.inf).all()
        assert not found["received_mass"].any() and (found["heaviest"].keys == -1).all()


def test_statistics_of_one_head_are_of_the_logits_or_of_the_weights():
    of_logits = {name for name, each in EVERY.items() if "weights" not in fields_read(each)}
    assert of_logits == set(OF_LOGITS)


@pytest.mark.slow
def test_signed_weights_have_the_entropy_of_their_magnitudes():
    weights = jnp.array([[0.5, -0.25, 0.25, 0.0]])
    shares = statistics.of_matrix(statistics.entropy, jnp.abs(weights))
    found = statistics.of_matrix(statistics.entropy, weights)
    np.testing.assert_allclose(found, shares, rtol=1e-12)
    np.testing.assert_allclose(found, [1.5 * np.log(2)], rtol=1e-12)
    distance = statistics.of_matrix(statistics.expected_distance, weights)
    np.testing.assert_allclose(distance, [0.75], rtol=1e-12)


def test_explain_says_that_statistics_take_a_second_pass():
    x = jax.ShapeDtypeStruct((1, 4096, 8, 64), "float32")
    talking = bind(head_maps.talking, weight=jnp.ones((8, 8), jnp.float32))
    ask = functools.partial(explain, x, x, x, mix_logits=talking, platform="cpu")
    once, twice = ask(), ask(statistics=FEW)
    assert twice.mixing_flops == 2 * once.mixing_flops
    assert str(twice).endswith(
        "two passes over tiles of all heads: the sums of rows, then weights and statistics"
    )


@pytest.mark.slow
def test_no_array_as_large_as_the_plane_is_made():
    length = 512
    x = jax.ShapeDtypeStruct((1, length, 2, 4), "float32")
    maps = {
        "mix_logits": bind(head_maps.neighbours, kernel=jnp.ones((2, 2, 3), jnp.float32)),
        "mix_weights": bind(head_maps.talking, weight=jnp.ones((2, 2), jnp.float32)),
    }
    tiled = {"implementation": "tiled", "tile_sizes": (64, 64)}
    of = functools.partial(attend, **maps, statistics=FEW, **tiled)
    loss = functools.partial(penalty, of)
    traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, x, x)
    assert max(_sizes(traced.jaxpr)) < length * length / 4


def _sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from _sizes(inner)
