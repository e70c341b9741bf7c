"""Statistics of few seeds: intervals, paired comparisons, and how many seeds are needed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# All resamples (n^n) or sign flips (2^n) are enumerated up to these numbers of seeds.
_ENUMERATED_RESAMPLES = 5
_ENUMERATED_FLIPS = 16
_RANDOM_DRAWS = 20_000

Values = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval; ``note`` says where its coverage is lower than stated."""

    mean: float
    low: float
    high: float
    count: int
    note: str = ""

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.4g}"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def interval(values: Values, *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """The mean over seeds and its bootstrap interval: expanded percentiles (Hesterberg 2015).

    The percentiles of resampled means are too narrow for few values, and BCa cannot estimate its
    corrections from them. So with the quantile t of n - 1 degrees of freedom the percentile at
    Phi(-t sqrt(n / (n - 1))) is taken instead of (1 - confidence) / 2. Up to five values all n^n
    resamples are enumerated. No bootstrap leaves the range of the values, which misses the mean
    of a symmetric distribution with probability 2^(1-n): below six values it cannot cover 95%,
    and ``note`` says so.

    >>> print(interval([90.0, 92.0, 97.0]))
    93 [90, 97]
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"interval: expected a list of at least one number, got {values!r}.")
    n, mean = len(x), float(x.mean())
    if not np.isfinite(x).all():
        bad = int((~np.isfinite(x)).sum())
        return Interval(mean, math.nan, math.nan, n, f"not finite: {bad} of {n} values")
    if n == 1:
        return Interval(mean, math.nan, math.nan, n, "one value has no interval")
    if (x == x[0]).all():
        return Interval(mean, mean, mean, n, f"all {n} values are equal: the interval is no bound")
    tail = _expanded_tail(n, confidence)
    means = _resampled_means(x, seed)
    low = float(np.quantile(means, tail, method="lower"))
    high = float(np.quantile(means, 1 - tail, method="higher"))
    return Interval(mean, low, high, n, too_few_to_cover(n, confidence=confidence))


def too_few_to_cover(n: int, *, confidence: float = 0.95) -> str:
    """Say how often an interval of n values covers their mean, if less often than stated.

    >>> too_few_to_cover(3)
    '3 values cover their mean in at most about 75% of cases'
    >>> too_few_to_cover(8)
    ''
    """
    reached = 1 - 2.0 ** (1 - n)
    if reached >= confidence:
        return ""
    return f"{n} values cover their mean in at most about {100 * reached:.0f}% of cases"


def _expanded_tail(n: int, confidence: float) -> float:
    from scipy.special import ndtr, stdtrit

    t = stdtrit(n - 1, (1 + confidence) / 2)
    return float(ndtr(-t * math.sqrt(n / (n - 1))))


def _resampled_means(x: np.ndarray, seed: int) -> np.ndarray:
    n = len(x)
    if n <= _ENUMERATED_RESAMPLES:
        return x[np.array(list(itertools.product(range(n), repeat=n)))].mean(axis=1)
    return np.random.default_rng(seed).choice(x, (_RANDOM_DRAWS, n)).mean(axis=1)


def sign_flip_p_value(differences: Values, *, seed: int = 0) -> float:
    """Two-sided p of the paired permutation test (Fisher 1935): exact up to 16 pairs.

    Under the null hypothesis each difference is as likely as its negative; p is the share of all
    2^n choices of signs whose sum is at least as far from zero as the one observed.

    >>> sign_flip_p_value([1.0, 2.0, 3.0])
    0.25
    """
    d = np.asarray(differences, np.float64)
    if len(d) <= _ENUMERATED_FLIPS:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(d))))
        drawn = 0
    else:
        signs = np.random.default_rng(seed).choice((1.0, -1.0), (_RANDOM_DRAWS, len(d)))
        drawn = 1  # the observed signs count as one draw, so that p is never zero
    # The same sum in another order of signs may differ in the last bits of the largest terms.
    far = np.abs(signs @ d) >= abs(d.sum()) - 1e-12 * np.abs(d).sum()
    return float((far.sum() + drawn) / (len(signs) + drawn))


