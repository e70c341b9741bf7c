"""The program: ``python -m experiments.translate_sweep``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.translate import exits
from experiments.translate_sweep.command_line import parse
from experiments.translate_sweep.config import Sweep


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: see `exits.run`."""
    return exits.run("translate_sweep", arguments, parse, _do)


def _do(sweep: Sweep) -> None:
    from experiments.translate_sweep.run import run

    run(sweep)


if __name__ == "__main__":
    sys.exit(main())
