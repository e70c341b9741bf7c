"""What a claim is, its settings and verdicts; all claims, read from the docstrings of their files.

Reading imports no claim, so that help and the list of claims do not wait for JAX.
"""

from __future__ import annotations

import functools
import importlib
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
_FOLDER = Path(__file__).parent
# In the order of the report.
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
# Evidence as JSON has it: numbers, strings, lists and dictionaries of them.
Data = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """The effort of a measurement: `tiny` to see that it runs, `quick`, or `full` for papers."""

    name: str

    def pick(self, *, tiny: T, quick: T, full: T) -> T:
        """Return the value for this setting.

        >>> SETTINGS["quick"].pick(tiny=1, quick=10, full=100)
        10
        """
        return {"tiny": tiny, "quick": quick, "full": full}[self.name]


SETTINGS = {name: Setting(name) for name in ("tiny", "quick", "full")}


class Outcome(StrEnum):
    """The four outcomes of a test."""

    HOLDS = "holds"
    ONLY_IF = "holds only if"
    FAILS = "does not hold"
    UNDECIDED = "cannot be decided here"


@dataclass(frozen=True)
class Verdict:
    """An outcome and the numbers it rests on; `condition` ends "holds only if"."""

    outcome: Outcome
    because: str
    condition: str = ""

    def __str__(self) -> str:
        return f"{self.outcome} {self.condition}".strip()


def holds(because: str) -> Verdict:
    """Return the verdict that the claim is true."""
    return Verdict(Outcome.HOLDS, because)


def holds_only_if(condition: str, because: str) -> Verdict:
    """Return the verdict that the claim is true under a condition that it does not state.

    >>> print(holds_only_if("entries are independent", because="..."))
    holds only if entries are independent
    """
    return Verdict(Outcome.ONLY_IF, because, condition)


def fails(because: str) -> Verdict:
    """Return the verdict that the claim is false."""
    return Verdict(Outcome.FAILS, because)


def undecided(because: str) -> Verdict:
    """Return the verdict that the data do not decide."""
    return Verdict(Outcome.UNDECIDED, because)


@dataclass(frozen=True)
class Claim:
    """A claim as its file states it, before any data.

    `claim` is the sentence that is tested, `source` who says so, `method` how it is tested,
    `criterion` what decides, and `published` the figures that others report, if there are any.
    """

    number: int
    theme: str
    path: Path
    claim: str
    source: str
    method: str
    criterion: str
    published: str = ""

    def load(self) -> ModuleType:
        """Import the file, and with it JAX."""
        return importlib.import_module(f"{__package__}.{self.theme}.{self.path.stem}")


class Theme(NamedTuple):
    """A chapter: its title, and what it is about."""

    title: str
    about: str


@functools.cache
def all_claims() -> dict[int, Claim]:
    """Return all claims by number, theme after theme.

    >>> all_claims()[39].theme
    'scale'
    """
    paths = [path for theme in THEMES for path in sorted((_FOLDER / theme).glob("c*_*.py"))]
    return {claim.number: claim for claim in map(read_claim, paths)}


def all_themes() -> dict[str, Theme]:
    """Return all themes by the name of their folder."""
    found = {}
    for name in THEMES:
        title, _, about = _docstring(_FOLDER / name / "__init__.py").partition("\n\n")
        found[name] = Theme(title.rstrip("."), " ".join(about.split()))
    return found


def read_claim(path: Path) -> Claim:
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
    """Return the docstring of a file without importing it."""
    found = re.match(r'"""(.*?)"""', path.read_text(encoding="utf-8"), re.DOTALL)
    return found[1].strip() if found else ""
