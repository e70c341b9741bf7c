"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import pathlib


def write(path: pathlib.Path, content: bytes) -> None:
    """Write a file; where that fails, as on a full disk, it stays as it was, or is not there.

    Raises:
      OSError: it cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None
