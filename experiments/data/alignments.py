"""Gold alignments as they are published.

``0-0 1-2`` (Pharaoh; fast_align, GIZA++) lists the links of a line, ``i-j`` sure and ``i?j`` or
``ipj`` possible, counted from 0 or, as in the hand-aligned sets of Europarl, from 1. The files of
the shared tasks of NAACL 2003 and ACL 2005 (Mihalcea & Pedersen 2003) have a link in each line,
``sentence source target S|P``, all counted from 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from experiments.data.corpus import DataError, Links, Pair, shortened

_LINK = re.compile(r"(\d+)([-?p])(\d+)", re.ASCII)
_ALIGNMENT = re.compile(r"\d+(?:[-?p]\d+)?(?: \d+(?:[-?p]\d+)?)*", re.ASCII)
# More digits than the position of a word in any sentence has.
_DIGITS = 9
_NAACL = re.compile(r"(\d{1,9})\s+(\d{1,9})\s+(\d{1,9})(?:\s+([SP]))?(?:\s+\d*\.?\d+)?", re.ASCII)

# The number of a row, and its source, its target and perhaps its links.
Row = tuple[int, list[str]]


def is_alignment(text: str) -> bool:
    """Whether a text can be parsed as an alignment."""
    return bool(_ALIGNMENT.fullmatch(" ".join(text.split())))


def parse_alignment(
    text: str, source_length: int, target_length: int, first: int = 0
) -> tuple[Links, Links]:
    """Sure and possible links (source, target) of either notation, checked against the lengths.

    ``0-0 1?2 2p2`` lists links, ``-`` sure, ``?`` and ``p`` possible. ``2 0 1`` gives the source
    position of each target token and, where it has one entry more, of the end symbol, which is
    dropped.

    Args:
      text: the links.
      source_length: number of source tokens.
      target_length: number of target tokens.
      first: the position of the first token in the text; what is returned counts from 0.

    Raises:
      ValueError: a phrase that says what is wrong, to follow "the alignment".

    >>> parse_alignment("0-0 1?2", 2, 3)[0]
    frozenset({(0, 0)})
    >>> sorted(parse_alignment("1-1 2p3", 2, 3, first=1)[1])
    [(0, 0), (1, 2)]
    >>> sorted(parse_alignment("2 0 2", 3, 2)[1])
    [(0, 1), (2, 0)]
    """
    fields = text.split()
    if all(field.isascii() and field.isdigit() for field in fields):
        if len(fields) not in (target_length, target_length + 1):
            raise ValueError(
                f"has {len(fields)} positions for {target_length} target tokens and the end symbol"
            )
        entries = fields[:target_length]
        sure = {(_position(field, first), position) for position, field in enumerate(entries)}
        possible: set[tuple[int, int]] = set()
    else:
        sure, possible = set(), set()
        for field in fields:
            match = _LINK.fullmatch(field)
            if not match:
                raise ValueError(
                    f"has the entry {shortened(field)!r}, which is neither i-j nor i?j or ipj"
                )
            links = sure if match[2] == "-" else possible
            links.add((_position(match[1], first), _position(match[3], first)))
    for i, j in sorted(sure | possible):
        if not (0 <= i < source_length and 0 <= j < target_length):
            raise ValueError(
                f"links {i + first} to {j + first}, outside of {source_length} source and "
                f"{target_length} target tokens counted from {first}"
            )
    return frozenset(sure), frozenset(sure | possible)


def _position(digits: str, first: int) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"has the position {shortened(digits)}, which is in no sentence")
    return int(digits) - first


def pharaoh(sure: Links, possible: Links | None = None) -> str:
    """Links as text in order of the source, sure ones as ``i-j``, merely possible ones as ``i?j``.

    >>> pharaoh(frozenset({(1, 0), (0, 2)}), frozenset({(1, 0), (0, 2), (1, 1)}))
    '0-2 1-0 1?1'
    """
    links = sorted(sure | (possible or frozenset()))
    return " ".join(f"{i}{'-' if (i, j) in sure else '?'}{j}" for i, j in links)


def by_sentence(lines: Sequence[str], count: int) -> list[str] | None:
    """The links of each of `count` sentences, counted from 1, or None if these are no such lines.

    Lines ``sentence source target S|P``: a link without letter is sure, a confidence behind it is
    left out, and so is a link to 0, the empty word. Without any letter they are taken for lines of
    links only where there are as many of them as sentences.

    Raises:
      ValueError: a phrase that says which line is of no sentence.

    >>> by_sentence(["1 1 1 S", "1 2 3 P", "0003 1 2 S 0.9"], 3)
    ['1-1 2p3', '', '1-2']
    """
    found = [_NAACL.fullmatch(line.strip()) for line in lines if line.strip()]
    lettered = any(match and match[4] for match in found)
    if not all(found) or not (lettered or len(lines) != count):
        return None
    links: list[list[str]] = [[] for _ in range(count)]
    for number, line in enumerate(lines, 1):
        match = _NAACL.fullmatch(line.strip())
        if not match:  # a blank line
            continue
        sentence, i, j = map(int, match.groups()[:3])
        if not 1 <= sentence <= count:
            raise ValueError(
                f"line {number} is of sentence {sentence}, but there are {count} sentences, "
                "counted from 1"
            )
        if i and j:
            links[sentence - 1].append(f"{i}{'p' if match[4] == 'P' else '-'}{j}")
    return [" ".join(of_sentence) for of_sentence in links]


def aligned(where: str, row: Row, columns: tuple[int, int] = (0, 1), first: int = 0) -> Pair:
    """The words of a row between spaces, with the links that it has for its columns 0 and 1.

    Args:
      where: the row is in, before its number in the message of an error.
      row: its number, two sentences and perhaps links.
      columns: of the source and the target.
      first: the position of a first word in the links.

    Raises:
      DataError: the links cannot be read.
    """
    number, cells = row
    words = tuple(cells[0].split()), tuple(cells[1].split())
    source, target = (words[column] for column in columns)
    if len(cells) < 3 or not cells[2].strip() or not (source and target):
        return Pair(source, target)
    try:
        sure, possible = parse_alignment(cells[2], len(words[0]), len(words[1]), first)
    except ValueError as error:
        raise DataError(f"{where} {number}: the alignment {error}.") from None
    if columns == (1, 0):
        sure, possible = (frozenset((j, i) for i, j in links) for links in (sure, possible))
    return Pair(source, target, sure, possible)


def all_aligned(
    where: str,
    rows: Sequence[Row],
    tell: Callable[[str], None],
    columns: tuple[int, int] = (0, 1),
    first: int = 0,
) -> list[Pair]:
    """`aligned` of each row; says where the links may count from another position.

    Raises:
      DataError: links cannot be read; the sentence says if all can, counted otherwise.
    """
    other = 1 - first

    try:
        pairs = [aligned(where, row, columns, first) for row in rows]
    except DataError as error:
        if not _fits(where, rows, other):
            raise
        sentence = str(error).removesuffix(".")
        raise DataError(
            f"{sentence}; counted from {other} all links fit: set --links_from={other}."
        ) from None
    if other == 1 and _fits(where, rows, other):
        tell(
            f"{where.removesuffix(' line')}: no link is of position 0, and all would fit counted "
            "from 1 too; if they count so, set --links_from=1."
        )
    return pairs


def _fits(where: str, rows: Sequence[Row], first: int) -> bool:
    """Whether there are links, and all can be read counted from a position."""
    try:
        pairs = [aligned(where, row, first=first) for row in rows]
    except DataError:
        return False
    return any(pair.possible for pair in pairs)
