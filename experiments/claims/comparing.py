"""Trained arms beside each other: which of two is better, if six seeds can tell."""

from __future__ import annotations

from experiments.claims.evidence import Values, shown
from experiments.statistics import compare, interval


def higher(first: Values, second: Values) -> bool:
    """Tell whether the first arm is conclusively higher: p at most 0.05 over paired seeds.

    >>> higher([2.0, 2.1, 2.2, 2.3, 2.4, 2.5], [1.0, 1.1, 1.0, 1.1, 1.0, 1.1])
    True
    >>> higher([2.0, 2.1], [1.0, 1.1])
    False
    """
    found = compare(first, second)
    return found.conclusive and found.difference.mean > 0


def difference(first: Values, second: Values) -> str:
    """Write the mean of the paired differences with its interval and p.

    A claim may show several, of as many sizes: p is that of each alone, and said to be.

    >>> difference([2.0, 2.1, 2.2], [1.0, 1.0, 1.0])
    '1.1 [1, 1.2], uncorrected p = 0.25'
    """
    found = compare(first, second)
    mean = shown([a - b for a, b in zip(first, second, strict=True)])
    return f"{mean}, uncorrected p = {found.p_value:.2g}"


def learned(*arms: Values, least: float = 10.0) -> bool:
    """Tell whether every arm reaches a least mean; of what was not learned nothing can be said."""
    return all(interval(arm).mean >= least for arm in arms)


def within(first: Values, second: Values, low: float, high: float) -> bool:
    """Tell whether the interval of the paired differences lies between two numbers."""
    found = interval([a - b for a, b in zip(first, second, strict=True)])
    return found.low >= low and found.high <= high
