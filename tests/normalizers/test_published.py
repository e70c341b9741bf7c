"""Against numbers that others computed: the package `entmax` 1.3 (Peters et al.), in float64.

Those of `entmax.sparsemax`, `entmax15` and `entmax_bisect(n_iter=80)`; its gradients are those of
the sum of COEFFICIENTS times the weights, over all rows for alpha.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import normalizers

LOGITS = np.array(
    [
        [1.2, 0.3, -0.5, 0.9, -1.7, 0.1],
        [3.0, -3.0, 0.0, 0.0, 1.0, 2.5],
        [0.05, 0.04, 0.03, 0.02, 0.01, 0.0],
    ]
)
COEFFICIENTS = np.array([[0.3, -1.0, 2.0, 0.7, -0.4, 1.1]])
SPARSEMAX = [
    [0.65, 0.0, 0.0, 0.35, 0.0, 0.0],
    [0.75, 0.0, 0.0, 0.0, 0.0, 0.25],
    [23 / 120, 109 / 600, 103 / 600, 97 / 600, 91 / 600, 17 / 120],
]
OF_ALPHA = {  # weights and gradient of the first row, and the gradient of alpha
    1.2: (
        [
            0.4353018259897143,
            0.13177514066473708,
            0.03341896169383278,
            0.30143891867351635,
            0.0013507284527391166,
            0.09671442452546043,
        ],
        [
            -0.049976904608636574,
            -0.27614061415319935,
            0.10569864209969035,
            0.11600925362188944,
            -0.004036736013613582,
            0.10844635905386979,
        ],
        -0.17609323394033846,
    ),
    1.5: (
        [0.5410870697284396, 0.08155948232740376, 0.0, 0.3429112072614276, 0.0, 0.0344422406827291],
        [-0.0046955923724544, -0.3730851016363439, 0.0, 0.2304964113923932, 0.0, 0.147284282616405],
        0.02832796096925793,
    ),
    1.8: (
        [0.6302205262108234, 0.0, 0.0, 0.3697794737891766, 0.0, 0.0],
        [-0.17264601304160726, 0.0, 0.0, 0.1726460130416072, 0.0, 0.0],
        -0.1904963761031728,
    ),
}


@pytest.mark.slow
def test_sparsemax_and_entmax15(x64):
    logits, allowed = jnp.asarray(LOGITS), jnp.ones(LOGITS.shape, bool)
    np.testing.assert_allclose(normalizers.sparsemax(logits, allowed), SPARSEMAX, atol=1e-14)
    weights = normalizers.entmax15(logits, allowed)
    np.testing.assert_allclose(weights[0], OF_ALPHA[1.5][0], atol=1e-14)
    found = [0.6739926363384381, 0.0, 0.0, 0.0, 0.0, 0.32600736366156174]
    np.testing.assert_allclose(weights[1], found, atol=1e-14)


@pytest.mark.parametrize("alpha", OF_ALPHA)
def test_entmax_with_its_gradients(alpha, x64):
    def total(logits, alpha):
        weights = normalizers.entmax(logits, jnp.ones(logits.shape, bool), alpha=alpha)
        return jnp.sum(jnp.asarray(COEFFICIENTS) * weights), weights

    found = jax.jit(jax.grad(total, (0, 1), has_aux=True))(jnp.asarray(LOGITS), jnp.float64(alpha))
    (of_logits, of_alpha), weights = found
    expected = OF_ALPHA[alpha]
    for ours, theirs in zip((weights[0], of_logits[0], of_alpha), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1.15, 1.5, 1.9])
def test_entmax_is_what_its_definition_says(alpha, x64):
    """The largest of <w, e> + H(w) on the simplex, with H the Tsallis entropy of order alpha.

    So dH/dw_j + e_j is the same number where w_j > 0, and at most that elsewhere.
    """
    logits = 2 * np.random.default_rng(0).normal(size=(20, 50))
    allowed = jnp.ones(logits.shape, bool)
    weights = np.asarray(normalizers.entmax(jnp.asarray(logits), allowed, alpha=alpha))
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-12)
    marginal = logits - weights ** (alpha - 1.0) / (alpha - 1.0)
    for row, value in zip(weights, marginal, strict=True):
        assert (row >= 0.0).all() and 0.0 in row
        np.testing.assert_allclose(value[row > 0], value[row > 0][0], atol=1e-9)
        assert (value[row == 0] <= value[row > 0][0] + 1e-9).all()
