"""Linformer against its formula, its theory, and what it cannot do."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attend, masks, normalizers, scores
from attention_jax.linear import linformer
from attention_jax.linear.linformer import linformer_attention

B, T, S, N, K, H, V, R = 2, 5, 9, 4, 2, 6, 3, 4


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape))


def qkv(length=S):
    return normal(B, T, N, H), normal(B, length, K, H), normal(B, length, K, V)


def oracle(query, key, value, key_projection, value_projection):
    """softmax(q (E K)^T / sqrt(H)) F V, one head at a time; projections [K, R, S]."""
    context = np.zeros((B, T, N, V))
    for b, n in np.ndindex(B, N):
        k = n // (N // K)
        logits = query[b, :, n] @ (key_projection[k] @ key[b, :, k]).T / np.sqrt(H)
        weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        context[b, :, n] = weights @ (value_projection[k] @ value[b, :, k])
    return context


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["all", "heads", "key and value", "nothing"])
def test_is_the_formula_of_the_paper(shared):
    shape = (R, S) if shared in ("all", "heads") else (K, R, S)
    key_projection = normal(*shape, seed=1)
    one = shared in ("all", "key and value")
    value_projection = None if one else normal(*shape, seed=2)
    context = linformer_attention(*qkv(), key_projection, value_projection)
    each = [
        np.broadcast_to(x, (K, R, S))
        for x in (key_projection, key_projection if one else value_projection)
    ]
    expected = oracle(*(np.asarray(x) for x in qkv()), *each)
    np.testing.assert_allclose(context, expected, atol=1e-12)


@pytest.mark.slow
def test_without_projection_it_is_attention():
    eye = jnp.eye(S)
    for score in (scores.scaled_dot, scores.cosine):
        np.testing.assert_allclose(
            linformer_attention(*qkv(), eye, score=score), attend(*qkv(), score=score), atol=1e-12
        )
    one = linformer_attention(*qkv(), jnp.ones((1, S)) / S)
    mean = jnp.repeat(jnp.mean(qkv()[2], axis=1, keepdims=True), N // K, axis=2)
    np.testing.assert_allclose(one, jnp.broadcast_to(mean, one.shape), atol=1e-12)


@pytest.mark.slow
def test_padding_is_a_shorter_sequence():
    """A shorter sequence uses the first columns; empty rows and padded queries get zeros."""
    projection = normal(R, S, seed=1)
    query, key, value = qkv()
    mask = masks.Lengths(np.array([6, 0]), np.array([4, 5]))
    spoiled = key.at[:, 6:].set(jnp.nan), value.at[:, 6:].set(jnp.inf)

    def loss(query, key, value):
        context = linformer_attention(query, key, value, projection, mask=mask)
        return jnp.sum(context**2), context

    spoiled_query = query.at[0, 4:].set(jnp.nan)
    gradients, context = jax.grad(loss, (0, 1, 2), has_aux=True)(spoiled_query, *spoiled)
    shorter = linformer_attention(query, key[:, :6], value[:, :6], projection)
    np.testing.assert_allclose(context[0, :4], shorter[0, :4], atol=1e-12)
    np.testing.assert_array_equal(context[0, 4:], 0.0)
    np.testing.assert_array_equal(context[1], 0.0)
    chex.assert_tree_all_finite(gradients)
    for gradient in gradients[1:]:
        np.testing.assert_array_equal(gradient[0, 6:], 0.0)
        np.testing.assert_array_equal(gradient[1], 0.0)
    array = jnp.arange(S)[None, :] < jnp.array([[6], [0]])
    by_array = linformer_attention(query, *spoiled, projection, mask=array[:, None, None])
    np.testing.assert_allclose(by_array[0, :4], context[0, :4], atol=1e-12)
    assert np.all(np.isnan(linformer_attention(query, *spoiled, projection)))


@pytest.mark.slow
def test_random_projections_have_the_error_of_johnson_and_lindenstrauss():
    """p^T E^T E v is p . v on average, with mean squared error (|p|^2 |v|^2 + (p . v)^2) / R."""
    draws, weights, value = 20_000, jax.nn.softmax(normal(S)), normal(S, seed=1)

    def error(key):
        projection = linformer.random_projection(key, R, S, jnp.float64)
        return (projection @ weights) @ (projection @ value) - weights @ value

    errors = jax.jit(jax.vmap(error))(jax.random.split(jax.random.key(0), draws))
    expected = (weights @ weights * (value @ value) + (weights @ value) ** 2) / R
    assert abs(np.mean(errors)) < 4 * np.sqrt(expected / draws)
    np.testing.assert_allclose(np.mean(errors**2), expected, rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "length"), [(1, 1), (1, 7), (3, 7), (7, 7), (5, 127)])
def test_mean_pooling_averages_runs_of_neighbours(rank, length):
    projection = np.asarray(linformer.mean_pooling(rank, length, jnp.float64))
    np.testing.assert_allclose(projection.sum(axis=1), 1.0)
    members = projection > 0
    np.testing.assert_array_equal(members.sum(axis=0), 1)
    sizes = members.sum(axis=1)
    assert sizes.max() - sizes.min() <= 1
    np.testing.assert_array_equal(np.sort(members.argmax(axis=0)), members.argmax(axis=0))


@pytest.mark.slow
def test_gradients_reach_the_projections():
    projections = normal(K, R, S, seed=1), normal(R, S, seed=2)

    def loss(*projections):
        return jnp.sum(jnp.sin(linformer_attention(*qkv(), *projections)))

    jax.test_util.check_grads(jax.jit(loss), projections, order=1, modes=["rev"], atol=1e-7)


@pytest.mark.slow
def test_half_precision_and_other_normalizers():
    projection = normal(R, S, seed=1)
    arrays = [x.astype(jnp.bfloat16) for x in qkv()]
    exact = functools.partial(linformer_attention, normalizer=normalizers.softmax_plus_one)
    context = exact(*arrays, projection.astype(jnp.bfloat16))
    assert context.dtype == jnp.bfloat16
    expected = exact(*(x.astype(jnp.float64) for x in arrays), projection)
    np.testing.assert_allclose(context.astype(jnp.float64), expected, atol=0.05)
    tiled = exact(*qkv(), projection, implementation="tiled")
    np.testing.assert_allclose(tiled, exact(*qkv(), projection), atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: linformer_attention(*qkv(), normal(R, S), mask=masks.Causal()),
            "linformer_attention: the mask Causal cannot be honoured, because each projected key "
            "mixes all positions",
        ),
        (
            lambda: linformer_attention(*qkv(), normal(R, S), mask=jnp.ones((T, S), bool)),
            "linformer_attention: an array of pairs cannot be honoured",
        ),
        (
            lambda: linformer_attention(*qkv(), normal(R, S), bias=normal(T, S)),
            "linformer_attention: bias cannot be honoured, because there are no pairs",
        ),
        (
            lambda: linformer_attention(*qkv(), normal(S + 1, S)),
            r"key_projection must have a rank R of at most its length L, got shape \(10, 9\)",
        ),
        (
            lambda: linformer_attention(*qkv(), normal(R, S - 1)),
            "key_projection serves up to 8 keys, its last axis, got S = 9",
        ),
        (
            lambda: linformer_attention(*qkv(), normal(R, S), normal(R + 1, S)),
            r"must have one rank R, got shapes \(4, 9\) and \(5, 9\)",
        ),
        (
            lambda: linformer_attention(*qkv(), normal(N, R, S)),
            r"key_projection must be \[R, L\], or \[K, R, L\] with K = 2 key heads, got",
        ),
        (
            lambda: linformer.random_projection(jax.random.key(0), 10, 9),
            "random_projection: rank must be 1 or more and at most the length 9, got 10",
        ),
        (lambda: linformer.mean_pooling(0, 9), "mean_pooling: rank must be 1 or more"),
    ],
)
def test_what_cannot_be_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
