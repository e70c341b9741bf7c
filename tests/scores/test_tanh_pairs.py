"""Additive pairing against a float64 oracle in numpy, its derivatives and its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from attention_jax.base import placement
from attention_jax.scores.tanh_pairs import activation_pairs, tanh_pairs

compiled_pairs = jax.jit(tanh_pairs)


def oracle(query, key, value, activation=np.tanh):
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    return np.einsum("tsa,a->ts", activation(query[:, None] + key[None]), value)


def tokens(T, S, A, dtype=jnp.float32, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (T, A), (S, A), (A,)
    return tuple(jnp.asarray(scale * rng.standard_normal(s), dtype) for s in shapes)


def assert_close(scores, query, key, value):
    """Each term may be off by a few units of rounding of its weight."""
    expected = oracle(query, key, value)
    weight = np.sum(np.abs(np.asarray(value, np.float64)))
    eps = float(jnp.finfo(scores.dtype).eps)
    assert scores.shape == expected.shape
    np.testing.assert_allclose(scores, expected, rtol=0, atol=4 * eps * weight)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("T", "S", "A"),
    [
        *[(1, 1, 1), (1, 129, 64), (127, 1, 17)],
        *[(7, 7, 5), (7, 127, 1), (129, 7, 16), (127, 129, 64), (129, 129, 17)],
    ],
)
def test_every_size_matches_the_oracle(T, S, A):
    inputs = tokens(T, S, A)
    assert_close(tanh_pairs(*inputs), *inputs)


@pytest.mark.slow
@pytest.mark.parametrize(("T", "S", "A"), [(0, 3, 4), (3, 0, 4), (0, 0, 4), (3, 2, 0)])
def test_nothing_to_pair_gives_zeros_of_that_shape(T, S, A):
    inputs = tokens(T, S, A)
    np.testing.assert_array_equal(tanh_pairs(*inputs), np.zeros((T, S)))
    gradients = jax.grad(lambda *x: jnp.sum(tanh_pairs(*x)), argnums=(0, 1, 2))(*inputs)
    for gradient, x in zip(gradients, inputs, strict=True):
        np.testing.assert_array_equal(gradient, jnp.zeros_like(x))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_and_returned_in_float32(dtype):
    inputs = tokens(9, 11, 20, dtype)
    scores = tanh_pairs(*inputs)
    assert scores.dtype == jnp.float32
    assert_close(scores, *inputs)
    gradient = jax.grad(lambda *x: jnp.sum(tanh_pairs(*x)))(*inputs)
    assert gradient.dtype == dtype


@pytest.mark.slow
def test_one_double_input_makes_the_result_double():
    with jax.enable_x64(True):
        query, key, value = tokens(9, 11, 20, jnp.float64, scale=3.0)
        for inputs in [(query, key, value), (query.astype(jnp.float32), key, value)]:
            scores = tanh_pairs(*inputs)
            assert scores.dtype == jnp.float64
            assert_close(scores, *inputs)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0, 100.0, 1e3, 1e6])
def test_any_magnitude_is_exact(scale, dtype):
    with jax.enable_x64(True):
        inputs = tokens(33, 35, 17, dtype, scale)
        assert_close(compiled_pairs(*inputs), *inputs)


@pytest.mark.parametrize("large", ["query", "key"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exact_on_both_sides_of_the_switch(dtype, large):
    """Sums near zero and around saturation, of numbers at the limits of the exponentials."""
    with jax.enable_x64(True):
        sums, fractions = np.linspace(-40, 40, 81), np.linspace(0, 1, 9)
        switch = 11.02 if dtype == "float32" else 114.7
        for reach in switch * np.array([0.9, 0.999, 1.0, 1.001, 1.1]):
            for sign in (1, -1):
                near = jnp.asarray(sign * reach * fractions[:, None], dtype)
                far = jnp.asarray(sums[:, None] - sign * reach, dtype)
                pair = (near, far) if large == "key" else (far, near)
                inputs = *pair, jnp.ones(1, dtype)
                assert_close(compiled_pairs(*inputs), *inputs)


def test_differences_of_huge_numbers():
    query, key = jnp.array([[1000.0], [-1e30]]), jnp.array([[-995.0], [-1000.0], [1e30]])
    np.testing.assert_allclose(
        tanh_pairs(query, key, jnp.ones(1)),
        [[np.tanh(5.0), 0.0, 1.0], [-1.0, -1.0, 0.0]],
        atol=1e-6,
    )


@pytest.mark.parametrize("others", [0.5, 300.0])
def test_infinity_gives_the_limit_and_nan_stays_where_it_is(others):
    query = jnp.array([[others], [jnp.inf], [-jnp.inf], [jnp.nan]])
    key = jnp.array([[0.25], [-others], [jnp.inf]])
    with np.errstate(invalid="ignore"):
        expected = oracle(query, key, np.ones(1))
    np.testing.assert_allclose(tanh_pairs(query, key, jnp.ones(1)), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("T", "scale"), [(1, 1.0), (3, 1.0), (3, 200.0)])
@pytest.mark.parametrize("activation", [None, jax.nn.gelu])
def test_derivatives_of_both_orders_and_modes(activation, T, scale):
    pairs = tanh_pairs
    if activation is not None:
        pairs = functools.partial(activation_pairs, activation=activation)
    with jax.enable_x64(True):
        query, key, value = tokens(T, 4, 3, jnp.float64)
        query, key = query + scale, key - scale
        if scale > 1:  # a spread that only the direct form can do
            query, key = query.at[0, 2].set(-2e3), key.at[1, 2].set(2e3)
        check_grads(jax.jit(pairs), (query, key, value), order=2, modes=("fwd", "rev"), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_gradients_match_the_dense_formula_in_float64(scale):
    inputs = tokens(129, 127, 64, scale=scale)
    cotangent = tokens(129, 127, 127, seed=1)[0]
    query, key, value, ct = (np.asarray(x, np.float64) for x in (*inputs, cotangent))
    tanh = np.tanh(query[:, None] + key[None])
    slope = ct[:, :, None] * value * (1 - tanh**2)
    expected = slope.sum(1), slope.sum(0), np.einsum("ts,tsa->a", ct, tanh)
    gradients = jax.vjp(tanh_pairs, *inputs)[1](cotangent)
    for gradient, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.parametrize("large", [12.0, 40.0, 1e3, np.inf])
@pytest.mark.parametrize("small", [0.1, 10.9, 500.0])
def test_saturation_leaves_no_derivative_and_no_nan(small, large):
    query, key, value = tokens(2, 3, 4)
    query, key = jnp.full_like(query, small), jnp.full_like(key, large)
    gradient = jax.grad(lambda *x: jnp.sum(compiled_pairs(*x)), argnums=(0, 1, 2))
    dquery, dkey, dvalue = gradient(query, key, value)
    np.testing.assert_allclose(dquery, 0, atol=1e-8)
    np.testing.assert_allclose(dkey, 0, atol=1e-8)
    np.testing.assert_array_equal(dvalue, 6.0)
    for sign in (1, -1):
        tangents = jnp.ones_like(query), 1e3 * jnp.ones_like(key), value
        _, curvature = jax.jvp(gradient, (sign * query, sign * key, value), tangents)
        assert all(jnp.all(jnp.isfinite(x)) for x in curvature)


@pytest.mark.slow
def test_jacobians_agree_across_modes_with_the_hessian_symmetric():
    with jax.enable_x64(True):
        query, key, value = tokens(3, 2, 5, jnp.float64)
        reverse = jax.jit(jax.jacrev(tanh_pairs, argnums=(0, 1, 2)))(query, key, value)
        forward = jax.jit(jax.jacfwd(tanh_pairs, argnums=(0, 1, 2)))(query, key, value)
        for a, b in zip(reverse, forward, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-14)
        loss = lambda q: jnp.sum(tanh_pairs(q, key, value) ** 2)  # noqa: E731
        H = jax.jit(jax.jacrev(jax.grad(loss)))(query).reshape(15, 15)
        np.testing.assert_allclose(H, H.T, atol=1e-13)
        np.testing.assert_allclose(H, jax.jit(jax.hessian(loss))(query).reshape(15, 15), atol=1e-13)


@pytest.mark.slow
def test_second_order_survives_rematerialisation():
    with jax.enable_x64(True):
        query, key, value = tokens(3, 4, 5, jnp.float64)

        def product(pairs):
            gradient = jax.grad(lambda q: jnp.sum(pairs(q, key, value) ** 2))
            return jax.jit(lambda q: jax.jvp(gradient, (q,), (q,))[1])(query)

        np.testing.assert_allclose(
            product(jax.checkpoint(tanh_pairs)), product(tanh_pairs), atol=1e-13
        )


@pytest.mark.slow
def test_shards_of_the_queries_make_the_whole():
    inputs = tokens(6, 4, 5)
    mesh = jax.make_mesh((1,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.P("device"), jax.P()
    sharded = jax.shard_map(tanh_pairs, mesh=mesh, in_specs=(rows, whole, whole), out_specs=rows)
    np.testing.assert_allclose(jax.jit(sharded)(*inputs), tanh_pairs(*inputs), atol=1e-5)

    def gradient(pairs):
        return jax.jit(jax.grad(lambda *x: jnp.sum(pairs(*x) ** 2), argnums=(0, 1, 2)))(*inputs)

    for shard, expected in zip(gradient(sharded), gradient(tanh_pairs), strict=True):
        np.testing.assert_allclose(shard, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_vmap_equals_a_loop_also_where_only_some_heads_are_huge():
    heads = [tokens(7, 9, 5, seed=n) for n in range(3)]
    query, key, value = (jnp.stack(x) for x in zip(*heads, strict=True))
    query, key = query.at[1].multiply(1e3), key.at[1].multiply(1e3)
    looped = jnp.stack([tanh_pairs(*x) for x in zip(query, key, value, strict=True)])
    np.testing.assert_allclose(jax.vmap(tanh_pairs)(query, key, value), looped, atol=1e-5)
    inner = jax.vmap(tanh_pairs, in_axes=(0, 0, None))
    twice = jax.vmap(inner, in_axes=(None, None, 0))(query, key, value)
    np.testing.assert_allclose(twice[jnp.arange(3), jnp.arange(3)], looped, atol=1e-5)


def test_one_branch_runs_under_vmap():
    query, key, value = (jnp.stack([x, x]) for x in tokens(4, 5, 6))
    text = str(jax.make_jaxpr(jax.vmap(jax.vmap(tanh_pairs)))(query[None], key[None], value[None]))
    assert "cond[" in text and "select_n" not in text.split("cond[")[0]


def test_jit_changes_nothing():
    inputs = tokens(17, 19, 20)
    np.testing.assert_allclose(jax.jit(tanh_pairs)(*inputs), tanh_pairs(*inputs), atol=1e-5)


@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.silu, jnp.sin])
def test_any_activation_matches_the_oracle(activation):
    inputs = tokens(7, 9, 20)
    scores = activation_pairs(*inputs, activation=activation)
    broadcast = oracle(*inputs, activation=lambda x: np.asarray(activation(x.astype(np.float32))))
    np.testing.assert_allclose(scores, broadcast, atol=1e-5)


def test_disagreeing_features_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"tanh_pairs: axis A .* of key .* must be 4 as in query"):
        tanh_pairs(jnp.ones((2, 4)), jnp.ones((3, 5)), jnp.ones(4))


def temporary_bytes(function, *inputs):
    return jax.jit(function).lower(*inputs).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "pairs", [tanh_pairs, functools.partial(activation_pairs, activation=jnp.sin)]
)
def test_memory_is_that_of_a_few_score_matrices(pairs):
    inputs = tokens(256, 512, 128)
    matrix = 256 * 512 * 4
    loss = lambda *x: jnp.sum(pairs(*x) ** 2)  # noqa: E731
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    assert temporary_bytes(pairs, *inputs) <= 2 * matrix
    assert temporary_bytes(lambda *x: jax.jvp(pairs, x, x)[1], *inputs) <= 3 * matrix
    assert temporary_bytes(gradient, *inputs) <= 8 * matrix
    assert temporary_bytes(lambda *x: jax.jvp(gradient, x, x)[1], *inputs) <= 16 * matrix


@pytest.mark.parametrize("pairs", [tanh_pairs, lambda *x: activation_pairs(*x, jax.nn.gelu)])
def test_derivatives_are_traced_for_the_platforms_of_the_scores(pairs):
    with placement.lowered_for(("cpu",)):
        both = jax.make_jaxpr(jax.grad(lambda *x: jnp.sum(jnp.sin(pairs(*x))), (0, 1, 2)))
        text = str(both(*tokens(8, 9, 4)))
    assert "scan" in text
    assert "platform_index" not in text
    assert "constant_of_placement" not in text
