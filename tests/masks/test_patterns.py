import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attend, masks
from attention_jax.masks import (
    EMPTY,
    FULL,
    Block,
    Causal,
    Chunked,
    Dilated,
    Fixed,
    Full,
    GlobalTokens,
    Heads,
    Strided,
    Window,
    bigbird,
    draw,
    longformer,
    patterns,
    random_blocks,
    sparse_fixed,
    sparse_strided,
)
from tests.contract import examples
from tests.oracle import assert_sound, states_of

KEY = jax.random.key(0)
MARKS = np.array([0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0], bool)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "allowed"),
    [
        (Strided(3), lambda i, j: (i - j) % 3 == 0),
        (Fixed(4, 2), lambda i, j: j % 4 in (2, 3)),
        (Dilated(2, 1, dilation=3), lambda i, j: j - i in (-6, -3, 0, 3)),
        (Dilated(3, 0, dilation=1), lambda i, j: i - 3 <= j <= i),
        (Chunked(4), lambda i, j: i // 4 == j // 4),
        (Chunked(2, before=1, after=2), lambda i, j: i // 2 - 1 <= j // 2 <= i // 2 + 2),
        (Block(Causal(), 3), lambda i, j: j // 3 <= i // 3),
        (Block(Window(1, 0), 2), lambda i, j: i // 2 - 1 <= j // 2 <= i // 2),
        (GlobalTokens(2), lambda i, j: i < 2 or j < 2),
        (GlobalTokens(0), lambda i, j: False),
        (GlobalTokens(MARKS), lambda i, j: MARKS[i] or MARKS[j]),
        (sparse_strided(3), lambda i, j: j <= i and (i - j <= 3 or (i - j) % 3 == 0)),
        (sparse_fixed(4, 2), lambda i, j: j <= i and (j // 4 == i // 4 or j % 4 >= 2)),
        (longformer(4), lambda i, j: abs(i - j) <= 2),
        (longformer(4, tokens=1), lambda i, j: abs(i - j) <= 2 or 0 in (i, j)),
        (longformer(4, dilation=2), lambda i, j: j - i in (-4, -2, 0, 2, 4)),
        (
            longformer(2, MARKS) & Causal(),
            lambda i, j: i - 1 <= j <= i or (j <= i and (MARKS[i] or MARKS[j])),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_patterns_say_what_their_formula_says(mask, allowed):
    expected = np.array([[allowed(i, j) for j in range(11)] for i in range(9)])
    np.testing.assert_array_equal(mask.to_dense(9, 11), expected)
    for sizes in ((1, 1), (2, 3), (4, 4), (9, 11)):
        assert_sound(mask.tiles(9, 11, *sizes), expected, *sizes)
    np.testing.assert_array_equal(mask.tiles(9, 11, 1, 1) == FULL, expected)


def test_a_local_window_is_a_band_and_not_a_stride():
    """Every key within reach and no other, in numbers and in the picture."""
    mask = longformer(6)
    dense = np.asarray(mask.to_dense(20))
    for query, row in enumerate(dense):
        attended = np.flatnonzero(row)
        np.testing.assert_array_equal(np.diff(attended), 1)
        assert attended[0] == max(query - 3, 0) and attended[-1] == min(query + 3, 19)
    assert draw(mask, 20).splitlines()[10] == "·······███████······"


LENGTH = 512


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "sizes"),
    [
        (Strided(64), (16, 16)),
        (Fixed(64, 16), (16, 16)),
        (Chunked(64, before=1), (32, 64)),
        (Block(Causal() & Window(2, 0), 32), (32, 32)),
        (GlobalTokens(40), (32, 32)),
        (sparse_strided(64), (16, 16)),
        (sparse_fixed(64, 16), (16, 16)),
        (longformer(64, tokens=8), (32, 32)),
        (bigbird(KEY, LENGTH, size=32), (32, 32)),
        (bigbird(KEY, LENGTH, size=16), (64, 32)),
    ],
    ids=[
        "strided",
        "fixed",
        "chunked",
        "block",
        "global",
        "sparse strided",
        "sparse fixed",
        "longformer",
        "bigbird",
        "bigbird in larger tiles",
    ],
)
def test_every_empty_tile_is_found(mask, sizes):
    states = np.asarray(mask.tiles(LENGTH, LENGTH, *sizes))
    real = states_of(np.asarray(mask.to_dense(LENGTH)), *sizes)
    np.testing.assert_array_equal(states == EMPTY, real == EMPTY)
    assert (states == EMPTY).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "of_row"),
    [
        (lambda length: longformer(128), 3),
        (lambda length: longformer(128, dilation=2), 5),
        (lambda length: Chunked(64, before=1) & Causal(), 2),
        (lambda length: bigbird(KEY, length, size=64, num_global=0), 6),
    ],
)
def test_live_tiles_are_proportional_to_what_is_attended(pattern, of_row):
    """Tiles of 64: so many a row for every length, and fewer at the ends of the sequence."""
    for length in (512, 4096):
        live = int((np.asarray(pattern(length).tiles(length, length, 64, 64)) != EMPTY).sum())
        rows = length // 64
        assert of_row * (rows - 4) <= live <= of_row * rows


@pytest.mark.slow
def test_bigbird_attends_the_blocks_it_should():
    """3 of the window, 2 global, 3 random; rows of global blocks attend to all."""
    length, size = 4096, 64
    dense = np.asarray(bigbird(KEY, length, size=size).to_dense(length))
    blocks = states_of(dense, size, size)
    assert set(np.unique(blocks)) == {EMPTY, FULL}
    count = (blocks == FULL).sum(axis=1)
    np.testing.assert_array_equal(count[:2], 64)
    np.testing.assert_array_equal(count[4:-1], 8)
    assert (blocks[:, :2] == FULL).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blocks", "size"),
    [(3, 4), (9, 1)]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [(1, 1), (2, 4), (5, 1), (7, 4), (8, 1), (8, 4), (33, 1), (33, 4)]
    ],
)
def test_random_blocks_repeat_neither_window_nor_global_blocks(blocks, size):
    """Also where there are fewer blocks than are asked for, and a last block that is short."""
    near = Window(1, 1) | GlobalTokens(1)
    length = blocks * size - (size > 1)
    drawn = random_blocks(KEY, length, size, num_blocks=3, avoiding=near)
    listed = np.asarray(drawn.mask.neighbors)
    allowed = np.asarray(near.to_dense(blocks))
    for query, row in enumerate(listed):
        found = row[row >= 0]
        assert len(set(found)) == len(found) == min(3, (~allowed[query]).sum())
        assert not allowed[query, found].any()
    whole = bigbird(KEY, length, size=size, num_global=1).to_dense(length)
    both = Block(near, size).to_dense(length) & drawn.to_dense(length)
    assert whole.shape == (length, length) and not both.any()


def test_random_blocks_come_from_anywhere_with_equal_chance():
    blocks, draws = 64, 200
    keys = jax.random.split(KEY, draws)
    rows = jax.jit(
        jax.vmap(lambda key: random_blocks(key, blocks, 1, num_blocks=3).mask.neighbors)
    )(keys)
    counts = np.bincount(np.asarray(rows).ravel(), minlength=blocks)
    expected = draws * 3
    assert counts.sum() == expected * blocks
    assert (abs(counts - expected) < 6 * np.sqrt(expected)).all()


def test_random_blocks_reach_beyond_the_first_1024_tokens():
    """Three quarters of 4096 tokens are beyond, for the first rows of blocks and for the last."""
    listed = np.asarray(random_blocks(KEY, 4096, size=64, num_blocks=16).mask.neighbors)
    beyond = (listed >= 1024 // 64).mean(axis=1)
    assert listed.shape == (64, 16)
    assert (beyond > 0.4).all() and abs(beyond.mean() - 0.75) < 0.05


@pytest.mark.slow
def test_random_blocks_depend_on_the_key_alone():
    mask = bigbird(KEY, 64, size=4)
    np.testing.assert_array_equal(mask.to_dense(64), bigbird(KEY, 64, size=4).to_dense(64))
    other = bigbird(jax.random.key(1), 64, size=4)
    assert (mask.to_dense(64) != other.to_dense(64)).any()
    traced = jax.jit(lambda key: bigbird(key, 64, size=4).to_dense(64))(KEY)
    np.testing.assert_array_equal(traced, mask.to_dense(64))


@pytest.mark.slow
def test_tiles_of_random_blocks_drawn_inside_jit_are_sharp():
    @jax.jit
    def states(key):
        return bigbird(key, 256, size=16).tiles(256, 256, 16, 16)

    expected = bigbird(KEY, 256, size=16).tiles(256, 256, 16, 16)
    np.testing.assert_array_equal(states(KEY), expected)
    assert (np.asarray(expected) == EMPTY).any()


def inputs(heads, length):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(3, 2, length, heads, 4)), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "of_head"),
    [
        (Heads([Causal(), Window(1, 1), Full()]), lambda n: [Causal(), Window(1, 1), Full()][n]),
        (
            Causal() & Heads([Full(), Strided(3), Dilated(2, 0, 2)]),
            lambda n: Causal() & [Full(), Strided(3), Dilated(2, 0, 2)][n],
        ),
        (longformer(4, tokens=1, dilation=[1, 2, 3]), lambda n: longformer(4, 1, dilation=n + 1)),
        (
            bigbird(KEY, 13, size=2, num_random=1, num_heads=3),
            lambda n: bigbird(KEY, 13, size=2, num_random=1, num_heads=3).of(head=n),
        ),
    ],
    ids=["heads", "composed heads", "dilated heads", "random heads"],
)
def test_masks_that_differ_between_heads(mask, of_head, implementation):
    query, key, value = inputs(heads=3, length=13)
    context = attend(query, key, value, mask=mask, **implementation)
    for head in range(3):
        one = slice(head, head + 1)
        expected = attend(
            *(x[:, :, one] for x in (query, key, value)), mask=of_head(head), implementation="dense"
        )
        np.testing.assert_allclose(context[:, :, one], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(mask.of(head=head).to_dense(13), of_head(head).to_dense(13))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [np.uint8, np.uint32, jnp.uint8, np.int64])
