"""results.json: means, intervals and comparisons over seeds, from what was measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from experiments import metrics, statistics
from experiments.translate.config import Config
from experiments.translate.task import Task
from experiments.translate.workdir import Record

# Of the first two mechanisms these are compared: is there a difference, and was one faster? Not of
# all pairs: of five scores these were 40 tests, with which fewer than 11 seeds can show nothing.
COMPARED = {
    "exact_match": "exact match on test (%)",
    "bleu": "BLEU on test",
    "valid_loss": "validation loss",
    "mean_exact_match": "mean exact match over training (%)",
}


def summarize(config: Config, task: Task, outcomes: Sequence[Record], host: Record) -> Record:
    """Collect everything that table, figures and report show."""
    corpus = task.corpus
    mechanisms = [_mechanism(outcome) for outcome in outcomes]
    return {
        "config": config.identity,
        "environment": host,
        "data": {
            "name": corpus.name,
            "pairs": {"train": len(corpus.train)}
            | {name: len(given.pairs) for name, given in task.sets.items()},
            "source_words": len(corpus.source_vocabulary),
            "target_words": len(corpus.target_vocabulary),
            "notices": list(corpus.notices),
        },
        "signatures": signatures(config.lowercase, corpus.at_spaces),
        "mechanisms": mechanisms,
        "comparisons": _comparisons(mechanisms) if len(mechanisms) > 1 else [],
    }


def signatures(lowercase: bool, at_spaces: bool) -> dict[str, str]:
    """Return sacrebleu's signatures of scores on text of a run, which cuts all sets alike.

    Args:
      lowercase: as the run has it.
      at_spaces: of its corpus, whose words then are as they were written.
    """
    return metrics.signatures(lowercased=lowercase and not at_spaces)


def measured(outcome: Record) -> dict[str, Any]:
    """Return what was measured of a mechanism by name: a value of each seed, or None."""
    test, valid = outcome["sets"]["test"], outcome["sets"]["valid"]
    return {
        "valid_loss": valid["loss"],
        "test_loss": test["loss"],
        **{k: test[k] for k in ("exact_match", "token_accuracy", "bleu", "chrf")},
        **{k: test[k] for k in ("alignment_error", *metrics.CLASSES)},
        **{k: outcome[k] for k in ("steps_to_90", "mean_exact_match")},
    }


def _mechanism(outcome: Record) -> Record:
    extra = {
        name: {k: summary(v) for k, v in of_set.items()}
        for name, of_set in outcome["sets"].items()
        if name not in ("valid", "test")
    }
    kept = ("score", "parameters", "sizes", "compile_seconds", "train_seconds")
    return {
        **{k: outcome[k] for k in (*kept, "tokens_per_second")},
        "metrics": {name: summary(of_seeds) for name, of_seeds in measured(outcome).items()},
        "extra": extra,
    }


def summary(values: list[float | None] | None) -> Record | None:
    """Mean and 95% bootstrap interval over seeds; None where a seed has no value."""
    if values is None:
        return None
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {"values": values, "mean": None, "low": None, "high": None, "note": "not reached"}
    found = statistics.interval(known)
    one = len(known) == 1
    return {
        "values": values,
        "mean": found.mean,
        "low": None if one else found.low,
        "high": None if one else found.high,
        "note": found.note,
    }


def _comparisons(mechanisms: list[Record]) -> list[Record]:
    """Test the first two mechanisms in every metric, corrected for all of these tests."""
    families = {
        words: {m["score"]: m["metrics"][metric]["values"] for m in mechanisms[:2]}
        for metric, words in COMPARED.items()
    }
    found = statistics.compare_families(families)
    left_out = (
        f" Of the {len(mechanisms)} scores only the first two are compared; "
        "experiments.translate_sweep compares all pairs."
    ) * (len(mechanisms) > 2)
    compared = []
    for metric, words in COMPARED.items():
        (of_metric,) = found[words]
        record = without_nan(dataclasses.asdict(of_metric))
        compared.append({**record, "metric": metric, "sentence": of_metric.sentence + left_out})
    return compared


def without_nan(record: Any) -> Any:
    """Return a record with None for NaN, which JSON does not know."""
    if isinstance(record, dict):
        return {name: without_nan(value) for name, value in record.items()}
    return None if isinstance(record, float) and math.isnan(record) else record
