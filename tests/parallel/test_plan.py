"""Keys travel so that each device has them at the step whose tiles need them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from attention_jax import masks, parallel
from attention_jax.normalizers import softmax
from attention_jax.parallel.placement import Axis, Placement
from attention_jax.parallel.plan import make_plan
from attention_jax.request import Request
from attention_jax.scores import scaled_dot

LENGTH, DEVICES = 256, 8


def plan_of(mask, order=None):
    x = jax.ShapeDtypeStruct((1, LENGTH, 1, 4), jnp.float32)
    fixed = {"score": scaled_dot, "bias": None, "normalizer": softmax, "dropout_rate": 0.0}
    fixed |= {"dropout_key": None, "tile_sizes": (8, 8), "return_logsumexp": False}
    axis = Axis("sp", AbstractMesh((DEVICES,), ("sp",)), is_manual=False)

    def planned(x):
        request = Request.of(x, x, x, mask=mask, implementation=None, return_weights=False, **fixed)
        plans.append(
            make_plan(request, Placement(axis, request.pairs, (order, order)), False, "cpu")
        )
        return x

    plans = []
    jax.eval_shape(planned, x)
    return plans[0]


SHUFFLED = np.random.default_rng(0).permutation(LENGTH).astype(np.int32)
MASKS = {
    "causal": masks.Causal(),
    "window before": masks.Window(40, 0),
    "window": masks.Window(70, 70),
    "far": lambda q_idx, kv_idx: (q_idx - kv_idx >= 130) & (q_idx - kv_idx < 150),
    "blocks": masks.Segment(np.arange(LENGTH) // 32),
    "blocks of three": masks.Segment(np.arange(LENGTH) // 96),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("order", [None, "dealt", "shuffled"])
def test_keys_are_there_when_their_tiles_are_visited(name, order):
    mask = masks.as_mask(MASKS[name])
    if order is not None:
        dealt = parallel.deal(mask, LENGTH, DEVICES, block=8, tile_sizes=(8, 8))
        order = SHUFFLED if order == "shuffled" else dealt
    plan = plan_of(mask, order)
    visited = np.zeros((DEVICES, DEVICES), bool)
    for chain in plan.chains:
        keys = np.arange(DEVICES)  # whose keys each device has
        for step, moves in enumerate(chain.moves):
            if step or chain.first:
                moved = np.full(DEVICES, -1)
                for source, destination in moves:
                    moved[destination] = (keys if step else np.arange(DEVICES))[source]
                keys = moved
            live = (chain.states[:, step] != masks.EMPTY).any(axis=(0, 2))
            wanted = (np.arange(DEVICES) + chain.first + step * chain.stride) % DEVICES
            assert np.array_equal(keys[live], wanted[live])
            visited[np.flatnonzero(live), wanted[live]] = True
    stored = np.arange(LENGTH) if order is None else order
    allowed = np.asarray(mask.to_dense(LENGTH, LENGTH))[stored][:, stored]
    needed = allowed.reshape(DEVICES, 32, DEVICES, 32).any(axis=(1, 3))
    assert (visited >= needed).all()


def test_steps_without_live_tiles_are_left_out():
    runs = [(chain.first, chain.stride, chain.steps) for chain in plan_of(MASKS["far"]).chains]
    assert runs == [(4, -1, 2)]  # keys of the device four before, and then of five before
    assert not any(pairs for chain in plan_of(MASKS["blocks"]).chains for pairs in chain.moves)


def test_keys_travel_in_chunks_unless_devices_would_wait():
    """Of a causal mask each chunk has early and late keys, where a device has both."""
    dealt = parallel.deal(MASKS["causal"], LENGTH, DEVICES, block=16, tile_sizes=(8, 8))
    assert plan_of(MASKS["causal"], dealt).chunks == 2
    assert plan_of(MASKS["causal"]).chunks == 4  # its last device has most at every step
    assert plan_of(None).chunks == 4
    assert plan_of(MASKS["blocks"]).received == 8