@pytest.mark.parametrize(
    "build",
    [
        lambda n: Window(n, n),
        lambda n: Dilated(n, n, n),
        lambda n: Chunked(n, n, n),
        GlobalTokens,
        lambda n: longformer(n, n, n),
        Strided,
        lambda n: Fixed(n, n),
        lambda n: Block(Causal(), n),
    ],
)
def test_sizes_may_be_of_any_integer_type(build, kind):
    np.testing.assert_array_equal(build(kind(2)).to_dense(40), build(2).to_dense(40))


@pytest.mark.slow
def test_random_blocks_differ_between_heads():
    mask = random_blocks(KEY, 64, 2, num_blocks=2, num_heads=2)
    assert (mask.of(head=0).to_dense(64) != mask.of(head=1).to_dense(64)).any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Strided(0), "Strided: stride must be 1 or more, got 0."),
        (lambda: Fixed(4, 0), "Fixed: columns must be 1 or more, got 0."),
        (lambda: Fixed(4, 5), "Fixed: columns must be at most stride = 4, got 5."),
        (lambda: Dilated(-1, 0, 1), "Dilated: left must be 0 or more, got -1."),
        (lambda: Dilated(1, 1, 0), "Dilated: dilation must be 1 or more, got 0."),
        (
            lambda: Dilated(1, 1, np.array([1, 0])),
            "Dilated: dilation must be 1 or more, got [1 0].",
        ),
        (lambda: Dilated(1, 1, 1.5), "Dilated: dilation must be a whole number, got 1.5."),
        (lambda: Chunked(0), "Chunked: size must be 1 or more, got 0."),
        (lambda: Chunked(2, before=-1), "Chunked: before must be 0 or more, got -1."),
        (lambda: Block(Causal(), 0), "Block: size must be 1 or more, got 0."),
        (lambda: GlobalTokens(-1), "GlobalTokens: tokens must be 0 or more, got -1."),
        (
            lambda: GlobalTokens(np.float32(3)),
            "GlobalTokens: tokens must be an int (the first ones) or a boolean array [S], got a "
            "float32 scalar.",
        ),
        (lambda: Heads([]), "Heads: give one mask for each head, got none."),
        (lambda: longformer(3), "longformer: window must be even and 2 or more, got 3."),
        (lambda: longformer(0), "longformer: window must be even and 2 or more, got 0."),
        (
            lambda: longformer(2, dilation=[1, 0]),
            "Dilated: dilation must be 1 or more, got [[1 0]].",
        ),
        (
            lambda: bigbird(KEY, 64, window=2),
            "bigbird: window must be odd and 1 or more blocks, got 2.",
        ),
        (lambda: bigbird(KEY, 64, size=0), "Block: size must be 1 or more, got 0."),
        (
            lambda: bigbird(KEY, 64, num_random=-1),
            "random_blocks: num_blocks must be 0 or more, got -1.",
        ),
        (lambda: random_blocks(KEY, 0, 4, 1), "random_blocks: length must be 1 or more, got 0."),
        (
            lambda: Heads([Causal(), Full()]).to_dense(4),
            "mask: Heads.head differs between examples or heads, got shape (1, 2); look at one of "
            "them with mask.of(example, head).",
        ),
    ],
)
def test_bad_arguments_raise_at_once(build, message):
    with pytest.raises(ValueError) as error:
        build()
    assert str(error.value) == message


