"""Derivatives by what a statistic is bound to, and by what its functions close over."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attend, bind, masks, normalizers
from attention_jax.statistics import Statistic
from attention_jax.statistics.protocol import scaled

LENGTH, HEADS = 9, 2
SEGMENTS = np.repeat([0, 1, 2], LENGTH // 3)
ARGUMENTS = {
    "every pair": {},
    "causal": {"mask": masks.Causal()},
    "segments": {"mask": masks.Segment(jnp.asarray(SEGMENTS))},
    "plus one": {"normalizer": normalizers.softmax_plus_one},
    "sparsemax": {"normalizer": normalizers.sparsemax},
    "mixed": {"mix_weights": lambda weights: jnp.stack([weights[0] - weights[1], weights[1]])},
}


def of_queries(pairs, table):  # linear in the weights, as what is rescaled has to be
    return (pairs.weights * table[pairs.kv_idx] ** 2).sum(1)


def of_final(pairs, table):
    return jnp.sin(pairs.weights * table[pairs.kv_idx]).sum(1)


def of_keys(pairs, table):
    return jnp.sin(pairs.weights * table[pairs.kv_idx]).sum(0)


KINDS = {
    "streams": (of_queries, {"rescale": scaled}),
    "final weights": (of_final, {"rescale": None}),
    "keys": (of_keys, {"rescale": None, "of": "key"}),
}
WAYS = {
    "bound": lambda of_tile, table: bind(of_tile, table=table),
    "closed over": lambda of_tile, table: lambda pairs: of_tile(pairs, table),
}


def loss(kind, way, arguments, options, table, query):
    of_tile, rest = KINDS[kind]
    own = Statistic(WAYS[way](of_tile, table), **rest)
    key, value = (normal(1, LENGTH, HEADS, 4, seed=seed) for seed in (1, 2))
    found = attend(query, key, value, statistics={"own": own}, **arguments, **options)
    return jnp.sum(jnp.sin(found.statistics["own"])) + jnp.sum(found.context**2)


def normal(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


CHEAP = (
    ("segments", "final weights", "closed over"),
    ("mixed", "keys", "closed over"),
)


def cases():
    for one in itertools.product(ARGUMENTS, KINDS, WAYS):
        marks = [pytest.mark.slow] + [pytest.mark.exhaustive] * (one not in CHEAP)
        yield pytest.param(*one, id="-".join(one), marks=marks)


@pytest.mark.parametrize(("name", "kind", "way"), list(cases()))
def test_derivatives_by_the_numbers_of_a_statistic_are_those_of_the_matrix(name, kind, way, x64):
    table, query = normal(LENGTH, seed=3), normal(1, LENGTH, HEADS, 4, seed=4)
    direction = normal(LENGTH, seed=5)
    found = []
    for options in ({"implementation": "dense"}, {"implementation": "tiled", "tile_sizes": (4, 3)}):
        of = jax.jit(functools.partial(loss, kind, way, ARGUMENTS[name], options))
        gradients = jax.grad(of, (0, 1))

        def along(table, gradients=gradients):
            return gradients(table, query)

        found.append(jax.jvp(along, (table,), (direction,)))
    assert abs(found[0][0][0]).max() > 0.1
    for dense, tiled in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(tiled, dense, rtol=1e-11, atol=1e-12)
