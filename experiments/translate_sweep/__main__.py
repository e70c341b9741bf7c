"""The program: ``python -m experiments.translate_sweep``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.translate.command_line import run_program
from experiments.translate_sweep.command_line import parse
from experiments.translate_sweep.config import Sweep


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: see `command_line.run_program`."""
    return run_program("translate_sweep", arguments, parse, _do)


def _do(sweep: Sweep) -> None:
    # Importing JAX takes a second; the help text and a mistyped flag do not wait for it.
    from experiments.translate_sweep.run import run_sweep

    run_sweep(sweep)


if __name__ == "__main__":
    sys.exit(main())