def test_every_pattern_draws_itself():
    for name in patterns.__all__:
        example = getattr(patterns, name)
        assert "█" in example.__doc__ or ".to_dense(" in example.__doc__, name
    assert str(Strided(3)).splitlines()[:2] == ["Strided(stride=3)", "█··█··█··█··"]


def arguments(mask):
    """Return what a mask was made of, by the names of its constructor."""
    return {
        field.name: getattr(mask, field.name) for field in dataclasses.fields(mask) if field.init
    }


@pytest.mark.parametrize("name", examples.MASKS)
def test_every_argument_of_a_mask_counts(name):
    """What is given is kept: the same again makes an equal mask, another value one that differs."""
    mask = masks.as_mask(examples.mask_example(name, 1, 2, 4, 4).mask)
    given = arguments(mask)
    assert type(mask)(**given) == mask
    for field, value in given.items():
        assert type(mask)(**{**given, field: other(value)}) != mask


def other(value):
    """Return another value of the same kind."""
    if isinstance(value, masks.Mask):
        return ~value
    if isinstance(value, tuple):
        return value[::-1]
    if value is None:
        return np.array(1)
    if callable(value):
        return masks.Full()
    if isinstance(value, int):
        return 0 if value == 1 else value + 1
    return ~value if value.dtype == np.bool_ else value + 1


