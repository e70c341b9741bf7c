"""Maps across heads: dense against plain NumPy in float64, tiles against dense, errors by text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.test_util import check_grads

from attention_jax import (
    ShapeError,
    attend,
    bind,
    explain,
    head_maps,
    masks,
    normalizers,
    parallel,
    per_example,
    per_head,
    statistics,
)
from attention_jax.cache import attend_cached, extend, init
from tests import oracle
from tests.contract import examples
from tests.oracle import sample

pytestmark = pytest.mark.usefixtures("x64")

B, T, S, H, V = 2, 5, 6, 3, 2
TILE = (2, 4)
STEP = 1e-6


def qkv(heads, key_heads=1, value_heads=1):
    return sample(B, T, heads, H), sample(B, S, key_heads, H), sample(B, S, value_heads, V)


def plain(query, key, value, allowed, mix_logits=None, mix_weights=None):
    """Attention with maps given as functions of [M, T, S], in NumPy; the mask is [T, S]."""
    found = []
    for q, k, v in zip(query, key, value, strict=True):
        _, weights = oracle.mixed_heads(q, k, allowed, mix_logits, mix_weights)
        shared = len(weights) // v.shape[1]
        found.append([w @ v[:, n // shared] for n, w in enumerate(weights)])
    return np.moveaxis(np.array(found), 1, 2)


def case(name, place):
    """Return arrays, a mask with an empty row, the maps for `attend` and those for `plain`."""
    example = examples.head_map_example(name, sample)
    arrays = qkv(example.heads)
    maps = {place: example.head_map}
    return arrays, masks.Causal(-1), maps, {place: example.of_pairs}


DEARER = [pytest.mark.slow, pytest.mark.exhaustive]
PLACES = [
    pytest.param("talking", "mix_weights", marks=pytest.mark.slow),
    pytest.param("neighbours", "mix_logits", marks=pytest.mark.slow),
    pytest.param("difference", "mix_weights", marks=pytest.mark.slow),
    pytest.param("talking", "mix_logits", marks=DEARER),
    pytest.param("neighbours", "mix_weights", marks=DEARER),
    pytest.param("grouped", "mix_weights", marks=DEARER),
    pytest.param("differential", "mix_weights", marks=DEARER),
]


def test_talking_heads_are_the_formula_whatever_their_number():
    query, key, value = qkv(2, 1, 3)
    before, after = sample(2, 2), sample(2, 3)
    maps = {
        "mix_logits": bind(head_maps.talking, weight=before),
        "mix_weights": bind(head_maps.talking, weight=after),
    }
    formulas = {
        "mix_logits": lambda pairs: np.tensordot(before.T, pairs, 1),
        "mix_weights": lambda pairs: np.tensordot(after.T, pairs, 1),
    }
    expected = plain(query, key, value, np.ones((T, S), bool), **formulas)
    arrays = map(jnp.asarray, (query, key, value))
    context = attend(*arrays, **maps, implementation="tiled", tile_sizes=(T, S))
    np.testing.assert_allclose(context, expected, rtol=1e-12)


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_values_are_those_of_the_formula_and_gradients_finite_differences(name, place):
    arrays, mask, maps, formulas = case(name, place)
    allowed = np.asarray(mask.to_dense(T, S))
    assert not allowed[0].any()
    expected = plain(*arrays, allowed, **formulas)
    arrays = tuple(map(jnp.asarray, arrays))
    cotangent = sample(*expected.shape, seed=1)
    found = {}
    for implementation in ("dense", "tiled"):
        run = functools.partial(attend, mask=mask, implementation=implementation, tile_sizes=TILE)

        def of_all(query, key, value, maps, run=run):
            return run(query, key, value, **maps)

        context, pull_back = jax.vjp(of_all, *arrays, maps)
        np.testing.assert_allclose(context, expected, rtol=1e-12, atol=1e-13)
        assert not np.asarray(context)[:, 0].any()
        found[implementation] = pull_back(jnp.asarray(cotangent))
    for ours, dense in zip(*map(jax.tree.leaves, found.values()), strict=True):
        np.testing.assert_allclose(ours, dense, rtol=1e-9, atol=1e-12)
    step = [sample(*x.shape, seed=2) for x in arrays]
    derivative = sum(np.vdot(g, dx) for g, dx in zip(found["dense"], step, strict=False))
    ends = [
        plain(
            *(np.asarray(x) + sign * STEP * dx for x, dx in zip(arrays, step, strict=True)),
            allowed,
            **formulas,
        )
        for sign in (1, -1)
    ]
    slope = np.vdot(cotangent, (ends[0] - ends[1]) / (2 * STEP))
    np.testing.assert_allclose(derivative, slope, rtol=1e-6, atol=1e-8)


def test_every_map_is_the_formula_where_all_weights_are_held():
    for name in examples.HEAD_MAPS:
        example = examples.head_map_example(name, sample)
        pairs = sample(example.heads, 4, 5)
        around = np.pad(pairs, head_maps.halo_of(example.head_map).padding)
        found = example.head_map(jnp.asarray(around))
        np.testing.assert_allclose(found, example.of_pairs(pairs), rtol=1e-12)


@pytest.mark.slow
def test_the_convolution_transposes_itself_over_strips_of_queries_that_do_not_divide():
    pairs, kernel = jnp.asarray(sample(2, 1 + 19, 2 + 4)), jnp.asarray(sample(2, 2, 3))
    check_grads(head_maps.neighbours, (pairs, kernel), order=2, modes=("fwd", "rev"))


def everything(implementation, query, key, value, parameters):
    """Attend with both maps and all that goes with them."""
    kernel, weight, sinks, bias = parameters
    return attend(
        query,
        key,
        value,
        mask=masks.Causal() & masks.Lengths(jnp.array([5, 2])),
        bias=bias,
        normalizer=per_head(bind(normalizers.softmax_with_sink, sink=sinks)),
        mix_logits=bind(head_maps.neighbours, kernel=kernel),
        mix_weights=per_example(bind(head_maps.talking, weight=weight)),
        dropout_rate=0.3,
        dropout_key=jax.random.key(0),
        implementation=implementation,
        tile_sizes=TILE,
    )


@pytest.mark.exhaustive
@pytest.mark.slow
def test_all_derivatives_are_the_dense_ones_with_everything_else_and_nan_behind_the_mask():
    query, key, value = map(jnp.asarray, qkv(2, 1, 3))
    key, value = key.at[1, 3].set(jnp.nan), value.at[1, 4, 1].set(jnp.inf)
    parameters = tuple(
        jnp.asarray(sample(*shape)) for shape in ((2, 2, 3), (B, 2, 3), (2,), (2, T, S))
    )
    arrays = (query, key, value, parameters)

    def gradients(implementation):
        def loss(*arrays):
            return jnp.sum(everything(implementation, *arrays) ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))

    moved = jax.tree.map(jnp.nan_to_num, arrays)
    dense, tiled = (
        jax.jit(functools.partial(jax.jvp, gradients(name)))(arrays, moved)
        for name in ("dense", "tiled")
    )
    for ours, theirs in zip(*map(jax.tree.leaves, (tiled, dense)), strict=True):
        assert np.isfinite(theirs).all()
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-10)


GROUPS_OF_ONE = bind(head_maps.grouped, weight=np.ones((2, 1, 1)))
HEARING = {
    "each itself": ({"mix_logits": bind(head_maps.talking, weight=np.eye(2))}, [0, 1]),
    "each itself after": ({"mix_weights": GROUPS_OF_ONE}, [0, 1]),
    "each other": ({"mix_weights": bind(head_maps.talking, weight=np.ones((2, 2)))}, [1, 1]),
}


@pytest.mark.parametrize("hearing", HEARING)
@pytest.mark.parametrize("implementation", ["dense", pytest.param("tiled", marks=pytest.mark.slow)])
def test_nan_in_a_value_reaches_the_heads_that_may_attend_to_it_alone(hearing, implementation):
    maps, expected = HEARING[hearing]
    query, key, value = map(jnp.asarray, qkv(2, 2, 2))
    value = value.at[0, 3].set(jnp.nan)
    allowed = np.ones((1, 2, T, S), bool)
    allowed[:, 0, :, 3] = False
    context = attend(
        query, key, value, mask=jnp.asarray(allowed), implementation=implementation, **maps
    )
    found = np.isnan(context)
    np.testing.assert_array_equal(found[0].any(axis=(0, 2)), expected)
    assert not found[1].any()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_half_precision_and_huge_logits(dtype):
    with jax.enable_x64(False):
        query, key, value = (jnp.asarray(x, dtype) for x in qkv(2, 2, 2))
        maps = {
            "mix_logits": bind(head_maps.talking, weight=jnp.asarray(sample(2, 2), jnp.float32)),
            "mix_weights": bind(head_maps.talking, weight=jnp.asarray(sample(2, 2), jnp.float32)),
        }
        query = query * 1e4
        dense, tiled = (
            attend(query, key, value, mask=masks.Causal(), **maps, implementation=name)
            for name in ("dense", "tiled")
        )
        assert tiled.dtype == dtype and np.isfinite(np.asarray(tiled, np.float32)).all()
        tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == jnp.bfloat16 else {"rtol": 1e-4}
        np.testing.assert_allclose(
            np.asarray(tiled, np.float32), np.asarray(dense, np.float32), **tolerance
        )


@pytest.mark.slow
def test_no_array_as_large_as_the_plane_is_made():
    length = 512
    arrays = [jax.ShapeDtypeStruct((1, length, 2, 4), "float32")] * 3
    weight, kernel = jnp.ones((2, 2), jnp.float32), jnp.ones((2, 2, 3), jnp.float32)
    maps = {
        "mix_logits": bind(head_maps.neighbours, kernel=kernel),
        "mix_weights": bind(head_maps.talking, weight=weight),
    }

    def loss(*arrays):
        return jnp.sum(attend(*arrays, **maps, implementation="tiled", tile_sizes=(64, 64)))

    traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)
    assert max(_sizes(traced.jaxpr)) < length * length / 4


def _sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from _sizes(inner)


def pair(scale=0.5):
    return bind(head_maps.difference, scale=scale)


@pytest.mark.slow
def test_differential_attention_is_two_calls_less_one_and_runs_as_heads_that_stand_alone():
    query, key, value = map(jnp.asarray, qkv(4, 2, 2))
    one = attend(query, key, value, mix_weights=pair(), mask=masks.Causal())
    first, second = (
        attend(
            query[:, :, n::2], jnp.repeat(key, 2, axis=2)[:, :, n::2], value, mask=masks.Causal()
        )
        for n in (0, 1)
    )
    np.testing.assert_allclose(one, first - 0.5 * second, rtol=1e-12)
    x = jax.ShapeDtypeStruct((1, 4096, 8, 64), "float32")
    shared = jax.ShapeDtypeStruct((1, 4096, 4, 128), "float32")
    told = str(explain(x, x, shared, mask=masks.Causal(), mix_weights=pair(), platform="cpu"))
    assert told.endswith("forward; one pass; the contexts of heads are then mixed")


def test_explain_says_the_tiles_of_all_heads_and_the_operations_of_the_maps():
    x = jax.ShapeDtypeStruct((1, 4096, 8, 64), "float32")
    talking = bind(head_maps.talking, weight=jnp.ones((8, 8), jnp.float32))
    told = explain(
        x, x, x, mask=masks.Causal(), mix_logits=talking, mix_weights=talking, platform="cpu"
    )
    pairs = (told.partial + told.full) * np.prod(told.tile)
    assert (told.together, told.mixing_flops) == (8, 3 * 2 * 8 * 8 * pairs)
    assert "of 8 heads: " in str(told) and "to mix heads) and" in str(told)
    assert str(told).endswith(
        "two passes over tiles of all heads: the sums of rows, then the mixed weights"
    )


def talk(heads=2):
    return bind(head_maps.talking, weight=jnp.eye(heads))


def both_read():
    """Return a statistic that reads logits and weights."""
    return statistics.Statistic(lambda pairs: jnp.sum(pairs.weights * pairs.logits, axis=1))


def masked_logits():
    """Return a statistic of the logits where a mask of 4 heads is true."""
    where = masks.as_mask(jnp.ones((1, 4, T, S), bool))

    def of_tile(pairs, where):
        return jnp.sum(jnp.where(where(pairs.q_idx, pairs.kv_idx), pairs.logits, 0.0), axis=1)

    return statistics.Statistic(bind(of_tile, where=where), rescale=None)


REFUSED = {
    "a statistic of logits and weights of different heads": (
        lambda: {
            "mix_weights": bind(head_maps.talking, weight=jnp.ones((2, 4))),
            "statistics": {"own": both_read()},
        },
        "attend: statistics['own'] reads logits, of 2 heads, and weights, of 4 heads after "
        "mix_weights; give two statistics, or a map that keeps the number of heads.",
    ),
    "a statistic of logits with a mask of other heads": (
        lambda: {
            "mix_weights": bind(head_maps.talking, weight=jnp.ones((2, 4))),
            "statistics": {"own": masked_logits()},
        },
        "attend: statistics['own'] reads logits, of 2 heads, and a mask that differs between "
        "heads, of 4 heads after mix_weights; give two statistics, or a map that keeps the number "
        "of heads.",
    ),
    "log-sum-exp": (
        lambda: {"mix_weights": talk(), "return_logsumexp": True},
        "attend: return_logsumexp would belong to the heads before mix_weights, and the context to "
        "those after; leave one of the two out.",
    ),
    "another number of heads": (
        lambda: {"mix_logits": talk(3)},
        "talking: axis M (number 0) of weight [M, N] must be 2 as in pairs, got 3; give both the "
        "same M.",
    ),
    "a map for each head": (
        lambda: {"mix_logits": per_head(talk())},
        "attend: mix_logits maps all heads together and cannot be per_head; give one map, or "
        "per_example of it.",
    ),
    "parameters that are missing": (
        lambda: {"mix_weights": head_maps.talking},
        "attend: mix_weights still waits for weight; give them with bind(mix_weights, weight=...).",
    ),
    "no function": (
        lambda: {"mix_weights": 3},
        "attend: mix_weights must be a function such as bind(head_maps.difference, scale=0.5), got "
        "3.",
    ),
    "a halo that is not declared": (
        lambda: {"mix_logits": lambda pairs: pairs[:, 1:]},
        "attend: mix_logits must map [M, T, S] = (2, 3, 5) with its halo around it to [N, T, S] = "
        '[N, 3, 5], got shape (2, 2, 5); declare the neighbours that it looks at by the rule "halo'
        '".',
    ),
    "value heads that do not divide": (
        lambda: {"mix_weights": pair()},
        "attend: heads of the context must be a multiple of value heads, got heads of the context "
        "= 1 and value heads = 2.",
    ),
    "a mask of heads whose number changes": (
        lambda: {
            "mix_logits": bind(head_maps.talking, weight=jnp.ones((2, 4))),
            "mask": jnp.ones((1, 2, T, S), bool),
        },
        "attend: a mask that differs between heads cannot follow mix_logits from 2 to 4 heads; "
        "give a mask for all heads, or a map that keeps their number.",
    ),
    "a normalizer of more passes in tiles": (
        lambda: {
            "mix_logits": talk(),
            "normalizer": normalizers.sparsemax,
            "implementation": "tiled",
        },
        "attend: implementation 'tiled' cannot mix heads under sparsemax, which needs more than "
        "one pass over the keys; use implementation='dense'.",
    ),
    "a kernel": (
        lambda: {"mix_logits": talk(), "implementation": "pallas"},
        "attend: implementation 'pallas' computes one head at a time, and mix_logits or "
        "mix_weights mixes heads; use implementation='tiled'.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_maps_cannot_do_is_refused_by_name(name):
    options, text = REFUSED[name]
    options = options()
    with pytest.raises((ValueError, TypeError, ShapeError)) as error:
        attend(*map(jnp.asarray, qkv(2, 2, 2)), **options)
    assert str(error.value) == text


def test_a_split_sequence_and_a_cache_refuse_maps_that_they_cannot_apply():
    query, key, value = map(jnp.asarray, qkv(2, 2, 2))
    mesh = jax.make_mesh((1,), ("sp",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(TypeError) as error:
        parallel.attend(query, query, query, axis="sp", mesh=mesh, mix_logits=talk())
    assert str(error.value).startswith(
        "parallel.attend: mix_logits cannot be given for a split sequence; it takes "
    )
    cache = init(B, S, 2, H, V)
    _, view = extend(cache, key, value)
    with pytest.raises(ValueError) as error:
        attend_cached(
            query, view, mix_weights=bind(head_maps.neighbours, kernel=jnp.ones((2, 1, 3)))
        )
    assert str(error.value) == (
        "attend_cached: mix_weights looks at neighbouring pairs, and a cache holds neither earlier "
        "queries nor keys in order; decode with the whole sequence, or with a map without a halo."
    )


def test_heads_that_an_explicit_mesh_splits_are_refused():
    mesh = jax.make_mesh((1,), ("heads",), axis_types=(jax.sharding.AxisType.Explicit,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "heads"))
    arrays = [jax.device_put(x, split) for x in qkv(2, 2, 2)]
    with jax.set_mesh(mesh), pytest.raises(ShapeError) as error:
        attend(*arrays, mix_logits=talk())
    assert str(error.value) == (
        "attend: axis 2 of query, its heads, is split over an explicit mesh, and mix_logits or "
        "mix_weights mixes heads; jax.reshard it to hold heads together, or give an automatic mesh "
        "axis."
    )
