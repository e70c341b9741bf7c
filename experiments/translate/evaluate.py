"""Evaluate the translators of one mechanism on a set of pairs, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import metrics
from experiments.data.batches import sweep
from experiments.data.corpus import Links, Pair
from experiments.data.vocabulary import EOS, PAD
from experiments.translate.compile import Programs
from experiments.translate.data import Examples

Words = tuple[str, ...]
Weights = np.ndarray


class Trained(NamedTuple):
    """Trained translators, one for each seed on axis 0 of the parameters, and their programs."""

    parameters: Any
    programs: Programs

    @property
    def num_seeds(self) -> int:
        """The number of translators."""
        return jax.tree.leaves(self.parameters)[0].shape[0]


class Evaluation(NamedTuple):
    """The result of an evaluation.

    Attributes:
      measured: of each metric a value for each seed; None where it cannot be measured.
      translations: of each seed all translations.
      weights: [T, S] of each pair, of the first seed.
    """

    measured: dict[str, list[float] | None]
    translations: list[list[Words]]
    weights: list[Weights]


def evaluate(
    score: str,
    trained: Trained,
    examples: Examples,
    further: Sequence[Sequence[Words]] | None = None,
    comet: str = "",
) -> Evaluation:
    """Translate a set of pairs and read its references, and measure both.

    Args:
      score: of the attention.
      trained: translators.
      examples: the pairs.
      further: more references of all pairs for BLEU and chrF; with them, also with none, chrF++ is
        measured.
      comet: a model for `metrics.comet`.
    """
    found = translations(trained, examples)
    links, weights = attended(trained, examples)
    measured = {
        **quality(found, examples.pairs, further or ()),
        "loss": losses(trained, examples),
        **alignment(links if score != "none" else [], examples.pairs),
    }
    pairs = examples.pairs
    sides = [pair.source for pair in pairs], [pair.target for pair in pairs]
    if further is not None:
        scores = [metrics.chrf_plus_plus(h, sides[1], *further) for h in found]
        measured["chrf_plus_plus"] = [score.value for score in scores]
    if comet:
        measured["comet"] = [metrics.comet(comet, sides[0], h, sides[1]) for h in found]
    return Evaluation(measured, found, weights)


def losses(trained: Trained, examples: Examples) -> list[float]:
    """Return the cross-entropy of a target token, end symbol included, in nats, for each seed."""
    tokens = sum(int((held.target != PAD).sum()) for held in examples.buckets.members)
    return (-log_probabilities(trained, examples).sum(axis=1) / tokens).tolist()


def log_probabilities(trained: Trained, examples: Examples) -> np.ndarray:
    """Return the log-probability of each target, end symbol included, [N, pairs]."""
    pending = [(at, real, loss) for at, real, loss, _ in _forced(trained, examples)]
    found = np.zeros((trained.num_seeds, len(examples.pairs)))
    for index, real, loss in pending:
        found[:, index] = -np.asarray(loss, np.float64)[:, real]
    return found


def translations(
    trained: Trained, examples: Examples, *, greedy: bool = False
) -> list[list[Words]]:
    """Return the translations of all pairs, in their order, for each seed."""
    decode = trained.programs.greedy if greedy else trained.programs.search
    pending = []
    for number, rows, real in sweep(examples.buckets, trained.programs.batch_size):
        held = examples.buckets.members[number]
        source = held.source[rows]
        words = decode[source.shape[1]](trained.parameters, source)
        pending.append((held.index[rows[real]], real, words))
    found: list[list[Words]] = [[()] * len(examples.pairs) for _ in range(trained.num_seeds)]
    for index, real, words in pending:
        for seed, sentences in enumerate(np.asarray(words)[:, real].tolist()):
            for position, sentence in zip(index.tolist(), sentences, strict=True):
                # A translation that was cut off has no end symbol.
                ended = sentence if EOS in sentence else [*sentence, EOS]
                found[seed][position] = examples.corpus.target_vocabulary.decode(ended)
    return found


def attended(trained: Trained, examples: Examples) -> tuple[list[list[Links]], list[Weights]]:
    """Return the links and the weights of attention when it reads the references.

    Returns:
      For each seed the links of all pairs; and of the first seed all weights [T, S].
    """
    links: list[list[Links]] = []
    weights: list[Weights] = [np.zeros((0, 0), np.float32)] * len(examples.pairs)
    for index, real, _, batch in _forced(trained, examples):
        arrays = np.asarray(batch)[:, real]
        links = links or [[frozenset()] * len(examples.pairs) for _ in arrays]
        for row, position in enumerate(index.tolist()):
            pair = examples.pairs[position]
            lengths = len(pair.source), len(pair.target)
            for seed, array in enumerate(arrays if pair.sure is not None else ()):
                of_words = examples.weights_of_words(position, array[row])
                links[seed][position] = metrics.links(of_words, *lengths)
            weights[position] = examples.weights_of_words(position, arrays[0, row])
    return links, weights


def quality(
    hypotheses: list[list[Words]],
    pairs: Sequence[Pair],
    further: Sequence[Sequence[Words]] = (),
) -> dict[str, list[float]]:
    """Return exact match, token accuracy, BLEU and chrF for each seed, all in 0..100.

    Exact match and token accuracy are against the pairs alone, BLEU and chrF also against `further`
    references.
    """
    references = [pair.target for pair in pairs]
    return {
        "exact_match": [100 * metrics.exact_match(h, references) for h in hypotheses],
        "token_accuracy": [100 * metrics.token_accuracy(h, references) for h in hypotheses],
        "bleu": [metrics.bleu(h, references, *further).value for h in hypotheses],
        "chrf": [metrics.chrf(h, references, *further).value for h in hypotheses],
    }


def alignment(links: list[list[Links]], pairs: Sequence[Pair]) -> dict[str, list[float] | None]:
    """Return the alignment error rate and the links found by class, for each seed in 0..100.

    None without gold alignments, or without attention.
    """
    of_seeds = {
        "alignment_error": [metrics.alignment_quality(f, pairs).error_rate for f in links],
        **metrics.by_class(links, pairs),
    }
    return {
        name: None if not rates or any(map(math.isnan, rates)) else [100 * rate for rate in rates]
        for name, rates in of_seeds.items()
    }


def _forced(trained: Trained, examples: Examples):
    """Yield of every batch: indices of pairs, their rows, losses [N, B], weights [N, B, T, S]."""
    for number, rows, real in sweep(examples.buckets, trained.programs.batch_size):
        held = examples.buckets.members[number]
        source = held.source[rows]
        target = np.where(real[:, None], held.target[rows], PAD)
        width = source.shape[1], target.shape[1]
        yield (
            held.index[rows[real]],
            real,
            *trained.programs.force[width](trained.parameters, source, target),
        )
