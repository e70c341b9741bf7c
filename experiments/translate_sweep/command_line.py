"""The command line: the translator's flags, of which those with a number may take a list."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.command_line import UsageError, parse_flags
from experiments.shards import parse_shard
from experiments.translate import command_line
from experiments.translate.config import SEVERAL, Config
from experiments.translate_sweep.config import LISTED, Sweep

_SUMMARY = f"""\
Trains translators at every combination of the values listed, chooses the learning rate of each
score by its validation loss, and concludes which scores differ and where.

  python -m experiments.translate_sweep --scores=additive,scaled_dot,dot \\
      --attention_size=2,8,32,128,512 --learning_rate=0.003,0.01,0.03 --seeds=10

These take a list: scores, {", ".join(LISTED[:5])},
{", ".join(LISTED[5:])}.

The same command again resumes an interrupted sweep; with values or scores added to its lists, it
trains only these. The folder is runs/sweep-DATA-KEY unless --workdir is given; the key depends on
the flags without a list and on which flags have one. sweep.csv has all runs of the folder,
results.json and the figures those of the last command. --flagfile=FILE reads flags from a file.

Jobs that share the folder divide the work: with --shard=2/8 a job does the second of eight shares
of the runs, then helps with others. Without --shard the same command collects what they did, does
what nobody does, and writes the results."""

# A sweep only trains; the other modes are for its runs.
_FIELDS = tuple(
    f for f in dataclasses.fields(Config) if f.metadata["group"] not in ("After training", SEVERAL)
)


@dataclasses.dataclass(frozen=True)
class _Jobs:
    """Flags of a sweep alone."""

    shard: str | None = dataclasses.field(
        default=None,
        metadata={
            "group": "Several jobs",
            "help": "The share of the runs that this job does, such as 2/8; all, and the results, "
            "unless given.",
        },
    )


_JOBS = dataclasses.fields(_Jobs)


class _Several(flags.ArgumentParser):
    """Numbers separated by commas."""

    def __init__(self, one: flags.ArgumentParser):
        self.one = one

    def parse(self, argument: Any) -> tuple[Any, ...]:
        if not isinstance(argument, str):
            return (self.one.parse(argument),)
        parts = argument.split(",")
        if len(parts) > 1 and not all(map(str.strip, parts)):
            raise ValueError("an element of the list is empty")
        return tuple(self.one.parse(part) for part in parts)


def parse(arguments: Sequence[str]) -> Sweep:
    """Parse the arguments after the program's name into a sweep, and check it.

    Raises:
      UsageError: an unknown flag, or a value that cannot be used.
      HelpRequested: the help text was asked for.

    >>> parse(["--attention_size=2,8", "--seeds=2"]).values
    {'attention_size': (2, 8)}
    """
    several = {
        int: _define(flags.IntegerParser()),
        int | None: _define(flags.IntegerParser()),
        float: _define(flags.FloatParser()),
    }
    values = command_line.defined(_FIELDS, {**command_line.DEFINE, **several})
    (shard,) = _JOBS
    flags.DEFINE_string(shard.name, None, shard.metadata["help"], flag_values=values)
    parse_flags("translate_sweep", values, arguments, help_text)
    given: dict[str, Any] = {
        f.name: values[f.name].value for f in _FIELDS if values[f.name].present
    }
    numbers = {name: value for name, value in given.items() if isinstance(value, tuple)}
    swept = {name: value for name, value in numbers.items() if len(value) > 1}
    for name, value in swept.items():
        if name not in LISTED:
            listed = ",".join(map(str, value))
            raise UsageError(f"--{name} is {listed}, but takes one value; --help names the lists.")
    # absl reads a list of names as a list; a configuration is to be hashed.
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    base = Config(**given | {name: value[0] for name, value in numbers.items()})
    sweep = Sweep(base, swept, parse_shard(values[shard.name].value))
    sweep.check()
    return sweep


def help_text() -> str:
    """Return all flags by group, with their defaults."""
    return command_line.help_text(_SUMMARY, (*_FIELDS, *_JOBS))


def _define(one: flags.ArgumentParser) -> command_line.Define:
    def define(name: str, default: Any, help: str, **options: Any) -> None:
        flags.DEFINE(_Several(one), name, default, help, **options)

    return define
