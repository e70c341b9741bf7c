"""Write files whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

# The field of a record with its SHA-256.
_SEAL = "sha256"


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


def write_sealed(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON with its SHA-256, atomically."""
    write_json(path, {**record, _SEAL: _checksum(record)})


def unsealed(record: Any) -> dict[str, Any]:
    """Return a record that was read, without its seal.

    Raises:
      ValueError: it is not as it was written.
    """
    held = dict(record)
    if held.pop(_SEAL, None) != _checksum(held):
        raise ValueError(f"{_SEAL}: the record is not as it was written.")
    return held


def _checksum(record: dict[str, Any]) -> str:
    as_read = json.loads(json.dumps(record))  # where a number is a key, its text is
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()
