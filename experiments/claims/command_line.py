"""The command line: flags from the fields of one dataclass, and error messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments.claims.claim import SETTINGS, Claim, all_claims, all_themes
from experiments.claims.workdir import are_verdicts
from experiments.command_line import UsageError, check_file, parse_flags
from experiments.shards import Shard, parse_shard

_HELP = """\
Tests what is claimed about additive and multiplicative attention and their relatives: each claim
with a number, a picture and a verdict that is computed from data. Writes a table, results.json,
figures, and report.html, which reads as an article. What was measured before is not measured again
unless the code it depends on has changed. Jobs that share the folder divide the work: with
--shard=2/8 a job measures the second of eight shares, then helps with others; without --shard the
same command judges and writes what they measured, and measures what nobody does.

  python -m experiments.claims
  python -m experiments.claims --claims=39,43
  python -m experiments.claims --setting=full --out=experiments/results/claims.md
"""


def _flag(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Options:
    """What is tested, how thoroughly, and where the results go."""

    claims: tuple[int, ...] = _flag((), "numbers of claims, as in 39,43; all unless given")
    setting: str = _flag("quick", "tiny (seconds), quick (minutes) or full (for papers)")
    workdir: str = _flag("runs/claims", "folder of results and of what was measured before")
    out: str = _flag(
        "", "a file NAME.md for the table, data in NAME.json; keeps claims that are not tested now"
    )
    shard: Shard | None = dataclasses.field(
        default=None, metadata={"help": "the share that this job measures, such as 2/8"}
    )
    list: bool = _flag(False, "list all claims and test none")

    @property
    def chosen(self) -> list[Claim]:
        """The claims to test, theme after theme."""
        return [c for c in all_claims().values() if not self.claims or c.number in self.claims]


def parse(arguments: Sequence[str]) -> Options:
    """Read the arguments behind the program's name.

    Raises:
      UsageError: an unknown flag, or a value that cannot be used.
      HelpRequested: the help text was asked for.

    >>> parse(["--claims=39,43", "--setting=tiny"]).claims
    (39, 43)
    """
    values = flags.FlagValues()
    for field in dataclasses.fields(Options):
        default: Any = field.default or None if field.name in _READ else field.default
        define: Any = flags.DEFINE_bool if field.name == "list" else flags.DEFINE_string
        define(field.name, default, "", flag_values=values)
    given = parse_flags("claims", values, arguments, help_text)
    options = Options(**given | {name: read(given[name]) for name, read in _READ.items()})
    _check(options)
    return options


def help_text() -> str:
    """Return what the program does, and all flags with their defaults."""
    lines = [_HELP]
    for field in dataclasses.fields(Options):
        default = f"={field.default}" if isinstance(field.default, str) else ""
        default = "=" if field.name in _READ else default
        lines.append(f"  --{field.name}{default}".ljust(25) + field.metadata["help"])
    return "\n".join(lines)


def list_text() -> str:
    """Return all claims, theme after theme."""
    lines = []
    for name, theme in all_themes().items():
        lines += [
            theme.title,
            *(f"  {c.number}  {c.claim}" for c in all_claims().values() if c.theme == name),
            "",
        ]
    return "\n".join(lines).rstrip()


def _numbers(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--claims: must be numbers such as 39,43, got {text!r}.") from None
    for number in numbers:
        if number not in all_claims():
            raise UsageError(f"--claims: there is no claim {number}; --list shows all.")
    return numbers


# How the text of a flag is read.
_READ = {"claims": _numbers, "shard": parse_shard}


def _check(options: Options) -> None:
    if options.setting not in SETTINGS:
        there_are = ", ".join(SETTINGS)
        raise UsageError(f"--setting: must be one of {there_are}, got {options.setting!r}.")
    if options.shard and options.out:
        raise UsageError(
            f"--shard={options.shard} writes no table; leave --out out, and give it to the command "
            "without --shard."
        )
    if options.out:
        _check_out(Path(options.out))


def _check_out(out: Path) -> None:
    """Refuse an output that cannot be written or would overwrite a file of another program."""
    check_file("out", out)
    if out.suffix != ".md":
        raise UsageError(f"--out is {out}, but a name that ends in .md is needed.")
    data = out.with_suffix(".json")
    check_file("out", data)
    if data.exists() and not are_verdicts(data):
        raise UsageError(
            f"--out: the data go into {data}, but that file is not of this program; give another "
            "name."
        )
