"""All claims and themes, read out of the docstrings of their files, without importing them."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple

from experiments.claims.claim import Claim

_FOLDER = Path(__file__).parent
# In this order they are reported.
THEMES = (
    "scale",
    "saturation",
    "expressiveness",
    "heads",
    "masks",
    "positions",
    "cost",
    "efficient",
    "translation",
)


class Theme(NamedTuple):
    """A chapter: its title, and what it is about."""

    title: str
    about: str


@functools.cache
def claims() -> dict[int, Claim]:
    """Return all claims by number, theme after theme.

    >>> claims()[39].theme
    'scale'
    """
    paths = [path for theme in THEMES for path in sorted((_FOLDER / theme).glob("c*_*.py"))]
    return {claim.number: claim for claim in map(read, paths)}


def themes() -> dict[str, Theme]:
    """Return all themes by the name of their folder."""
    found = {}
    for name in THEMES:
        title, _, about = _docstring(_FOLDER / name / "__init__.py").partition("\n\n")
        found[name] = Theme(title.rstrip("."), " ".join(about.split()))
    return found


def read(path: Path) -> Claim:
    """Read what a file claims: its first paragraph, and then paragraphs that begin with a name.

    Raises:
      ValueError: the source, method or criterion is missing, or the name of the file has no number.
    """
    sentence, *rest = _docstring(path).split("\n\n")
    named = (" ".join(part.split()).partition(": ") for part in rest)
    fields = {name.lower(): text for name, _, text in named}
    number = re.match(r"c(\d+)_", path.name)
    missing = {"source", "method", "criterion"} - fields.keys()
    if missing or not number:
        lacks = ", ".join(sorted(missing)) or "a number in its name"
        raise ValueError(f"{path}: the claim lacks {lacks}.")
    return Claim(int(number[1]), path.parent.name, path, " ".join(sentence.split()), **fields)


def _docstring(path: Path) -> str:
    """Return the text between the first quotes, also of a file that cannot be imported."""
    found = re.match(r'"""(.*?)"""', path.read_text(encoding="utf-8"), re.DOTALL)
    return found[1].strip() if found else ""
