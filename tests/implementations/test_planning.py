"""What a trace asks for is asked once, and what its platform does not run is not asked for at all.

Counted, since times depend on the machine: a trace of 2^18 positions takes a fraction of a second.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attend, masks
from attention_jax.base.remembering import one_call, remembered
from attention_jax.implementations import covering, interpreted, progressions, tiles
from attention_jax.implementations.tiles import LatePlan
from attention_jax.masks import EMPTY, FULL, PARTIAL, algebra
from attention_jax.masks.graphs import Edges

LENGTH = 2**18


def trace(mask, length=LENGTH, heads=2, **options):
    x = jax.ShapeDtypeStruct((1, length, heads, 64), jnp.float32)
    return jax.jit(lambda x: attend(x, x, x, mask=mask, **options)).trace(x)


def counted(monkeypatch, owner, name):
    """Count the calls of a function."""
    function, calls = getattr(owner, name), []

    def counting(*arguments, **options):
        calls.append(arguments)
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, counting)
    return calls


@pytest.mark.parametrize(
    ("mask", "asked"),
    [
        (masks.Causal(), 4),  # a sample and the plan, for CPUs and for others
        (masks.Window(700, 0), 6),  # the sample tells that the plane is small, and is it
    ],
    ids=["causal", "window"],
)
def test_a_mask_is_judged_once_for_all_sizes_of_tiles(mask, asked, monkeypatch):
    """However many there are, and although the same call is traced in several ways."""
    judged = counted(monkeypatch, covering.Judged, "of")
    trace(mask)
    assert len(judged) == asked
    judged.clear()
    trace(mask)  # nothing is kept for another call
    assert len(judged) == asked


def test_tiles_of_kernels_are_not_looked_for_where_a_program_runs_on_a_cpu(monkeypatch):
    def refuse(self):
        raise AssertionError("a program for a CPU looks for the tiles of kernels")

    monkeypatch.setattr(LatePlan, "whole", property(refuse))
    traced = trace(masks.Causal(), 1024)
    assert "attention_kernel" in str(traced.jaxpr) or "later" in str(traced.jaxpr)
    traced.lower()
    with pytest.raises(AssertionError, match="looks for the tiles of kernels"):
        traced.lower(lowering_platforms=("tpu",))


@pytest.mark.slow
def test_tiles_of_kernels_are_those_of_the_mask_when_it_was_traced():
    reach = 100
    mask = masks.as_mask(lambda q_idx, kv_idx: abs(q_idx - kv_idx) <= reach)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 320, 1, 16)), jnp.float32)
    kernels = {"implementation": "pallas", "tile_sizes": (32, 32), "mask": mask}
    traced = jax.jit(lambda x: attend(x, x, x, **kernels)).trace(x)
    expected = attend(x, x, x, mask=mask, implementation="dense")
    reach = 0
    with interpreted():
        found = traced.lower().compile()(x)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class OfTheUser(masks.Causal):
    """A mask that is none of the library."""


def test_masks_that_say_the_same_at_any_time():
    ids = np.arange(4)
    for mask in (masks.Causal(), masks.Segment(ids) | masks.Heads([masks.Window(1, 1)])):
        assert algebra.is_constant(mask)
    changing = masks.as_mask(lambda q_idx, kv_idx: q_idx > kv_idx)
    for mask in (changing, masks.Block(changing, 2), masks.Heads([changing]), OfTheUser()):
        assert not algebra.is_constant(mask & masks.Causal())


@pytest.mark.parametrize(
    "mask",
    [masks.Heads([masks.Causal(), masks.Window(40, 0)]), masks.Dilated(9, 9, np.array([[1, 3]]))],
    ids=["heads", "dilated"],
)
def test_heads_with_masks_of_their_own_within_jit(mask):
    """In a program whose platform is not known NumPy's arrays are vectorised over, too."""
    assert trace(mask, 320).lower().out_info.shape == (1, 320, 2, 64)


def test_edges_are_listed_once_a_call(monkeypatch):
    listed = counted(monkeypatch, masks.graphs, "_distinct")
    ring = np.arange(LENGTH)
    trace(Edges(np.stack([ring, (ring + 7) % LENGTH], axis=1)))
    assert len(listed) == 1


