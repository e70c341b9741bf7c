"""Fonts for labels in any script: installed ones that have what the fonts of a figure lack."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Its glyphs are boxes.
_NO_FONT = "Last Resort"
# How the names of characters begin that Chinese, Japanese and Korean fonts have.
_CJK = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC", "FULLWIDTH")


def complete(figure: Figure) -> str:
    """Give every text of a figure further fonts for characters that its own lack.

    The figure must have been drawn once, because ticks have no labels before.

    Returns:
      The characters that no installed font has, in order.
    """
    from matplotlib.text import Text

    nowhere: set[str] = set()
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        families = text.get_fontfamily()
        missing = {c for c in text.get_text() if c.isprintable()} - _characters(families)
        if missing:
            found, without = _fonts_for("".join(sorted(missing)))
            text.set_fontfamily([*families, *found])
            nowhere |= without
    return "".join(sorted(nowhere))


def package(characters: str) -> str:
    """Return the package of Debian and Ubuntu that has a font with some characters.

    >>> package("你好"), package("ꦗꦮ")
    ('fonts-noto-cjk', 'fonts-noto-core')
    """
    names = (unicodedata.name(character, "") for character in characters)
    return "fonts-noto-cjk" if any(map(_is_cjk, names)) else "fonts-noto-core"


def _is_cjk(name: str) -> bool:
    return name.startswith(_CJK)


def _characters(families: Sequence[str]) -> set[str]:
    from matplotlib.font_manager import FontProperties, findfont

    paths = (findfont(FontProperties(family=[family])) for family in families)
    return {chr(code) for path in paths for code in _codes(path)}


@functools.cache
def _fonts_for(characters: str) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return names of few fonts that together have characters, and the characters without one."""
    missing, found = set(characters), []
    candidates = {name: _having(path, missing) for name, path in _installed().items()}
    while missing and candidates:
        name = max(candidates, key=lambda of: len(candidates[of] & missing))
        if not candidates[name] & missing:
            break
        found.append(name)
        missing -= candidates.pop(name)
    return tuple(found), frozenset(missing)


def _having(path: str, characters: Iterable[str]) -> set[str]:
    codes = _codes(path)
    return {character for character in characters if ord(character) in codes}


def _installed() -> dict[str, str]:
    """Return the upright fonts by name, each with its file."""
    from matplotlib.font_manager import fontManager

    return {
        entry.name: entry.fname
        for entry in reversed(fontManager.ttflist)
        if entry.style == "normal" and not entry.name.startswith(_NO_FONT)
    }


@functools.lru_cache(maxsize=8)
def _codes(path: str) -> frozenset[int]:
    from matplotlib.font_manager import get_font

    try:
        return frozenset(get_font(path).get_charmap())
    except (OSError, RuntimeError):  # it was removed, or FreeType cannot read it
        return frozenset()
