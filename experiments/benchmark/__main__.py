"""The program: ``python -m experiments.benchmark``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.benchmark.command_line import HelpRequested, UsageError, parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: 0, 2 for a request that cannot be met."""
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        # JAX takes a second to import; a mistyped flag does not wait for it.
        from experiments.benchmark.run import run

        run(options)
    except HelpRequested as help:
        print(help)
    except UsageError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
