"""How training stops before its end: it diverged, or a signal came."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Diverged(Exception):  # noqa: N818  the caller reports it as a sentence
    """A loss or a parameter became NaN or infinite."""


class Interrupted(Exception):  # noqa: N818  it is not an error
    """The run was stopped by a signal; `code` is the shell's exit code for it."""

    def __init__(self, where: str, number: int):
        super().__init__(where)
        self.code = 128 + number


class Listener:
    """Remembers the first signal; the second one interrupts at once."""

    def __init__(self) -> None:
        self.heard: int | None = None

    def hear(self, number: int, frame: Any) -> None:
        del frame
        if self.heard is not None:
            raise KeyboardInterrupt
        self.heard = number


@contextlib.contextmanager
def listening() -> Iterator[Listener]:
    """Defer SIGINT and SIGTERM to the listener; in other threads than the main one do nothing."""
    listener = Listener()
    if threading.current_thread() is not threading.main_thread():
        yield listener
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, listener.hear) for number in numbers]
    try:
        yield listener
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
