"""Generated kernels against the dense oracle, in Pallas' interpreter, with every derivative."""

import contextvars
import functools
import itertools
import operator
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from attention_jax import attend, bind, explain, masks, normalizers, per_head, positions, scores
from attention_jax.implementations import interpreted
from attention_jax.normalizers import streaming
from tests import oracle
from tests.contract import examples

B, T, S, N, K, H, V = 2, 5, 7, 2, 1, 4, 3
TILE = (3, 4)


@pytest.fixture(autouse=True, params=["tpu"])
def platform(request):
    with interpreted(request.param):
        yield request.param


NOT_THERE = [
    "tpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            jax.__version_info__ >= (0, 11), reason="later JAX asks a GPU before it lowers for one"
        ),
    ),
]
"""Platforms that programs are lowered for."""


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def qkv(query_length=T, key_length=S, depth=H, key_depth=H):
    return (
        normal(B, query_length, N, depth),
        normal(B, key_length, K, key_depth, seed=1),
        normal(B, key_length, K, V, seed=2),
    )


def functions_of(options):
    """What has gradients besides query, key and value: bound functions, and a bias."""
    given = {name: options.get(name) for name in ("score", "bias", "normalizer")}
    return {
        name: one
        for name, one in given.items()
        if jax.tree.leaves(one) and not isinstance(one, types.FunctionType)
    }


def results(options, implementation, arrays, functions):
    """Context and, where there is one, log-sum-exp with 0 for the rows that have none."""
    normalizer = options.get("normalizer", normalizers.softmax)
    how = streaming(getattr(normalizer, "function", normalizer))
    has_logsumexp = isinstance(how, normalizers.LogSum)
    found = attend(
        *arrays,
        **{**options, **functions},
        implementation=implementation,
        tile_sizes=TILE if implementation == "pallas" else None,
        return_logsumexp=has_logsumexp,
    )
    if not has_logsumexp:
        return found, jnp.zeros(())
    return found.context, jnp.where(jnp.isneginf(found.logsumexp), 0.0, found.logsumexp)


def loss(options, implementation, arrays, functions):
    context, logsumexp = results(options, implementation, arrays, functions)
    return jnp.sum(jnp.sin(context) * normal(*context.shape, seed=3)) + jnp.sum(
        jnp.cos(3.0 * logsumexp)
    )


