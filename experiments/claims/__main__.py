"""The program: ``python -m experiments.claims``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.claims.command_line import list_text, parse
from experiments.command_line import HelpRequested, UsageError, show


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code.

    0; 1 where a claim could not be tested; 2 for a request that cannot be met; 130 when it was
    interrupted.
    """
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        if options.list:
            show(list_text())
            return 0
        # JAX takes a second to import; help and a mistyped flag do not wait for it.
        from experiments.claims.run import run

        return run(options)
    except HelpRequested as help:
        show(help)
        return 0
    except UsageError as error:
        print(f"claims: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("claims: interrupted; the same command goes on from there.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
