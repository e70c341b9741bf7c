"""Text: lines of UTF-8 files, and words of a line, for languages with spaces between words."""

from __future__ import annotations

import codecs
import contextlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import regex

from experiments.data.corpus import DataError

# Letters, digits and the marks of all scripts, by Unicode's categories and its boundaries of words
# (UAX 29), which take signs such as Hebrew's geresh for letters; a sign that precedes a number
# belongs to it. What is no word is one grapheme cluster: a flag, or a person with a colour of skin.
_ALPHABETIC = r"[\p{WB=ALetter}\p{WB=Hebrew_Letter}]"
_LETTER = rf"[\p{{L}}\p{{N}}_{_ALPHABETIC[1:]}"
_PART = r"[\p{L}\p{N}\p{M}_\p{WB=ALetter}\u180e\u200c\u200d]"
_LETTERS = rf"(?:\p{{GCB=Prepend}}*{_LETTER}{_PART}*)"
_SUFFIX = rf"['’](?:s|re|ve|ll|d|m|n|ne)(?!{_PART})"
# Also those of Armenian and Hebrew, and the one where no line breaks.
_HYPHEN = r"[-\u058a\u05be\u2010\u2011]"
# Signs inside of words: Catalan's col·lecció, Hebrew's acronyms.
_INSIDE = rf"(?<=[{_ALPHABETIC[1:-1]}\p{{M}}])[\u00b7\u05f4\u2027](?={_ALPHABETIC})"
_TOKEN = regex.compile(
    rf"""
      (?:(?:https?|ftp)://|www\.)\S*[^\s\p{{P}}]/?          # https://example.org/a?b=c
    | [\w.+-]{{1,64}}+(?<=\w)@\w+(?:[.-]\w+)*\.\w+          # name@example.org
    | \p{{Nd}}+(?:[.,:٫٬]\p{{Nd}}+)+(?!\p{{M}})             # 3.5  1,000  10:30
    | (?<!{_PART})(?:\p{{L}}\p{{M}}*\.){{2,}}                 # z.B.  U.S.
    | {_LETTERS}?(?=n['’]t(?!{_PART})) | n['’]t(?!{_PART})    # do n't
    | (?<={_PART}){_SUFFIX}                                   # it 's   geht 's
    | {_LETTERS}(?:(?:(?!{_SUFFIX})['’]|{_HYPHEN}|{_INSIDE}){_LETTERS})*
      (?:{_HYPHEN}(?=\s))?                                    # o'clock  T-Shirt  Vor-
    | \.{{2,}} | -{{2,}} | (?!\s)\X
    """,
    regex.VERBOSE | regex.IGNORECASE,
)
_INVISIBLE = regex.compile(r"[\p{Bidi_Control}\u00ad\u2060-\u2064\ufeff]")
# The longer ones first: that of UTF-16 is their beginning.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_BLANK = re.compile("[\x00-\x1f\x7f-\x9f\u200b]")

_CLOSING = regex.compile(
    r"(?:[.,;:!?%)\]}…”’]|\p{Terminal_Punctuation}|\p{Pe})+|n['’]t|" + _SUFFIX, regex.IGNORECASE
)
# Scripts without spaces between words.
UNSPACED = r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}\p{Javanese}\p{Balinese}\p{LB=SA}"
# The same, and those of Chinese and Japanese, with their punctuation.
_UNSPACED = (
    rf"[\p{{Han}}\p{{Hiragana}}\p{{Katakana}}\p{{Bopomofo}}{UNSPACED}"
    r"\u3001-\u303f\u30fb\u30fc\uff01-\uffef]"
)
_BEGINS_UNSPACED = regex.compile(_UNSPACED)
_ENDS_UNSPACED = regex.compile(rf"{_UNSPACED}\p{{M}}*\Z")
_OPENS = regex.compile(r"[\p{Ps}‚¿¡$£€#]")
_TOGGLING = {'"': '"', "'": "'", "«": "«»", "»": "«»"}
_AMBIGUOUS = {"“": "„", "‘": "‚"}  # they open in English, and close what these opened in German


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file that is not empty; see `lines_of`.

    Raises:
      DataError: the file is missing, a folder, unreadable, empty, not UTF-8, or not text.
    """
    return lines_of(read_content(path), path)


def read_content(path: Path) -> bytes:
    """The bytes of a file that has more than a byte order mark.

    Raises:
      DataError: the file is missing, a folder, unreadable or empty.
    """
    with readable(path):
        try:
            content = path.read_bytes()
        except IsADirectoryError:
            raise DataError(
                f"{path} is a folder where a file was expected; give a text file."
            ) from None
        except FileNotFoundError:
            raise DataError(f"{path} does not exist; check the path.") from None
    if not content.removeprefix(codecs.BOM_UTF8):
        raise DataError(f"{path} is empty, but lines of text were expected; give another file.")
    return content


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say of what the system refuses to read what it is and why.

    Raises:
      DataError: the system refused it.
    """
    try:
        yield
    except OSError as error:
        refused = error.filename or path
        raise DataError(
            f"{refused} cannot be read: {error.strerror or error}; check the path, and who may "
            "read it."
        ) from None


