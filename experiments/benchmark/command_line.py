"""The command line: absl flags, a help text to read, and one sentence for what cannot be used."""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags

SUITES = ("attention", "memory", "compile", "additive", "patterns")

_HELP = """\
Measures attend beside jax.nn, the textbook formula and, where it is installed, PyTorch: the
programs of a case take turns in one process, and a ratio is taken in every turn. Prints a table;
writes JSON and log-log plots against the sequence length. The suite patterns instead sweeps the
length for every family of masks and tells how time and bytes grow.

  python -m experiments.benchmark
  python -m experiments.benchmark --suites=memory,compile,additive --repeats=11

  --suites=attention   which of attention, memory, compile, additive, patterns to run, or all
  --repeats=7          turns that every program of a case takes
  --out=runs/benchmark directory of results; those of the same suite are replaced
  --noplots            leave out the sweep over lengths and its plots
  --quick              tiny shapes, to see that everything runs; its numbers mean nothing"""


class UsageError(Exception):
    """A request that cannot be met; the argument is the sentence to print."""


class HelpRequested(Exception):  # noqa: N818  it is no error
    """`--help` was given; the argument is the text to print."""


class Options(NamedTuple):
    """What is to be measured, how often, and where the results go."""

    suites: tuple[str, ...]
    repeats: int
    out: pathlib.Path
    plots: bool
    quick: bool


def parse(arguments: Sequence[str]) -> Options:
    """Read the arguments behind the program's name.

    Raises:
      UsageError: an unknown flag, or a value that cannot be used.
      HelpRequested: the help text was asked for.

    >>> parse(["--suites=memory,compile", "--repeats=3"]).suites
    ('memory', 'compile')
    >>> parse(["--suites=memroy"])
    Traceback (most recent call last):
    experiments.benchmark.command_line.UsageError: --suites: no suite 'memroy'; there are
    attention, memory, compile, additive, patterns, and all.
    """
    values = flags.FlagValues()
    flags.DEFINE_list("suites", ["attention"], "", flag_values=values)
    flags.DEFINE_integer("repeats", 7, "", flag_values=values)
    flags.DEFINE_string("out", "runs/benchmark", "", flag_values=values)
    flags.DEFINE_bool("plots", True, "", flag_values=values)
    flags.DEFINE_bool("quick", False, "", flag_values=values)
    flags.DEFINE_flag(flags.BooleanFlag("help", False, "", short_name="h"), values)
    try:
        rest = values(["benchmark", *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, list(values), n=1)
        hint = f"did you mean --{near[0]}?" if near else "--help lists all flags."
        raise UsageError(f"unknown flag --{error.flagname}; {hint}") from None
    except flags.Error as error:
        raise UsageError(f"{' '.join(str(error).split())}; --help lists all flags.") from None
    if values["help"].value:
        raise HelpRequested(_HELP)
    if rest:
        raise UsageError(f"{rest[0]!r} is no flag; write --name=value, and --help lists all flags.")
    given: dict[str, Any] = {name: values[name].value for name in values}
    return _checked(
        Options(
            suites=tuple(given["suites"]),
            repeats=given["repeats"],
            out=pathlib.Path(given["out"]),
            plots=given["plots"],
            quick=given["quick"],
        )
    )


def _checked(options: Options) -> Options:
    for suite in options.suites:
        if suite not in (*SUITES, "all"):
            there_are = ", ".join(SUITES)
            raise UsageError(f"--suites: no suite {suite!r}; there are {there_are}, and all.")
    if not options.suites:
        raise UsageError("--suites: name at least one suite, or all.")
    if options.repeats < 1:
        raise UsageError(f"--repeats: expected at least 1 turn, got {options.repeats}.")
    at = next(path for path in (options.out, *options.out.absolute().parents) if path.exists())
    if not at.is_dir():
        raise UsageError(f"--out: {at} is a file; give a directory.")
    return options._replace(suites=SUITES if "all" in options.suites else options.suites)
