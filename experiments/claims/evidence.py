"""Numbers with their uncertainty: from random draws, compared between trained arms, and as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from experiments.significance import compare, interval
from experiments.translate.train_step import quick_options

# A value for each draw or seed.
Values = Sequence[float]


def draws(
    of_draw: Callable[[jax.Array], Mapping[str, jax.Array]], rng: jax.Array, num_draws: int
) -> dict[str, list[float]]:
    """Call a function of a random key `num_draws` times; return the numbers that it names.

    >>> found = draws(lambda rng: {"uniform": jax.random.uniform(rng)}, jax.random.key(0), 3)
    >>> len(found["uniform"])
    3
    """
    # It runs once, so that optimizing it does not pay.
    together = jax.jit(jax.vmap(of_draw), compiler_options=quick_options(1))
    found = together(jax.random.split(rng, num_draws))
    return {name: np.asarray(values, np.float64).tolist() for name, values in found.items()}


def by_name(of_points: Sequence[Mapping[str, Values]]) -> dict[str, list[Values]]:
    """Turn named values of every point into a list of points for every name.

    >>> by_name([{"a": [1.0]}, {"a": [2.0]}])
    {'a': [[1.0], [2.0]]}
    """
    return {name: [point[name] for point in of_points] for name in of_points[0]}


def shown(values: Values | float) -> str:
    """Write the mean of draws or seeds with its 95% bootstrap interval.

    >>> shown([1.0, 2.0, 3.0]), shown(0.25)
    ('2 [1, 3]', '0.25')
    """
    found = interval(np.atleast_1d(np.asarray(values, np.float64)))
    if math.isnan(found.low) or found.low == found.high:
        return f"{found.mean:.3g}"
    return f"{found.mean:.3g} [{found.low:.3g}, {found.high:.3g}]"


def by_size(
    title: str, sizes: Sequence[str], values: Mapping[str, Sequence[Values]]
) -> list[list[str]]:
    """Return a table with a row for each size and a column for each name.

    >>> by_size("loss", ["d = 2"], {"dot": [[1.0, 3.0]], "additive": [[2.0, 2.0]]})
    [['loss', 'dot', 'additive'], ['d = 2', '2 [1, 3]', '2']]
    """
    rows = [
        [size, *(shown(of_name[n]) for of_name in values.values())] for n, size in enumerate(sizes)
    ]
    return [[title, *values], *rows]


def between(values: Values, low: float, high: float) -> bool:
    """Tell whether the whole 95% interval lies between two numbers.

    >>> between([1.0, 1.1], 0.9, 1.2), between([1.0, 1.3], 0.9, 1.2)
    (True, False)
    """
    found = interval(values)
    return found.low >= low and found.high <= high


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

    p is not corrected for the number of comparisons, and the text says so.

    >>> difference([2.0, 2.1, 2.2], [1.0, 1.0, 1.0])
    '1.1 [1, 1.2], uncorrected p = 0.25'
    """
    found = compare(first, second)
    mean = shown([a - b for a, b in zip(first, second, strict=True)])
    return f"{mean}, uncorrected p = {found.p_value:.2g}"


def learned(*arms: Values, least: float = 10.0) -> bool:
    """Tell whether every arm reaches a least mean; arms that learned nothing cannot be compared."""
    return all(interval(arm).mean >= least for arm in arms)


def within(first: Values, second: Values, low: float, high: float) -> bool:
    """Tell whether the interval of the paired differences lies between two numbers."""
    found = interval([a - b for a, b in zip(first, second, strict=True)])
    return found.low >= low and found.high <= high
