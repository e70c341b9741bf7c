"""Which tiles, methods and messages follow from shapes, mask and order; nothing is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

import attention_jax
from attention_jax import masks, normalizers, parallel
from attention_jax.base import ShapeError

MESH = AbstractMesh((2, 4), ("dp", "sp"))


def explain(length=4096, heads=(8, 8), **options):
    query, key = (jax.ShapeDtypeStruct((1, length, n, 64), jnp.float32) for n in heads)
    return parallel.explain(query, key, key, **({"axis": "sp", "mesh": MESH} | options))


def test_a_step_without_live_tiles_moves_nothing():
    window = explain(mask=masks.Window(256, 0), method="ring")
    assert window.steps == 1
    assert window.bytes == 1024 * 8 * (64 + 64) * 4
    blocks = masks.Segment(np.repeat(np.arange(4), 1024))
    assert explain(mask=blocks, method="ring").bytes == 0
    assert explain(method="ring").steps == 3


def test_an_order_balances_a_causal_mask():
    order = parallel.deal(masks.Causal(), 4096, 4)
    contiguous, dealt = (
        explain(mask=masks.Causal(), method="ring", order=x, tile_sizes=(128, 128))
        for x in (None, order)
    )
    assert contiguous.dearest > 1.5
    assert dealt.dearest <= 1.05
    assert sum(dealt.live) == sum(contiguous.live)


PACKED = np.repeat(np.arange(40), np.random.default_rng(3).permutation(np.arange(40) * 21 + 2))


@pytest.mark.parametrize(
    "mask",
    [masks.Causal(), masks.Segment(PACKED[: 2**14]), masks.bigbird(jax.random.key(0), 2**14)],
    ids=["causal", "packed", "BigBird"],
)
def test_four_devices_do_a_quarter_each(mask):
    """The dearest of them has at most 1 / 3.8 of the products of one device, at S = 16k."""
    x = jax.ShapeDtypeStruct((1, 2**14, 8, 64), jnp.float32)
    whole = attention_jax.explain(x, x, x, mask=mask)
    order = parallel.deal(mask, 2**14, 4)
    found = explain(length=2**14, mask=mask, method="ring", order=order)
    dearest = max(found.live) * np.prod(found.tile)
    assert dearest <= (whole.partial + whole.full) * np.prod(whole.tile) / 3.8


def test_none_takes_what_moves_least():
    assert explain().method == "all_to_all"
    assert explain(heads=(8, 2)).method == "all_gather"
    assert explain(heads=(8, 2), length=2**16, mask=masks.Causal()).method == "ring"
    assert explain(normalizer=normalizers.hard).method == "all_to_all"


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"axis": "tp"}, ValueError, "axis must be one of the mesh, which has 'dp' of 2, 'sp' of"),
        ({"mesh": None}, ValueError, "no mesh is set; call it within jax.set_mesh"),
        ({"length": 4098}, ShapeError, "must divide the queries T, got T = 4098; pad them to 4100"),
        ({"method": "tree"}, ValueError, "one of ring, all_gather, all_to_all, got 'tree'"),
        ({"method": "all_to_all", "heads": (6, 6)}, ValueError, "got K = 6; use 'ring'"),
        (
            {"method": "ring", "normalizer": normalizers.hard},
            ValueError,
            "'ring' joins blocks of keys, and hard needs a whole row",
        ),
        ({"order": np.zeros(4096, int)}, ShapeError, "each position from 0 to 4095 once"),
        ({"return_weights": True}, TypeError, "return_weights cannot be given for a split"),
    ],
)
def test_what_cannot_be_done_is_said(options, kind, words):
    with pytest.raises(kind, match=words.replace("(", r"\(")):
        explain(**options)