def is_there(path: Path) -> bool:
    """Whether there is a file or folder.

    Raises:
      OSError: the system does not tell, as in a folder that nobody may enter.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def lines_of(content: bytes, path: object) -> list[str]:
    r"""Lines of UTF-8 text, without byte order mark and line ends (LF or CRLF).

    Only "\n" ends a line: U+2028, U+0085, vertical tab and form feed stay inside it, so that
    line n of one file belongs to line n of the other.

    Args:
      content: the bytes.
      path: where they come from, for the message of an error.

    Raises:
      DataError: they are not UTF-8, not text, or lines of an old Macintosh.
    """
    for mark, encoding in _MARKS.items():
        if content.startswith(mark):
            raise DataError(
                f"{path} line 1 begins with the mark of {encoding}, but UTF-8 was expected; "
                f"convert the file with `iconv -f {encoding} -t UTF-8`."
            )
    if (zero := content.find(b"\0")) >= 0:
        line = content.count(b"\n", 0, zero) + 1
        raise DataError(
            f"{path} line {line} has a NUL byte, so the file is binary or UTF-16, but UTF-8 text "
            "was expected; give a text file or convert it with iconv."
        )
    if b"\n" not in content and b"\r" in content.rstrip(b"\r"):
        raise DataError(
            f"{path} ends its lines with a carriage return alone, but line feeds were expected; "
            "convert the file with `tr '\\r' '\\n'`."
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} line {line} is not UTF-8 (byte 0x{error.object[error.start]:02x}); if the "
            "file is Latin-1, convert it with `iconv -f LATIN1 -t UTF-8`."
        ) from None
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def without_last_blanks(lines: list[str], count: int) -> list[str]:
    """Lines without blank ones at the end that are more than `count`.

    >>> without_last_blanks(["a", "", " ", ""], 2)
    ['a', '']
    """
    return lines if any(map(str.strip, lines[count:])) else lines[:count]


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
    """Words of a line of text, split at spaces only or by `tokenize`.

    >>> cut("Ein Hund.", at_spaces=True, lowercase=True)
    ('Ein', 'Hund.')
    >>> cut("Ein Hund.", at_spaces=False, lowercase=True)
    ('ein', 'hund', '.')
    """
    return tuple(text.split()) if at_spaces else tokenize(text, lowercase)


def detokenize(tokens: Iterable[str]) -> str:
    r"""Tokens as a line of text, punctuation and contractions joined to their words.

    Scripts that have no spaces between words, such as Japanese and Thai, get none.

    >>> print(detokenize(tokenize('She said: "I don\'t know (yet)."')))
    She said: "I don't know (yet)."
    """
    return "".join(token if joined else f" {token}" for token, joined in _joined(tokens))


def spaced(tokens: Iterable[str]) -> list[int]:
    """Count the tokens in each part between spaces of the line that `detokenize` makes of them.

    >>> spaced(tokenize("Hello, Bob."))
    [2, 2]
    """
    counts: list[int] = []
    for _, joined in _joined(tokens):
        if joined and counts:
            counts[-1] += 1
        else:
            counts.append(1)
    return counts


def _joined(tokens: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Each token, and whether it follows what is before it without a space."""
    before, glued = "", True
    opened: set[str] = set()
    for token in tokens:
        kind = _TOGGLING.get(token)
        closes = bool(_CLOSING.fullmatch(token)) or token == "/"
        opens = bool(_OPENS.fullmatch(token)) or token == "/"
        if token in _AMBIGUOUS:
            closes, opens = _AMBIGUOUS[token] in opened, _AMBIGUOUS[token] not in opened
            opened.discard(_AMBIGUOUS[token])
        elif kind:
            closes, opens = kind in opened, kind not in opened
            opened ^= {kind}
        elif opens:
            opened.add(token)
        unspaced = _ENDS_UNSPACED.search(before) and _BEGINS_UNSPACED.match(token)
        yield token, glued or closes or bool(unspaced)
        before, glued = token, opens
