"""What was measured of one mechanism at the end, as JSON; reports are made from this alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import metrics
from experiments.command_line import UsageError
from experiments.data.corpus import Pair
from experiments.translate import evaluation
from experiments.translate.learning import count_parameters
from experiments.translate.model import Sizes
from experiments.translate.task import Task
from experiments.translate.train import Trained
from experiments.translate.workdir import Record, write_text

_PICTURED = 3
_SAMPLED = 6
_READABLE = range(6, 15)
_TALLEST = 20
_REACHED = 90.0


def measure(score: str, sizes: Sizes, trained: Trained, task: Task, folder: Path) -> Record:
    """Evaluate all sets, and write the translations of the test set beside."""
    parameters, programs = trained
    outcome: Record = {
        "score": score,
        "parameters": count_parameters(score, sizes),
        "sizes": sizes._asdict(),
        "compile_seconds": round(programs.seconds, 2),
        "sets": {},
    }
    for name, given in task.sets.items():
        measured, found, weights = evaluation.of_set(score, programs, parameters, given)
        outcome["sets"][name] = measured
        if name == "test":
            outcome["samples"] = [
                _sample(given.pairs[i], found[0][i]) for i in range(min(_SAMPLED, len(found[0])))
            ]
            outcome["pictures"] = [
                _picture(given.pairs[i], weights[i]) for i in pictured(given.pairs)
            ]
            _write_translations(folder / "translations", score, found)
    return outcome


def read(path: Path) -> Record:
    """Return what was measured of a mechanism before.

    Raises:
      UsageError: the file is damaged.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UsageError(
            f"{path} is damaged; delete it, and the same command measures again what was trained."
        ) from None


def speed(records: list[Record]) -> dict[str, Any]:
    """Read from the log how fast training went, and how soon it reached 90% exact match.

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


def pictured(pairs: Sequence[Pair]) -> list[int]:
    """Choose sentences to draw: of readable length, those whose words change places most."""

    def crossings(pair: Pair) -> int:
        order = [source for _, source in sorted((j, i) for i, j in pair.sure or ())]
        return sum(a > b for n, a in enumerate(order) for b in order[n + 1 :])

    def is_readable(pair: Pair) -> bool:
        return len(pair.source) in _READABLE and len(pair.target) <= _TALLEST

    readable = [i for i, pair in enumerate(pairs) if is_readable(pair)] or range(len(pairs))
    return sorted(readable, key=lambda i: (-crossings(pairs[i]), i))[:_PICTURED]


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
