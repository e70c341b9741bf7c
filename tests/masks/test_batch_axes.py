import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax.base.checks import ShapeError
from attention_jax.masks import (
    Block,
    Causal,
    Full,
    GlobalTokens,
    Heads,
    Lengths,
    Prefix,
    Segment,
    Shift,
    Table,
    Window,
    batch_axes,
    edges,
    random_blocks,
)

SIZES = {"B": 2, "N": 4, "K": 2, "T": 5, "S": 7}


@pytest.mark.parametrize(
    ("shape", "left", "letters"),
    [
        ((), (1, 1), ""),
        ((7,), (1, 7), ""),
        ((5, 1), (5, 1), ""),
        ((1, 5, 7), (5, 7), ""),
        ((4, 5, 7), (4, 5, 7), "N"),
        ((2, 1, 1, 7), (2, 1, 7), "B"),
        ((1, 4, 5, 1), (4, 5, 1), "N"),
        ((2, 4, 5, 7), (2, 4, 5, 7), "BN"),
        ((1, 1, 1, 1), (1, 1), ""),
    ],
)
def test_arrays(shape, left, letters):
    """Alone, and as a table within a composition."""
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    kept, found = batch_axes.of_array("f: bias", array, SIZES)
    assert (kept.shape, found) == (left, letters)
    np.testing.assert_array_equal(kept.ravel(), array.ravel())
    if len(shape) == 3:  # a mask has to say whether examples or heads come first
        array = array[None]
    for mask in (Table(array > 3), Full() & Table(array > 3), ~Table(array > 3)):
        _, (found,) = batch_axes.of_mask("f", mask, SIZES)
        assert found == letters


@pytest.mark.parametrize("shape", [(6,), (2, 5, 7), (4, 7), (1, 2, 4, 5, 7), (2, 2, 5, 7)])
def test_arrays_that_do_not_broadcast(shape):
    message = rf"must broadcast to \[B, N, T, S\] = \(2, 4, 5, 7\), got {str(shape)[:-1]}"
    with pytest.raises(ShapeError, match=f"f: bias {message}".replace("(6", r"\(6")[:60]):
        batch_axes.of_array("f: bias", np.ones(shape), SIZES)
    whose = r"of three axes" if len(shape) == 3 else "must broadcast"
    with pytest.raises(ShapeError, match=rf"f: Table.allowed {whose}"):
        batch_axes.of_mask("f", Full() & Table(np.ones(shape, bool)), SIZES)


@pytest.mark.parametrize(
    ("mask", "letters"),
    [
        (Causal() & Window(1, 1), []),
        (Prefix(3), []),
        (Prefix(np.int32(3)), [""]),
        (Prefix(np.ones(2, int)), ["B"]),
        (Prefix([1, 2]), ["B"]),
        (Prefix(np.ones((2, 4), int)), ["BN"]),
        (Prefix(np.ones((1, 4), int)), ["N"]),
        (Prefix(np.ones((2, 1), int)), ["B"]),
        (Lengths(np.ones(2, int), np.ones((2, 4), int)), ["B", "BN"]),
        (Segment(np.ones(5, int), np.ones((2, 7), int)), ["", "B"]),
        (
            Shift(Segment(np.ones(99, int)), query=np.ones(2, int)) | Prefix(np.int32(2)),
            ["", "B", ""],
        ),
        (GlobalTokens(np.ones((2, 7), bool)), ["B"]),
        (
            Block(edges([(0, 1)], length=3), 2) | Shift(edges([(0, 1)], length=99), query=1),
            ["", ""],
        ),
        (Causal() & Shift(Table(np.ones((2, 9, 9), bool)), query=1), ["B"]),
    ],
)
def test_masks(mask, letters):
    assert batch_axes.of_mask("f", mask, SIZES)[1] == letters


def test_the_same_array_may_serve_two_fields():
    shared = np.arange(2)
    mask = Prefix(shared) | Segment(shared)
    sizes = SIZES | {"T": 2, "S": 2}
    assert batch_axes.of_mask("f", mask, sizes)[1] == ["B", ""]


