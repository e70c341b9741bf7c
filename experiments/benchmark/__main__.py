"""The program: ``python -m experiments.benchmark``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments import command_line
from experiments.benchmark.command_line import Options, parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: see `command_line.run`."""
    return command_line.run("benchmark", arguments, parse, _measure)


def _measure(options: Options) -> None:
    # JAX takes a second to import; a mistyped flag does not wait for it.
    from experiments.benchmark.run import run

    run(options)


if __name__ == "__main__":
    sys.exit(main())
