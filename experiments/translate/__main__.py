"""The program: ``python -m experiments.translate``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.translate import exits
from experiments.translate.command_line import parse
from experiments.translate.config import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: see `exits.run`."""
    return exits.run("translate", arguments, parse, _do)


def _do(config: Config) -> None:
    from experiments.translate.run import run
    from experiments.translate.use import use

    (run if config.mode == "train" else use)(config)


if __name__ == "__main__":
    sys.exit(main())
