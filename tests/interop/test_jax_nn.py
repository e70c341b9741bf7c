import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_jax.base.checks import ShapeError
from attention_jax.interop import dot_product_attention
from tests import oracle

B, T, S, N, K, H = 2, 5, 7, 4, 2, 3
RNG = np.random.default_rng(0)


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


QUERY, KEY, VALUE = normal(B, T, N, H), normal(B, S, K, H), normal(B, S, K, H)


def compiled(function, *operands, **options):
    return jax.jit(functools.partial(function, **options))(*operands)


def is_close(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def allowed_pairs(shape, mask, is_causal, query_lengths, key_lengths, window):
    """Return in plain loops which pairs the arguments of `jax.nn` allow, [B, N, T, S]."""
    allowed = np.ones(shape, bool) if mask is None else np.broadcast_to(mask, shape).copy()
    left, right = (window, window) if isinstance(window, int) else window or (shape[3], shape[3])
    for b, _, i, j in np.ndindex(*shape):
        allowed[b, :, i, j] &= (
            (not is_causal or j <= i)
            and i - left <= j <= i + right
            and (query_lengths is None or i < query_lengths[b])
            and (key_lengths is None or j < key_lengths[b])
        )
    return allowed


def agrees_with_jax(query, key, value, bias=None, mask=None, *, implementation=None, **options):
    """Compare context, residual and all gradients, where `jax.nn` has no empty row to average."""
    shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    allowed = allowed_pairs(
        shape,
        mask,
        options.get("is_causal", False),
        options.get("query_seq_lengths"),
        options.get("key_value_seq_lengths"),
        options.get("local_window_size"),
    )
    has_keys = allowed.any(axis=-1).swapaxes(1, 2)  # [B, T, N]
    cotangent = np.random.default_rng(1).normal(size=query.shape) * has_keys[..., None]
    cotangent = jnp.asarray(cotangent, query.dtype)

    def run(function, **choice):
        def loss(query, key, value, bias):
            context, residual = function(
                query, key, value, bias, mask, return_residual=True, **options, **choice
            )
            return jnp.sum(context * cotangent), (context, residual)

        arguments = (0, 1, 2) if bias is None else (0, 1, 2, 3)
        differentiated = jax.value_and_grad(loss, arguments, has_aux=True)
        if choice:  # one program; else each small operation is compiled once for all examples
            differentiated = jax.jit(differentiated)
        (_, results), gradients = differentiated(query, key, value, bias)
        return results, gradients

    (context, residual), gradients = run(
        dot_product_attention, **({"implementation": implementation} if implementation else {})
    )
    (jax_context, jax_residual), jax_gradients = run(jax.nn.dot_product_attention)
    is_close(context, jnp.where(has_keys[..., None], jax_context, 0.0))
    is_close(residual, jnp.where(has_keys, jax_residual, -jnp.inf))
    for gradient, expected in zip(gradients, jax_gradients, strict=True):
        is_close(gradient, expected, 1e-4)


def test_signature_is_that_of_jax_nn():
    ours, theirs = (
        inspect.signature(function).parameters
        for function in (dot_product_attention, jax.nn.dot_product_attention)
    )
    described = [
        [(p.name, p.kind, p.default) for p in parameters.values()] for parameters in (ours, theirs)
    ]
    assert described[0] == described[1]


def broadcastable(draw):
    """Draw a shape that broadcasts to [B, N, T, S], of any rank."""
    full = [draw(st.sampled_from((1, size))) for size in (B, N, T, S)]
    return tuple(full[draw(st.integers(0, 4)) :])


@st.composite
def arguments(draw):
    found = {}
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    if draw(st.booleans()):
        found["bias"] = jnp.asarray(rng.normal(size=broadcastable(draw)), jnp.float32)
    if draw(st.booleans()):
        found["mask"] = rng.random(broadcastable(draw)) < 0.6
    if draw(st.booleans()):
        found["scale"] = draw(st.sampled_from((0.0, -0.3, 1, 2.5)))
    found["is_causal"] = draw(st.booleans())
    for name, longest in (("query_seq_lengths", T), ("key_value_seq_lengths", S)):
        if draw(st.booleans()):
            found[name] = np.array([draw(st.integers(0, longest)) for _ in range(B)], np.int32)
    sizes = st.one_of(st.integers(0, 3), st.tuples(st.integers(-2, 3), st.integers(-1, 4)))
    found["local_window_size"] = draw(st.one_of(st.none(), sizes))
    return found


@pytest.mark.slow
@settings(max_examples=settings().max_examples // 5)
@given(arguments())
def test_whole_argument_space(arguments):
    agrees_with_jax(QUERY, KEY, VALUE, **arguments)


@pytest.mark.slow
def test_tiled_with_everything():
    agrees_with_jax(
        QUERY,
        KEY,
        VALUE,
        bias=normal(B, 1, 1, S),
        mask=np.random.default_rng(2).random((1, N, T, S)) < 0.7,
        implementation="tiled",
        scale=0.4,
        is_causal=True,
        query_seq_lengths=np.array([3, 5], np.int32),
        key_value_seq_lengths=np.array([7, 2], np.int32),
        local_window_size=(2, 1),
    )


@pytest.mark.slow
def test_several_tiles():
    query, key, value = normal(1, 130, 2, 4), normal(1, 300, 1, 4), normal(1, 300, 1, 4)
    options = {
        "is_causal": True,
        "local_window_size": 40,
        "key_value_seq_lengths": jnp.array([95], jnp.int32),
    }
    context = compiled(dot_product_attention, query, key, value, implementation="tiled", **options)
    is_close(context, compiled(jax.nn.dot_product_attention, query, key, value, **options))


@pytest.mark.slow
def test_three_axes():
    """The batch may be left out, also of some operands if it is one."""
    operands = QUERY[0], KEY[:1], VALUE[0]
    mask = np.random.default_rng(3).random((N, T, S)) < 0.7
    options = {"is_causal": True, "mask": mask, "return_residual": True}
    context, residual = compiled(dot_product_attention, *operands, **options)
    expected, expected_residual = compiled(jax.nn.dot_product_attention, *operands, **options)
    has_keys = (mask & np.tri(T, S, dtype=bool)).any(axis=-1).T
    assert context.shape == (T, N, H)
    assert residual.shape == (T, N)
    is_close(context[has_keys], expected[has_keys])
    is_close(residual[has_keys], expected_residual[has_keys])


@pytest.mark.slow
def test_empty_rows_are_zeros_with_zero_gradients():
    mask = np.ones((1, 1, T, S), bool)
    mask[0, 0, 2] = False
    options = {"mask": mask, "key_value_seq_lengths": jnp.array([S, 0], jnp.int32)}
    context, residual = dot_product_attention(QUERY, KEY, VALUE, return_residual=True, **options)
    for empty in ((0, 2), (1, slice(None))):
        np.testing.assert_array_equal(context[empty], 0.0)
        np.testing.assert_array_equal(residual[empty], -np.inf)
    gradients = jax.grad(
        lambda q, k, v: jnp.sum(dot_product_attention(q, k, v, **options) ** 2), (0, 1, 2)
    )(QUERY, KEY, VALUE)
    assert not gradients[0][0, 2].any()
    assert all(np.isfinite(gradient).all() and not gradient[1].any() for gradient in gradients)


def test_float64_is_honoured(x64):
    query, key, value = (normal(*x.shape, dtype=jnp.float64) for x in (QUERY, KEY, VALUE))
    expected, _ = oracle.attention(query, key, value, lambda q, k: q @ k / np.sqrt(H))
    context, residual = compiled(dot_product_attention, query, key, value, return_residual=True)
    assert context.dtype == residual.dtype == jnp.float64
    is_close(context, expected, 1e-14)
    with jax.numpy_dtype_promotion("standard"):
        rounded = compiled(jax.nn.dot_product_attention, query, key, value)
    assert np.abs(rounded - expected).max() > 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    """Half-precision operands give what float32 gives for the same numbers, rounded once."""
    half = [x.astype(dtype) for x in (QUERY, KEY, VALUE)]
    context, residual = compiled(dot_product_attention, *half, return_residual=True)
    exact, exact_residual = jax.nn.dot_product_attention(
        *(x.astype(jnp.float32) for x in half), return_residual=True
    )
    assert context.dtype == dtype
    np.testing.assert_array_equal(context, exact.astype(dtype))
    assert residual.dtype == jnp.float32
    is_close(residual, exact_residual, 1e-6)
    with jax.numpy_dtype_promotion("standard"):
        _, truncated = jax.nn.dot_product_attention(*half, return_residual=True)
    assert truncated.dtype == dtype
    is_close(residual, truncated.astype(jnp.float32), 10 * float(jnp.finfo(dtype).eps))


@pytest.mark.slow
def test_gradient_of_the_scale():
    def loss(function, scale):
        return jnp.sum(function(QUERY, KEY, VALUE, scale=scale) ** 2)

    ours, theirs = (
        jax.grad(lambda scale, function=function: loss(function, scale))(0.7)
        for function in (dot_product_attention, jax.nn.dot_product_attention)
    )
    is_close(ours, theirs, 1e-4)


@pytest.mark.slow
def test_minus_infinity_in_the_bias():
    bias = jnp.where(np.tri(T, S, dtype=bool), 0.0, -jnp.inf)
    agrees_with_jax(QUERY, KEY, VALUE, bias[None, None])


@pytest.mark.slow
def test_lengths_inside_jit_and_vmap():
    lengths = jnp.array([[3, 7], [1, 2], [5, 0]], jnp.int32)

    @jax.jit
    @jax.vmap
    def ours(lengths):
        return dot_product_attention(QUERY, KEY, VALUE, key_value_seq_lengths=lengths)

    found = ours(lengths)
    for context, row in zip(found, lengths, strict=True):
        expected = jax.nn.dot_product_attention(QUERY, KEY, VALUE, key_value_seq_lengths=row)
        is_close(context, jnp.where((row > 0)[:, None, None, None], expected, 0.0))


def test_numpy_arrays_and_another_depth_of_values():
    value = np.asarray(normal(B, S, K, 6))
    context = dot_product_attention(np.asarray(QUERY), np.asarray(KEY), value)
    for columns in (slice(0, 3), slice(3, 6)):
        expected = jax.nn.dot_product_attention(QUERY, KEY, value[..., columns])
        is_close(context[..., columns], expected)


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 4), (2, 3, 0)])
def test_nothing_to_attend(batch, queries, keys):
    operands = normal(batch, queries, N, H), normal(batch, keys, K, H), normal(batch, keys, K, H)
    context = compiled(dot_product_attention, *operands, is_causal=True)
    assert context.shape == (batch, queries, N, H)
    assert not context.any()


