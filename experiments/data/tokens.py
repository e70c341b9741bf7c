"""Text to tokens and back, for languages that write spaces between words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

# Combining marks are no word characters to `re`, although they are part of words.
_MARK = "".join(
    chr(code)
    for first, last in ((0x300, 0x1DFF), (0x20D0, 0x20FF), (0xFE00, 0xFE2F))
    for code in range(first, last + 1)
    if unicodedata.category(chr(code)).startswith("M")
)
_LETTERS = rf"(?:\w[{_MARK}\u200c\u200d]*)+"
_SUFFIX = r"['’](?:s|re|ve|ll|d|m|n|ne)\b"
_TOKEN = re.compile(
    rf"""
      \d+(?:[.,:]\d+)+                                      # 3.5  1,000  10:30
    | (?<!\w)(?:[^\W\d_]\.){{2,}}                           # z.B.  U.S.
    | {_LETTERS}?(?=n['’]t\b) | n['’]t\b                    # do n't
    | (?<=\w){_SUFFIX}                                      # it 's   geht 's
    | {_LETTERS}(?:(?:(?!{_SUFFIX})['’]|-){_LETTERS})*(?:-(?=\s))?   # o'clock  T-Shirt  Vor-
    | \.{{2,}} | -{{2,}} | \S[{_MARK}]*(?:\u200d\S[{_MARK}]*)*
    """,
    re.VERBOSE | re.IGNORECASE,
)
_INVISIBLE = re.compile("[\u00ad\u200e\u200f\u2060\ufeff]")
_BLANK = re.compile("[\x00-\x1f\x7f-\x9f\u200b]")

_CLOSING = re.compile(r"[.,;:!?%)\]}…”’]+|n['’]t|" + _SUFFIX, re.IGNORECASE)
_OPENING = frozenset("([{„‚¿¡$£€#")
_TOGGLING = {'"': '"', "'": "'", "«": "«»", "»": "«»"}
_AMBIGUOUS = {"“": "„", "‘": "‚"}  # they open in English, and close what these opened in German


def tokenize(text: str, lowercase: bool = False) -> tuple[str, ...]:
    """Words and punctuation of a line of text, in Unicode's composed form (NFC).

    >>> tokenize("Don't wait, it's 10:30 o'clock!")
    ('Do', "n't", 'wait', ',', 'it', "'s", '10:30', "o'clock", '!')
    >>> tokenize("Wie geht's? Vor- und Nachteile des T-Shirts.", lowercase=True)
    ('wie', 'geht', "'s", '?', 'vor-', 'und', 'nachteile', 'des', 't-shirts', '.')
    """
    text = _BLANK.sub(" ", _INVISIBLE.sub("", unicodedata.normalize("NFC", text)))
    # Lower-casing may decompose again (İ), so that NFC comes last.
    text = unicodedata.normalize("NFC", text.lower()) if lowercase else text
    return tuple(token for token in _TOKEN.findall(text) if token)


def cut(text: str, at_spaces: bool, lowercase: bool) -> tuple[str, ...]:
    """Words of a line of text: what lies between spaces, as it is, or those of `tokenize`.

    >>> cut("Ein Hund.", at_spaces=True, lowercase=True)
    ('Ein', 'Hund.')
    >>> cut("Ein Hund.", at_spaces=False, lowercase=True)
    ('ein', 'hund', '.')
    """
    return tuple(text.split()) if at_spaces else tokenize(text, lowercase)


def detokenize(tokens: Iterable[str]) -> str:
    r"""Tokens as a line of text, punctuation and contractions joined to their words.

    >>> print(detokenize(tokenize('She said: "I don\'t know (yet)."')))
    She said: "I don't know (yet)."
    """
    text, glued = "", True
    opened: set[str] = set()
    for token in tokens:
        kind = _TOGGLING.get(token)
        closes = bool(_CLOSING.fullmatch(token)) or token == "/"
        opens = token in _OPENING or token == "/"
        if token in _AMBIGUOUS:
            closes, opens = _AMBIGUOUS[token] in opened, _AMBIGUOUS[token] not in opened
            opened.discard(_AMBIGUOUS[token])
        elif kind:
            closes, opens = kind in opened, kind not in opened
            opened ^= {kind}
        elif opens:
            opened.add(token)
        text += token if glued or closes else f" {token}"
        glued = opens
    return text