compiled = functools.partial(
    jax.jit,
    # Interpreted kernels are large programs on few numbers: to compile them takes the time.
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


def close(ours, theirs, tolerance=2e-5):
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(
            np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=tolerance, atol=tolerance
        )


def same_as_dense(options, arrays=None, transformed=jax.value_and_grad, tolerance=2e-5):
    """Compare what a transformation makes of the loss, as a function of arrays and parameters."""
    arrays = qkv() if arrays is None else arrays
    ours, theirs = (
        compiled(transformed(functools.partial(loss, options, name), (0, 1)))(
            arrays, functions_of(options)
        )
        for name in ("pallas", "dense")
    )
    close(ours, theirs, tolerance)


WITH_GRADIENT = "additive"
"""The score whose gradients go through loops, maps of rows and parameters of pairs."""


def contract():
    """Every score, every mask, alone or joined to another, and every normalizer that streams."""
    streamable = itertools.cycle(
        name
        for name, one in examples.NORMALIZERS.items()
        if isinstance(streaming(one.normalizer), normalizers.LogSum | normalizers.Elementwise)
    )
    number = max(len(examples.SCORES), -(-len(examples.MASKS) // 2))
    scores_in_turn = itertools.islice(itertools.cycle(examples.SCORES), number)
    masks_in_turn = itertools.zip_longest(examples.MASKS[:number], examples.MASKS[number:])
    turns = zip(scores_in_turn, itertools.cycle(masks_in_turn), streamable, strict=False)
    for turn, (score, masks_of_turn, normalizer) in enumerate(turns):
        names = tuple(filter(None, masks_of_turn))
        yield pytest.param(("tpu", "gpu")[turn % 2], score, names, normalizer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "score", "joined", "normalizer"), list(contract()), indirect=["platform"]
)
def test_values_and_gradients_of_every_export(score, joined, normalizer):
    key_depth = H + 1 if score in examples.DIFFERENT_DEPTHS else H
    bound, formula = examples.score_example(score, normal, H, key_depth)
    those = [examples.mask_example(name, B, N, T, S) for name in joined]
    options = {
        "score": bound,
        "mask": functools.reduce(operator.or_, (masks.as_mask(one.mask) for one in those)),
        "normalizer": examples.NORMALIZERS[normalizer].normalizer,
    }
    arrays = qkv(key_depth=key_depth)
    if score == WITH_GRADIENT:
        same_as_dense(options, arrays, tolerance=1e-4)
        return
    context, _ = compiled(functools.partial(results, options, "pallas"))(
        arrays, functions_of(options)
    )
    expected, _ = oracle.attention(
        *arrays,
        formula,
        allowed=lambda *pair: any(one.allowed(*pair) for one in those),
        normalizer=examples.NORMALIZERS[normalizer].of_row,
    )
    close(context, expected)


def test_a_kernel_gives_what_dense_does():
    arrays, mask = qkv(), masks.Causal(-2)
    context, logsumexp = compiled(functools.partial(results, {"mask": mask}, "pallas"))(arrays, {})
    expected = attend(*arrays, mask=mask, implementation="dense", return_logsumexp=True)
    close(context, expected.context)
    close(logsumexp, jnp.where(jnp.isneginf(expected.logsumexp), 0.0, expected.logsumexp))


def slope_bias(q_idx, kv_idx, slope):
    return -slope * abs(q_idx - kv_idx).astype(slope.dtype)


DERIVED = {
    "sink, function and dropout": lambda: {
        "normalizer": per_head(bind(normalizers.softmax_with_sink, sink=normal(N))),
        "bias": per_head(bind(slope_bias, slope=normal(N))),
        "mask": masks.Causal(-2) & masks.Window(3, 0),
        "dropout_rate": 0.4,
        "dropout_key": jax.random.key(1),
    },
    "sigmoid and array": lambda: {
        "normalizer": bind(normalizers.sigmoid, shift=normal()),
        "bias": normal(N, T, S),
        "mask": masks.Segment(
            jnp.array([[0, 0, 1, 1, 2]] * B), jnp.array([[0, 0, 0, 2, 2, 3, 3]] * B)
        ),
    },
}


def second_order(function, which):
    """The value, the gradient, and how both change along a direction."""
    value_and_gradient = jax.value_and_grad(function, which)

    def along(*primals):
        direction = jax.tree.map(lambda x: jnp.cos(3.0 * x), primals)
        return jax.jvp(value_and_gradient, primals, direction)

    return along


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "name", "transformed"),
    [("tpu", "sink, function and dropout", second_order), ("gpu", "sigmoid and array", jax.grad)],
    indirect=["platform"],
)
def test_derivatives_are_those_of_dense(name, transformed):
    same_as_dense(DERIVED[name](), transformed=transformed, tolerance=2e-4)


@pytest.mark.slow
def test_reverse_over_reverse_and_forward_mode():
    arrays = qkv()

    def of_query(implementation, query):
        return loss({"mask": masks.Causal(1)}, implementation, (query, *arrays[1:]), {})

    def gradient_norm(implementation, query):
        gradient = jax.grad(functools.partial(of_query, implementation))(query)
        return jnp.sum(gradient**2)

    def derivatives(name):
        reverse = jax.grad(functools.partial(gradient_norm, name))
        ahead = functools.partial(of_query, name)
        return compiled(lambda x: (reverse(x), jax.jvp(ahead, (x,), (jnp.cos(x),))))(arrays[0])

    close(derivatives("pallas"), derivatives("dense"), 2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "score"),
    [("tpu", scores.scaled_dot), ("gpu", bind(scores.cosine, temperature=0.1))],
    indirect=["platform"],
)
def test_nan_behind_the_mask_reaches_nothing_and_before_it_only_its_reader(score):
    query, key, value = qkv(8, 8)
    key, value = key.at[:, 5].set(jnp.nan), value.at[:, 5].set(jnp.inf)
    attending = functools.partial(attend, score=score, implementation="pallas", tile_sizes=TILE)

    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def masked(*arrays):
        context = attending(*arrays, mask=masks.Lengths(5))
        return jnp.sum(context**2), (context, attending(*arrays, mask=masks.Causal()))

    (_, (context, causal)), gradients = compiled(masked)(query, key, value)
    dense = attend(query, key[:, :5], value[:, :5], score=score, implementation="dense")
    close(context, dense)
    assert bool(jnp.all(jnp.isnan(causal[:, 5:])))
    assert bool(jnp.all(jnp.isfinite(causal[:, :5])))
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in gradients)
    np.testing.assert_array_equal(gradients[1][:, 5:], 0.0)


