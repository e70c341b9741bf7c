"""The three products of a tile: values, derivatives of every kind and vectorisation."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import mlir
from jax.sharding import PartitionSpec
from jax.test_util import check_grads

from attention_jax import attend, masks
from attention_jax.base import matmul
from attention_jax.base.matmul import Products, times, times_transpose

PRODUCTS = {
    "times": (times, (5, 3), (3, 4), lambda a, b: a @ b),
    "times_transpose": (times_transpose, (5, 3), (4, 3), lambda a, b: a @ b.T),
}


@pytest.fixture(params=PRODUCTS)
def product(request):
    function, left, right, plain = PRODUCTS[request.param]
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        yield (
            function,
            jnp.asarray(random.normal(size=left)),
            jnp.asarray(random.normal(size=right)),
            plain,
        )


@pytest.mark.slow
def test_values_and_derivatives_to_second_order(product):
    function, a, b, plain = product
    np.testing.assert_allclose(function(a, b), plain(np.asarray(a), np.asarray(b)), rtol=1e-14)
    check_grads(lambda a, b: jnp.tanh(function(a, b)), (a, b), order=2, rtol=1e-6)


def test_the_transposed_product_has_either_side_as_the_smaller(product):
    function, a, b, plain = product
    wide = jnp.ones((a.shape[0], 7), a.dtype)

    def loss(multiply):
        return lambda a, b: jnp.sum(jnp.sin(multiply(multiply(a, b).T, wide)))

    def plain_loss(a, b):
        return jnp.sum(jnp.sin(plain(a, b).T @ wide))

    if function is times:
        ours, theirs = jax.grad(loss(times), (0, 1))(a, b), jax.grad(plain_loss, (0, 1))(a, b)
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, 2)])
def test_vectorised_like_the_plain_product(product, axes):
    function, a, b, plain = product
    stacked = [
        x if axis is None else jnp.stack([x, 2.0 * x, -x], axis=axis)
        for x, axis in zip((a, b), axes, strict=True)
    ]
    expected = jax.vmap(plain, axes)(*stacked)
    np.testing.assert_allclose(jax.vmap(function, axes)(*stacked), expected, rtol=1e-14)

    def gradient(multiply):
        return jax.vmap(jax.grad(lambda a, b: jnp.sum(jnp.sin(multiply(a, b)))), axes)(*stacked)

    np.testing.assert_allclose(gradient(function), gradient(plain), rtol=1e-12)


@pytest.mark.slow
def test_derivatives_of_a_batch_of_batches(product):
    function, a, b, plain = product
    scales = jnp.linspace(0.5, 1, 6, dtype=a.dtype).reshape(2, 3, 1, 1)
    a, b = scales * a[None, None], b[None, None] / scales

    def bounded(multiply):
        return lambda a, b: jnp.tanh(jax.vmap(jax.vmap(multiply))(a, b))

    check_grads(bounded(function), (a, b), order=2, rtol=1e-6)

    def gradient(multiply):
        return jax.grad(lambda a, b: jnp.sum(bounded(multiply)(a, b)), (0, 1))(a, b)

    for x, y in zip(gradient(function), gradient(plain), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-11)


def test_under_shard_map(product):
    function, a, b, plain = product
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (PartitionSpec("d"), PartitionSpec())
    sharded = jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("d"))
    )
    np.testing.assert_allclose(sharded(a, b), plain(a, b), rtol=1e-14)
    gradient = jax.grad(lambda a, b: jnp.sum(jnp.sin(sharded(a, b))), (0, 1))(a, b)
    expected = jax.grad(lambda a, b: jnp.sum(jnp.sin(plain(a, b))), (0, 1))(a, b)
    for x, y in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12)


def test_the_precision_is_that_asked_for_where_the_product_is_written():
    def total(a, b):
        with jax.default_matmul_precision("highest"):
            return jnp.sum(times_transpose(a, b) ** 2)

    gradient = jax.jit(jax.grad(total, (0, 1))).lower(jnp.ones((3, 2)), jnp.ones((4, 2)))
    products = re.findall(r"dot_general.*precision = \[(.*?)\]", gradient.as_text())
    assert len(products) == 3 and set(products) == {"HIGHEST, HIGHEST"}


@pytest.fixture
def rounded_on_cpu():
    """Let the CPU compute products as accelerators do, from rounded operands."""
    lowering = functools.partial(mlir.lower_fun, multiple_results=False)
    mlir.register_lowering(matmul._product, lowering(matmul._rounded), platform="cpu")
    yield
    mlir.register_lowering(matmul._product, lowering(matmul._copied), platform="cpu")


def test_operands_are_rounded_for_accelerators_alone():
    def total(a, b):
        return jnp.sum(times_transpose(a, b, Products.of(jnp.bfloat16, None)) ** 2)

    program = jax.jit(jax.grad(total, (0, 1))).trace(jnp.ones((3, 2)), jnp.ones((4, 2)))
    for platform, operand in {"tpu": "bf16", "cuda": "bf16", "cpu": "f32"}.items():
        text = program.lower(lowering_platforms=(platform,)).as_text()
        signatures = re.findall(r"dot_general.*: \((.*)\) -> (.*)", text)
        assert len(signatures) == 3
        for operands, result in signatures:
            assert re.findall(r"x(b?f\d+)>", operands) == [operand, operand]
            assert result.endswith("xf32>")


@pytest.mark.parametrize(
    ("dtype", "precision", "operands"),
    [
        ("bfloat16", None, "bfloat16"),
        ("float16", "default", "float16"),
        ("bfloat16", "high", None),
        ("float16", "highest", None),
        ("float32", None, None),
        ("float64", None, None),
    ],
)
def test_which_operands_are_rounded(dtype, precision, operands):
    products = Products.of(dtype, precision)
    assert products == Products(precision, operands and jnp.dtype(operands))
    assert products.of_derivatives.operands == (
        None if operands == "float16" else products.operands
    )


@pytest.mark.slow
def test_rounded_products_are_no_worse_than_those_of_jax_nn(rounded_on_cpu):
    """Context and gradients, against dense attention in float64 on the same numbers."""
    random = np.random.default_rng(0)
    depth = 24  # whose root is no power of two
    arrays = random.normal(size=(4, 1, 256, 1, depth))
    *given, weight = jnp.asarray(arrays, jnp.bfloat16)

    def of(attention, *operands):
        def loss(*operands):
            context = attention(*operands)
            return jnp.sum(context.astype(jnp.float32) * weight.astype(jnp.float32)), context

        gradients, context = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*operands)
        return [np.asarray(x, np.float64) for x in (context, *gradients)]

    tiles = {"implementation": "tiled", "tile_sizes": (64, 128)}
    ours = of(functools.partial(attend, mask=masks.Causal(), **tiles), *given)
    with jax.numpy_dtype_promotion("standard"):
        theirs = of(functools.partial(jax.nn.dot_product_attention, is_causal=True), *given)
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in given]
        exact = of(functools.partial(attend, mask=masks.Causal(), implementation="dense"), *wide)
    for name, one, other, best in zip(
        ("context", "dq", "dk", "dv"), ours, theirs, exact, strict=True
    ):
        errors = [np.sqrt(np.mean((x - best) ** 2)) for x in (one, other)]
        assert errors[0] <= 1.05 * errors[1], (name, errors)
        assert errors[0] > 1e-8  # the operands were rounded