def test_axes_of_size_one_are_dropped_from_the_mask_itself():
    mask, letters = batch_axes.of_mask("f", Causal() & np.ones((2, 1, 1, 7), bool), SIZES)
    assert mask.second.allowed.shape == (2, 1, 7)
    assert isinstance(mask.second.allowed, np.ndarray), "what is known stays known"
    assert letters == ["B"]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            Full() & Lengths(jnp.ones(3, int)),
            "f: Lengths.key_length may have the leading axes [B, N] = (2, 4) beyond its 0 for one "
            "example, got shape (3,).",
        ),
        (
            Prefix(jnp.ones((2, 4, 5), int)),
            "f: Prefix.length may have the leading axes [B, N] = (2, 4) beyond its 0 for one "
            "example, got shape (2, 4, 5).",
        ),
        (
            Segment(jnp.ones(5, int)),
            "f: Segment.query_ids must hold an entry for each of the S = 7 positions, got shape "
            "(5,); build the mask for this length.",
        ),
        (
            Segment(jnp.ones(5, int), jnp.ones(8, int)),
            "f: Segment.key_ids must hold an entry for each of the S = 7 positions, got shape "
            "(8,); build the mask for this length.",
        ),
        (
            ~GlobalTokens([False, True]),
            "f: GlobalTokens.tokens must hold an entry for each of the max(T, S) = 7 positions, "
            "got shape (2,); build the mask for this length.",
        ),
        (
            Heads([Causal()] * 3 + [edges([(0, 1)], length=2)]),
            "f: Edges.neighbors must hold an entry for each of the T = 5 positions, got shape "
            "(2, 1); build the mask for this length.",
        ),
        (
            random_blocks(jax.random.key(0), 2, size=2, num_blocks=1) | Causal(),
            "f: Edges.neighbors must hold an entry for each of the T = 3 blocks of 2 positions, "
            "got shape (1, 1); build the mask for this length.",
        ),
        (
            Block(Block(Table(jnp.ones((5, 7), bool)), 2), 2),
            "f: Table.allowed must broadcast to [B, N, T, S] = (2, 4, 2, 2), got (5, 7).",
        ),
        (
            Table(jnp.ones((5, 6), bool)),
            "f: mask must broadcast to [B, N, T, S] = (2, 4, 5, 7), got (5, 6).",
        ),
    ],
)
def test_errors(mask, message):
    with pytest.raises(ShapeError) as error:
        batch_axes.of_mask("f", mask, SIZES)
    assert str(error.value) == message


def compositions(shape):
    allowed = np.ones(shape, bool)
    return {"mask": Table(allowed), "Table.allowed": Full() & Table(allowed)}.items()


def test_a_mask_that_reads_in_two_ways_is_refused():
    square = SIZES | {"B": SIZES["T"]}
    for name, mask in compositions((5, 7)):
        batch_axes.of_mask("f", mask, SIZES)
        with pytest.raises(ShapeError) as error:
            batch_axes.of_mask("f", mask, square)
        assert str(error.value) == (
            f"f: {name} of shape (5, 7) may be padding [B, S] or pairs [T, S], since B = T = 5; "
            "write mask[:, None, None, :] for padding, or mask[None, None] for pairs."
        )
    for shape in ((4, 5, 7), (2, 5, 7)):  # of heads, of examples
        for name, mask in compositions(shape):
            with pytest.raises(ShapeError) as error:
                batch_axes.of_mask("f", mask, SIZES)
            assert str(error.value) == (
                f"f: {name} of three axes, {shape}, may differ between examples or between heads; "
                "write mask[:, None] for [B, 1, T, S], or mask[None] for [1, N, T, S]."
            )
    for shape in ((5, 1, 1, 7), (1, 1, 5, 7), (1, 7), (1, 5, 7)):
        for _, mask in compositions(shape):
            batch_axes.of_mask("f", mask, square)
