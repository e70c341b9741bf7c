"""The program: ``python -m experiments.translate``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.translate.command_line import parse, run_program
from experiments.translate.config import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: see `command_line.run_program`."""
    return run_program("translate", arguments, parse, _do)


def _do(config: Config) -> None:
    # Importing JAX takes a second; the help text and a mistyped flag do not wait for it.
    from experiments.translate.run import train_and_report
    from experiments.translate.use import use

    (train_and_report if config.mode == "train" else use)(config)


if __name__ == "__main__":
    sys.exit(main())
