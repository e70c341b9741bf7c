"""A parallel corpus: pairs of sentences, their splits and vocabularies, and gold alignments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from experiments.data.vocabulary import Vocabulary

Links = frozenset[tuple[int, int]]


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
