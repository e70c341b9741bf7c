"""Positions are dealt so that no device has more than 1.05 times the mean of live tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention_jax import ShapeError, masks, parallel

LENGTH = 2**14


@functools.cache
def documents(mean, examples=None):
    """Return the ids of documents of many lengths, packed into sequences: [T], or [B, T]."""
    if examples is not None:
        return np.stack([documents(mean + n) for n in range(examples)])
    lengths = np.random.default_rng(mean).exponential(mean, size=LENGTH).astype(int) + 1
    return np.repeat(np.arange(LENGTH), lengths)[:LENGTH]


MASKS = {
    "all": lambda: None,
    "causal": masks.Causal,
    "window": lambda: masks.Window(512, 512),
    "causal window": lambda: masks.Window(512, 0),
    "packed": lambda: masks.Segment(documents(1000)),
    "packed, causal": lambda: masks.Segment(documents(1000)) & masks.Causal(),
    "short documents": lambda: masks.Segment(documents(200)) & masks.Causal(),
    "packed by example": lambda: masks.Segment(documents(1000, 2)) & masks.Causal(),
    "padded": lambda: masks.Lengths(9000, 9000) & masks.Causal(),
    "prefix": lambda: masks.Prefix(4000) | masks.Causal(),
    "Longformer": lambda: masks.longformer(512, tokens=64),
    "Longformer, 16 tokens": lambda: masks.longformer(512, tokens=16),
    "Longformer, one token": lambda: masks.longformer(512, tokens=1),
    "BigBird": lambda: masks.bigbird(jax.random.key(0), LENGTH),
    "strided": lambda: masks.sparse_strided(128),
    "fixed": lambda: masks.sparse_fixed(128),
    "heads": lambda: masks.Heads([masks.Causal(), masks.Window(512, 512)]),
    "one's own": lambda: lambda q_idx, kv_idx: q_idx * 2 >= kv_idx,
}


@pytest.mark.parametrize("devices", [4, 8])
@pytest.mark.parametrize("name", MASKS)
def test_the_dearest_device_has_little_more_than_the_mean(name, devices):
    mask = MASKS[name]()
    order = parallel.deal(mask, LENGTH, devices)
    found = parallel.load(mask, LENGTH, devices, order)
    assert found.dearest <= 1.05
    assert np.array_equal(np.sort(order), np.arange(LENGTH))
    consecutive = parallel.load(mask, LENGTH, devices)
    assert found.devices.sum() <= consecutive.devices.sum()
    if consecutive.dearest <= 1.05:
        assert np.array_equal(order, np.arange(LENGTH))


def test_of_a_causal_mask_every_device_has_a_cheap_and_a_dear_block():
    order = parallel.deal(masks.Causal(), 64, 4).reshape(4, 2, 8)
    assert np.array_equal(order[:, :, 0] // 8, [[0, 7], [1, 6], [2, 5], [3, 4]])
    assert np.array_equal(order - order[:, :, :1], np.broadcast_to(np.arange(8), (4, 2, 8)))


def test_devices_of_a_ring_do_not_wait_for_each_other():
    order = parallel.deal(masks.Causal(), LENGTH, 8)
    assert parallel.load(masks.Causal(), LENGTH, 8, order).waiting <= 1.01
    assert parallel.load(masks.Causal(), LENGTH, 8).waiting > 1.8


def test_keys_move_only_where_they_are_attended_to():
    assert parallel.load(masks.Window(512, 0), LENGTH, 8).moves == 1
    assert parallel.load(masks.Window(512, 512), LENGTH, 8).moves == 2
    assert parallel.load(None, LENGTH, 8).moves == 7
    assert parallel.load(masks.Segment(np.arange(LENGTH) // 2048), LENGTH, 8).moves == 0


def test_blocks_stay_together_where_their_size_is_given():
    order = parallel.deal(masks.Segment(documents(1000)), LENGTH, 4, block=64)
    blocks = order.reshape(-1, 64)
    assert np.array_equal(blocks, blocks[:, :1] + np.arange(64))
    assert (np.diff(order.reshape(4, -1), axis=1) > 0).all()


def by_pairs(mask, order, key_order, devices, tile):
    """Count the pairs of tiles with an allowed pair, from the whole plane of pairs."""
    allowed = np.asarray(mask.to_dense(len(order), len(key_order)))[order][:, key_order]
    total = np.zeros((devices, devices), int)
    rows, columns = (np.array_split(np.arange(len(x)), devices) for x in (order, key_order))
    for d, e in np.ndindex(devices, devices):
        part = allowed[rows[d]][:, columns[e]]
        for q in range(0, len(part), tile[0]):
            for k in range(0, part.shape[1], tile[1]):
                cell = part[q : q + tile[0], k : k + tile[1]]
                total[d, e] += cell.size * cell.any()
    return total


@pytest.mark.parametrize("tile", [(1, 1), (4, 4), (3, 5), (8, 2)])
@pytest.mark.parametrize("is_dealt", [False, True])
def test_the_load_is_that_of_the_tiles_with_an_allowed_pair(tile, is_dealt):
    mask = masks.Causal() & masks.Window(9, 0)
    order = parallel.deal(masks.Causal(), 32, 2, block=4) if is_dealt else np.arange(32)
    found = parallel.load(mask, 32, 2, order, tile_sizes=tile)
    assert np.array_equal(found.pairs, by_pairs(mask, order, order, 2, tile))


def test_a_memory_keeps_its_own_order():
    mask = masks.Causal(offset=8)
    order = parallel.deal(mask, (64, 72), 4, block=4, tile_sizes=(4, 6))
    assert parallel.load(mask, (64, 72), 4, order, tile_sizes=(4, 6)).dearest <= 1.05
    key_order = np.random.default_rng(0).permutation(72)
    found = parallel.load(mask, (64, 72), 4, order, key_order=key_order, tile_sizes=(4, 5))
    assert np.array_equal(found.pairs, by_pairs(mask, order, key_order, 4, (4, 5)))


def test_work_is_summed_over_examples_and_heads():
    ids = documents(1000, 2)
    both = parallel.load(masks.Segment(ids), LENGTH, 4)
    each = [parallel.load(masks.Segment(one), LENGTH, 4) for one in ids]
    assert np.array_equal(both.pairs, each[0].pairs + each[1].pairs)


def test_what_only_jit_knows_counts_as_live():
    orders = []

    @jax.jit
    def traced(ids):
        orders.append(parallel.deal(masks.Causal() & masks.Segment(ids), 1024, 4))
        return ids

    traced(jnp.zeros(1024, int))
    assert np.array_equal(orders[0], parallel.deal(masks.Causal(), 1024, 4))


def test_a_mask_that_allows_nothing_is_balanced():
    found = parallel.load(~masks.Full(), 64, 4)
    assert (found.dearest, found.waiting, found.moves) == (1.0, 1.0, 0)
    assert np.array_equal(parallel.deal(~masks.Full(), 64, 4), np.arange(64))


@given(st.permutations(range(12)), st.integers(0, 2))
def test_restore_is_the_inverse_of_permute(order, axis):
    shape = tuple(12 if n == axis else n + 2 for n in range(3))
    x, order = np.arange(np.prod(shape)).reshape(shape), np.array(order)
    for array in (x, jnp.asarray(x)):
        dealt = parallel.permute(array, order, axis)
        assert isinstance(dealt, type(array))
        assert np.array_equal(np.asarray(dealt).take(3, axis), x.take(order[3], axis))
        assert np.array_equal(parallel.restore(dealt, order, axis), x)
        assert parallel.permute(array, None, axis) is array
        assert parallel.restore(array, None, axis) is array


def test_an_order_may_be_known_only_in_jit():
    order = jnp.array([2, 0, 1])
    x = np.array([[5, 6, 7]])
    assert np.array_equal(jax.jit(parallel.permute)(x, order), [[7, 5, 6]])
    assert np.array_equal(jax.jit(parallel.restore)(x, order), [[6, 7, 5]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: parallel.deal(masks.Causal(), 1001, 8),
            "deal: the length T = 1001 must be a multiple of devices = 8; pad the sequence to "
            "1008.",
        ),
        (
            lambda: parallel.deal(masks.Causal(), 1000, 4, block=64),
            "deal: the length T = 1000 must be a multiple of devices = 4 x block = 64, which is "
            "256; pad the sequence to 1024.",
        ),
        (
            lambda: parallel.load(masks.Causal(), (8, 9), 2),
            "load: the length S = 9 must be a multiple of devices = 2; pad the sequence to 10.",
        ),
        (
            lambda: parallel.deal(masks.Segment(np.zeros(8, int)), 16, 2),
            "deal: Segment.query_ids must hold an entry for each of the T = 16 positions, got "
            "shape (8,); build the mask for this length.",
        ),
        (
            lambda: parallel.load(masks.Causal(), 4, 2, np.array([0, 1, 1, 3])),
            "load: an order [T] must hold each of the 4 positions once, as parallel.deal returns "
            "it, got int64 of shape (4,).",
        ),
        (
            lambda: parallel.permute(np.zeros((2, 5)), np.arange(4)),
            "permute: an order [T] must hold each of the 5 positions once, as parallel.deal "
            "returns it, got int64 of shape (4,).",
        ),
        (
            lambda: parallel.restore(np.zeros((2, 2)), np.array([0.0, 1.0])),
            "restore: an order [T] must hold each of the 2 positions once, as parallel.deal "
            "returns it, got float64 of shape (2,).",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ShapeError) as refused:
        call()
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: parallel.deal(masks.Causal(), 16, 0),
            "deal: devices must be 1 or more, got 0.",
        ),
        (
            lambda: parallel.deal(masks.Causal(), 16, 2, block=0),
            "deal: block must be 1 or more, got 0.",
        ),
        (
            lambda: parallel.load(masks.Causal(), 16, 2, tile_sizes=(8, 0)),
            "load: tile_sizes must be 1 or more, got [8 0].",
        ),
        (
            lambda: parallel.permute(np.zeros((2, 5)), np.arange(5), axis=2),
            "permute: x has no axis 2, got shape (2, 5).",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError) as refused:
        call()
    assert str(refused.value) == message
