"""Attention over a split sequence is attention over the whole one, in every combination."""

import functools
import itertools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attention_jax import attend, bind, masks, normalizers, parallel, per_head, scores

pytestmark = [
    pytest.mark.usefixtures("x64"),
    pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices; see test_devices.py"),
]

B, N, K, H, V = 2, 4, 2, 4, 3
T = 28
TILES = (3, 4)
CHUNKED = (3, 7)  # of two devices, whose keys are two such tiles, and travel in two chunks
ORDER = np.random.default_rng(0).permutation(T)


def mesh_of(shape=(2,), names=("sp",), kind=AxisType.Auto):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=devices)


def qkv(key_heads=K, length=T, dtype=jnp.float64):
    shapes = [(B, length, N, H), (B, length, key_heads, H), (B, length, key_heads, V)]
    rngs = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(rng, shape, dtype) for rng, shape in zip(rngs, shapes, strict=True)]


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape)


@scores.positional
def fading_dot(query, key, rate, *, q_idx, kv_idx):
    distance = jnp.abs(q_idx[:, None] - kv_idx[None, :]).astype(query.dtype)
    return (query @ key.T) * jnp.exp(-rate * distance)


def recency(q_idx, kv_idx, rate):
    return -rate * jnp.log1p(abs(q_idx - kv_idx).astype(jnp.float64))


# For each case its parameters, and a function from these to options of `attend`.
CASES = {
    "causal, grouped": ({}, lambda: {"mask": masks.Causal()}),
    "window, positional score, plus one, dropout": (
        {"rate": 0.1},
        lambda rate: {
            "mask": masks.Window(5, 2) & ~masks.Prefix(6),  # with empty rows
            "score": bind(fading_dot, rate=rate),
            "normalizer": normalizers.softmax_plus_one,
            "dropout_rate": 0.3,
            "dropout_key": jax.random.key(3),
        },
    ),
    "segments in jit, bias per head": (
        {"rate": normal(N), "ids": np.array([[0] * 9 + [1] * (T - 9), [2] * 20 + [3] * (T - 20)])},
        lambda rate, ids: {
            "mask": masks.Segment(ids) & masks.Causal(),
            "bias": per_head(bind(recency, rate=rate)),
        },
    ),
    "lengths, bias of pairs, score and sink per head": (
        {
            "bias": normal(B, N, T, T),
            "lengths": np.array([T - 9, 5]),
            "weight": normal(N, H, H),
            "sink": normal(N),
        },
        lambda bias, lengths, weight, sink: {
            "mask": masks.Lengths(lengths, lengths),
            "bias": bias,
            "score": scores.scaled(per_head(bind(scores.bilinear, weight=weight)), 0.5),
            "normalizer": per_head(bind(normalizers.softmax_with_sink, sink=sink)),
        },
    ),
    "array of pairs, bias of keys, additive score, sink": (
        {
            "bias": normal(N, 1, T),
            "w": normal(H, 3),
            "u": normal(H, 3),
            "v": normal(3),
            "sink": np.float64(0.3),
        },
        lambda bias, w, u, v, sink: {
            "mask": np.asarray(normal(B, 1, T, T) > 0.3),
            "bias": bias,
            "score": bind(scores.additive, query_weight=w, key_weight=u, value=v, bias=0 * v),
            "normalizer": bind(normalizers.softmax_with_sink, sink=sink),
        },
    ),
    "sigmoid, dropout": (
        {"shift": np.float64(-1.0)},
        lambda shift: {
            "normalizer": bind(normalizers.sigmoid, shift=shift),
            "mask": masks.Causal(),
            "dropout_rate": 0.4,
            "dropout_key": jax.random.key(7),
        },
    ),
    "captured": (
        {"scale": np.float64(0.7), "offset": normal(T)},
        lambda scale, offset: {
            "score": lambda query, key: scale * (query @ key.T),
            "bias": lambda q_idx, kv_idx: offset[q_idx] * offset[kv_idx],
            "mask": lambda q_idx, kv_idx: q_idx + jnp.int32(scale * 3) >= kv_idx,
        },
    ),
}


def loss(function, options_of, arrays, parameters):
    """Return a number that depends on all of the result."""
    options = options_of(**parameters)
    wants = options.get("normalizer") is None or "sigmoid" not in str(options["normalizer"])
    found = function(*arrays, return_logsumexp=wants, **options)
    context, logsumexp = (found.context, found.logsumexp) if wants else (found, jnp.zeros(1))
    shown = jnp.where(jnp.isfinite(logsumexp), logsumexp, 0.0)
    return jnp.sum(jnp.sin(context)) + jnp.sum(jnp.cos(shown)), (context, logsumexp)


def stored(order, x):
    return x if order is None else x[:, order]


def restored(order, x):
    return x if order is None or x.ndim < 3 else x[:, np.argsort(order)]


def split_attend(query, key, value, order=None, **options):
    """Attend in another order of storage, and undo it."""
    arrays = [stored(order, x) for x in (query, key, value)]
    found = parallel.attend(*arrays, axis="sp", order=order, **options)
    return jax.tree.map(functools.partial(restored, order), found)