def seeds_needed(alpha: float = 0.05, comparisons: int = 1) -> int:
    """The fewest seeds whose smallest possible p, 2^(1-n) times ``comparisons``, is below alpha.

    >>> seeds_needed(), seeds_needed(comparisons=10)
    (6, 9)
    """
    return next(n for n in itertools.count(1) if comparisons * 2.0 ** (1 - n) <= alpha)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """p-values adjusted for their number (Holm 1979), in the order given.

    >>> holm([0.01, 0.04, 0.03])
    (0.03, 0.06, 0.06)
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return tuple(adjusted)


@dataclass(frozen=True)
class Comparison:
    """first - second over paired seeds; ``p_value`` is corrected if there were several."""

    first: str
    second: str
    metric: str
    difference: Interval
    p_value: float
    conclusive: bool
    sentence: str


def compare(
    first: Values,
    second: Values,
    *,
    names: tuple[str, str] = ("first", "second"),
    metric: str = "score",
    alpha: float = 0.05,
) -> Comparison:
    """Compare two systems trained with the same seeds."""
    return compare_all({names[0]: first, names[1]: second}, metric=metric, alpha=alpha)[0]


def compare_all(
    systems: Mapping[str, Values], *, metric: str = "score", alpha: float = 0.05
) -> tuple[Comparison, ...]:
    """Compare every pair of systems, with p-values corrected for their number by Holm's method."""
    return compare_families({metric: systems}, alpha=alpha)[metric]


def compare_families(
    families: Mapping[str, Mapping[str, Values]], *, alpha: float = 0.05
) -> dict[str, tuple[Comparison, ...]]:
    """Compare every pair of systems in each family, corrected for all comparisons of all families.

    Args:
      families: the systems of each by what they are compared in, such as "BLEU at width 8".
      alpha: largest corrected p that is called conclusive.

    >>> high, low = [3.0, 4, 5, 4, 3, 4, 5], [1.0, 2, 1, 2, 1, 2, 1]
    >>> found = compare_families(
    ...     {"early": {"a": high, "b": low}, "late": {"a": high, "b": high}}
    ... )
    >>> [(c.metric, c.p_value, c.conclusive) for of in found.values() for c in of]
    [('early', 0.03125, True), ('late', 1.0, False)]
    """
    pairs = [
        (metric, names, _differences(systems, names))
        for metric, systems in families.items()
        for names in itertools.combinations(_paired(systems), 2)
    ]
    finite = [bool(np.isfinite(d).all()) for _, _, d in pairs]
    tested = [sign_flip_p_value(d) for (_, _, d), ok in zip(pairs, finite, strict=True) if ok]
    p_values = iter(holm(tested))
    found: dict[str, tuple[Comparison, ...]] = dict.fromkeys(families, ())
    for (metric, (a, b), d), ok in zip(pairs, finite, strict=True):
        p = next(p_values) if ok else math.nan
        sentence = _sentence(a, b, metric, interval(d), p, alpha, len(tested))
        compared = Comparison(a, b, metric, interval(d), p, ok and p <= alpha, sentence)
        found[metric] += (compared,)
    return found


def _paired(systems: Mapping[str, Values]) -> Mapping[str, Values]:
    counts = {name: len(values) for name, values in systems.items()}
    if len(set(counts.values())) != 1 or len(systems) < 2 or 0 in counts.values():
        raise ValueError(
            "compare: expected at least two systems with a value for each of the same seeds, got "
            + (", ".join(f"{count} of {name}" for name, count in counts.items()) or "none")
            + "."
        )
    return systems


def _differences(systems: Mapping[str, Values], names: tuple[str, str]) -> np.ndarray:
    first, second = (np.asarray(systems[name], np.float64) for name in names)
    return first - second


def _sentence(
    first: str,
    second: str,
    metric: str,
    difference: Interval,
    p: float,
    alpha: float,
    comparisons: int,
) -> str:
    n, smallest = difference.count, min(1.0, comparisons * 2.0 ** (1 - difference.count))
    what = f"{first} - {second} in {metric}: {difference} over {n} seed{'s' * (n > 1)}"
    if math.isnan(p):
        return f"{what}: not compared, because {difference.note}."
    corrected = f", corrected for {comparisons} comparisons" if comparisons > 1 else ""
    tested = f"{what} (paired permutation test, p = {p:.2g}{corrected})"
    if smallest > alpha:
        return (
            f"{tested}: too few seeds to conclude anything, because with {n} the smallest possible "
            f"p is {smallest:.2g}; at least {seeds_needed(alpha, comparisons)} are needed for "
            f"p <= {alpha:g}."
        )
    if p <= alpha:
        higher, lower = (first, second) if difference.mean > 0 else (second, first)
        return f"{tested}: {higher} is higher than {lower}."
    return f"{tested}: no difference is shown, which does not show that they are equal."
