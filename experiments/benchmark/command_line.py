"""The command line: absl flags, a help text, and error messages."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from absl import flags

from experiments.command_line import UsageError, check_folder, parse_flags

SUITES = (
    *("attention", "memory", "compile", "additive", "patterns", "translate", "accelerators"),
    *("matrix", "normalizers", "statistics"),
)

_HELP = """\
Measures attend beside jax.nn, the textbook formula and, where it is installed, PyTorch: the
programs of a case take turns in one process, and a ratio is taken in every turn. Prints a table;
writes JSON and log-log plots against the sequence length. The suite patterns instead sweeps the
length for every family of masks and tells how time and bytes grow; the suite translate trains
the recurrent translator, at its default size and at that of Multi30k, beside one in PyTorch; the
suite accelerators compiles kernels for TPU and GPU beside those of JAX, which needs no device, and
the suite matrix 360 of ours, for six devices; it goes on where it was stopped. The suite
normalizers tells what each costs over softmax, statistics what each costs over none.

  python -m experiments.benchmark
  python -m experiments.benchmark --suites=memory,compile,additive --repeats=11

  --suites=attention   which of attention, memory, compile, additive, patterns, translate,
                       accelerators, matrix, normalizers, statistics to run, or all; --suite is
                       the same
  --data=DIR           Multi30k for translate; without it, synthetic sentences of its size
  --repeats=7          turns that every program of a case takes
  --out=runs/benchmark directory of results; those of the same suite are replaced
  --noplots            leave out the sweep over lengths and its plots
  --quick              tiny shapes, to see that everything runs; its numbers mean nothing"""


class Options(NamedTuple):
    """What is to be measured, how often, and where the results go."""

    suites: tuple[str, ...]
    repeats: int
    out: pathlib.Path
    plots: bool
    quick: bool
    data: str


def parse(arguments: Sequence[str]) -> Options:
    """Read the arguments behind the program's name.

    Raises:
      UsageError: an unknown flag, or a value that cannot be used.
      HelpRequested: the help text was asked for.

    >>> parse(["--suites=memory,compile", "--repeats=3"]).suites
    ('memory', 'compile')
    >>> parse(["--suites=memroy"])
    Traceback (most recent call last):
    experiments.command_line.UsageError: --suites: no suite 'memroy'; there are
    attention, memory, compile, additive, patterns, translate, accelerators, matrix,
    normalizers, statistics, and all.
    """
    values = flags.FlagValues()
    flags.DEFINE_list("suites", ["attention"], "", flag_values=values)
    flags.DEFINE_alias("suite", "suites", flag_values=values)
    flags.DEFINE_integer("repeats", 7, "", flag_values=values)
    flags.DEFINE_string("out", "runs/benchmark", "", flag_values=values)
    flags.DEFINE_bool("plots", True, "", flag_values=values)
    flags.DEFINE_bool("quick", False, "", flag_values=values)
    flags.DEFINE_string("data", "", "", flag_values=values)
    given = parse_flags("benchmark", values, arguments, lambda: _HELP)
    return _checked(
        Options(
            suites=tuple(given["suites"]),
            repeats=given["repeats"],
            out=pathlib.Path(given["out"]),
            plots=given["plots"],
            quick=given["quick"],
            data=given["data"],
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
    suites = SUITES if "all" in options.suites else options.suites
    if options.data and "translate" not in suites:
        raise UsageError(
            "--data is for the suite translate, which --suites does not name; add it, or leave "
            "--data out."
        )
    check_folder("out", options.out)
    return options._replace(suites=suites)
