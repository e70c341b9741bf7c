"""What was measured after training: an outcome of each mechanism, and results.json of the run.

Reports are made from these records alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import metrics, significance
from experiments.command_line import UsageError
from experiments.data.corpus import Pair
from experiments.files import write_text
from experiments.translate import evaluate
from experiments.translate.evaluate import Trained
from experiments.translate.looking import pictured
from experiments.translate.marks import read_marked
from experiments.translate.prepare import Run
from experiments.translate.table import COMPARED
from experiments.translate.train_step import count_parameters
from experiments.translate.workdir import Record, is_first

# Number of sentences whose translations are shown.
_SAMPLED = 6
# Exact match in percent that counts as reached.
_REACHED = 90.0
# What to do about an outcome that cannot be used.
_MEASURED_ANEW = "delete it, and the same command measures again what was trained."


def measure(score: str, run: Run, trained: Trained) -> Record:
    """Evaluate all sets, and write the translations of the test set to the folder of the run."""
    outcome: Record = {
        "score": score,
        "parameters": count_parameters(score, run.sizes[score]),
        "sizes": run.sizes[score]._asdict(),
        "compile_seconds": round(trained.programs.seconds, 2),
        "sets": {},
    }
    for name, examples in run.task.sets.items():
        measured, found, weights = evaluate.evaluate(score, trained, examples)
        outcome["sets"][name] = measured
        if name == "test" and is_first():
            pairs = examples.pairs
            sampled = zip(pairs[:_SAMPLED], found[0], strict=False)
            outcome["samples"] = [_sample(pair, words) for pair, words in sampled]
            outcome["pictures"] = [_picture(pairs[i], weights[i]) for i in pictured(pairs)]
            _write_translations(run.folder / "translations", score, found)
    return outcome


def read_outcome(path: Path, folder: Path) -> Record:
    """Return the outcome of a mechanism from its file, or why it diverged.

    Raises:
      UsageError: the file is damaged, of another run than that in the folder, or of another score.
    """
    outcome = read_marked(path, folder, _MEASURED_ANEW, of_another=_MEASURED_ANEW)
    if outcome.get("score", path.stem) != path.stem:
        raise UsageError(f"{path} was measured of {outcome['score']}; {_MEASURED_ANEW}")
    return outcome


def speed(records: list[Record]) -> dict[str, Any]:
    """Compute from the log how fast training was, and when it reached 90% exact match.

    Returns:
      Tokens per second of all seeds together, the seconds of training, and for each seed the
      first validated step with at least 90% (None if there is none) and the mean exact match
      over all validations, the area under the learning curve.
    """
    rounds = [record for record in records if "tokens" in record]
    seconds = sum(record["seconds"] for record in rounds)
    validated = [record for record in records if "exact_match" in record]
    exact = np.array([record["exact_match"] for record in validated])
    steps = [record["step"] for record in validated]
    reached = [np.flatnonzero(of_seed >= _REACHED) for of_seed in exact.T]
    return {
        "train_seconds": round(seconds, 2),
        "tokens_per_second": sum(record["tokens"] for record in rounds) / seconds,
        "steps_to_90": [steps[at[0]] if len(at) else None for at in reached],
        "mean_exact_match": exact.mean(axis=0).tolist(),
    }


def _sample(pair: Pair, translation: tuple[str, ...]) -> Record:
    words = {"source": pair.source, "target": pair.target, "translation": translation}
    return {name: list(sentence) for name, sentence in words.items()}


def _picture(pair: Pair, weights: np.ndarray) -> Record:
    return {
        "source": list(pair.source),
        "target": list(pair.target),
        "weights": np.round(weights.astype(float), 4).tolist(),
        "gold": (
            None
            if pair.sure is None or pair.possible is None
            else metrics.pharaoh(pair.sure, pair.possible)
        ),
    }


def _write_translations(folder: Path, score: str, found: list[list[tuple[str, ...]]]) -> None:
    folder.mkdir(exist_ok=True)
    for seed, sentences in enumerate(found):
        text = "".join(" ".join(words) + "\n" for words in sentences)
        write_text(folder / f"{score}.seed{seed}.txt", text)


def summarize(
    run: Run, outcomes: Sequence[Record], environment: Record, gaps: Sequence[str] = ()
) -> Record:
    """Collect everything that table, figures and report show.

    Args:
      run: with the data.
      outcomes: of its scores.
      environment: in which it began.
      gaps: what `Run.gaps` says.
    """
    config, corpus = run.config, run.task.corpus
    mechanisms = [_mechanism(outcome) for outcome in outcomes]
    return {
        "config": config.identity,
        "environment": environment,
        "data": {
            "name": corpus.name,
            "pairs": {"train": len(corpus.train)}
            | {name: len(examples.pairs) for name, examples in run.task.sets.items()},
            "source_words": len(corpus.source_vocabulary),
            "target_words": len(corpus.target_vocabulary),
            "notices": [*corpus.notices, *gaps],
        },
        "signatures": signatures(run.task.sets["test"].pairs, config.lowercase, corpus.at_spaces),
        "mechanisms": mechanisms,
        "comparisons": _comparisons(mechanisms) if len(mechanisms) > 1 else [],
    }


def signatures(
    pairs: Sequence[Pair], lowercase: bool, at_spaces: bool, further: int = 0
) -> dict[str, str]:
    """Return sacrebleu's signatures for text of a run, which tokenizes all sets alike.

    Args:
      pairs: with the references.
      lowercase: as the run has it.
      at_spaces: whether its corpus was split at spaces only, and so not lower-cased.
      further: how many references each sentence has beside the first.
    """
    references = [pair.target for pair in pairs]
    return metrics.signatures(references, further=further, lowercased=lowercase and not at_spaces)


def measured(outcome: Record) -> dict[str, Any]:
    """Return all metrics of a mechanism by name: a value of each seed, or None."""
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
    found = significance.interval(known)
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
    found = significance.compare_families(families)
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
