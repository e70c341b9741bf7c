"""Linear attention against sums over all pairs in float64: masks, chunks, decoding, derivatives."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jax.test_util import check_grads

from attention_jax import bind, linear, masks, per_head
from attention_jax.linear import feature_maps, linear_attention, performer
from tests.implementations.test_tiled import largest_intermediate

B, T, N, K, H, V = 2, 13, 4, 2, 4, 3
LENGTHS = np.array([T, 4])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape))


def qkv(query_length=T, key_length=T):
    return normal(B, query_length, N, H), normal(B, key_length, K, H), normal(B, key_length, K, V)


def favor(kind="positive"):
    return bind(getattr(performer, kind), projection=normal(6, H, seed=5))


def hedgehog(seed=0, *heads):
    weight, bias = normal(*heads, H, 3, seed=seed), normal(*heads, 3, seed=seed)
    return bind(feature_maps.hedgehog, weight=weight, bias=bias)


def oracle(query, key, value, feature_map, allowed=None, normalize=True):
    """Every pair by itself; `feature_map` is a list if each key head has its own."""
    query_length, key_length = query.shape[1], key.shape[1]
    context = np.zeros((B, query_length, N, V))
    allowed = np.ones((query_length, key_length)) if allowed is None else allowed
    for b, n in np.ndindex(B, N):
        k = n // (N // K)
        phi = feature_map[k] if isinstance(feature_map, list) else feature_map
        weights = np.asarray(phi(query[b, :, n]) @ phi(key[b, :, k]).T)
        weights = weights * np.broadcast_to(allowed, (B, query_length, key_length))[b]
        if normalize:
            total = weights.sum(axis=1, keepdims=True)
            weights = np.divide(weights, total, where=total != 0, out=np.zeros_like(weights))
        context[b, :, n] = weights @ np.asarray(value[b, :, k])
    return context


def dense(mask, query_length=T, key_length=T):
    return np.stack([mask.of(b).to_dense(query_length, key_length) for b in range(B)])


def attention(mask=None, **options):
    return jax.jit(functools.partial(linear_attention, mask=mask, **({"chunk_size": 4} | options)))


CASES = {
    "full": (lambda: feature_maps.elu_plus_one, None, True),
    "padded": (lambda: feature_maps.relu, masks.Lengths(LENGTHS, LENGTHS), True),
    "signed, not normalized": (lambda: feature_maps.identity, masks.Lengths(LENGTHS), False),
    "causal": (lambda: feature_maps.elu_plus_one, masks.Causal(), True),
    "causal, padded, ahead": (favor, masks.Causal(2) & masks.Lengths(LENGTHS), True),
    "causal, behind": (hedgehog, masks.Causal(-3), True),
    "causal, not normalized": (lambda: favor("trigonometric"), masks.Causal(), False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_is_the_sum_over_pairs(name):
    make, mask, normalize = CASES[name]
    feature_map = make()
    context = attention(mask, feature_map=feature_map, normalize=normalize)(*qkv())
    allowed = None if mask is None else dense(mask)
    expected = oracle(*qkv(), feature_map, allowed, normalize)
    np.testing.assert_allclose(context, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("query_length", "key_length"), [(1, 129), (127, 7), (0, 3)])
def test_odd_lengths(query_length, key_length):
    """With chunks of the default size; the last query lines up with the last key."""
    mask = masks.Causal(key_length - query_length)
    arrays = qkv(query_length, key_length)
    context = attention(mask, chunk_size=128)(*arrays)
    allowed = np.tri(query_length, key_length, key_length - query_length)
    expected = oracle(*arrays, feature_maps.elu_plus_one, allowed)
    np.testing.assert_allclose(context, expected, atol=1e-12)


@pytest.mark.slow
def test_each_key_head_may_have_its_own_features():
    context = attention(masks.Causal(), feature_map=per_head(hedgehog(1, K)))(*qkv())
    maps = [jax.tree.map(lambda leaf, k=k: leaf[k], hedgehog(1, K)) for k in range(K)]
    np.testing.assert_allclose(context, oracle(*qkv(), maps, np.tri(T)), atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [None, masks.Causal()])
@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (2, 0, 2, 4)])
def test_nothing_to_attend(shape, mask):
    x = jnp.ones(shape)
    assert linear_attention(x, x, x, mask=mask).shape == shape
    assert linear_attention(x, x, x[..., :0], mask=mask).shape == (*shape[:3], 0)


@pytest.mark.slow
def test_empty_rows_are_zeros_with_zero_gradients():
    mask = masks.Causal(-3) & masks.Lengths(np.array([T, 0]), np.array([T - 1, T]))

    def loss(query, key, value):
        context = linear_attention(query, key, value, mask=mask, chunk_size=4)
        return jnp.sum(jnp.sin(context) + context), context

    gradients, context = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*qkv())
    empty = np.zeros((B, T), bool)
    empty[0, :3], empty[0, -1], empty[1] = True, True, True
    np.testing.assert_array_equal(context[empty], 0.0)
    np.testing.assert_array_equal(gradients[0][empty], 0.0)
    assert np.all(np.any(np.asarray(context[~empty]) != 0, axis=(1, 2)))
    for gradient in gradients[1:]:
        np.testing.assert_array_equal(gradient[1], 0.0)
    chex.assert_tree_all_finite(gradients)


@pytest.mark.slow
def test_nan_reaches_only_those_that_may_attend_to_it():
    query, key, value = qkv()
    spoiled = key.at[:, 6].set(jnp.nan), value.at[:, 7].set(jnp.inf)
    causal = attention(masks.Causal())
    context = causal(query, *spoiled)
    np.testing.assert_array_equal(context[:, :6], causal(query, key, value)[:, :6])
    assert np.all(np.isnan(context[:, 6:]))

    mask = masks.Causal() & masks.Lengths(6, 9)
    query = query.at[:, 9:].set(jnp.nan)

    def loss(query, key, value, mask):
        context = linear_attention(query, key, value, mask=mask, chunk_size=4)
        return jnp.sum(context**2), context

    run = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    gradients, context = run(query, *spoiled, mask)
    chex.assert_tree_all_finite((gradients, context))
    clean, expected = run(query.at[:, 9:].set(0.0), key, value, mask)
    np.testing.assert_array_equal(context, expected)
    chex.assert_trees_all_equal(gradients, clean)
    full = attention(masks.Lengths(np.array([6, 7])))(jnp.nan_to_num(query), *spoiled)
    assert np.all(np.isfinite(full[0])) and np.all(np.isnan(full[1]))


@pytest.mark.slow
def test_a_nan_in_the_future_reaches_no_gradient_of_the_past():
    query, key, value = qkv()

    def loss(query, key, value):
        context = linear_attention(query, key, value, mask=masks.Causal(), chunk_size=4)
        return jnp.sum(context[:, :6] ** 2)

    run = jax.jit(jax.grad(loss, (0, 1, 2)))
    spoiled = run(query, key.at[:, 6].set(jnp.nan), value.at[:, 9].set(jnp.nan))
    chex.assert_trees_all_equal(spoiled, run(query, key, value))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["elu", "favor"])
def test_no_later_key_or_value_changes_an_output_by_one_bit(name):
    feature_map = favor() if name == "favor" else feature_maps.elu_plus_one
    query, key, value = (x.astype(jnp.float32) for x in qkv())
    causal = attention(masks.Causal(), feature_map=feature_map)
    context = causal(query, key, value)
    for position in (0, 3, 4, T - 1):
        for size in (-1.0, 1e4):
            changed = (x.at[:, position].multiply(size) for x in (key, value))
            again = causal(query, *changed)
            np.testing.assert_array_equal(again[:, :position], context[:, :position])
            assert not np.array_equal(again[:, position], context[:, position])
            assert np.all(np.isfinite(again))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["elu", "favor"])
def test_chunk_by_chunk_is_step_by_step(name):
    feature_map = favor() if name == "favor" else feature_maps.elu_plus_one
    arrays = qkv()
    full = attention(masks.Causal(), feature_map=feature_map)(*arrays)
    step = jax.jit(functools.partial(linear.decode, feature_map=feature_map, chunk_size=4))
    state = linear.init(B, K, H, V, feature_map=feature_map, dtype=jnp.float64)
    sizes = jax.tree.map(jnp.shape, state)
    contexts, place = [], 0
    for tokens in (6, 1, 1, 1, 1, 1, 1, 1):
        context, state = step(*(x[:, place : place + tokens] for x in arrays), state)
        contexts.append(context)
        place += tokens
        assert jax.tree.map(jnp.shape, state) == sizes
    np.testing.assert_allclose(jnp.concatenate(contexts, axis=1), full, rtol=1e-10, atol=1e-12)

    # The state is of all keys: read from outside it is attention without a mask.
    everything = attention(feature_map=feature_map)(*arrays)
    np.testing.assert_allclose(
        linear.read(arrays[0], state, feature_map=feature_map), everything, atol=1e-12
    )


@pytest.mark.slow
def test_ragged_prompts():
    query, key, value = qkv()
    count = np.array([5, 2])
    state = linear.init(B, K, H, V, dtype=jnp.float64)
    spoiled = (x.at[1, 2:].set(jnp.nan) for x in (query[:, :5], key[:, :5], value[:, :5]))
    prompt, state = jax.jit(linear.decode)(*spoiled, state, count=count)
    context, _ = jax.jit(linear.decode)(*(x[:, 5:6] for x in (query, key, value)), state)
    for b, length in enumerate(count):
        tokens = np.array([*range(length), 5])
        alone = [x[:, tokens] for x in (query, key, value)]
        expected = oracle(*alone, feature_maps.elu_plus_one, np.tri(length + 1))[b]
        np.testing.assert_allclose(prompt[b, :length], expected[:-1], atol=1e-12)
        np.testing.assert_array_equal(prompt[b, length:], 0.0)
        np.testing.assert_allclose(context[b, 0], expected[-1], atol=1e-12)


@pytest.mark.slow
def test_extended_in_parts():
    query, key, value = qkv()
    state = linear.init(B, K, H, V, dtype=jnp.float64)
    extend = jax.jit(linear.extend)
    state = extend(state, key[:, :6], value[:, :6])
    state = extend(state, key[:, 6:], value[:, 6:], count=LENGTHS - 6)
    lengths = np.array([T, 6])  # a negative count adds nothing
    expected = oracle(query, key, value, feature_maps.elu_plus_one, dense(masks.Lengths(lengths)))
    np.testing.assert_allclose(jax.jit(linear.read)(query, state), expected, atol=1e-12)


def of_pairs(feature_map, query, key, value, allowed):
    """The definition, in JAX."""
    key, value = (jnp.repeat(x, N // K, axis=2) for x in (key, value))
    phi = jax.vmap(jax.vmap(feature_map, 1, 1))
    weights = jnp.einsum("btnm,bsnm->bnts", phi(query), phi(key)) * allowed
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 0.0)
    return jnp.einsum("bnts,bsnv->btnv", weights, value)


@pytest.mark.slow
def test_value_gradient_and_hessian_vector_product_are_those_of_the_definition():
    """Of inputs and features; forward mode over reverse mode, so both and the second order."""
    mask = masks.Causal(-1) & masks.Lengths(LENGTHS)
    primals = (favor(), *qkv())

    def everything(context):
        def loss(*operands):
            return jnp.sum(jnp.sin(context(*operands)))

        direction = jax.tree.map(lambda x: jnp.cos(3.0 * x), primals)
        return jax.jit(lambda *x: jax.jvp(jax.value_and_grad(loss, (0, 1, 2, 3)), *x))(
            primals, direction
        )

    def ours(feature_map, *arrays):
        return linear_attention(*arrays, feature_map=feature_map, mask=mask, chunk_size=4)

    expected = everything(functools.partial(of_pairs, allowed=1.0 * dense(mask)[:, None]))
    chex.assert_trees_all_close(everything(ours), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_gradients_are_finite_differences():
    query, key, value = qkv()
    attended = attention(masks.Causal())
    check_grads(attended, (query, key, value), order=1, modes=["rev"], atol=1e-7, rtol=1e-7)


@pytest.mark.slow
def test_vmap_of_the_gradient_is_a_loop():
    arrays = jax.tree.map(lambda x: jnp.stack([x, -x, 2 * x]), qkv())

    def gradient(query, key, value):
        def loss(key):
            context = linear_attention(query, key, value, mask=masks.Causal(), chunk_size=4)
            return jnp.sum(context**2)

        return jax.grad(loss)(key)

    one = jax.jit(gradient)
    loop = jnp.stack([one(*(x[i] for x in arrays)) for i in range(3)])
    np.testing.assert_allclose(jax.jit(jax.vmap(gradient))(*arrays), loop, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_under_shard_map():
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (PartitionSpec("batch"),) * 3
    local = functools.partial(linear_attention, mask=masks.Causal(), chunk_size=4)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[0])
    np.testing.assert_allclose(jax.jit(sharded)(*qkv()), jax.jit(local)(*qkv()), atol=1e-12)


def test_memory_is_linear_in_the_sequence_also_of_the_derivative():
    """Neither T x S nor S x M x V numbers: all arrays are of S (M + V) with a small factor."""
    features, depth = 64, 16
    feature_map = bind(performer.positive, projection=normal(features, depth))

    def largest(length, mask):
        x = jax.ShapeDtypeStruct((1, length, 1, depth), jnp.float64)

        def loss(query, key, value):
            context = linear_attention(
                query, key, value, feature_map=feature_map, mask=mask, chunk_size=32
            )
            return jnp.sum(context**2)

        return largest_intermediate(jax.grad(loss, (0, 1, 2)), x, x, x)

    for mask in (None, masks.Causal()):
        short, long = largest(1024, mask), largest(2048, mask)
        assert long <= 2 * short
        assert long <= 2 * 2048 * (features + depth)
    assert 2 * 2048 * (features + depth) < min(2048 * 2048, 2048 * features * depth) / 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_sums_in_float32(dtype):
    """A sum of 2000 ones in bfloat16 would stop at 256."""
    arrays = (jnp.ones((1, 2000, 1, 2), dtype), jnp.ones((1, 2000, 1, 2), dtype))
    value = jnp.asarray(np.arange(2000)[None, :, None, None] / 2000, dtype)
    context = attention(masks.Causal(), chunk_size=128)(*arrays, value)
    assert context.dtype == dtype
    expected = np.cumsum(np.asarray(value, np.float64)) / np.arange(1, 2001)
    np.testing.assert_allclose(
        context[0, :, 0, 0].astype(np.float64), expected, rtol=2 * float(jnp.finfo(dtype).eps)
    )


REFUSED = {
    "window": (
        lambda: linear_attention(*qkv(), mask=masks.Window(2, 0)),
        "linear_attention: the mask Window cannot be honoured, because its queries share one "
        "sum over the keys",
    ),
    "signed": (
        lambda: linear_attention(*qkv(), feature_map=feature_maps.identity),
        "linear_attention: this feature map gives weights of either sign, .* normalize=False",
    ),
    "heads": (
        lambda: linear_attention(qkv()[0][:, :, :3], *qkv()[1:]),
        "linear_attention: query heads N must be a multiple of key heads K",
    ),
    "depth": (
        lambda: linear_attention(qkv()[0][..., :3], *qkv()[1:]),
        r"axis H \(number 3\) of key \[B, S, K, H\] must be 3 as in query, got 4",
    ),
    "chunk": (
        lambda: linear_attention(*qkv(), chunk_size=0),
        "linear_attention: chunk_size must be 1 or more, got 0",
    ),
    "features": (
        lambda: linear_attention(*qkv(), feature_map=lambda x: x[:, 0]),
        r"feature_map: one row \[1, H\] must become features \[1, M\]",
    ),
    "state": (
        lambda: linear.decode(*qkv(), linear.init(B, K, H, V + 1)),
        r"decode: state.sums \[B, K, M, V \+ 1\] must be \(2, 2, 4, 4\) .* got shape "
        r"\(2, 2, 4, 5\)",
    ),
    "integers": (
        lambda: linear_attention(jnp.ones((1, 2, 1, 1), int), *qkv()[1:]),
        "linear_attention: query must be floating point",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_by_name(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()
