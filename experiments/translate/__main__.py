"""The program: ``python -m experiments.translate``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.command_line import HelpRequested, UsageError, show
from experiments.translate.command_line import parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code.

    0; 1 where training or writing failed; 2 for a request that cannot be met; 130 or 143 when
    it was interrupted.
    """
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
    except HelpRequested as help:
        show(help)
        return 0
    except UsageError as error:
        return _complain(error, 2)
    # JAX takes a second to import; help and a mistyped flag do not wait for it.
    from experiments.translate.interrupts import Interrupted
    from experiments.translate.run import run
    from experiments.translate.train import Diverged
    from experiments.translate.use import use

    try:
        (run if config.mode == "train" else use)(config)
    except UsageError as error:
        return _complain(error, 2)
    except Diverged as error:
        return _complain(error, 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}; what was saved before is kept.", 1)
    except (Interrupted, KeyboardInterrupt) as stop:
        where = f" after {stop}" if str(stop) else ""
        code = stop.code if isinstance(stop, Interrupted) else 130
        return _complain(f"interrupted{where}; the same command goes on from there.", code)
    return 0


def _complain(sentence: object, code: int) -> int:
    print(f"translate: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
