"""English number words into German ones, split into morphemes: forty two -> zwei und vierzig."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from experiments.data.corpus import Pair

LIMIT = 1_000_000

_BELOW_TWENTY = (
    "zero/null one/ein two/zwei three/drei four/vier five/fünf six/sechs seven/sieben eight/acht "
    "nine/neun ten/zehn eleven/elf twelve/zwölf thirteen/dreizehn fourteen/vierzehn "
    "fifteen/fünfzehn sixteen/sechzehn seventeen/siebzehn eighteen/achtzehn nineteen/neunzehn"
)
_TENS = (
    "twenty/zwanzig thirty/dreißig forty/vierzig fifty/fünfzig sixty/sechzig seventy/siebzig "
    "eighty/achtzig ninety/neunzig"
)
_ENGLISH, _GERMAN = zip(*(word.split("/") for word in _BELOW_TWENTY.split()), strict=True)
_ENGLISH_TENS, _GERMAN_TENS = zip(*(word.split("/") for word in _TENS.split()), strict=True)

# A German morpheme with its sure and its possible source positions.
_Morpheme = tuple[str, tuple[int, ...], tuple[int, ...]]


def _below_hundred(n: int, source: list[str]) -> list[_Morpheme]:
    at = len(source)
    if n < 20:
        source.append(_ENGLISH[n])
        return [(_GERMAN[n], (at,), ())]
    tens = (_GERMAN_TENS[n // 10 - 2], (at,), ())
    source.append(_ENGLISH_TENS[n // 10 - 2])
    if n % 10 == 0:
        return [tens]
    source.append(_ENGLISH[n % 10])
    return [(_GERMAN[n % 10], (at + 1,), ()), ("und", (), (at, at + 1)), tens]


def _below_thousand(n: int, source: list[str], *, after: bool) -> list[_Morpheme]:
    """``after``: whether thousands come before, so that English joins the rest by "and"."""
    target: list[_Morpheme] = []
    if n >= 100:
        target += _below_hundred(n // 100, source)
        target.append(("hundert", (len(source),), ()))
        source.append("hundred")
    if n % 100:
        if n >= 100 or after:
            source.append("and")
        target += _below_hundred(n % 100, source)
    return target


def translate(n: int) -> Pair:
    """The pair of ``n`` in 0..999999; German "und" is Possible to both words that it joins.

    English "and" between hundreds and the rest has no counterpart and no link.

    >>> pair = translate(2021)
    >>> " ".join(pair.source), " ".join(pair.target)
    ('two thousand and twenty one', 'zwei tausend ein und zwanzig')
    """
    if not 0 <= n < LIMIT:
        raise ValueError(f"translate: expected a number in 0..{LIMIT - 1}, got {n}.")
    source: list[str] = []
    target: list[_Morpheme] = []
    if n >= 1000:
        target += _below_thousand(n // 1000, source, after=False)
        target.append(("tausend", (len(source),), ()))
        source.append("thousand")
    if n == 0:
        target += _below_hundred(0, source)
    target += _below_thousand(n % 1000, source, after=n >= 1000)
    words = [word for word, _, _ in target]
    if words[-1] == "ein":
        words[-1] = "eins"
    sure = frozenset((i, j) for j, (_, links, _) in enumerate(target) for i in links)
    extra = frozenset((i, j) for j, (_, _, links) in enumerate(target) for i in links)
    return Pair(tuple(source), tuple(words), sure, sure | extra)


def sentences(random: Random) -> Iterator[Pair]:
    """Random numbers without end, as often of one length as of another; some repeat."""
    while True:
        digits = 1 + int(random.random() * 6)
        yield translate(int(random.random() * 10**digits))
