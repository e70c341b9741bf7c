"""The command line: absl flags made from the fields of `Config`, the help text, and exit codes."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence

from absl import flags

from experiments import command_line
from experiments.command_line import Options, complain
from experiments.translate import workdir
from experiments.translate.config import Config
from experiments.translate.stopping import Diverged, Interrupted

_SUMMARY = """\
Trains translators that differ only in their attention score, several seeds of each at once, and
writes a table, learning curves, alignments and a report that compares them.

  python -m experiments.translate
  python -m experiments.translate --scores=additive,scaled_dot,dot,uniform,none --match_parameters
  python -m experiments.translate --data=corpus.tsv --source=en --target=de --width=256 \\
      --learning_rate=0.002 --dropout=0.2 --steps=5000

  python -m experiments.translate --mode=translate --workdir=DIR

The same command again resumes an interrupted run. --flagfile=FILE reads flags from a file."""

Define = Callable[..., typing.Any]

# How absl defines a flag for a field of each type.
DEFINE: Mapping[typing.Any, Define] = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    int | None: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
    tuple[str, ...]: flags.DEFINE_list,
}


def parse(arguments: Sequence[str]) -> Config:
    """Parse the arguments after the program's name into a configuration, and check it.

    Raises:
      UsageError: an unknown flag, or a value that cannot be used.
      HelpRequested: the help text was asked for.

    >>> parse(["--seeds=2", "--scores=dot,none", "--noline_noise"])
    Traceback (most recent call last):
    experiments.command_line.UsageError: unknown flag --noline_noise; --help lists all flags.
    >>> parse(["--seeds=2", "--scores=dot,none"]).scores
    ('dot', 'none')
    """
    values = defined(dataclasses.fields(Config))
    command_line.parse_flags("translate", values, arguments, help_text)
    names = Config.__dataclass_fields__
    given = {name: workdir.from_json(values[name].value) for name in names if values[name].present}
    config = Config(**given)
    config.check()
    return config if config.mode == "train" else workdir.trained_config(config, given)


def help_text(
    summary: str = _SUMMARY,
    fields: Sequence[dataclasses.Field] = dataclasses.fields(Config),
    width: int = 98,
) -> str:
    """Return all flags by group, with their defaults, below a summary."""
    indent = 27
    lines = [summary]
    group = None
    for field in fields:
        if field.metadata["group"] != group:
            group = field.metadata["group"]
            lines += ["", group]
        help = textwrap.wrap(field.metadata["help"], width - indent)
        default = _shown(field.default)
        head = f"  --{field.name}" + (f"={default}" if default else "")
        if len(head) >= indent - 1:
            lines.append(head)
            head = ""
        lines.append(head.ljust(indent) + help[0])
        lines += [" " * indent + line for line in help[1:]]
    return "\n".join(lines)


def defined(
    fields: Sequence[dataclasses.Field], define: Mapping[typing.Any, Define] = DEFINE
) -> flags.FlagValues:
    """Return absl flags for fields of `Config`; `define` has a function for each type."""
    values = flags.FlagValues()
    types = typing.get_type_hints(Config)
    for field in fields:
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        define[types[field.name]](
            field.name, default, field.metadata["help"], flag_values=values, module_name="translate"
        )
    flags.DEFINE_string("flagfile", "", "file of flags", flag_values=values)
    return values


def run_program(
    program: str,
    arguments: Sequence[str] | None,
    parse: Callable[[Sequence[str]], Options],
    do: Callable[[Options], typing.Any],
) -> int:
    """Run a program that trains, print one sentence for any failure, and return its exit code.

    What `do` returns, or 0. 1: training diverged or a file could not be written. 2: the request
    cannot be met. 130 or 143: interrupted by SIGINT or SIGTERM.
    """

    def done(options: Options) -> int:
        try:
            return do(options) or 0
        except Diverged as error:
            return complain(program, error, 1)
        except OSError as error:
            reason = command_line.reason(error)
            command_line.drop_output()
            return complain(program, f"{reason}; what was saved before is kept.", 1)
        except (Interrupted, KeyboardInterrupt) as stop:
            where = f" after {stop}" if str(stop) else ""
            code = stop.code if isinstance(stop, Interrupted) else 130
            sentence = f"interrupted{where}; the same command goes on from there."
            return complain(program, sentence, code)

    return command_line.run(program, arguments, parse, done)


def _shown(default: object) -> str:
    if isinstance(default, tuple):
        return ",".join(default)
    if isinstance(default, bool):
        return str(default).lower()
    if default is None:
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)
