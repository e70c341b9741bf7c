import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention_jax import masks
from attention_jax.masks import EMPTY, FULL, PARTIAL, intervals
from attention_jax.masks.intervals import Interval, Lookup, Truth, Unknown

numbers = st.integers(-12, 12)


@st.composite
def ranges(draw):
    low = draw(numbers)
    return low, low + draw(st.integers(0, 6))


def interval(low, high):
    return Interval(np.int32(low), np.int32(high))


def values(pair):
    return np.arange(pair[0], pair[1] + 1)


ARITHMETIC = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "negative": lambda a, b: -a,
    "absolute": lambda a, b: abs(a),
    "number -": lambda a, b: 3 - a,
    "number *": lambda a, b: -2 * a + 1,
    "//": lambda a, b: a // 3,
    "%": lambda a, b: a % 4,
    "nested": lambda a, b: abs(a - b) % 5 // 2,
}
COMPARISONS = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARITHMETIC)
@given(first=ranges(), second=ranges())
def test_arithmetic_contains_every_value(name, first, second):
    operation = ARITHMETIC[name]
    bound = operation(interval(*first), interval(*second))
    reached = operation(values(first)[:, None], values(second)[None, :])
    assert bound.low <= reached.min() and reached.max() <= bound.high


@pytest.mark.parametrize("name", ["+", "-", "negative", "absolute", "number -", "//"])
@given(first=ranges(), second=ranges())
def test_arithmetic_that_loses_nothing(name, first, second):
    operation = ARITHMETIC[name]
    bound = operation(interval(*first), interval(*second))
    reached = operation(values(first)[:, None], values(second)[None, :])
    assert (bound.low, bound.high) == (reached.min(), reached.max())


@pytest.mark.parametrize("name", COMPARISONS)
@given(first=ranges(), second=ranges())
def test_comparisons_of_two_ranges_are_exact(name, first, second):
    compare = COMPARISONS[name]
    reached = compare(values(first)[:, None], values(second)[None, :])
    expected = FULL if reached.all() else PARTIAL if reached.any() else EMPTY
    assert compare(interval(*first), interval(*second)).state == expected


@pytest.mark.parametrize("name", COMPARISONS)
@given(pair=ranges(), number=numbers)
def test_comparisons_with_a_number_on_either_side(name, pair, number):
    compare = COMPARISONS[name]
    for reached, answer in (
        (compare(values(pair), number), compare(interval(*pair), number)),
        (compare(number, values(pair)), compare(number, interval(*pair))),
        (compare(np.int32(number), values(pair)), compare(np.int32(number), interval(*pair))),
    ):
        expected = FULL if reached.all() else PARTIAL if reached.any() else EMPTY
        assert answer.state == expected


def test_an_index_equals_itself():
    index = interval(0, 5)
    assert (index == index).state == FULL
    assert (index != index).state == EMPTY


STATES = [EMPTY, PARTIAL, FULL]


@pytest.mark.parametrize("first", STATES)
@pytest.mark.parametrize("second", STATES)
def test_truth_is_kleene_s_logic(first, second):
    a, b = Truth(np.int8(first)), Truth(np.int8(second))
    assert (a & b).state == min(first, second)
    assert (a | b).state == max(first, second)
    assert (~a).state == {EMPTY: FULL, PARTIAL: PARTIAL, FULL: EMPTY}[first]
    decided = PARTIAL not in (first, second)
    assert (a ^ b).state == ((FULL if first != second else EMPTY) if decided else PARTIAL)
    assert (a != b).state == (a ^ b).state
    assert (a == b).state == (~(a ^ b)).state


@pytest.mark.parametrize("state", STATES)
def test_truth_meets_plain_booleans_on_either_side(state):
    truth = Truth(np.int8(state))
    for true in (True, np.True_):
        assert (truth & true).state == (true & truth).state == state
        assert (truth | true).state == (true | truth).state == FULL
    assert (truth & False).state == EMPTY
    assert (truth == False).state == (~truth).state  # noqa: E712


@pytest.mark.parametrize("value", [interval(0, 1), interval(0, 1) < 1])
def test_and_or_not_are_refused(value):
    for misuse in (lambda: value and True, lambda: value or True, lambda: not value):
        with pytest.raises(TypeError, match=r"mask: .*& \| ~"):
            misuse()


@pytest.mark.parametrize("divisor", [0, -2, None, "3", np.array([1, 0])])
def test_division_by_something_not_positive_is_refused(divisor):
    with pytest.raises(TypeError, match=r"mask: an index can be divided \(//\) by positive"):
        interval(0, 3) // divisor
    with pytest.raises(TypeError, match=r"mask: an index can be divided \(%\) by positive"):
        interval(0, 3) % divisor


HASH = 1103515245


@pytest.mark.slow
@pytest.mark.parametrize(
    "predicate",
    [
        lambda q_idx, kv_idx: (kv_idx * 0.25) % 1 < 0.5,
        lambda q_idx, kv_idx: ((q_idx - kv_idx) * 0.5) % 1 == 0,
        lambda q_idx, kv_idx: (kv_idx + 0.5) % 2 < 1,
        lambda q_idx, kv_idx: (q_idx * HASH + kv_idx * 22695477) > 0,
        lambda q_idx, kv_idx: (q_idx * HASH + kv_idx * HASH - 2 * kv_idx) // 7 % 3 == 1,
    ],
)
@pytest.mark.parametrize("size", [4, 64])
def test_fractions_and_wrapping_integers_decide_nothing_wrongly(predicate, size):
    mask = masks.as_mask(predicate)
    with jax.numpy_dtype_promotion("standard"):
        states, allowed = mask.tiles(130, 130, size, size), np.asarray(mask.to_dense(130))
    for (i, j), state in np.ndenumerate(states):
        tile = allowed[i * size : (i + 1) * size, j * size : (j + 1) * size]
        assert state == PARTIAL or (state == FULL) == tile.all() == tile.any()


