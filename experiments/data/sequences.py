"""Copying and reversing strings of symbols: the smallest tasks that need an alignment."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from experiments.data.corpus import Pair

SYMBOLS = tuple("abcdefghijklmnopqrst")


def sentences(random: Random, *, longest: int, reverse: bool) -> Iterator[Pair]:
    """Strings of 1 to ``longest`` symbols, without end; the longer ones are not rarer."""
    while True:
        length = 1 + int(random.random() * longest)
        source = tuple(SYMBOLS[int(random.random() * len(SYMBOLS))] for _ in range(length))
        links = frozenset((length - 1 - j if reverse else j, j) for j in range(length))
        yield Pair(source, source[::-1] if reverse else source, links, links)
