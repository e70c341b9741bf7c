"""The program: ``python -m experiments.claims``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments import command_line
from experiments.claims.command_line import Options, list_text, parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code.

    0; 1 where a claim could not be tested; 2 for a request that cannot be met; 130 when it was
    interrupted.
    """
    return command_line.run("claims", arguments, parse, _test)


def _test(options: Options) -> int:
    if options.list:
        command_line.show(list_text())
        return 0
    try:
        # JAX takes a second to import; help and a mistyped flag do not wait for it.
        from experiments.claims.run import run

        return run(options)
    except KeyboardInterrupt:
        sentence = "interrupted; the same command goes on from there."
        return command_line.complain("claims", sentence, 130)


if __name__ == "__main__":
    sys.exit(main())
