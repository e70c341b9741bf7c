"""Intervals that cover, tests that are calibrated, and sentences that claim no more than that."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments.significance import (
    compare,
    compare_all,
    holm,
    interval,
    seeds_needed,
    sign_flip_p_value,
)

FINITE = st.floats(-100, 100).map(lambda x: round(x, 3))


def test_few_values_give_their_range_and_a_note():
    found = interval([0.9, 0.95, 0.97])
    assert (found.low, found.high) == pytest.approx((0.9, 0.97))
    assert found.mean == pytest.approx(0.94)
    assert found.note == "3 values cover their mean in at most about 75% of cases"
    assert str(found) == "0.94 [0.9, 0.97]"


@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_constant_values(n):
    found = interval([0.7] * n)
    assert found.mean == pytest.approx(0.7)
    if n == 1:
        assert math.isnan(found.low) and math.isnan(found.high)
        assert found.note == "one value has no interval"
        assert str(found) == "0.7"
    else:
        assert found.low == found.high == found.mean
        assert found.note == f"all {n} values are equal: the interval is no bound"


def test_nearly_constant_values_stay_finite():
    found = interval([1.0] * 9 + [1.0 + 1e-15])
    assert 1.0 <= found.low <= found.high <= 1.0 + 1e-15


def test_values_that_are_not_finite():
    found = interval([1.0, math.nan, math.inf])
    assert math.isnan(found.low) and found.note == "not finite: 2 of 3 values"


@pytest.mark.parametrize("values", [[], [[1.0], [2.0]]])
def test_no_list_of_numbers(values):
    with pytest.raises(
        ValueError, match=r"^interval: expected a list of at least one number, got "
    ):
        interval(values)


@given(st.lists(FINITE, min_size=2, max_size=9))
def test_an_interval_holds_its_mean_within_the_range(values):
    found = interval(values)
    slack = 1e-9
    assert min(values) - slack <= found.low <= found.mean + slack
    assert found.mean - slack <= found.high <= max(values) + slack


def test_the_enumerated_resamples_match_random_ones():
    values = np.random.default_rng(1).normal(size=5)
    found = interval(values)
    drawn = np.random.default_rng(2).choice(values, (200_000, 5)).mean(axis=1)
    tail = stats.norm.cdf(-stats.t.ppf(0.975, 4) * math.sqrt(5 / 4))
    expected = np.quantile(drawn, [tail, 1 - tail])
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.03)


@pytest.mark.parametrize(("n", "coverage"), [(3, 0.75), (6, 0.95), (10, 0.95)])
def test_intervals_cover_as_often_as_they_say(n, coverage):
    random = np.random.default_rng(0)
    found = [interval(random.normal(size=n)) for _ in range(300)]
    share = np.mean([i.low <= 0 <= i.high for i in found])
    # Three standard errors of a share over 300 samples.
    assert abs(share - coverage) < 3 * math.sqrt(coverage * (1 - coverage) / 300)


def test_many_values_agree_with_the_t_interval():
    values = np.random.default_rng(0).normal(size=200)
    expected = stats.t.interval(0.95, 199, values.mean(), stats.sem(values))
    found = interval(values)
    assert (found.low, found.high) == pytest.approx(expected, abs=0.01)
    assert found.note == "" and found == interval(values)


@given(st.lists(FINITE, min_size=2, max_size=9))
def test_the_p_value_is_that_of_scipy(differences):
    ours = sign_flip_p_value(differences)
    if len(set(map(abs, differences))) > 1:
        theirs = stats.permutation_test(
            (np.array(differences), np.zeros(len(differences))),
            lambda x, y: abs(np.mean(x - y)),
            permutation_type="samples",
            alternative="greater",
            n_resamples=np.inf,
        )
        assert ours == pytest.approx(theirs.pvalue)
    assert 2.0 ** (1 - len(differences)) <= ours <= 1.0


def test_the_smallest_p_value_and_ties():
    for n in range(1, 10):
        assert sign_flip_p_value([0.1] * n) == 2.0 ** (1 - n)
    assert sign_flip_p_value([0.0, 0.0, 0.0]) == 1.0
    assert sign_flip_p_value([1.0, -1.0]) == 1.0
    nothing = [0.1, 0.2, -0.3, 0.1, -0.1, 0.4, -0.4]
    assert sum(nothing) != 0.0, "but for rounding"
    assert sign_flip_p_value(nothing) == sign_flip_p_value([10 * x for x in nothing]) == 1.0
    assert sign_flip_p_value([0.1, 0.2, 0.3, 1e-9]) == 2 / 16


def test_many_pairs_are_sampled():
    random = np.random.default_rng(0)
    assert sign_flip_p_value(random.normal(size=20) + 3) == pytest.approx(1 / 20_001)
    sampled = sign_flip_p_value(x := random.normal(0.3, 1, size=40))
    assert sampled == pytest.approx(stats.ttest_1samp(x, 0).pvalue, abs=0.02)


def test_the_test_is_calibrated():
    random = np.random.default_rng(0)
    p_values = np.array([sign_flip_p_value(random.normal(size=8)) for _ in range(1000)])
    for alpha in (0.05, 0.25, 0.5):
        expected = math.floor(alpha * 128) / 128
        error = 3.5 * math.sqrt(expected * (1 - expected) / 1000)
        assert abs((p_values <= alpha).mean() - expected) < error


def test_seeds_needed():
    assert [seeds_needed(alpha) for alpha in (0.5, 0.25, 0.05, 0.01)] == [2, 3, 6, 8]
    assert seeds_needed(0.05, comparisons=10) == 9


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0.001, 0.999))
def test_holm_rejects_what_its_step_down_procedure_rejects(p_values, alpha):
    adjusted = holm(p_values)
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    steps = ((len(p_values) - rank) * p_values[i] <= alpha for rank, i in enumerate(order))
    rejected = len(list(itertools.takewhile(bool, steps)))
    assert sum(p <= alpha for p in adjusted) == rejected
    assert all(a >= p for a, p in zip(adjusted, p_values, strict=True))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([]) == ()


def test_three_seeds_are_too_few():
    found = compare(
        [0.9, 0.95, 0.97],
        [0.8, 0.85, 0.9],
        names=("additive", "scaled_dot"),
        metric="exact match",
    )
    assert found.sentence == (
        "additive - scaled_dot in exact match: 0.09 [0.07, 0.1] over 3 seeds (paired permutation "
        "test, p = 0.25): too few seeds to conclude anything, because with 3 the smallest possible "
        "p is 0.25; at least 6 are needed for p <= 0.05."
    )
    assert found.p_value == 0.25 and not found.conclusive


def test_one_seed_is_too_few():
    found = compare([0.9], [0.8], names=("a", "b"), metric="BLEU")
    assert found.sentence == (
        "a - b in BLEU: 0.1 over 1 seed (paired permutation test, p = 1): too few seeds to "
        "conclude anything, because with 1 the smallest possible p is 1; at least 6 are needed "
        "for p <= 0.05."
    )


def test_a_shown_difference_in_both_directions():
    high, low = [9.0, 8, 7, 9, 9, 8], [1.0, 2, 3, 1, 1, 1]
    found = compare(high, low, names=("a", "b"))
    assert found.conclusive and found.p_value == 0.03125
    assert found.sentence.endswith("(paired permutation test, p = 0.031): a is higher than b.")
    assert compare(low, high, names=("b", "a")).sentence.endswith(": a is higher than b.")


def test_no_difference_shown_is_not_called_equality():
    found = compare([1.0, 2, 3, 4, 5, 6], [1.1, 1.9, 3.1, 3.9, 5.1, 5.9])
    assert not found.conclusive
    assert found.sentence.endswith(
        ": no difference is shown, which does not show that they are equal."
    )


def test_a_diverged_run_is_not_compared():
    found = compare([1.0, math.nan], [1.0, 2.0], names=("a", "b"), metric="BLEU")
    assert found.sentence == (
        "a - b in BLEU: nan over 2 seeds: not compared, because not finite: 1 of 2 values."
    )
    assert math.isnan(found.p_value) and not found.conclusive


def test_several_systems_are_corrected_together():
    high, low = [9.0, 8, 7, 9, 9, 8, 9], [1.0, 2, 3, 1, 1, 1, 2]
    found = compare_all({"a": high, "b": low, "c": [x + 0.1 for x in low]})
    assert [(c.first, c.second) for c in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [c.p_value for c in found] == [3 / 64] * 3
    assert all("corrected for 3 comparisons" in c.sentence for c in found)
    six = compare_all(
        {name: values[:6] for name, values in {"a": high, "b": low, "c": low}.items()}
    )
    assert "with 6 the smallest possible p is 0.094; at least 7 are needed" in six[0].sentence


def test_unpaired_systems_are_refused():
    with pytest.raises(ValueError) as error:
        compare([1.0, 2.0], [1.0], names=("a", "b"))
    assert str(error.value) == (
        "compare: expected at least two systems with a value for each of the same seeds, got 2 of "
        "a, 1 of b."
    )
    with pytest.raises(ValueError, match=r"got none\.$"):
        compare_all({})