UNKNOWN_USES = [
    lambda index, unknown: index < unknown,
    lambda index, unknown: unknown >= index,
    lambda index, unknown: index == unknown,
    lambda index, unknown: index != unknown,
    lambda index, unknown: index + unknown > 3,
    lambda index, unknown: unknown - index > 3,
    lambda index, unknown: abs(unknown * index) // 2 % 3 == 1,
    lambda index, unknown: (index // unknown == 1) & (index % unknown == 0),
    lambda index, unknown: Lookup(unknown)[index] == 1,
    lambda index, unknown: Lookup(np.arange(9))[index + unknown] == Lookup(unknown)[index],
]


@pytest.mark.parametrize("use", UNKNOWN_USES)
def test_nothing_is_known_of_a_statement_about_an_unknown(use):
    assert use(interval(2, 4), Unknown()).state == PARTIAL


@pytest.mark.slow
@given(
    table=st.lists(st.integers(-5, 5), min_size=1, max_size=40),
    low=st.integers(-3, 42),
    width=st.integers(0, 45),
)
def test_lookup_gives_the_range_of_the_table(table, low, width):
    lookup = Lookup(np.array(table, np.int32))
    reached = np.asarray(lookup[np.arange(low, low + width + 1)])
    bound = lookup[interval(low, low + width)]
    assert (bound.low, bound.high) == (reached.min(), reached.max())


def test_a_divisor_may_be_known_inside_jit_only():
    low, high = np.array([0, 2, 5, 3], np.int32), np.array([1, 6, 5, 5], np.int32)
    for operation in (lambda a, d: a // d, lambda a, d: a % d):
        traced = jax.jit(lambda d, operation=operation: vars(operation(Interval(low, high), d)))(3)
        outside = operation(Interval(low, high), 3)
        np.testing.assert_array_equal(traced["low"], outside.low)
        np.testing.assert_array_equal(traced["high"], outside.high)


def test_lookup_inside_jit_equals_outside():
    table = np.array([3, 1, 4, 1, 5, 9, 2, 6], np.int32)
    low, high = np.array([0, 2, 5], np.int32), np.array([1, 6, 5], np.int32)
    traced = jax.jit(lambda table: vars(Lookup(table)[Interval(low, high)]))(table)
    outside = Lookup(table)[Interval(low, high)]
    np.testing.assert_array_equal(traced["low"], outside.low)
    np.testing.assert_array_equal(traced["high"], outside.high)
    np.testing.assert_array_equal(outside.low, [1, 1, 9])


@pytest.mark.parametrize("computed", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("entries", [1, 6, 7, 20])
@pytest.mark.parametrize(("length", "size"), [(7, 7), (7, 3), (7, 20), (129, 8)])
def test_lookup_gives_the_range_of_each_tile_of_a_sequence(length, size, entries, computed):
    table = np.random.default_rng(0).integers(-9, 9, entries, np.int32)
    tiles = intervals.tile_intervals(length, size, axis=1, computed=computed)
    found, expected = (Lookup(table)[x] for x in (tiles, Interval(tiles.low, tiles.high)))
    np.testing.assert_array_equal(found.low, expected.low)
    np.testing.assert_array_equal(found.high, expected.high)
    np.testing.assert_array_equal(tiles.low.shape, found.low.shape)


@pytest.mark.parametrize("length", [1, 7, 8, 127, 129])
@pytest.mark.parametrize("size", [1, 8, 128, 500])
def test_tile_intervals_cover_the_sequence_without_overlap(length, size):
    rows = intervals.tile_intervals(length, size, axis=0)
    covered = [
        i for low, high in zip(rows.low, rows.high, strict=True) for i in range(low[0], high[0] + 1)
    ]
    assert covered == list(range(length))
    assert intervals.tile_intervals(length, size, axis=1).low.shape == rows.low.shape[::-1]


@pytest.mark.parametrize(
    "predicate",
    [
        lambda q_idx, kv_idx: jnp.sin(q_idx) > 0,
        lambda q_idx, kv_idx: np.array([True, False])[q_idx],
        lambda q_idx, kv_idx: 0 <= q_idx - kv_idx <= 3,
        lambda q_idx, kv_idx: (q_idx & 1) == 0,
        lambda q_idx, kv_idx: q_idx.astype(int) > 0,
        lambda q_idx, kv_idx: q_idx - kv_idx,
    ],
)
def test_a_predicate_that_cannot_be_read_counts_as_partial(predicate):
    rows, columns = (intervals.tile_intervals(4, 2, axis) for axis in (0, 1))
    np.testing.assert_array_equal(
        intervals.classify(predicate, rows, columns), np.full((2, 2), PARTIAL)
    )


@pytest.mark.parametrize("constant", [True, False, np.True_])
def test_a_constant_predicate(constant):
    rows, columns = (intervals.tile_intervals(4, 2, axis) for axis in (0, 1))
    state = intervals.classify(lambda q_idx, kv_idx: constant, rows, columns)
    np.testing.assert_array_equal(state, np.full((2, 2), FULL if constant else EMPTY))


def test_a_predicate_must_answer_with_booleans():
    with pytest.raises(TypeError) as error:
        intervals.judge(lambda q_idx, kv_idx: q_idx - kv_idx, jnp.arange(3), jnp.arange(3))
    assert str(error.value) == (
        "mask: a predicate must return booleans, got int32; compare the indices, and combine "
        "conditions with & | ~."
    )
    with pytest.raises(TypeError, match="must return booleans, got str"):
        intervals.judge(lambda q_idx, kv_idx: "yes", jnp.arange(3), jnp.arange(3))
