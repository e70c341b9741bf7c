"""Ctrl-C and SIGTERM, heard at the next safe place instead of anywhere."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Interrupted(Exception):  # noqa: N818  it is no error
    """The run was asked to stop, and has; `code` is the exit code of a shell for the signal."""

    def __init__(self, where: str, number: int):
        super().__init__(where)
        self.code = 128 + number


class Listener:
    """Remembers the first signal; the second one acts at once."""

    def __init__(self) -> None:
        self.heard: int | None = None

    def hear(self, number: int, frame: Any) -> None:
        del frame
        if self.heard is not None:
            raise KeyboardInterrupt
        self.heard = number


@contextlib.contextmanager
def listening() -> Iterator[Listener]:
    """Hold back SIGINT and SIGTERM; outside of the main thread nothing is held back."""
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