def test_the_heads_of_a_mask_are_numbered_by_itself():
    with pytest.raises(TypeError, match="head"):
        masks.Heads([masks.Causal()], head=5)


COUNTS = {
    "sparse_strided": (masks.sparse_strided(3), 3 + 1 + 5),  # 19 18 17, itself, 14 11 8 5 2
    "sparse_fixed": (masks.sparse_fixed(3), 3 + 6),  # 18 19 20, and the last of each block before
    "longformer": (masks.longformer(6, tokens=2), 6 + 1 + 2),
    "Window": (masks.Window(3, 1), 3 + 1 + 1),
    "Dilated": (masks.Dilated(2, 1, dilation=3), 2 + 1 + 1),
    "Chunked": (masks.Chunked(3, before=2), 3 * (1 + 2)),
    "Strided": (masks.Strided(4) & masks.Causal(), 6),  # 20 16 12 8 4 0
    "Prefix": (masks.Prefix(5), 5),
}


@pytest.mark.parametrize(("mask", "count"), COUNTS.values(), ids=COUNTS)
def test_a_query_attends_to_as_many_keys_as_the_docstring_says(mask, count):
    assert mask.to_dense(40)[20].sum() == count


@pytest.mark.slow
def test_bigbird_with_the_first_and_the_last_blocks_global():
    mask = masks.bigbird(jax.random.key(0), 22, size=2, num_global=1, num_random=1, num_last=2)
    dense = np.asarray(mask.to_dense(22))
    for tokens in (slice(0, 2), slice(18, 22)):
        assert dense[tokens].all()
        assert dense[:, tokens].all()
    inner = dense[2:18].sum(axis=1)
    assert (inner <= 2 * (3 + 3 + 1)).all()
    assert (inner < 22).all()
