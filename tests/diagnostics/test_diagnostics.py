"""Diagnostics against values worked out by hand, on empty rows, and their derivatives."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax import diagnostics, masks, normalizers
from attention_jax.nnx import MultiHeadAttention

LN2 = math.log(2)
ROWS = jnp.array([[0.5, 0.25, 0.25, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0] * 4, [0.25] * 4])
OF_WEIGHTS = {
    "entropy": diagnostics.entropy,
    "effective_support": diagnostics.effective_support,
    "jacobian_trace": diagnostics.jacobian_trace,
    "jensen_shannon": diagnostics.jensen_shannon,
    "linear_cka": diagnostics.linear_cka,
    "rollout": lambda weights: diagnostics.rollout([weights, weights]),
}


def causal_weights(*leading):
    """Softmax weights [..., 5, 5], the first row of which attends to nothing."""
    exponentials = np.tril(np.exp(np.random.default_rng(0).normal(size=(*leading, 5, 5))), -1)
    sums = exponentials.sum(axis=-1, keepdims=True)
    return jnp.asarray(exponentials / np.where(sums > 0, sums, 1.0), jnp.float32)


def test_entropy_support_and_trace_by_hand():
    np.testing.assert_allclose(diagnostics.entropy(ROWS), [1.5 * LN2, 0, 0, 2 * LN2], atol=1e-6)
    np.testing.assert_allclose(diagnostics.effective_support(ROWS), [2**1.5, 1, 0, 4], rtol=1e-6)
    np.testing.assert_allclose(diagnostics.jacobian_trace(ROWS), [0.625, 0, 0, 0.75], rtol=1e-6)


def test_entropy_does_not_depend_on_the_sum_of_a_row():
    """Sigmoid weights and softmax with a sink do not sum to one."""
    np.testing.assert_allclose(diagnostics.entropy(3 * ROWS), diagnostics.entropy(ROWS), rtol=1e-6)


@pytest.mark.slow
def test_the_trace_is_the_trace_of_the_jacobian():
    logits, allowed = jnp.array([[0.3, -1.0, 2.0]]), jnp.array([[True, True, False]])
    of_row = jax.jit(jax.jacobian(lambda e: normalizers.softmax(e, allowed)[0]))
    jacobian = of_row(logits)[:, 0]
    trace = diagnostics.jacobian_trace(normalizers.softmax(logits, allowed))
    np.testing.assert_allclose(trace, [jnp.trace(jacobian)], rtol=1e-6)


@pytest.mark.slow
def test_saturated_rows_leave_out_what_attends_to_nothing():
    weights = jnp.stack([ROWS, jnp.zeros((4, 4)), jnp.eye(4)])
    np.testing.assert_allclose(diagnostics.saturated_rows(weights), [1 / 3, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(diagnostics.saturated_rows(ROWS, threshold=0.4), 2 / 3, rtol=1e-6)


def test_tanh_saturation_by_its_derivative():
    edge = math.atanh(math.sqrt(0.95))
    inputs = jnp.array([[edge + 0.01, edge - 0.01, -edge - 0.01, 0.0], [0.0] * 4])
    np.testing.assert_array_equal(diagnostics.tanh_saturation(inputs), [0.5, 0])
    np.testing.assert_array_equal(diagnostics.tanh_saturation(inputs, threshold=0.04), [0, 0])


def test_additive_saturation_is_that_of_its_tanh():
    normal = np.random.default_rng(1).normal
    query, key = jnp.asarray(normal(size=(3, 4))), jnp.asarray(normal(size=(5, 2)))
    weights = jnp.asarray(normal(size=(4, 7))), jnp.asarray(normal(size=(2, 7)))
    bias = jnp.asarray(normal(size=7))
    inputs = (query @ weights[0])[:, None] + (key @ weights[1] + bias[None])[None]
    found = diagnostics.additive_saturation(query, key, *weights, bias, threshold=0.3)
    np.testing.assert_allclose(found, np.mean(1 - np.tanh(inputs) ** 2 < 0.3, axis=-1), rtol=1e-6)
    assert 0 < found.mean() < 1


def test_jensen_shannon_by_hand():
    """Between (1, 0) and (1/2, 1/2): H(3/4, 1/4) - ln 2 / 2; the second row has one empty head."""
    jensen_shannon = jax.jit(diagnostics.jensen_shannon)
    first, last = [1.0, 0.0], [0.0, 1.0]
    heads = jnp.array([[first, first], [[0.5, 0.5], [0.0, 0.0]], [last, last]])
    mixed = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) - LN2 / 2
    expected = [[0, mixed, LN2], [mixed, 0, mixed], [LN2, mixed, 0]]
    np.testing.assert_allclose(jensen_shannon(heads), expected, atol=1e-6)
    np.testing.assert_array_equal(jensen_shannon(0 * heads), 0)


@pytest.mark.slow
def test_linear_cka_by_its_definition_with_feature_covariances():
    x, y = np.random.default_rng(2).normal(size=(2, 9, 4)).astype(np.float32)
    x_centred, y_centred = x - x.mean(0), y - y.mean(0)

    def square(a, b):
        return np.sum((a.T @ b) ** 2)

    expected = square(y_centred, x_centred) / np.sqrt(
        square(x_centred, x_centred) * square(y_centred, y_centred)
    )
    rotation = np.linalg.qr(np.random.default_rng(3).normal(size=(4, 4)))[0].astype(np.float32)
    heads = jnp.stack([x, y, 7 * x @ rotation + 1, jnp.ones_like(x)])
    linear_cka = jax.jit(diagnostics.linear_cka)
    cka = linear_cka(heads)
    np.testing.assert_allclose(cka[:, [0, 3]].T, [[1, expected, 1, 0], [0] * 4], atol=1e-5)
    assert 0.01 < expected < 0.9

    padded = jnp.concatenate([heads, jnp.full((4, 3, 4), jnp.nan)], axis=1)
    rows = jnp.arange(12) < 9
    np.testing.assert_allclose(linear_cka(padded, rows), cka, atol=1e-5)
    batch = linear_cka(jnp.stack([padded, padded]), jnp.stack([rows, ~rows & False]))
    np.testing.assert_allclose(batch, jnp.stack([cka, jnp.zeros((4, 4))]), atol=1e-5)
    wide = jnp.concatenate([heads, heads, heads], axis=2)
    np.testing.assert_allclose(linear_cka(wide), cka, atol=1e-5)


def test_linear_cka_of_contexts_holds_no_pairs_of_queries():
    contexts = jax.ShapeDtypeStruct((2, 65536, 16), "float32")
    compiled = jax.jit(diagnostics.linear_cka).lower(contexts).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 2**20


@pytest.mark.slow
def test_ablation_of_weights_is_ablation_of_the_output_projection():
    layer = MultiHeadAttention(3, 6, rngs=nnx.Rngs(0))
    graph, parameters = nnx.split(layer)
    x = jax.random.normal(jax.random.key(1), (2, 5, 6))

    @jax.jit
    def run(parameters):
        layer = nnx.merge(graph, parameters)
        output, weights = layer(x, mask=masks.Causal(), return_weights=True)
        kernel, value = layer.out.kernel[...], layer.value(x)  # [N, V, D], [B, S, N, V]

        def of_weights(keep, replacement=jnp.zeros_like):
            replaced = diagnostics.replace_heads(weights, keep, replacement)
            return jnp.einsum("bnts,bsnv,nvd->btd", replaced, value, kernel)

        def of_projection(keep):
            layer.out.kernel[...] = jnp.where(keep[:, None, None], kernel, 0.0)
            return layer(x, mask=masks.Causal())

        mean = jnp.cumsum(value, axis=1) / jnp.arange(1.0, 6)[None, :, None, None]
        return {
            "of nothing": (of_weights(jnp.ones(3, bool)), output),
            "of each": (
                diagnostics.head_ablation(of_weights, num_heads=3),
                jnp.stack([of_projection(jnp.arange(3) != head) for head in range(3)]),
            ),
            "made uniform": (
                of_weights(jnp.zeros(3, bool), diagnostics.uniform),
                jnp.einsum("btnv,nvd->btd", mean, kernel),
            ),
        }

    for found, expected in run(parameters).values():
        chex.assert_trees_all_close(found, expected, atol=1e-5)


def test_ablation_returns_any_pytree():
    gain = jnp.array([1.0, 2.0, 4.0])
    found = diagnostics.head_ablation(
        lambda keep: {"kept": keep, "sum": gain @ keep.astype(float)}, 3
    )
    np.testing.assert_array_equal(found["sum"], [6, 5, 3])
    np.testing.assert_array_equal(found["kept"], ~np.eye(3, dtype=bool))


def test_rollout_by_hand():
    """Two heads of mean [[1, 0], [1/2, 1/2]], then a layer whose second row attends to nothing."""
    first = jnp.array([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    second = jnp.array([[[0.0, 1.0], [0.0, 0.0]]])
    np.testing.assert_allclose(diagnostics.rollout([first]), [[1, 0], [0.25, 0.75]])
    np.testing.assert_allclose(diagnostics.rollout([first, second]), [[0.625, 0.375], [0.25, 0.75]])


def test_rollout_of_causal_layers_is_causal_and_sums_to_one():
    found = jax.jit(diagnostics.rollout)([causal_weights(2, 3)] * 4)
    assert found.shape == (2, 5, 5)
    np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(jnp.triu(found, 1), 0)


def test_links_and_alignment_error_rate_by_hand():
    weights = jnp.array([[0.1, 0.7, 0.2], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [0.0, 0.1, 0.9]])
    found = diagnostics.links(weights)
    np.testing.assert_array_equal(found.astype(int), [[0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1]])
    sure = jnp.zeros((4, 3), bool).at[0, 1].set(True).at[2, 0].set(True)
    possible = sure.at[3, 2].set(True)
    quality = diagnostics.alignment_quality(found, sure, possible)
    np.testing.assert_allclose(quality, [1 - (1 + 2) / (3 + 2), 2 / 3, 1 / 2], rtol=1e-6)
    nothing = jnp.zeros((2, 2), bool)
    assert np.all(np.isnan(diagnostics.alignment_quality(nothing, nothing, nothing)))


def of_weights(weights):
    return {name: function(weights) for name, function in OF_WEIGHTS.items()}


@pytest.mark.slow
def test_gradients_are_those_of_finite_differences_and_finite_at_empty_rows(x64):
    """Along one direction in the logits; the first row attends to nothing in half of the batch."""
    allowed = jnp.stack([np.tri(4, dtype=bool), np.tri(4, k=-1, dtype=bool)])[:, None]
    allowed = jnp.broadcast_to(allowed, (2, 2, 4, 4))
    draw = np.random.default_rng(4).normal
    logits, step = jnp.asarray(draw(size=(2, 2, 2, 4, 4)))

    @jax.jit
    def value_and_slope(logits):
        def total(logits):
            exponentials = jnp.where(allowed, jnp.exp(logits), 0.0)
            sums = jnp.sum(exponentials, axis=-1, keepdims=True)
            found = of_weights(exponentials / jnp.where(sums > 0, sums, 1.0))
            return {
                name: jnp.sum(jnp.cos(jnp.arange(x.size, dtype=x.dtype)) * x.ravel())
                for name, x in found.items()
            }

        return total(logits), jax.tree.map(lambda g: jnp.vdot(g, step), jax.jacrev(total)(logits))

    _, slopes = value_and_slope(logits)
    ahead, behind = (value_and_slope(logits + sign * 1e-6 * step)[0] for sign in (1, -1))
    expected = jax.tree.map(lambda a, b: (a - b) / 2e-6, ahead, behind)
    chex.assert_trees_all_close(slopes, expected, rtol=1e-6, atol=1e-8)
    assert all(slope != 0 for slope in slopes.values())


@pytest.mark.slow
def test_half_precision_counts_in_float32():
    weights = causal_weights(2)
    exact, found = (jax.jit(of_weights)(weights.astype(dtype)) for dtype in (float, jnp.bfloat16))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, exact)
    chex.assert_trees_all_close(found, exact, atol=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: diagnostics.entropy(jnp.ones(3)),
            r"entropy: expected an array \[..., T, S\], got shape \(3,\)\.",
        ),
        (
            lambda: diagnostics.jensen_shannon(ROWS),
            r"jensen_shannon: expected an array \[..., N, T, S\], got shape \(4, 4\)\.",
        ),
        (
            lambda: diagnostics.links(jnp.ones((2, 2), int)),
            r"links: weights must be floating point, got int32; convert it",
        ),
        (lambda: diagnostics.rollout([]), r"rollout: give the weights of at least one layer"),
        (
            lambda: diagnostics.rollout([jnp.ones((1, 2, 3))]),
            r"rollout: weights must be of self-attention, \[..., N, T, T\], got shape \(1, 2, 3\)",
        ),
        (
            lambda: diagnostics.replace_heads(jnp.ones((3, 2, 2)), jnp.ones(2, bool)),
            r"replace_heads: keep must have the shape \(3,\), .* got \(2,\)\.",
        ),
        (
            lambda: diagnostics.alignment_quality(*2 * [jnp.ones((2, 2), bool)], jnp.ones((1, 2))),
            r"alignment_quality: found, sure and possible must have one shape \[..., T, S\], got "
            r"\(2, 2\), \(2, 2\) and \(1, 2\)\.",
        ),
        (
            lambda: diagnostics.additive_saturation(
                *3 * [jnp.ones((2, 2))], jnp.ones((3, 2)), ROWS
            ),
            r"additive_saturation: axis H \(number 0\) of key_weight \[H, A\] must be 2",
        ),
    ],
)
def test_bad_arguments_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()
