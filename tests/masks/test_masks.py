import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_jax import masks
from attention_jax.masks import (
    EMPTY,
    FULL,
    PARTIAL,
    Causal,
    Full,
    Lengths,
    Predicate,
    Prefix,
    Segment,
    Shift,
    Table,
    Window,
    algebra,
    as_mask,
    draw,
    intervals,
)
from tests.oracle import assert_sound, states_of

LENGTHS = st.sampled_from([1, 7, 13])  # few, so that JAX compiles few programs
SIZES = st.integers(1, 9)
PREDICATES = [
    lambda q_idx, kv_idx: (q_idx - kv_idx) % 3 == 0,
    lambda q_idx, kv_idx: abs(q_idx - kv_idx) <= 2,
    lambda q_idx, kv_idx: q_idx // 4 == kv_idx // 4,
    lambda q_idx, kv_idx: 2 * q_idx + 1 > kv_idx * kv_idx,
    lambda q_idx, kv_idx: (q_idx >= kv_idx) == (kv_idx < 5),
    lambda q_idx, kv_idx: (q_idx >= kv_idx) != (q_idx % 5 >= 2),
    lambda q_idx, kv_idx: (q_idx == kv_idx) ^ (q_idx + kv_idx < 9),
    lambda q_idx, kv_idx: True,
    lambda q_idx, kv_idx: jnp.cos(q_idx.astype(jnp.float32)) > 0,
]


@st.composite
def ids(draw, length):
    values = draw(st.lists(st.integers(0, 3), min_size=length, max_size=length))
    return np.array(sorted(values) if draw(st.booleans()) else values, np.int32)


@st.composite
def random_masks(draw, query_length, key_length):
    """Draw a random composition of every kind of mask."""
    small = st.integers(-4, 16)
    edge = st.none() | st.integers(0, 6)
    positive = st.integers(1, 6)
    leaves = st.one_of(
        st.just(Full()),
        st.builds(Causal, small),
        st.builds(Window, edge, edge),
        st.builds(lambda length: Prefix(np.int32(length)), small),
        st.builds(Lengths, small.map(np.int32), st.none() | small),
        st.builds(Segment, ids(query_length), ids(key_length)),
        st.integers(0, 99).map(
            lambda seed: Table(np.random.default_rng(seed).random((query_length, key_length)) < 0.5)
        ),
        st.sampled_from(PREDICATES).map(Predicate),
        st.builds(masks.Strided, positive),
        st.builds(masks.Fixed, st.just(5), positive.map(lambda n: min(n, 5))),
        st.builds(masks.Dilated, st.integers(0, 3), st.integers(0, 3), positive.map(np.int32)),
        st.builds(masks.Chunked, positive, st.integers(0, 2), st.integers(0, 2)),
        st.builds(masks.GlobalTokens, st.integers(0, 4) | ids(query_length)),
        st.builds(masks.GridWindow, positive, positive, st.just(3), st.integers(0, 2)),
        st.integers(0, 99).map(
            lambda seed: masks.Edges(
                np.random.default_rng(seed).integers(-1, key_length, (query_length, 2), np.int32)
            )
        ),
    )
    return draw(
        st.recursive(
            leaves,
            lambda inner: st.one_of(
                st.builds(lambda a, b: a & b, inner, inner),
                st.builds(lambda a, b: a | b, inner, inner),
                inner.map(lambda mask: ~mask),
                st.builds(Shift, inner, small, small.map(np.int32)),
                st.builds(masks.Block, inner, positive),
            ),
            max_leaves=5,
        )
    )


@st.composite
def problems(draw):
    query_length, key_length = draw(LENGTHS), draw(LENGTHS)
    mask = draw(random_masks(query_length, key_length))
    return mask, (query_length, key_length, draw(SIZES), draw(SIZES))


@pytest.mark.slow
@given(problems())
def test_tiles_are_sound(problem):
    mask, (query_length, key_length, *sizes) = problem
    states = mask.tiles(query_length, key_length, *sizes)
    assert isinstance(states, np.ndarray), "a mask known while tracing is read without JAX"
    assert_sound(states, mask.to_dense(query_length, key_length), *sizes)


