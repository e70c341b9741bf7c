"""Tiled attention against the dense oracle in float64: every derivative, any mask, any length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from attention_jax import (
    attend,
    bind,
    explain,
    masks,
    normalizers,
    per_example,
    per_head,
    scores,
)
from attention_jax.implementations import interpreted, tiles

pytestmark = pytest.mark.usefixtures("x64")

B, T, S, N, K, H, V = 2, 37, 29, 4, 2, 6, 5
TILE = (8, 16)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape))


def qkv(query_length=T, key_length=S):
    return (
        normal(B, query_length, N, H),
        normal(B, key_length, K, H),
        normal(B, key_length, K, V),
    )


def segments(length, seed):
    return jnp.sort(jnp.asarray(np.random.default_rng(seed).integers(0, 4, (B, length))))


def slope_bias(q_idx, kv_idx, slope):
    return -slope * abs(q_idx - kv_idx).astype(slope.dtype)


def additive():
    return bind(
        scores.additive,
        query_weight=normal(H, 7),
        key_weight=normal(H, 7, seed=1),
        value=normal(7),
        bias=normal(7, seed=1),
    )


CASES = {
    "every pair": lambda: {},
    "causal with offset": lambda: {"mask": masks.Causal(3)},
    "empty rows": lambda: {"mask": masks.Causal(-5) & masks.Window(9, 0)},
    "packed segments": lambda: {"mask": masks.Segment(segments(T, 0), segments(S, 1))},
    "ragged lengths": lambda: {"mask": masks.Lengths(jnp.array([5, 0])) & masks.Causal(-4)},
    "boolean array": lambda: {
        "mask": jnp.asarray(np.random.default_rng(0).random((B, 1, T, S)) < 0.3)
    },
    "bias of heads": lambda: {"bias": normal(N, T, S), "mask": masks.Causal()},
    "bias of keys": lambda: {"bias": normal(1, N, 1, S)},
    "learned bias function": lambda: {"bias": per_head(bind(slope_bias, slope=normal(N)))},
    "learned sink": lambda: {
        "normalizer": per_head(bind(normalizers.softmax_with_sink, sink=normal(N))),
        "mask": masks.Causal(-5),
    },
    "sigmoid with learned shift": lambda: {
        "normalizer": bind(normalizers.sigmoid, shift=normal()),
        "mask": masks.Causal(),
    },
    "additive": lambda: {"score": additive(), "mask": masks.Causal()},
    "bilinear per head": lambda: {"score": per_head(bind(scores.bilinear, weight=normal(N, H, H)))},
    "soft-capped": lambda: {"score": scores.soft_capped(scores.dot, 2.0)},
    "dropout": lambda: {
        "dropout_rate": 0.4,
        "dropout_key": jax.random.key(1),
        "mask": masks.Causal(2),
    },
}


def results(case, implementation, arrays, functions):
    """Context and, where there is one, log-sum-exp with 0 for the rows that have none."""
    arguments = dict(case, **functions)
    has_logsumexp = "sigmoid" not in str(case.get("normalizer"))
    tile = {"tile_sizes": TILE} if implementation == "tiled" else {}
    result = attend(
        *arrays,
        implementation=implementation,
        return_logsumexp=has_logsumexp,
        **tile,
        **arguments,
    )
    if not has_logsumexp:
        return result, jnp.zeros(())
    logsumexp = result.logsumexp
    return result.context, jnp.where(jnp.isneginf(logsumexp), 0.0, logsumexp)


def close(ours, theirs, tolerance=1e-10):
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


LIKE_ANOTHER = (
    "every pair",
    "causal with offset",
    "boolean array",
    "bias of keys",
    "bias of heads",
    "bilinear per head",
    "soft-capped",
    "additive",
    "packed segments",
    "learned sink",
    "ragged lengths",
    "sigmoid with learned shift",
)
LIKE_ANOTHER_MARKS = [pytest.mark.slow, pytest.mark.exhaustive]
NAMES = [pytest.param(name, marks=LIKE_ANOTHER_MARKS * (name in LIKE_ANOTHER)) for name in CASES]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_value_gradient_and_hessian_vector_product_are_the_dense_ones(name):
    same_as_dense(CASES[name]())


@pytest.mark.slow
@pytest.mark.exhaustive
def test_so_they_are_where_low_tiles_are_computed_beside_each_other(monkeypatch):
    monkeypatch.setattr(tiles, "LOW_PAIRS", 1)
    case = CASES["dropout"]() | CASES["learned bias function"]()
    same_as_dense(case | {"mask": masks.Causal() & masks.Window(8, 0)})


def same_as_dense(case):
    functions = {
        key: case[key] for key in ("score", "bias", "normalizer") if jax.tree.leaves(case.get(key))
    }
    fixed = {key: value for key, value in case.items() if key not in functions}
    weights = normal(B, T, N, V, seed=2)

    def loss(implementation, arrays, functions):
        context, logsumexp = results(fixed | case, implementation, arrays, functions)
        return jnp.sum(jnp.sin(context) * weights) + jnp.sum(jnp.cos(3.0 * logsumexp))

    def everything(implementation, arrays, functions):
        value_and_gradient = jax.value_and_grad(functools.partial(loss, implementation), (0, 1))
        primals = (arrays, functions)
        direction = jax.tree.map(lambda x: jnp.cos(3.0 * x), primals)
        return jax.jvp(value_and_gradient, primals, direction)

    ours, theirs = (
        jax.jit(functools.partial(everything, name))(qkv(), functions)
        for name in ("tiled", "dense")
    )
    close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(("query_length", "key_length"), [(1, 1), (1, 129), (7, 127), (129, 7)])
def test_odd_lengths(query_length, key_length):
    arrays = qkv(query_length, key_length)
    for mask in (None, masks.Causal(key_length - query_length)):
        ours, theirs = (
            attend(*arrays, mask=mask, implementation=name, return_logsumexp=True)
            for name in ("tiled", "dense")
        )
        close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
@pytest.mark.parametrize("name", ["dense", "tiled", "pallas"])
def test_nothing_to_attend_whatever_the_implementation(name, shape):
    batch, query_length, key_length = shape
    query = jnp.ones((batch, query_length, N, H), jnp.float32)
    key = jnp.ones((batch, key_length, K, H), jnp.float32)

    def attending(query, key, weight, **options):
        score = per_example(bind(scores.bilinear, weight=weight))
        return attend(query, key, key, score=score, implementation=name, **options)

    weight = jnp.ones((batch, H, H), jnp.float32)
    with interpreted():
        context, _, logsumexp, _ = attending(query, key, weight, return_logsumexp=True)
        loss = jax.grad(lambda *given: jnp.sum(attending(*given)), (0, 1, 2))
        gradients = loss(query, key, weight)
    assert context.shape == query.shape
    assert logsumexp.shape == query.shape[:3]
    if key_length == 0:
        np.testing.assert_array_equal(context, 0.0)
        np.testing.assert_array_equal(logsumexp, -jnp.inf)
    assert [x.shape for x in gradients] == [query.shape, key.shape, weight.shape]


@pytest.mark.slow
def test_a_users_closure_gets_exact_gradients_through_score_bias_and_jacobians():
    arrays = qkv()

    def loss(implementation, weight, slope):
        def score(query, key):
            return jnp.tanh(query @ weight) @ key.T

        def bias(q_idx, kv_idx):
            return slope * jnp.cos((q_idx + 2 * kv_idx).astype(slope.dtype))

        context = attend(*arrays, score=score, bias=bias, implementation=implementation)
        return jnp.stack([jnp.sum(jnp.sin(context)), jnp.sum(context**2)])

    for jacobian in (jax.jacrev, jax.jacfwd):
        ours, theirs = (
            jax.jit(jacobian(functools.partial(loss, name), (0, 1)))(normal(H, H), normal())
            for name in ("tiled", "dense")
        )
        close(ours, theirs)


@pytest.mark.slow
def test_reverse_over_reverse():
    def gradient_norm(implementation, query):
        def loss(query):
            context = attend(query, *qkv()[1:], mask=masks.Causal(), implementation=implementation)
            return jnp.sum(jnp.sin(context))

        return jnp.sum(jax.grad(loss)(query) ** 2)

    ours, theirs = (
        jax.jit(jax.grad(functools.partial(gradient_norm, name)))(qkv()[0])
        for name in ("tiled", "dense")
    )
    close(ours, theirs)


@pytest.mark.slow
def test_vmap_over_masks_that_differ_and_under_checkpoint_is_a_loop():
    arrays = qkv()
    ids = jnp.stack([segments(T, seed)[0] for seed in range(3)])
    key_ids = jnp.stack([segments(S, seed)[0] for seed in range(3)])

    @jax.checkpoint
    def gradient(ids, key_ids):
        def loss(query):
            mask = masks.Segment(ids, key_ids)
            return jnp.sum(jnp.sin(attend(query, *arrays[1:], mask=mask, implementation="tiled")))

        return jax.grad(loss)(arrays[0])

    together = jax.jit(jax.vmap(gradient))(ids, key_ids)
    one_by_one = jnp.stack([jax.jit(gradient)(*x) for x in zip(ids, key_ids, strict=True)])
    close(together, one_by_one)


@pytest.mark.slow
def test_under_shard_map():
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (PartitionSpec("batch"),) * 3
    local = functools.partial(attend, mask=masks.Causal(), implementation="tiled", tile_sizes=TILE)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[0])

    def loss(function, *arrays):
        return jnp.sum(jnp.sin(function(*arrays)))

    ours = jax.jit(jax.grad(functools.partial(loss, sharded), (0, 1, 2)))(*qkv())
    theirs = jax.jit(jax.grad(functools.partial(loss, local), (0, 1, 2)))(*qkv())
    close(ours, theirs)


@pytest.mark.slow
def test_dropout_does_not_depend_on_the_tile():
    first, second = (
        attend(
            *qkv(),
            dropout_rate=0.5,
            dropout_key=jax.random.key(3),
            implementation="tiled",
            tile_sizes=tile,
        )
        for tile in ((8, 16), (16, 5))
    )
    close(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_accumulates_in_float32(dtype):
    arrays = [x.astype(dtype) for x in qkv()]
    context, _, logsumexp, _ = attend(*arrays, implementation="tiled", return_logsumexp=True)
    exact = attend(*(x.astype(jnp.float64) for x in arrays))
    assert context.dtype == dtype
    assert logsumexp.dtype == jnp.float32
    np.testing.assert_allclose(
        context.astype(jnp.float64), exact, atol=2.0 * float(jnp.finfo(dtype).eps)
    )
    gradient = jax.grad(
        lambda query: jnp.sum(
            attend(query, *arrays[1:], implementation="tiled").astype(jnp.float32)
        )
    )(arrays[0])
    assert gradient.dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize(
    "mask",
    [pytest.param(None, marks=pytest.mark.exhaustive), masks.Causal()],
    ids=["every pair", "causal"],
)
def test_in_bfloat16_it_is_no_worse_than_jax_nn(mask):
    """Context and gradients, against float64 of the same rounded numbers."""
    keys = jax.random.split(jax.random.key(0), 4)
    *halves, weight = (jax.random.normal(key, (1, 384, 2, 64), jnp.bfloat16) for key in keys)

    def with_gradients(function, *arrays):
        context, pull = jax.vjp(function, *arrays)
        return context, pull(weight.astype(context.dtype))

    ours = functools.partial(attend, mask=mask, implementation="tiled", tile_sizes=(128, 128))
    theirs = functools.partial(jax.nn.dot_product_attention, is_causal=mask is not None)
    oracle = functools.partial(attend, mask=mask, implementation="dense")
    exact = with_gradients(oracle, *(x.astype(jnp.float64) for x in halves))
    errors = []
    for function in (ours, theirs):
        with jax.numpy_dtype_promotion("standard"):  # which jax.nn needs
            found = jax.jit(with_gradients, static_argnums=0)(function, *halves)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
        errors.append([float(jnp.std(x.astype(jnp.float64) - wanted)) for x, wanted in pairs])
    assert len(errors[0]) == 4
    assert all(mine <= other for mine, other in zip(*errors, strict=True)), errors


@pytest.mark.slow
def test_nan_behind_the_mask_reaches_nothing_and_before_it_only_its_reader():
    query, key, value = qkv(8, 8)
    spoiled = key.at[:, 5].set(jnp.nan), value.at[:, 5].set(jnp.inf)

    def context(query, key, value):
        return attend(
            query, key, value, mask=masks.Causal(), implementation="tiled", tile_sizes=(2, 4)
        )

    def loss(query, key, value):
        return jnp.sum(context(query, key, value)[:, :5] ** 2)

    assert bool(jnp.all(jnp.isnan(context(query, *spoiled)[:, 5:])))
    close(context(query, *spoiled)[:, :5], context(query, key, value)[:, :5])
    gradient = jax.grad(loss)(query[:, :5], *(x[:, :5] for x in (key, value)))
    masked = attend(
        query, *spoiled, mask=masks.Lengths(5), implementation="tiled", tile_sizes=(2, 4)
    )
    close(masked, attend(query, key[:, :5], value[:, :5]))
    gradients = jax.grad(
        lambda *x: jnp.sum(
            attend(*x, mask=masks.Lengths(5), implementation="tiled", tile_sizes=(2, 4)) ** 2
        ),
        (0, 1, 2),
    )(query, *spoiled)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in gradients)
    np.testing.assert_array_equal(gradients[1][:, 5:], 0.0)
    assert bool(jnp.all(jnp.isfinite(gradient)))


def largest_intermediate(function, *arguments):
    """The size of the largest array that a traced function makes, at any depth."""
    largest, pending = 0, [jax.make_jaxpr(function)(*arguments).jaxpr]
    while pending:
        jaxpr = pending.pop()
        for equation in jaxpr.eqns:
            largest = max([largest] + [variable.aval.size for variable in equation.outvars])
            for value in jax.tree.leaves(
                equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
            ):
                if hasattr(value, "jaxpr"):
                    pending.append(value.jaxpr)
                elif hasattr(value, "eqns"):
                    pending.append(value)
    return largest


@pytest.mark.slow
def test_no_array_as_large_as_the_plane_is_ever_made_even_for_additive():
    length = 512
    x = normal(1, length, 1, H)

    def loss(x, score):
        context = attend(
            x, x, x, score=score, mask=masks.Causal(), implementation="tiled", tile_sizes=(32, 64)
        )
        return jnp.sum(context)

    def dense_loss(x, score):
        return jnp.sum(attend(x, x, x, score=score, implementation="dense"))

    gradient = jax.grad(loss, (0, 1))
    assert largest_intermediate(gradient, x, additive()) < length * length / 8
    assert largest_intermediate(jax.grad(dense_loss), x, additive()) >= length * length


def test_empty_tiles_cost_nothing_that_the_compiler_can_count():
    length, tile = 2048, (64, 64)
    x = normal(1, length, 1, H)
    window = masks.Causal() & masks.Window(64, 0)
    found = explain(x, x, x, mask=window, tile_sizes=tile)
    assert found.partial + found.full <= 2 * length // 64
    assert found.empty == (length // 64) ** 2 - found.partial - found.full


@pytest.mark.slow
def test_a_derivative_that_runs_backward_only_is_refused_by_name():
    @jax.custom_vjp
    def score(query, key):
        return query @ key.T

    score.defvjp(
        lambda query, key: (score(query, key), (query, key)),
        lambda kept, change: (change @ kept[1], change.T @ kept[0]),
    )
    x = normal(1, T, 1, H)
    attending = functools.partial(attend, score=score, implementation="tiled", tile_sizes=TILE)
    with pytest.raises(TypeError, match=r"tiled: a score.* define it by jax.custom_jvp, or use im"):
        jax.grad(lambda x: attending(x, x, x).sum())(x)
    assert attending(x, x, x).shape == x.shape


def test_what_tiled_cannot_do_is_refused_by_name():
    with pytest.raises(ValueError, match="'tiled' never holds the weights; use implementation="):
        attend(*qkv(), implementation="tiled", return_weights=True)
    with pytest.raises(ValueError, match="cannot stream this normalizer, which needs a whole row"):
        attend(*qkv(), implementation="tiled", normalizer=lambda logits, allowed: logits)
    with pytest.raises(ValueError, match=r"tile_sizes must be two positive numbers, got \(0, 8\)"):
        attend(*qkv(), implementation="tiled", tile_sizes=(0, 8))
    with pytest.raises(ValueError, match="'cudnn' needs an NVIDIA GPU; this program runs on cpu"):
        attend(*qkv(), implementation="cudnn")
    with pytest.raises(ValueError, match="one of dense, tiled, pallas, cudnn, got 'flash'"):
        attend(*qkv(), implementation="flash")
