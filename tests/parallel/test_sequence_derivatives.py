"""A split sequence in forward mode and second order, under vmap, poisoned, in half precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attention_jax import attend, bind, masks, parallel, scores
from tests.parallel.test_sequence import H, N, mesh_of, normal, qkv

pytestmark = [
    pytest.mark.usefixtures("x64"),
    pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices; see test_devices.py"),
]

LENGTH = 32  # of which each of four devices has two tiles of keys, which travel in two chunks
MASK = masks.Window(5, 2) | masks.Prefix(2)
WEIGHT = normal(H, H)


def split(method, mesh=None, **options):
    mesh = mesh_of() if mesh is None else mesh
    return functools.partial(
        parallel.attend, axis="sp", method=method, mesh=mesh, tile_sizes=(3, 4), **options
    )


DENSE = functools.partial(attend, implementation="dense")


def of_weight(function, weight, arrays):
    score = bind(scores.bilinear, weight=weight)
    return jnp.sum(jnp.sin(function(*arrays, mask=MASK, score=score)))


def close(got, expected, tolerance=1e-11):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), got, expected
    )


def test_forward_mode_and_second_order():
    arrays = tuple(qkv(length=LENGTH))
    directions = tuple(jnp.cos(3 * x) for x in arrays)

    def products(function, weight, arrays, directions):
        of = functools.partial(of_weight, function)
        change = jax.jvp(of, (weight, arrays), (jnp.sin(weight), directions))[1]
        second = jax.jvp(jax.grad(of, (0, 1)), (weight, arrays), (jnp.sin(weight), directions))[1]
        return change, second

    ours, expected = (
        jax.jit(functools.partial(products, function))(WEIGHT, arrays, directions)
        for function in (split("ring", mesh_of((4,))), DENSE)
    )
    close(ours, expected)


def test_vmap():
    many = [jnp.stack([x, -x, jnp.sin(x)]) for x in qkv(length=LENGTH)]

    def of(function, *arrays):
        return jax.vmap(jax.grad(functools.partial(of_weight, function), 1), (None, 0))(
            WEIGHT, tuple(arrays)
        )

    close(*(jax.jit(functools.partial(of, f))(*many) for f in (split("ring"), DENSE)))


@pytest.mark.parametrize("method", ["ring", "all_gather", "all_to_all"])
def test_poison_reaches_who_attends_to_it(method):
    query, key, value = qkv(key_heads=N, length=LENGTH)
    key, value = key.at[0, 20, 1].set(jnp.nan), value.at[1, 3, 2, 0].set(jnp.inf)
    options = {"mask": masks.Causal() & ~masks.Prefix(1)}
    got, expected = (
        jax.jit(functools.partial(f, **options))(query, key, value) for f in (split(method), DENSE)
    )
    assert np.isnan(expected).any() and np.isfinite(expected).any()
    close(got, expected)


def test_half_precision():
    arrays = qkv(length=LENGTH, dtype=jnp.bfloat16)
    got = jax.jit(functools.partial(split("ring"), mask=MASK))(*arrays)
    whole = DENSE(*(x.astype(jnp.float32) for x in arrays), mask=MASK)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), whole, atol=2e-2)


@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        (AxisType.Auto, ("data", "sp", "heads")),
        pytest.param(AxisType.Explicit, ("data", "sp", "heads"), marks=pytest.mark.exhaustive),
        (AxisType.Explicit, ("data",)),  # whole sequences are split by the call
    ],
)
def test_examples_sequence_and_heads_are_split_together(kind, axes):
    mesh = mesh_of((2, 2, 2), ("data", "sp", "heads"), kind)
    place = NamedSharding(mesh, PartitionSpec(*axes))
    arrays = qkv(length=LENGTH)

    def of(function, *arrays):
        total = jax.value_and_grad(functools.partial(of_weight, function, WEIGHT))
        return total(arrays)

    with jax.set_mesh(mesh):
        placed = tuple(jax.device_put(x, place) for x in arrays)
        got = jax.jit(functools.partial(of, split("ring", mesh)))(*placed)
    assert all(g.sharding.is_equivalent_to(place, 4) for g in got[1])
    close(got, jax.jit(functools.partial(of, DENSE))(*arrays))


def test_parts_within_shard_map():
    mesh = mesh_of((2,), ("sp",))
    parts = PartitionSpec(None, "sp")

    def on_part(*arrays):
        return parallel.attend(*arrays, axis="sp", method="ring", mask=MASK, tile_sizes=(3, 4))

    of_all = jax.shard_map(on_part, mesh=mesh, in_specs=(parts,) * 3, out_specs=parts)

    def of(function, arrays):
        return jnp.sum(jnp.sin(function(*arrays)))

    got, expected = (
        jax.jit(jax.value_and_grad(functools.partial(of, function)))(tuple(qkv(length=LENGTH)))
        for function in (of_all, functools.partial(DENSE, mask=MASK))
    )
    close(got, expected)
