"""A linear function with a transposition of its own has every derivative of the plain one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax.base.transposition import linear_call


def weighted(fixed, moving):
    scale, shift = fixed["scale"], fixed["shift"]
    return {"sum": scale * moving[0] + jnp.sin(scale) * jnp.roll(moving[1], shift)}


def weighted_back(fixed, results):
    scale, of_sum = fixed["scale"], results["sum"]
    return [scale * of_sum, jnp.roll(jnp.sin(scale) * of_sum, -fixed["shift"])]


def total(function, scale, x):
    fixed = {"scale": scale, "shift": jnp.int32(1)}
    return jnp.sum(jnp.tanh(function(fixed, [x, x**2])["sum"]))


def derivatives(function, scale, x):
    of = functools.partial(total, function)
    first = jax.grad(of, (0, 1))
    many = jnp.stack([x, 2 * x])
    return [
        first(scale, x),
        jax.hessian(of, (0, 1))(scale, x),
        jax.jacrev(first, (0, 1))(scale, x),
        jax.vmap(first, (None, 0))(scale, many),
        jax.vmap(first)(many, many),
        jax.grad(lambda x: jnp.sum(jax.checkpoint(first)(scale, x)[1] ** 2))(x),
    ]


@pytest.mark.slow
def test_every_derivative_is_that_of_the_plain_function():
    scale, x = jnp.arange(3.0) + 1, jnp.arange(3.0) / 2 - 0.3
    ours = functools.partial(linear_call, weighted, weighted_back)
    got, expected = (
        jax.jit(functools.partial(derivatives, function))(scale, x) for function in (ours, weighted)
    )
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


def test_what_does_not_move_needs_no_transposition():
    """And of several that may move, one may stay."""
    ours = functools.partial(linear_call, weighted, weighted_back)
    fixed = {"scale": jnp.ones(3), "shift": jnp.int32(0)}

    def of(first):
        return jnp.sum(ours(fixed, [first, jnp.zeros(3)])["sum"])

    assert np.array_equal(jax.grad(of)(jnp.ones(3)), np.ones(3))
    assert jax.jit(lambda x: ours(fixed, [x, x])["sum"])(jnp.ones(3)).shape == (3,)