@pytest.mark.slow
def test_half_precision_accumulates_in_float32():
    both = [[x.astype(dtype) for x in qkv()] for dtype in (jnp.bfloat16, jnp.float16)]
    attending = functools.partial(
        attend, implementation="pallas", tile_sizes=TILE, return_logsumexp=True
    )
    found = compiled(lambda both: [attending(*arrays) for arrays in both])(both)
    for arrays, attended in zip(both, found, strict=True):
        context, logsumexp = attended.context, attended.logsumexp
        exact = attend(*(x.astype(jnp.float32) for x in arrays), implementation="dense")
        assert context.dtype == arrays[0].dtype
        assert logsumexp.dtype == jnp.float32
        close(context, exact, 2.0 * float(jnp.finfo(context.dtype).eps))


@pytest.mark.slow
def test_gradients_in_half_precision_are_those_of_dense():
    arrays = [x.astype(jnp.bfloat16) for x in qkv()]

    def total(implementation, *arrays):
        context = attend(
            *arrays, mask=masks.Causal(1), implementation=implementation, tile_sizes=TILE
        )
        return jnp.sum(jnp.sin(context.astype(jnp.float32)))

    ours, exact = (
        compiled(jax.grad(functools.partial(total, name), (0, 1, 2)))(*given)
        for name, given in (("pallas", arrays), ("dense", [x.astype("float32") for x in arrays]))
    )
    assert {x.dtype for x in ours} == {jnp.dtype(jnp.bfloat16)}
    close(ours, exact, 4.0 * float(jnp.finfo(jnp.bfloat16).eps))


@pytest.mark.slow
def test_vmap_over_masks_that_differ():
    arrays = qkv()
    ids = jnp.array([[0, 0, 1, 1, 2], [3, 3, 3, 1, 0]])

    def gradient(implementation, ids):
        options = {"mask": masks.Segment(ids, jnp.append(ids, ids[-2:]))}
        return jax.grad(lambda query: loss(options, implementation, (query, *arrays[1:]), {}))(
            arrays[0]
        )

    ours, theirs = (
        compiled(jax.vmap(functools.partial(gradient, name)))(ids) for name in ("pallas", "dense")
    )
    close(ours, theirs)


@pytest.mark.slow
def test_under_shard_map():
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec("batch"),) * 3
    local = functools.partial(attend, mask=masks.Causal(), implementation="pallas", tile_sizes=TILE)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[0])

    def total(function, *arrays):
        return jnp.sum(jnp.sin(function(*arrays)))

    ours, theirs = (
        compiled(jax.grad(functools.partial(total, function), (0, 1, 2)))(*qkv())
        for function in (sharded, functools.partial(attend, mask=masks.Causal()))
    )
    close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("score", [scores.scaled_dot, scores.gaussian])
@pytest.mark.parametrize("name", NOT_THERE)
def test_it_lowers_under_shard_map(name, score):
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("batch")
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32)
    attending = functools.partial(attend, score=score, implementation="pallas")
    sharded = jax.shard_map(attending, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(sharded(x, x, x))))
    assert gradient.trace(x).lower(lowering_platforms=(name,)).as_text()


@pytest.mark.slow
def test_nothing_to_attend():
    query, key, value = qkv()
    for mask, keys in ((masks.Full(), 0), (masks.Causal(-9), S)):
        context, _, logsumexp, _ = attend(
            query,
            key[:, :keys],
            value[:, :keys],
            mask=mask,
            implementation="pallas",
            return_logsumexp=True,
        )
        np.testing.assert_array_equal(context, 0.0)
        np.testing.assert_array_equal(logsumexp, -jnp.inf)


def test_what_kernels_cannot_do_is_refused_by_name(x64):
    arrays = qkv()
    attending = functools.partial(attend, implementation="pallas")
    with pytest.raises(ValueError, match="'pallas' computes in float32, got float64; give floa"):
        attending(*(x.astype(jnp.float64) for x in arrays))
    with pytest.raises(ValueError, match="'pallas' never holds the weights; use implementation='d"):
        attending(*arrays, return_weights=True)
    with pytest.raises(ValueError, match="'pallas' cannot compute sparsemax, which needs more"):
        attending(*arrays, normalizer=normalizers.sparsemax)
    message = '^interpreted: platform must be "tpu" or "gpu", got \'cpu\'.$'
    with pytest.raises(ValueError, match=message), interpreted("cpu"):
        pass


def lowered(platform, **options):
    """Lower a call for a platform that need not be there."""
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32)

    def attending(x):
        return attend(x, x, x, implementation="pallas", **options)

    return jax.jit(attending).trace(x).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize("name", NOT_THERE)
