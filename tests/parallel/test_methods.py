"""Which tiles, methods and messages follow from shapes, mask and order; nothing is computed."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

import attention_jax
from attention_jax import bind, masks, normalizers, parallel
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


def test_tiles_suit_the_platform():
    tile = {name: explain(method="ring", platform=name).tile for name in ("cpu", "tpu", "gpu")}
    assert tile == {"cpu": (512, 512), "tpu": (1024, 1024), "gpu": (1024, 1024)}
    assert explain(method="ring").tile == tile[jax.default_backend()]
    assert explain(method="all_to_all", platform="tpu").tile == (1024, 1024)


@pytest.mark.slow
def test_a_program_has_the_tiles_of_the_platform_that_it_is_lowered_for():
    """Traced once for all platforms; what is for another one leaves no memory behind."""
    mesh = jax.make_mesh((1,), ("sp",), axis_types=(AxisType.Auto,))
    split = functools.partial(parallel.attend, axis="sp", method="ring", mesh=mesh)
    x = jax.ShapeDtypeStruct((1, 1024, 2, 4), jnp.float32)

    def compiled(**options):
        of = jax.grad(lambda *arrays: split(*arrays, **options).sum(), (0, 1, 2))
        return jax.jit(of).lower(x, x, x).compile()

    program, as_told = compiled(), compiled(tile_sizes=(512, 512))
    found = re.findall(r"f32\[(?:512,512|1024,1024)\]", program.as_text())
    assert set(found) == {"f32[512,512]"}
    temporaries, others = (one.memory_analysis().temp_size_in_bytes for one in (program, as_told))
    assert temporaries <= 1.01 * others


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"platform": "npu"}, ValueError, "platform must be None or one of cpu, gpu, tpu, got"),
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
        (
            {
                "method": "all_gather",
                "normalizer": bind(normalizers.contextual_positions, table=np.ones((3, 64))),
            },
            ValueError,
            "'all_gather' joins blocks of keys, and contextual_positions needs a whole row",
        ),
        ({"order": np.zeros(4096, int)}, ShapeError, "each position from 0 to 4095 once"),
        ({"return_weights": True}, TypeError, "return_weights cannot be given for a split"),
    ],
)
def test_what_cannot_be_done_is_said(options, kind, words):
    with pytest.raises(kind, match=words.replace("(", r"\(")):
        explain(**options)
