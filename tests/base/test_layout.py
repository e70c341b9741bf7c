"""Axes that a function is vectorised over, kept where another array has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax.base.layout import laid_out_like


def doubled(x):
    """Two times x, made such that vectorising moves its axis to the front."""
    return laid_out_like(jnp.moveaxis(jnp.stack([x, x]), 0, 1).sum(1), x)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_axis_stays_where_the_other_array_has_it(axis):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)), jnp.float32)
    program = jax.make_jaxpr(jax.vmap(doubled, axis, axis))(x)
    last = program.jaxpr.eqns[-1]
    assert last.primitive.name == "laid_out_like"
    assert last.outvars[0] is program.jaxpr.outvars[0]
    assert last.outvars[0].aval.shape == x.shape
    np.testing.assert_allclose(jax.vmap(doubled, axis, axis)(x), 2.0 * x)


@pytest.mark.parametrize("axes", [(0, None), (None, 1), (1, 1)])
def test_one_side_may_be_shared(axes):
    x, other = jnp.ones((2, 3, 3)), jnp.zeros((2, 3, 3))
    arrays = [
        one if axis is not None else one[0] for one, axis in zip((x, other), axes, strict=True)
    ]
    found = jax.vmap(laid_out_like, axes)(*arrays)
    assert bool(jnp.all(found == 1.0))


def test_it_has_every_derivative():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)

    def cubes(x):
        return jnp.sum(laid_out_like(x**3, x), axis=1)

    each = jax.vmap(lambda row: cubes(row[:, None]), 1)
    jax.test_util.check_grads(each, (x,), 2, modes=("fwd", "rev"), rtol=1e-2, atol=1e-2)