def test_it_lowers_for_a_platform_that_is_not_there_or_names_the_primitive(name):
    lowered(name, mask=masks.Segment(jnp.zeros(256, jnp.int32)) & masks.Chunked(32))
    platform = {"tpu": "TPU", "cuda": "GPU"}[name]
    message = (
        f"^attend: implementation 'pallas' makes no kernel for {platform} of this: the score, "
        r"mask, bias or normalizer uses the primitive erfc; use implementation='tiled'\."
    )
    with pytest.raises(ValueError, match=message):
        lowered(name, score=lambda query, key: jax.lax.erfc(query @ key.T))


def test_on_a_cpu_it_is_refused_unless_interpreted():
    attending = functools.partial(attend, *qkv(3, 3), implementation="pallas")
    with pytest.raises(ValueError) as refused:
        contextvars.Context().run(attending)
    assert str(refused.value).splitlines()[0] == (
        "attend: implementation 'pallas' runs on TPU and GPU, and this program is compiled for a "
        "CPU; use implementation='tiled', or to test a kernel, run within "
        "implementations.interpreted()."
    )


def test_it_explains_itself_and_is_not_chosen_for_a_cpu():
    x = jax.ShapeDtypeStruct((1, 4096, 8, 64), "float32")
    found = explain(x, x, x, mask=masks.Causal(), implementation="pallas", tile_sizes=(512, 512))
    assert (found.implementation, found.empty, found.partial, found.full) == ("pallas", 28, 8, 28)
    assert explain(x, x, x).implementation == "tiled"


def of_blocks(q_idx, kv_idx, table):
    return table[q_idx // 2, kv_idx // 2]


def of_pairs(q_idx, kv_idx, table):
    return table[q_idx, kv_idx]


def of_distances(q_idx, kv_idx, table):
    return jnp.take(table, kv_idx - q_idx + T)


TABLES = {
    "T5": lambda: {"bias": per_head(bind(positions.t5_bias, table=normal(N, 32)))},
    "grid": lambda: {"bias": bind(positions.grid_bias, table=normal(3, 5), width=3)},
    "relative keys": lambda: {"score": bind(positions.relative_key, table=normal(5, H))},
    "blocks": lambda: {"bias": bind(of_blocks, table=normal(3, 4))},
    "pairs": lambda: {"bias": bind(of_pairs, table=normal(T, S))},
    "distances": lambda: {"bias": bind(of_distances, table=normal(T + S))},
    "mask": lambda: {"mask": masks.Table(normal(T, S) > 0.0)},
}
"""Functions that read a table by query and key at once."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "name"),
    list(zip(itertools.cycle(("tpu", "gpu")), TABLES, strict=False)),
    indirect=["platform"],
)
def test_tables_by_query_and_key_and_their_gradients(name):
    same_as_dense(TABLES[name]())


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_THERE)
@pytest.mark.parametrize("table", ["T5", "grid", "blocks", "pairs"])
def test_tables_lower_with_gradients(name, table):
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32)
    options = TABLES[table]()

    def total(x, functions):
        return jnp.sum(attend(x, x, x, implementation="pallas", **{**options, **functions}))

    gradient = jax.jit(jax.grad(total, (0, 1)))
    assert gradient.trace(x, functions_of(options)).lower(lowering_platforms=(name,)).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_THERE)
def test_relative_keys_lower_whatever_the_number_of_distances(name):
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32)

    def total(x, table):
        score = bind(positions.relative_key, table=table)
        return jnp.sum(attend(x, x, x, score=score, implementation="pallas"))

    for distances in (5, 33):
        gradient = jax.jit(jax.grad(total, (0, 1))).trace(x, normal(distances, 64))
        assert gradient.lower(lowering_platforms=(name,)).as_text()


@pytest.mark.parametrize("name", NOT_THERE)
def test_a_lookup_in_a_table_too_large_is_refused_by_the_number_of_entries(name):
    score = bind(positions.relative_key, table=normal(1025, 64))
    reason = (
        "a table of 1,025 entries is read by query and key at once, and kernels read at most "
        "1,024, or one for each pair"
    )
    with pytest.raises(ValueError) as refused:
        lowered(name, score=score)
    assert str(refused.value) == (
        f"attend: implementation 'pallas' makes no kernel of this: {reason}; use "
        "implementation='tiled'."
    )
    x = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.float32)
    platform = {"tpu": "tpu", "cuda": "gpu"}[name]
    assert reason in str(explain(x, x, x, score=score, platform=platform))
