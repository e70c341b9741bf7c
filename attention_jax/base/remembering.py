"""What is found once for a call, however often the call asks for it.

One call of `attend` is traced for several platforms, and each asks for the same tiles of the same
mask. Between calls an array may be written to, or what a function reads may change; so nothing is
remembered for longer.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Hashable, Iterator
from typing import Any

_found: contextvars.ContextVar[dict[Hashable, Any] | None]
_found = contextvars.ContextVar("_found", default=None)


@contextlib.contextmanager
def one_call() -> Iterator[None]:
    """Let `remembered` remember until this ends.

    Within another it starts anew: what is found while a program is traced ends with the trace.

    >>> asked = []
    >>> with one_call():
    ...     remembered(asked.append, 1), remembered(asked.append, 1), remembered(asked.append, 2)
    (None, None, None)
    >>> asked
    [1, 2]
    """
    token = _found.set({})
    try:
        yield
    finally:
        _found.reset(token)


def remembered(function: Callable[..., Any], *arguments: Hashable) -> Any:
    """Return function(*arguments), or what it returned for equal arguments in the same call."""
    found = _found.get()
    if found is None:
        return function(*arguments)
    key = function, *arguments
    if key not in found:
        found[key] = function(*arguments)
    return found[key]