def gradients(function, case, arrays):
    """Return value, result and gradients with respect to arrays and real parameters."""
    parameters, options_of = CASES[case]
    real = {k: v for k, v in parameters.items() if not np.issubdtype(np.asarray(v).dtype, int)}
    rest = {k: v for k, v in parameters.items() if k not in real}

    def of(arrays, real, rest):
        return loss(function, options_of, arrays, real | rest)

    return jax.jit(jax.value_and_grad(of, (0, 1), has_aux=True))(arrays, real, rest)


def close(got, expected):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-11, rtol=1e-11)


CAUSAL, WINDOW, SEGMENTS, LENGTHS, PAIRS, SIGMOID, CAPTURED = CASES
COMBINATIONS = [  # of two devices, no keys travel on
    pytest.param(CAUSAL, "ring", 4, ORDER, TILES, marks=pytest.mark.exhaustive),
    pytest.param(WINDOW, "ring", 2, None, TILES, marks=pytest.mark.exhaustive),
    (SEGMENTS, "ring", 4, ORDER, TILES),
    (LENGTHS, "ring", 2, ORDER, CHUNKED),
    pytest.param(PAIRS, "ring", 2, None, CHUNKED, marks=pytest.mark.exhaustive),
    (SIGMOID, "ring", 2, None, CHUNKED),
    (CAPTURED, "ring", 2, None, TILES),
    pytest.param(LENGTHS, "all_gather", 2, ORDER, TILES, marks=pytest.mark.exhaustive),
    (CAUSAL, "all_gather", 2, ORDER, TILES),
    (WINDOW, "all_to_all", 2, ORDER, None),
    (PAIRS, "all_to_all", 2, None, None),
]


@pytest.mark.parametrize(("case", "method", "devices", "order", "tile"), COMBINATIONS)
def test_as_on_one_device(case, method, devices, order, tile):
    arrays = qkv(key_heads=4 if method == "all_to_all" else K)
    options = {"tile_sizes": tile}
    mesh = mesh_of((devices,))
    ours = functools.partial(split_attend, method=method, order=order, mesh=mesh, **options)
    dense = functools.partial(attend, implementation="dense")
    close(gradients(ours, case, arrays), gradients(dense, case, arrays))


def test_memory_of_a_device_falls_as_one_over_the_devices():
    """All of it within 15 %, from one device on; a device holds chunks of what is not its own."""
    arrays = [jax.ShapeDtypeStruct((1, 4096, 4, 64), "float32")] * 4

    def of(split, *arrays):
        return jax.vjp(split, *arrays[:3])[1](arrays[3])

    def memory(devices):
        mesh = mesh_of((devices,))
        split = functools.partial(
            parallel.attend, axis="sp", method="ring", mesh=mesh, tile_sizes=(32, 32)
        )
        place = NamedSharding(mesh, PartitionSpec(None, "sp"))
        program = jax.jit(functools.partial(of, split), in_shardings=place).lower(*arrays)
        found = program.compile().memory_analysis()
        return found.temp_size_in_bytes + found.output_size_in_bytes + found.argument_size_in_bytes

    found = [memory(devices) for devices in (1, 2, 4, 8)]
    ratios = [one / two for one, two in itertools.pairwise(found)]
    assert min(ratios) >= 2 / 1.15, (found, ratios)


def test_a_program_can_be_exported():
    """With gradients, for as many devices: nothing but what `jax.export` can write down."""
    mesh = mesh_of((2,))
    place = NamedSharding(mesh, PartitionSpec(None, "sp"))
    ring = functools.partial(parallel.attend, axis="sp", method="ring", mesh=mesh)
    of = jax.grad(lambda *arrays: ring(*arrays, mask=masks.Causal(), tile_sizes=TILES).sum())
    arrays = [jax.device_put(x, place) for x in qkv(key_heads=N)]
    exported = jax.export.export(jax.jit(of, in_shardings=place))(*arrays)
    exported = jax.export.deserialize(exported.serialize())
    assert exported.nr_devices == 2
    got = jax.jit(exported.call)(*arrays)
    whole = lambda *arrays: attend(*arrays, mask=masks.Causal(), implementation="dense").sum()  # noqa: E731
    close(got, jax.grad(whole)(*arrays))


def test_keys_travel_to_those_that_attend_to_them_alone():
    arrays = [jax.ShapeDtypeStruct((1, 64, 2, 4), "float32")] * 3
    mesh = mesh_of((8,))
    ring = functools.partial(
        parallel.attend, axis="sp", method="ring", mesh=mesh, tile_sizes=(4, 4)
    )

    def moved(mask):
        text = jax.jit(functools.partial(ring, mask=mask)).lower(*arrays).compile().as_text()
        assert "all-gather" not in text
        return re.findall(r"source_target_pairs=\{(\S*)\}", text)

    neighbours = ",".join(f"{{{device},{device + 1}}}" for device in range(7))
    assert set(moved(masks.Window(8, 0))) == {neighbours}
    onward = neighbours.removeprefix("{0,1},")  # keys of 0 to 6 come from the device that has them
    assert set(moved(masks.Window(16, 0))) == {neighbours, onward}
    assert not moved(masks.Segment(np.arange(64) // 8))
