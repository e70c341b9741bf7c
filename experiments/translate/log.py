"""The log of training: what was measured of each mechanism, step by step."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from experiments.command_line import UsageError
from experiments.files import write_text
from experiments.translate.workdir import LOST, Record, is_first

# The fields that a training log needs: one written after every round of steps, one after every
# validation.
ROUND, VALIDATION = "tokens", "exact_match"


class Log:
    """metrics.jsonl: one JSON object a line, each with `score` and `step`.

    Of several processes the first one writes it.
    """

    def __init__(self, path: Path):
        self.path = path

    def records(self, score: str) -> list[Record]:
        """Return the records of one mechanism; an incomplete last line is ignored.

        Raises:
          UsageError: another line is damaged.
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
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, before)
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def rewind(self, score: str, step: int) -> None:
        """Drop the records of one mechanism after a step, which will be written again.

        Raises:
          UsageError: a line other than the last is damaged.
        """
        if not is_first():
            return
        kept = [r for r in self._all() if r["score"] != score or r["step"] <= step]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def _all(self) -> list[Record]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        return [self._record(number, line) for number, line in enumerate(lines[:-1], 1)]

    def _record(self, number: int, line: str) -> Record:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not {"score", "step"} <= record.keys():
            raise UsageError(
                f"{self.path} line {number} is damaged; delete that line, and the same command "
                "goes on."
            )
        return record