def test_what_is_remembered_ends_with_the_call():
    asked = []
    with one_call():
        remembered(asked.append, "outer")
        with one_call():
            remembered(asked.append, "inner")
            remembered(asked.append, "inner")
            remembered(asked.append, "outer")
        remembered(asked.append, "inner")
        remembered(asked.append, "outer")
    remembered(asked.append, "outer")
    assert asked == ["outer", "inner", "outer", "inner", "outer"]


MASKS = {
    "causal": masks.Causal(),
    "strided": masks.Strided(24),
    "segments": masks.Segment(np.repeat(np.arange(10), 50)),
    "graph": masks.edges([(i, (i + step) % 500) for i in range(500) for step in (0, 1, 7)], 500),
    "all": masks.Full(),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_cells_of_larger_tiles_are_made_of_those_of_small_ones(mask):
    pairs, size = (500, 470), (2, 3)
    judged = covering.Judged.of(mask, pairs, size)
    small = np.asarray(mask.tiles(*pairs, *size))
    for rows, cells in ((1, 1), (2, 4), (8, 1), (16, 16)):
        joined = judged.joined(rows, cells)
        shape = -(-small.shape[0] // rows), -(-small.shape[1] // cells)
        expected = np.zeros(shape, int)
        for row, cell in np.ndindex(shape):
            those = small[row * rows : (row + 1) * rows, cell * cells : (cell + 1) * cells]
            expected[row, cell] = those.flat[0] if (those == those.flat[0]).all() else PARTIAL
        places = np.indices(shape)
        np.testing.assert_array_equal(joined.at(*places), expected)
        live = np.zeros(shape, bool)
        for row, begin, end in zip(*joined.live[:3], strict=True):
            live[row, begin:end] = True
        np.testing.assert_array_equal(live, expected != EMPTY)


@pytest.mark.parametrize("reach", [0, 1, 5])
def test_tiles_of_edges_are_counted_wherever_they_lie(reach):
    """Cut once or many times by the limits of others, full and empty, beyond the last node."""
    rng = np.random.default_rng(reach)
    neighbors = rng.integers(-1, 40, (37, 6 * reach + 1), dtype=np.int32)
    neighbors[5:9] = np.arange(6 * reach + 1)
    mask = Edges(neighbors)
    dense = np.zeros((60, 60), int)
    dense[:37, :60] = np.asarray(mask.to_dense(37, 60))
    low, high = np.sort(rng.integers(0, 50, (2, 2, 300)), axis=0)
    for limits in ((low, high), (low // 6 * 6, low // 6 * 6 + 5), (low, low)):
        begin, end = (limit.astype(np.int32) for limit in limits)
        found = mask(*(masks.intervals.Interval(*of) for of in zip(begin, end, strict=True))).state
        for n, state in enumerate(found):
            tile = dense[begin[0, n] : end[0, n] + 1, begin[1, n] : end[1, n] + 1]
            count = tile.sum()
            expected = EMPTY if count == 0 else FULL if count == tile.size else PARTIAL
            assert state == expected


def test_a_table_without_order_is_given_up_early(monkeypatch):
    looked = counted(monkeypatch, progressions, "_breaks")
    table = np.random.default_rng(0).integers(0, 99, (2**18, 2), dtype=np.int32)
    assert progressions.computed(table) is table
    assert sum(len(values) for (values,) in looked) < len(table) / 4


def test_random_blocks_are_judged_near_what_is_drawn(monkeypatch):
    asked = []
    states = covering._states

    def counting(*arguments):
        found = states(*arguments)
        asked.append(found.size)
        return found

    monkeypatch.setattr(covering, "_states", counting)
    mask = masks.random_blocks(jax.random.key(0), LENGTH, size=64, num_blocks=2)
    mask = jax.tree.map(np.asarray, mask)
    plan = tiles.make_plan(mask, (LENGTH, LENGTH), (128, 128))
    assert sum(asked) < 2**22  # of 2^24 cells
    assert len(plan.starts) < 2**15
