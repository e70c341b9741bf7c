"""The program: ``python -m experiments.translate``."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence

from experiments import processes
from experiments.translate.command_line import parse, run_program
from experiments.translate.config import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code.

    It is that of `command_line.run_program` or, for a run of several processes, of
    `processes.watch`.
    """
    do = functools.partial(_do, arguments)
    if processes.WORKER in os.environ:
        # Importing JAX takes a second; the help text and a mistyped flag do not wait for it.
        from experiments.translate.run import train_together
        from experiments.worker import adopted

        do = functools.partial(train_together, adopted())
    return run_program("translate", arguments, parse, do)


def _do(arguments: Sequence[str] | None, config: Config) -> int:
    if group := config.group:
        given = sys.argv[1:] if arguments is None else arguments
        return processes.watch("translate", "experiments.translate", given, group)
    from experiments.translate.run import train_and_report
    from experiments.translate.use import use

    (train_and_report if config.mode == "train" else use)(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
