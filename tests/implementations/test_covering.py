"""Tiles are found without looking at the whole plane, and held without listing them all."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_jax import attend, masks
from attention_jax.implementations import cheapest, covering, progressions, tiles
from attention_jax.masks import EMPTY

LENGTH = 300
RING = [(i, (i + step) % LENGTH) for i in range(LENGTH) for step in (0, 1, 7)]
IDS = np.repeat(np.arange(10), 30)
MASKS = {
    "causal": masks.Causal(),
    "all": masks.Full(),
    "none": ~masks.Full(),
    "band or prefix": masks.Window(20, 5) | masks.Prefix(33),
    "longformer": masks.longformer(8, np.arange(LENGTH) % 70 == 0),
    "every fourth": masks.as_mask(lambda q_idx, kv_idx: (q_idx - kv_idx) % 64 == 0),
    "segments": masks.Segment(IDS) & masks.Causal(),
    "graph": masks.edges(RING, LENGTH),
    "unreadable": masks.Table(np.eye(LENGTH, dtype=bool)),
}


def cells_of(runs, rows):
    live = np.zeros((rows, runs.cells), bool)
    for row, begin, end in zip(runs.row, runs.begin, runs.end, strict=True):
        assert not live[row, max(begin - 1, 0) : end].any()  # neither overlapping nor touching
        live[row, begin:end] = True
    return live


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_live_cells_are_those_of_the_whole_grid(mask):
    for length, size in ((LENGTH, (2, 3)), (97, (1, 1))):
        if length != LENGTH and isinstance(mask, masks.Table):
            continue
        pairs = (LENGTH, length)
        whole = np.asarray(mask.tiles(*pairs, *size))
        judged = covering.Judged.of(mask, pairs, size)
        found = cells_of(judged.live, len(whole))
        np.testing.assert_array_equal(found, whole != EMPTY)
        rows, cells = np.indices(whole.shape)
        at_once = covering.states_at(mask, pairs, size, rows.ravel(), cells.ravel())
        np.testing.assert_array_equal(at_once.reshape(whole.shape), whole)
        np.testing.assert_array_equal(judged.at(rows, cells), whole)
        assert (judged.at(rows, cells + whole.shape[1]) == EMPTY).all()


@settings(deadline=None, max_examples=60)
@given(
    live=st.lists(st.lists(st.booleans(), min_size=13, max_size=13), min_size=1, max_size=3),
    width=st.integers(1, 5),
)
def test_intervals_cover_all_that_is_live_and_are_few(live, width):
    live = np.array(live)
    row, first = covering.cover(covering.runs_of(live), width)
    for number, cells in enumerate(live):
        starts = first[row == number]
        assert (np.diff(starts) >= width).all()
        assert (starts + width <= len(cells)).all()
        covered = {cell for start in starts for cell in range(start, start + width)}
        assert set(np.flatnonzero(cells)) <= covered
        needed, past = 0, -1
        for cell in np.flatnonzero(cells):
            if cell > past:
                needed, past = needed + 1, cell + width - 1
        assert len(starts) == needed


@dataclasses.dataclass(frozen=True)
class Counted(masks.Mask):
    """A mask that counts for how many tiles it is asked."""

    mask: masks.Mask
    asked: ClassVar[list[int]] = []

    def __call__(self, q_idx, kv_idx):
        if hasattr(q_idx, "low"):
            self.asked.append(np.broadcast(q_idx.low, kv_idx.low).size)
        return self.mask(q_idx, kv_idx)


def test_a_mask_is_asked_near_its_boundary_alone():
    for mask in (masks.Causal(), masks.Causal() & masks.Window(256, 0)):
        Counted.asked.clear()
        length = 2**18
        plan = tiles.make_plan(Counted(mask), (length, length), (512, 512))
        whole = (length // 512) * (length // plan.unit)
        found = len(plan.starts) * (512 // plan.unit)
        assert sum(Counted.asked) < found + whole / 8


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize(
    "mask",
    [masks.Full(), masks.Causal(), masks.sparse_strided(128), masks.sparse_fixed(128)],
    ids=["full", "causal", "strided", "fixed"],
)
def test_tiles_of_a_plane_full_of_them_are_chosen_from_a_sample(mask, platform):
    Counted.asked.clear()
    tile = cheapest.cheapest_tile(Counted(mask), (2**18, 2**18), True, platform)
    assert sum(Counted.asked) < 2**21  # of one size alone, 128 x 128, there are 2^22
    assert tile == {"cpu": (512, 512), "tpu": (1024, 1024)}[platform]


def test_tiles_of_random_blocks_are_chosen_from_a_sample():
    Counted.asked.clear()
    mask = masks.random_blocks(jax.random.key(0), 2**18, size=64, num_blocks=2)
    mask = jax.tree.map(np.asarray, mask)
    assert cheapest.cheapest_tile(Counted(mask), (2**18, 2**18), True, "cpu") == (128, 128)
    assert sum(Counted.asked) < 2**23  # all cells of one size are 2^24


def in_pieces():
    parts = []
    for number, length in enumerate((90, 1, 700, 2, 3, 401)):
        n = np.arange(length)
        parts.append(np.stack([n * number + n * (n - 1) // 2, n // 3], axis=1))
    return np.tile(np.concatenate(parts), (7, 1))


def taking_turns():
    n = np.arange(1000)
    turns = np.stack([2 * n, 5 * n + 9, 3 - n], axis=1).reshape(-1, 1)
    return np.concatenate([[[7], [7]], turns, [[1]]])


def of_rows():
    n = np.arange(1, 300)
    return np.concatenate([np.stack([0 * n[:k] + k, n[:k]], axis=1) for k in n])


@pytest.mark.slow
@pytest.mark.parametrize("build", [in_pieces, taking_turns, of_rows])
def test_a_table_is_computed_as_it_was(build):
    table = build().astype(np.int32)
    program = jax.jit(lambda: progressions.computed(table))
    assert len(program.lower().as_text()) < 8 * table.size
    np.testing.assert_array_equal(program(), table)


def test_numbers_without_order_are_held():
    table = np.random.default_rng(0).integers(0, 99, (500, 2), dtype=np.int32)
    assert progressions.computed(table) is table


def text_of(length, mask):
    x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    options = {"implementation": "tiled", "tile_sizes": (512, 512)}
    return jax.jit(lambda x: attend(x, x, x, mask=mask, **options)).lower(x).as_text()


@pytest.mark.parametrize(
    ("mask", "lengths"),
    [
        (masks.Causal(), (2**15, 2**18)),
        pytest.param(masks.Causal() & masks.Window(700, 0), (2**15, 2**18), marks=pytest.mark.slow),
        pytest.param(masks.sparse_strided(128), (2**15, 2**18), marks=pytest.mark.slow),
        pytest.param(masks.sparse_fixed(128), (2**15, 2**18), marks=pytest.mark.slow),
    ],
    ids=["causal", "window", "strided", "fixed"],
)
def test_a_program_is_as_long_whatever_the_sequence(mask, lengths):
    """There are 2080 live tiles of the causal mask, and 131328 of eight times the sequence."""
    short, long = (len(text_of(length, mask)) for length in lengths)
    assert abs(long - short) < 0.05 * short
    assert long < 75_000