def test_xla_is_handed_to_jax_nn():
    options = {"mask": np.zeros((T, S), bool), "return_residual": True}
    found = dot_product_attention(QUERY, KEY, VALUE, implementation="xla", **options)
    expected = jax.nn.dot_product_attention(QUERY, KEY, VALUE, implementation="xla", **options)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)
    assert found[0].any()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="cuDNN may be there")
def test_cudnn_is_refused_with_a_reason():
    with pytest.raises(ValueError, match=r"jax\.nn refuses implementation 'cudnn': cuDNN is not"):
        dot_product_attention(QUERY, KEY, VALUE, implementation="cudnn")


ERRORS = {
    "implementation must be None, 'dense', 'tiled', 'xla' or 'cudnn', got 'flash'": {
        "implementation": "flash"
    },
    r"query must be \[B, T, N, H\] or \[T, N, H\], got shape \(5, 3\)": {"query": QUERY[0, :, 0]},
    r"value must be \[B, S, K, H\] or \[S, K, H\], got shape \(5, 3\)": {"value": QUERY[0, :, 0]},
    "key must have the dtype of query, float32, got bfloat16": {"key": KEY.astype(jnp.bfloat16)},
    "query must be floating point, got int32": {"query": QUERY.astype(jnp.int32)},
    r"axis B \(number 0\) of key \[B, S, K, H\] must be 2 as in query, got 1": {"key": KEY[:1]},
    r"axis H \(number 3\) of key \[B, S, K, H\] must be 3 as in query, got 2": {
        "key": KEY[..., :2]
    },
    "query heads N must be a multiple of key heads K, got query heads N = 3": {
        "query": QUERY[:, :, :3]
    },
    r"bias must broadcast to \[B, N, T, S\] = \(2, 4, 5, 7\), got \(7, 5\)": {
        "bias": jnp.zeros((S, T))
    },
    r"mask must broadcast to \[B, N, T, S\] = \(2, 4, 5, 7\), got \(1, 2, 5, 7\)": {
        "mask": np.ones((1, 2, T, S), bool)
    },
    r"mask: an array must be boolean \(True = may attend\), got float32": {
        "mask": np.ones((T, S), np.float32)
    },
    r"query_seq_lengths must hold an integer for each of the B = 2 examples, got shape \(3,\)": {
        "query_seq_lengths": np.ones(3, np.int32)
    },
    r"key_value_seq_lengths must hold an integer .* got shape \(2,\) of float32": {
        "key_value_seq_lengths": np.ones(2, np.float32)
    },
    r"local_window_size must be one number of keys or two \(left, right\), got \(1, 2, 3\)": {
        "local_window_size": (1, 2, 3)
    },
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors_say_what_is_wrong(text):
    operands = {"query": QUERY, "key": KEY, "value": VALUE} | ERRORS[text]
    with pytest.raises((ShapeError, ValueError, TypeError), match=text):
        dot_product_attention(**operands)


@pytest.mark.slow
def test_the_residual_has_a_gradient():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 3, 1, 4))

    def total(query, of):
        return jnp.sum(of(query) ** 2)

    def residual(query):
        return dot_product_attention(query, key, key, return_residual=True)[1]

    def by_hand(query):
        logits = jnp.einsum("btnh,bsnh->btns", query, key) / 2
        return jax.nn.logsumexp(logits, axis=-1)

    found, expected = (jax.grad(total)(query, of) for of in (residual, by_hand))
    np.testing.assert_allclose(found, expected, atol=1e-5)
