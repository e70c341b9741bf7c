"""What a claim is, in which settings it is tested, and what a verdict can be."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")
# What was measured: numbers, strings, lists and dictionaries of them, as JSON has them.
Data = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """How much is spent on a claim: `tiny` to see that it runs, `quick`, or `full` for papers."""

    name: str

    def pick(self, *, tiny: T, quick: T, full: T) -> T:
        """Return what belongs to this setting.

        >>> SETTINGS["quick"].pick(tiny=1, quick=10, full=100)
        10
        """
        return {"tiny": tiny, "quick": quick, "full": full}[self.name]


SETTINGS = {name: Setting(name) for name in ("tiny", "quick", "full")}


class Outcome(StrEnum):
    """The four things that can be said of a claim."""

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
    """The claim is true as it stands."""
    return Verdict(Outcome.HOLDS, because)


def holds_only_if(condition: str, because: str) -> Verdict:
    """The claim leaves out a condition.

    >>> print(holds_only_if("entries are independent", because="..."))
    holds only if entries are independent
    """
    return Verdict(Outcome.ONLY_IF, because, condition)


def fails(because: str) -> Verdict:
    """The claim is not true."""
    return Verdict(Outcome.FAILS, because)


def undecided(because: str) -> Verdict:
    """The data do not tell."""
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
