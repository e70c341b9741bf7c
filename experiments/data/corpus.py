"""A parallel corpus: pairs of sentences, their splits and vocabularies, and gold alignments.

Gold alignments are written as Pharaoh writes them, ``0-0 1?2``, or as one source position for each
target token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from experiments.data.vocabulary import Vocabulary

Links = frozenset[tuple[int, int]]

_LINK = re.compile(r"(\d+)([-?])(\d+)", re.ASCII)
_ALIGNMENT = re.compile(r"\d+(?:[-?]\d+)?(?: \d+(?:[-?]\d+)?)*", re.ASCII)


# Characters of a user's text that a message repeats.
_REPEATED = 40


class DataError(ValueError):
    """A corpus that cannot be used; the message is one sentence for the user."""


def shortened(text: str) -> str:
    """Return text as a message repeats it: of a long one its beginning and its length.

    >>> shortened("zebra"), shortened(20_000 * "z")
    ('zebra', 'zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz... (20,000 characters)')
    """
    if len(text) <= _REPEATED:
        return text
    return f"{text[:_REPEATED]}... ({len(text):,} characters)"


@dataclass(frozen=True)
class Pair:
    """A sentence and its translation, with the gold alignment where there is one.

    Links are (source position, target position), zero-based, without BOS and EOS. ``possible``
    contains ``sure`` (Och & Ney 2003); both are None where no gold alignment is known.
    """

    source: tuple[str, ...]
    target: tuple[str, ...]
    sure: Links | None = None
    possible: Links | None = None


@dataclass(frozen=True)
class Corpus:
    """Training, validation and test pairs with their vocabularies.

    ``extra`` holds further test sets by name, such as ``"long"``: sentences longer than any in
    training. ``notices`` has one sentence for each thing the user must know about the data.
    ``files`` has the SHA-256 of every file that was read, by its path. ``at_spaces`` says whether
    text was split at spaces and kept its case: so is generated text, and text whose training set
    has gold alignments, because these count its words.
    """

    name: str
    train: tuple[Pair, ...]
    valid: tuple[Pair, ...]
    test: tuple[Pair, ...]
    source_vocabulary: Vocabulary
    target_vocabulary: Vocabulary
    extra: Mapping[str, tuple[Pair, ...]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    at_spaces: bool = True


def is_alignment(text: str) -> bool:
    """Whether a text can be parsed as an alignment."""
    return bool(_ALIGNMENT.fullmatch(" ".join(text.split())))


def parse_alignment(text: str, source_length: int, target_length: int) -> tuple[Links, Links]:
    """Sure and possible links (source, target) of either notation, checked against the lengths.

    ``0-0 1?2`` lists links, ``-`` sure and ``?`` possible. ``2 0 1`` gives the source position
    of each target token and, where it has one entry more, of the end symbol, which is dropped.

    Raises:
      ValueError: a phrase that says what is wrong, to follow "the alignment".

    >>> parse_alignment("0-0 1?2", 2, 3)[0]
    frozenset({(0, 0)})
    >>> sorted(parse_alignment("2 0 2", 3, 2)[1])
    [(0, 1), (2, 0)]
    """
    fields = text.split()
    if all(field.isascii() and field.isdigit() for field in fields):
        if len(fields) not in (target_length, target_length + 1):
            raise ValueError(
                f"has {len(fields)} positions for {target_length} target tokens and the end symbol"
            )
        sure = {(int(field), position) for position, field in enumerate(fields[:target_length])}
        possible: set[tuple[int, int]] = set()
    else:
        sure, possible = set(), set()
        for field in fields:
            match = _LINK.fullmatch(field)
            if not match:
                raise ValueError(
                    f"has the entry {shortened(field)!r}, which is neither i-j nor i?j"
                )
            links = sure if match[2] == "-" else possible
            links.add((int(match[1]), int(match[3])))
    for i, j in sorted(sure | possible):
        if i >= source_length or j >= target_length:
            raise ValueError(
                f"links {i} to {j}, outside of {source_length} source and {target_length} "
                "target tokens counted from 0"
            )
    return frozenset(sure), frozenset(sure | possible)


def pharaoh(sure: Links, possible: Links | None = None) -> str:
    """Links as text in order of the source, sure ones as ``i-j``, merely possible ones as ``i?j``.

    >>> pharaoh(frozenset({(1, 0), (0, 2)}), frozenset({(1, 0), (0, 2), (1, 1)}))
    '0-2 1-0 1?1'
    """
    links = sorted(sure | (possible or frozenset()))
    return " ".join(f"{i}{'-' if (i, j) in sure else '?'}{j}" for i, j in links)
