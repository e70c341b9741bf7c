"""What a training measured on its way: without it there is neither a speed nor a learning curve."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.command_line import UsageError
from experiments.translate.workdir import Log, Record

# A field of what is written after some steps, and one of what is written after a validation.
ROUND, VALIDATION = "tokens", "exact_match"


def read(log: Log, score: str, needed: Sequence[str] = (ROUND, VALIDATION)) -> list[Record]:
    """Return what one mechanism measured.

    Args:
      log: of the run.
      score: the mechanism.
      needed: fields, each of which at least one record has.

    Raises:
      UsageError: there is no such record, since the file was lost.
    """
    records = log.read(score)
    if not all(any(name in record for record in records) for name in needed):
        raise UsageError(
            f"{log.path} does not hold what the training of {score} measured; restore it from a "
            "copy, or train again in another --workdir."
        )
    return records
