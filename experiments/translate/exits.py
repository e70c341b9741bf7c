"""What a program that trains says and returns at its end, whatever that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from experiments import command_line
from experiments.command_line import Options, complain, reason


def run(
    program: str,
    arguments: Sequence[str] | None,
    parse: Callable[[Sequence[str]], Options],
    do: Callable[[Options], Any],
) -> int:
    """Run a program and return its exit code, with one sentence for what went wrong.

    0; 1 where training or writing failed; 2 for a request that cannot be met; 130 or 143 when
    it was interrupted.
    """

    def done(options: Options) -> int:
        # JAX takes a second to import; help and a mistyped flag do not wait for it.
        from experiments.translate.interrupts import Interrupted
        from experiments.translate.train import Diverged

        try:
            do(options)
        except Diverged as error:
            return complain(program, error, 1)
        except OSError as error:
            return complain(program, f"{reason(error)}; what was saved before is kept.", 1)
        except (Interrupted, KeyboardInterrupt) as stop:
            where = f" after {stop}" if str(stop) else ""
            code = stop.code if isinstance(stop, Interrupted) else 130
            sentence = f"interrupted{where}; the same command goes on from there."
            return complain(program, sentence, code)
        return 0

    return command_line.run(program, arguments, parse, done)
