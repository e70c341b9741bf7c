"""The values that a flag may have."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Range(NamedTuple):
    """The values that a field may have: in words, and as a predicate that is False for NaN."""

    words: str
    contains: Callable[[Any], bool]


POSITIVE = Range("a whole number of at least 1", lambda x: x >= 1)
NOT_NEGATIVE = Range("a finite number of at least 0", lambda x: 0 <= x < math.inf)
ABOVE_ZERO = Range("a finite number above 0", lambda x: 0 < x < math.inf)
BELOW_ONE = Range("a number in [0, 1)", lambda x: 0 <= x < 1)
# With a larger exponent the length penalty of a thousand words overflows float32.
UP_TO_TEN = Range("a number in [0, 10]", lambda x: 0 <= x <= 10)
ZERO_OR_ONE = Range("0 or 1", (0, 1).__contains__)
EVEN = Range("an even whole number of at least 2", lambda x: x >= 2 and x % 2 == 0)


def one_of(*names: str) -> Range:
    """Return the range of a field with one of a few values."""
    return Range(" or ".join(names), names.__contains__)
