"""The log of training: what was measured of each mechanism, step by step."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.command_line import UsageError
from experiments.files import write_text
from experiments.translate.workdir import LOST, Record, is_first

# The fields that a training log needs: one written after every round of steps, one after every
# validation.
ROUND, VALIDATION = "tokens", "exact_match"

# The field of a line with the start of the SHA-256 of the rest of it and of the mark of its run.
_SEAL = "seal"
_DIGITS = 16
# Steps that a sentence lists.
_LISTED = 5


class Log:
    """metrics.jsonl: one JSON object a line, each with `score`, `step` and a seal.

    Of several processes the first one writes it.

    Args:
      path: of the file.
      run: the mark of the run, as `marks.mark_of` returns it; lines of others are refused.
    """

    def __init__(self, path: Path, run: str | None = None):
        self.path = path
        self.run = run

    def records(self, score: str) -> list[Record]:
        """Return the records of one mechanism; an incomplete last line is ignored.

        Raises:
          UsageError: another line is damaged, or of another run.
        """
        return [record for record in self._all() if record["score"] == score]

    def complete_records(
        self, score: str, needed: Sequence[str] = (ROUND, VALIDATION)
    ) -> list[Record]:
        """Return the records of one mechanism that was trained.

        Args:
          score: the mechanism.
          needed: fields, each of which at least one record must have.

        Raises:
          UsageError: no record has one of these fields, because the file was lost.
        """
        records = self.records(score)
        if not all(any(name in record for record in records) for name in needed):
            raise UsageError(f"{self.path} lacks the measurements of training {score}; {LOST}")
        return records

    def gap(self, score: str, name: str, steps: Iterable[int]) -> str | None:
        """Return a sentence if records of a mechanism with a field are missing after some steps."""
        held = {record["step"] for record in self.records(score) if name in record}
        missing = [step for step in steps if step not in held]
        if not missing:
            return None
        listed = ", ".join(map(str, missing[:_LISTED])) + ", ..." * (len(missing) > _LISTED)
        return (
            f"{self.path.name} lacks {len(missing)} measurements of training {score}, after step "
            f"{listed}: what is computed of them, or drawn, is without these."
        )

    def append(self, record: Record) -> None:
        """Add a record at the end.

        Raises:
          OSError: it cannot be written; nothing is left of it.
        """
        if not is_first():
            return
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._line(record))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, before)
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def rewind(self, score: str, step: int) -> None:
        """Drop the records of one mechanism after a step, which will be written again.

        Raises:
          UsageError: a line other than the last is damaged, or of another run.
        """
        if not is_first():
            return
        kept = [r for r in self._all() if r["score"] != score or r["step"] <= step]
        write_text(self.path, "".join(map(self._line, kept)))

    def _line(self, record: Record) -> str:
        return json.dumps({**record, _SEAL: self._seal(record)}) + "\n"

    def _seal(self, record: Record) -> str:
        content = json.dumps([self.run, record], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:_DIGITS]

    def _all(self) -> list[Record]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        return [self._record(number, line) for number, line in enumerate(lines[:-1], 1)]

    def _record(self, number: int, line: str) -> Record:
        try:
            record = dict(json.loads(line))
            if record.pop(_SEAL, None) == self._seal(record):
                return record
        except (ValueError, TypeError):
            pass
        raise UsageError(
            f"{self.path} line {number} is damaged or of another run; delete that line, and the "
            "same command goes on."
        )