@pytest.mark.slow
@settings(max_examples=12)
@given(problems())
def test_tiles_are_sound_inside_jit(problem):
    mask, (query_length, key_length, *sizes) = problem
    possible = []

    @jax.jit
    def traced(mask):
        possible.append(mask.static().tiles(query_length, key_length, *sizes))
        return mask.tiles(query_length, key_length, *sizes), mask.to_dense(query_length, key_length)

    states, dense = traced(mask)
    np.testing.assert_array_equal(dense, mask.to_dense(query_length, key_length))
    assert_sound(states, dense, *sizes)
    assert isinstance(possible[0], np.ndarray), "what is known while tracing needs no JAX"
    assert_sound(possible[0], dense, *sizes)


@pytest.mark.slow
@settings(max_examples=12)
@given(problems())
def test_tiles_that_the_program_computes_are_sound(problem):
    mask, (query_length, key_length, *sizes) = problem
    states = jax.jit(functools.partial(computed_tiles, mask, query_length, key_length, *sizes))()
    assert_sound(states, mask.to_dense(query_length, key_length), *sizes)


def computed_tiles(mask, query_length, key_length, query_size, key_size):
    where = [
        intervals.tile_intervals(length, size, axis, computed=True)
        for axis, (length, size) in enumerate(((query_length, query_size), (key_length, key_size)))
    ]
    return intervals.classify(algebra.with_int32(mask), *where)


def grows_fast(q_idx, kv_idx):
    return (q_idx * 60_000 * kv_idx + 2**30) * 3 - kv_idx * 2**25 >= 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "predicate", [grows_fast, lambda q_idx, kv_idx: ~grows_fast(q_idx, kv_idx)]
)
def test_integers_that_wrap_around_decide_no_tile_wrongly(predicate):
    mask = masks.Predicate(predicate)
    dense = mask.to_dense(129, 127)
    assert dense.any() and not dense.all()
    for size in ((1, 1), (7, 3), (64, 32)):
        assert_sound(mask.tiles(129, 127, *size), dense, *size)
        assert_sound(
            jax.jit(lambda size=size: computed_tiles(mask, 129, 127, *size))(), dense, *size
        )


@pytest.mark.slow
@given(problems())
def test_single_entries_are_decided_exactly_unless_a_table_or_unreadable(problem):
    mask, (query_length, key_length, *_) = problem
    states = mask.tiles(query_length, key_length, 1, 1)
    dense = np.asarray(mask.to_dense(query_length, key_length))
    unreadable = any(isinstance(part, Table) or part is UNREADABLE for part in parts(mask))
    if not unreadable:
        np.testing.assert_array_equal(states, np.where(dense, FULL, EMPTY))


UNREADABLE = PREDICATES[-1]


def parts(mask):
    yield mask
    for name in ("first", "second", "mask"):
        if hasattr(mask, name):
            yield from parts(getattr(mask, name))
    if isinstance(mask, Predicate):
        yield mask.function


