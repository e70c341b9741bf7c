"""The configuration of a sweep: a run with several values for some fields, and its runs.

This module does not import JAX, so that `--help` and a mistyped flag are answered at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.command_line import UsageError
from experiments.shards import Shard
from experiments.translate.config import SWEPT, Config, named_after

RATE = "learning_rate"

# Fields that may have several values.
LISTED = (
    "train_size",
    "heads",
    "layers",
    "width",
    "attention_size",
    "dropout",
    "steps",
    "batch_size",
    RATE,
    "warmup",
    "weight_decay",
    "clip",
    "label_smoothing",
)

Point = dict[str, Any]


class Trial(NamedTuple):
    """A run of a sweep: one score at one point and one learning rate."""

    score: str
    point: Point
    rate: float
    config: Config

    def __str__(self) -> str:
        return f"{self.score}, {shown({**self.point, RATE: self.rate})}"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """All flags of a sweep.

    Attributes:
      base: a run with the first value of every field.
      values: the values of each field that was given several of them.
      shard: the share of the runs that this process does; None for all, and the results.
    """

    base: Config
    values: Mapping[str, tuple[Any, ...]]
    shard: Shard | None = None

    @property
    def directory(self) -> Path:
        """The folder: --workdir, or one named by which fields are swept and by all other values."""
        if self.base.workdir:
            return Path(self.base.workdir)
        free = dict.fromkeys(("scores", RATE, *self.values), SWEPT)
        identity = json.dumps(self.base.identity | free)
        key = hashlib.sha256(identity.encode()).hexdigest()[:8]
        return Path("runs") / f"sweep-{named_after(self.base.data)}-{key}"

    @property
    def identity(self) -> dict[str, Any]:
        """The values that all runs share; scores and swept values may be added later."""
        return self.base.identity | dict.fromkeys(("scores", *LISTED), SWEPT)

    @property
    def flags(self) -> dict[str, Any]:
        """All flags of the sweep as on the command line."""
        several = {name: ",".join(map(str, values)) for name, values in self.values.items()}
        return self.base.identity | several

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """The values of all swept fields but the learning rate, which is chosen at each point."""
        return {name: values for name, values in self.values.items() if name != RATE}

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to choose from."""
        return self.values.get(RATE, (self.base.learning_rate,))

    @property
    def points(self) -> list[Point]:
        """Every combination of the values of `axes`."""
        axes = self.axes
        return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]

    def trials(self) -> Iterator[Trial]:
        """Yield every run."""
        for point, score, rate in itertools.product(self.points, self.base.scores, self.rates):
            # The parameters of all scores are matched to those of the first.
            first = self.base.scores[:1] if self.base.match_parameters else ()
            scores = tuple(dict.fromkeys((*first, score)))
            run = dataclasses.replace(self.base, **point, learning_rate=rate, scores=scores)
            folder = self.directory / "runs" / f"{score}-{run.key}"
            yield Trial(score, point, rate, dataclasses.replace(run, workdir=str(folder)))

    def check(self) -> None:
        """Refuse values that cannot be used.

        Raises:
          UsageError: one sentence with flag, value and what is needed.
        """
        for name, values in self.values.items():
            for value in values:
                if values.count(value) > 1:
                    raise UsageError(f"--{name} names {value} twice; name every value once.")
        for point, rate in itertools.product(self.points, self.rates):
            dataclasses.replace(self.base, **point, learning_rate=rate).check()


def shown(point: Point) -> str:
    """Return a point as text.

    >>> shown({"attention_size": 8, "learning_rate": 0.01})
    'attention_size=8, learning_rate=0.01'
    """
    return ", ".join(f"{name}={value}" for name, value in point.items())
