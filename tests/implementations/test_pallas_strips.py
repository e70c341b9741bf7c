"""A scan over features by strips of rows is the scan, where rows do not depend on each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl

from attention_jax.implementations.pallas import loops, strips
from attention_jax.implementations.pallas.replay import in_kernel


def summed(term, query, key, weights, reverse=False):
    """Return the sum of a function of query and key features, [T, S]."""

    def add(total, feature):
        return term(total, *feature), None

    total = jnp.zeros((len(query), len(key)))
    return lax.scan(add, total, (query.T, key.T, weights), reverse=reverse)[0]


def tanh(total, query, key, weight):
    return total + weight * jnp.tanh(query[:, None] + key[None, :])


def gelu(total, query, key, weight):
    return 0.9 * total + weight * jax.nn.gelu(query[:, None] * key[None, :])


def above(total, query, key, weight):
    """Return what makes a row depend on others."""
    return total + weight * (query[:, None] - jnp.sum(total, axis=0)[None, :] * key[None, :])


def into(function, scan, *references):
    *given, result = references
    result[...] = in_kernel(function, *(x[...] for x in given), scan=scan)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("term", "features", "reverse"),
    [(tanh, 35, False), (gelu, 5, True), (gelu, 1, False), (above, 5, False)],
)
def test_strips_add_up_what_a_scan_does(monkeypatch, term, features, reverse):
    monkeypatch.setattr(strips, "REGISTERS", 1)
    whole = []
    monkeypatch.setattr(loops, "scan", _noted(whole, loops.scan))
    keys = jax.random.split(jax.random.key(0), 3)
    given = [
        jax.random.normal(key, shape)
        for key, shape in zip(keys, [(24, features), (16, features), (features,)], strict=True)
    ]
    function = functools.partial(summed, term, reverse=reverse)
    call = pl.pallas_call(
        functools.partial(into, function, strips.scan),
        out_shape=jax.ShapeDtypeStruct((24, 16), jnp.float32),
        interpret=True,
    )
    np.testing.assert_allclose(call(*given), function(*given), rtol=1e-5, atol=1e-5)
    assert bool(whole) == (term is above)


def _noted(calls, function):
    def noted(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return noted
