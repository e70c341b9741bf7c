"""Write files whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a crash leaves the old content or the new, never a part.

    Raises:
      OSError: it cannot be written; nothing is left of the new content.
    """
    unfinished = unfinished_of(path)
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def unfinished_of(path: Path) -> Path:
    """Return the temporary file that `write_text` renames to the path."""
    return path.with_name(f"{path.name}.unfinished")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