@pytest.mark.slow
@pytest.mark.parametrize(
    "mask",
    [
        Full(),
        Causal(),
        Causal(offset=3),
        Window(3, 0),
        Window(2, 5),
        Window(None, 1),
        Window(None, None),
        Prefix(9),
        Lengths(17, 11),
        Segment(np.repeat([0, 1, 2, 3], 5)),
        Causal() & Window(3, 0),
        Causal() & Segment(np.repeat([0, 1], 10)),
        Prefix(9) | Causal(),
        ~Causal(),
        Shift(Window(1, 1), query=4),
    ],
    ids=repr,
)
@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_tiles_of_the_common_masks_are_exact(mask, size):
    """Nothing is called PARTIAL that is EMPTY: a union alone may overlook that it is FULL."""
    states = mask.tiles(20, 20, size, size)
    real = states_of(np.asarray(mask.to_dense(20)), size, size)
    np.testing.assert_array_equal(states == EMPTY, real == EMPTY)
    if not isinstance(mask, algebra.Or):
        np.testing.assert_array_equal(states, real)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "allowed"),
    [
        (Full(), lambda i, j: True),
        (Causal(), lambda i, j: j <= i),
        (Causal(offset=2), lambda i, j: j <= i + 2),
        (Window(2, 1), lambda i, j: i - 2 <= j <= i + 1),
        (Window(2, None), lambda i, j: i - 2 <= j),
        (Window(0, 0), lambda i, j: i == j),
        (Prefix(3), lambda i, j: j < 3),
        (Lengths(4), lambda i, j: j < 4),
        (Lengths(4, 2), lambda i, j: j < 4 and i < 2),
        (Segment([0, 0, 1, 2, 2], [0, 1, 1, 1, 2, 3, 3]), lambda i, j: (i, j) in SAME_SEGMENT),
        (Shift(Causal(), query=3), lambda i, j: j <= i + 3),
        (Shift(Causal(), key=2), lambda i, j: j + 2 <= i),
        (Causal() & Window(1, 1), lambda i, j: i - 1 <= j <= i),
        (Prefix(2) | Causal(), lambda i, j: j < 2 or j <= i),
        (~Causal(), lambda i, j: j > i),
        (~(Prefix(2) | Causal()) & Window(None, 3), lambda i, j: max(2, i + 1) <= j <= i + 3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_masks_say_what_their_formula_says(mask, allowed):
    """With T = 5 and S = 7, so the alignment for T != S is pinned down too."""
    expected = [[allowed(i, j) for j in range(7)] for i in range(5)]
    np.testing.assert_array_equal(mask.to_dense(5, 7), expected)


SAME_SEGMENT = {(0, 0), (1, 0), (2, 1), (2, 2), (2, 3), (3, 4), (4, 4)}


def test_offset_aligns_the_last_query_with_the_last_key():
    np.testing.assert_array_equal(Causal(offset=4).to_dense(2, 6), np.tri(2, 6, 4, bool))


@pytest.mark.slow
@given(problems(), st.data())
def test_algebra(problem, data):
    a, (query_length, key_length, *_) = problem
    b = data.draw(random_masks(query_length, key_length))

    def dense(mask):
        return np.asarray(mask.to_dense(query_length, key_length))

    np.testing.assert_array_equal(dense(a & b), dense(a) & dense(b))
    np.testing.assert_array_equal(dense(a | b), dense(a) | dense(b))
    np.testing.assert_array_equal(dense(~a), ~dense(a))
    np.testing.assert_array_equal(dense(~(a & b)), dense(~a | ~b))


@pytest.mark.parametrize("array", [np.tri(4, dtype=bool), jnp.tri(4, dtype=bool)])
def test_arrays_and_functions_join_on_either_side(array):
    window = Window(1, None)
    expected = np.tri(4, dtype=bool) & np.asarray(window.to_dense(4))
    for mask in (array & window, window & array):
        assert isinstance(mask, masks.Mask)
        np.testing.assert_array_equal(mask.to_dense(4), expected)
    np.testing.assert_array_equal((array | window).to_dense(4), np.ones((4, 4), bool))

    def causal(q_idx, kv_idx):
        return q_idx >= kv_idx

    np.testing.assert_array_equal((window & causal).to_dense(4), expected)
    np.testing.assert_array_equal((causal & window).to_dense(4), expected)


def test_and_or_not_are_refused():
    for misuse in (
        lambda: Causal() and Full(),
        lambda: Causal() or Full(),
        lambda: not Causal(),
        lambda: bool(Causal()),
    ):
        with pytest.raises(TypeError) as error:
            misuse()
        assert str(error.value) == "mask: combine masks with & | ~, not with and, or, not."


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: Window(-1, 0),
            ValueError,
            "Window: left must be a whole number of keys, 0 or more (or None for no bound), "
            "got -1.",
        ),
        (
            lambda: Window(0, -3),
            ValueError,
            "Window: right must be a whole number of keys, 0 or more (or None for no bound), "
            "got -3.",
        ),
        (
            lambda: Window(1.5, 0),
            ValueError,
            "Window: left must be a whole number of keys, 0 or more (or None for no bound), "
            "got 1.5.",
        ),
        (
            lambda: as_mask(np.ones((2, 2))),
            TypeError,
            "mask: an array must be boolean (True = may attend), got float64; for numbers that "
            "are added to the logits use bias=.",
        ),
        *(
            (
                build,
                TypeError,
                "mask: an array must be boolean (True = may attend), got int32; write mask != 0 "
                "if 1 means may attend.",
            )
            for build in (
                lambda: as_mask(np.ones((2, 2), np.int32)),
                lambda: Table(np.ones((2, 2), np.int32)),
                lambda: Table(jnp.ones((2, 2), jnp.int32)),
                lambda: draw(np.ones((2, 2), np.int32)),
                lambda: Causal() & Table(np.ones((2, 2), np.int32)),
            )
        ),
        (
            lambda: Causal() & 3,
            TypeError,
            "mask: expected a Mask, a boolean array or a function (q_idx, kv_idx) -> bool, got "
            "int.",
        ),
        (
            lambda: algebra.leading_axes(Segment(np.zeros((2, 3, 4, 5), int))),
            ValueError,
            "Segment: query_ids has 1 axes for one example and at most 2 more (batch, heads), "
            "got shape (2, 3, 4, 5).",
        ),
        (
            lambda: Predicate(lambda q_idx, kv_idx: q_idx - kv_idx).to_dense(3),
            TypeError,
            "mask: a predicate must return booleans, got int32; compare the indices, and "
            "combine conditions with & | ~.",
        ),
        *(
            (
                lambda predicate=predicate: Predicate(predicate).to_dense(3),
                TypeError,
                "mask: combine conditions with & | ~, not with and, or, not, if or a chain such "
                "as a <= b < c.",
            )
            for predicate in (
                lambda q_idx, kv_idx: q_idx >= kv_idx and q_idx - kv_idx < 2,
                lambda q_idx, kv_idx: 0 <= q_idx - kv_idx < 2,
                jax.jit(lambda q_idx, kv_idx: q_idx >= kv_idx or kv_idx < 2),
            )
        ),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(build, error, message):
    with pytest.raises(error) as caught:
        build()
    assert str(caught.value) == message


def test_a_window_of_any_integers_is_that_of_plain_ones():
    expected = Window(2, 1).to_dense(4)
    np.testing.assert_array_equal(Window(np.uint8(2), np.int64(1)).to_dense(4), expected)
    for left in (np.array(2, np.uint8), jnp.uint8(2)):
        np.testing.assert_array_equal(Window(left, 1).to_dense(4), expected)
    np.testing.assert_array_equal(
        jax.jit(lambda left: Window(left, 1).to_dense(4))(jnp.int32(2)), expected
    )


def test_what_cannot_be_drawn_still_prints():
    """Lengths of several examples, and one known inside `jit` alone."""
    lengths = Lengths(jnp.array([1, 2]))
    assert str(lengths) == repr(lengths)

    @jax.jit
    def drawn(length):
        assert str(Prefix(length)).startswith("Prefix(length=")
        return length

    drawn(jnp.int32(2))


def test_pictures():
    assert draw(Window(1, 1), 4) == "██··\n███·\n·███\n··██"
    assert draw(Causal() & ~Window(1, 0), 4, 3) == "···\n···\n█··\n██·"
    assert str(Causal()).splitlines()[0] == "Causal(offset=0)"
    assert str(Causal()).splitlines()[1:] == draw(Causal()).splitlines()
    assert len(draw(Causal()).splitlines()) == 12
    assert repr(Causal() & ~(Full() | Prefix(2))) == (
        "(Causal(offset=0) & ~(Full() | Prefix(length=2)))"
    )


def test_a_mask_is_a_pytree_of_its_arrays():
    mask = (Segment(np.zeros(3, int)) | Prefix(jnp.int32(1))) & Window(2, None) & ~Causal()
    leaves, structure = jax.tree.flatten(mask)
    assert [leaf.shape for leaf in leaves] == [(3,), ()]
    again = jax.tree.unflatten(structure, leaves)
    np.testing.assert_array_equal(again.to_dense(3), mask.to_dense(3))


def test_arrays_in_a_mask_do_not_recompile_but_its_shape_does():
    dense = jax.jit(chex.assert_max_traces(lambda mask: mask.to_dense(4), n=1))
    for length in (0, 2, 4):
        np.testing.assert_array_equal(
            dense(Prefix(jnp.int32(length)) & Causal()),
            np.tri(4, dtype=bool) & (np.arange(4) < length),
        )
    with pytest.raises(AssertionError):
        dense(Prefix(jnp.int32(1)) & Window(1, 1))


def test_static_keeps_what_is_known_while_tracing():
    """A causal mask loses no tile because another one is known only at run time."""
    unknowns = [
        lambda n: Prefix(n),
        lambda n: Lengths(n, n),
        lambda n: Segment(jnp.full(8, n)),
        lambda n: Shift(Window(1, 1), query=n),
        lambda n: Table(jnp.full((8, 8), n > 0)),
        lambda n: Predicate(lambda q_idx, kv_idx: q_idx // n == kv_idx),
        lambda n: Predicate(lambda q_idx, kv_idx: kv_idx < n),
        lambda n: Predicate(lambda q_idx, kv_idx: jnp.arange(8)[n] < 3),
    ]
    seen = {}

    @functools.partial(jax.jit, static_argnums=1)
    def trace(n, which):
        seen[which] = (Causal() & unknowns[which](n)).static().tiles(8, 8, 2, 2)
        return n

    for which in range(len(unknowns)):
        trace(3, which)
        np.testing.assert_array_equal(seen[which], np.tril(np.full((4, 4), PARTIAL)))


def test_positions_beyond_a_table_repeat_its_edge():
    """Indices that a shift moves outside read the nearest entry, in both readings."""
    ids = np.array([0, 0, 1, 1])
    for shift in (-3, 3):
        mask = Shift(Segment(ids), query=shift)
        clipped = ids[np.clip(np.arange(4) + shift, 0, 3)]
        np.testing.assert_array_equal(mask.to_dense(4), clipped[:, None] == ids[None, :])
        np.testing.assert_array_equal(mask.tiles(4, 4, 1, 1) == FULL, mask.to_dense(4))


@pytest.mark.parametrize(("query_length", "key_length"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_attend(query_length, key_length):
    for mask in (Causal(), Segment(np.zeros(query_length, int), np.zeros(key_length, int))):
        assert mask.to_dense(query_length, key_length).shape == (query_length, key_length)
        grid = (-(-query_length // 2), -(-key_length // 2))
        assert mask.tiles(query_length, key_length, 2, 2).shape == grid


def test_work_is_proportional_to_what_is_attended():
    """Live tiles of a band: linear in the length, for any length."""
    for length in (256, 1024, 4096):
        states = (Causal() & Window(64, 0)).tiles(length, length, 32, 32)
        assert (states != EMPTY).sum() == 3 * (length // 32) - 3


def test_masks_written_by_the_user():
    """A subclass is a mask as good as any: it composes, is a pytree, and knows its tiles."""

    @dataclasses.dataclass(frozen=True)
    class Diagonal(masks.Mask):
        distance: object

        def __call__(self, q_idx, kv_idx):
            return kv_idx - q_idx == self.distance

    mask = Diagonal(jnp.int32(1)) & ~Diagonal(0)
    assert len(jax.tree.leaves(mask)) == 1
    np.testing.assert_array_equal(mask.to_dense(4), np.eye(4, k=1, dtype=bool))
    assert_sound(mask.tiles(4, 4, 2, 2), mask.to_dense(4), 2, 2)
    assert (Diagonal(1).tiles(4, 4, 2, 2) == EMPTY).sum() == 1


def test_a_mask_that_is_no_dataclass_is_refused():
    class Bare(masks.Mask):
        def __call__(self, q_idx, kv_idx):
            return q_idx >= kv_idx

    for use in (lambda: Bare().to_dense(3), lambda: (Causal() & Bare()).tiles(4, 4, 2, 2)):
        with pytest.raises(TypeError) as error:
            use()
        assert str(error.value) == (
            "Bare: a mask must be a dataclass, whose fields are its arrays; write "
            "@dataclasses.dataclass(frozen=True) above class Bare."
        )


def test_a_predicate_that_fails_on_intervals_in_any_way_counts_as_partial():
    def checked(q_idx, kv_idx):
        chex.assert_rank([q_idx, kv_idx], 2)
        return q_idx >= kv_idx

    predicate = Predicate(checked)
    assert (predicate.tiles(4, 4, 2, 2) == PARTIAL).all()
    assert (predicate.to_dense(3) == Causal().to_dense(3)).all()


@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_a_mask_of_zeros_and_ones_is_told_to_become_boolean(dtype):
    with pytest.raises(TypeError, match="write mask != 0 if 1 means may attend"):
        masks.as_mask(np.ones((2, 2), dtype))
