import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import scores
from attention_jax.base.finite import finite_rows
from attention_jax.implementations.dense import dense
from attention_jax.implementations.head import Head, kept
from attention_jax.masks import Causal, Full, Prefix
from attention_jax.normalizers import sigmoid, softmax
from attention_jax.scores import separate
from tests import oracle

RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (
    jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((5, 3), (7, 3), (7, 4))
)


def head(**changes):
    operands = {
        "query": QUERY,
        "key": KEY,
        "value": VALUE,
        "score": separate(scores.dot),
        "mask": Causal(),
        "bias": None,
        "normalizer": softmax,
        "dropout": None,
    }
    return Head(**operands | changes)


@pytest.mark.slow
def test_one_head_is_the_formula():
    result = dense(head(bias=jnp.full((5, 1), 0.25)))
    logits = oracle.logits_of(np.asarray(QUERY), np.asarray(KEY), lambda q, k: q @ k) + 0.25
    weights = np.stack([oracle.softmax(row, np.arange(7) <= i) for i, row in enumerate(logits)])
    np.testing.assert_allclose(result.weights, weights, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.context, weights @ VALUE, rtol=1e-5, atol=1e-6)
    total = np.where(np.tri(5, 7, dtype=bool), np.exp(logits), 0.0).sum(axis=1)
    np.testing.assert_allclose(result.logsumexp, np.log(total), rtol=1e-5)


def test_a_normalizer_without_logsumexp_has_none():
    assert dense(head(normalizer=sigmoid)).logsumexp is None


@pytest.mark.parametrize("bias", [lambda q_idx, kv_idx: q_idx - kv_idx, jnp.float32(0.5)])
def test_a_bias_is_a_function_of_indices_or_a_number(bias):
    context = dense(head(bias=bias, mask=Full())).context
    distance = np.arange(5)[:, None] - np.arange(7)[None, :]
    logits = np.asarray(QUERY @ KEY.T) + (distance if callable(bias) else 0.5)
    expected = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32), axis=1)) @ VALUE
    np.testing.assert_allclose(context, expected, rtol=1e-5, atol=1e-5)


def test_an_empty_mask_gives_zeros():
    result = dense(head(mask=Prefix(0)))
    np.testing.assert_array_equal(result.context, np.zeros((5, 4)))
    np.testing.assert_array_equal(result.weights, np.zeros((5, 7)))
    np.testing.assert_array_equal(result.logsumexp, np.full(5, -np.inf))


def test_finite_rows_split_numbers_from_poison():
    x = jnp.array([[1.0, 2.0], [jnp.nan, 3.0], [4.0, -jnp.inf]])
    rows, poison = finite_rows(x)
    np.testing.assert_array_equal(rows, [[1.0, 2.0], [0.0, 3.0], [4.0, 0.0]])
    np.testing.assert_array_equal(poison, [0.0, np.nan, np.nan])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_largest_numbers_are_no_poison(dtype):
    largest = jnp.finfo(dtype).max
    x = jnp.full((3, 64), largest, dtype) * jnp.array([[1], [-1], [1]], dtype)
    for found in (finite_rows(x)[1], jax.jit(lambda x: finite_rows(x)[1])(x)):
        assert found.dtype == x.dtype
        np.testing.assert_array_equal(found, jnp.zeros(3, dtype))


@pytest.mark.slow
def test_the_factor_of_a_pair_does_not_depend_on_the_tile():
    dropout = (jnp.array([3, 5], jnp.uint32), jnp.float32(0.4))
    q_idx, kv_idx = jnp.arange(9)[:, None], jnp.arange(13)[None, :]
    whole = kept(dropout, q_idx, kv_idx, jnp.float32)
    tile = kept(dropout, q_idx[4:7], kv_idx[:, 5:11], jnp.float32)
    np.testing.assert_array_equal(tile, whole[4:7, 5:11])
    np.testing.assert_array_equal(np.unique(whole), np.array([0.0, 1.0 / 0.6], np.float32))
    other = kept((dropout[0] + 1, dropout[1]), q_idx, kv_idx, jnp.float32)
    assert (other != whole).any()
