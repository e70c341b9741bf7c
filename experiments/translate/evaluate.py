"""What a set of pairs says about the translators of one mechanism, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import metrics
from experiments.data.batches import Buckets, bucket, choose_widths, rounded_up, sweep
from experiments.data.corpus import Corpus, Links, Pair
from experiments.data.vocabulary import EOS, PAD
from experiments.translate.programs import Programs

Words = tuple[str, ...]
Weights = np.ndarray

# Every shape is compiled twice, and evaluation is short.
_SHAPES = 2


class Examples(NamedTuple):
    """Pairs, encoded and sorted into buckets."""

    pairs: Sequence[Pair]
    buckets: Buckets
    corpus: Corpus


def examples(
    sets: Mapping[str, Sequence[Pair]], corpus: Corpus, batch_size: int, multiple: int = 1
) -> dict[str, Examples]:
    """Sort sets of pairs into buckets of a few shapes that all of them share.

    Each width is a multiple of `multiple`, so that sets that come later find shapes compiled.
    """
    vocabularies = corpus.source_vocabulary, corpus.target_vocabulary
    pairs = [pair for pairs in sets.values() for pair in pairs]
    lengths = np.array([(len(pair.source) + 1, len(pair.target) + 1) for pair in pairs])
    chosen = choose_widths(lengths, _SHAPES)
    widths = tuple((rounded_up(s, multiple), rounded_up(t, multiple)) for s, t in chosen)
    return {
        name: Examples(
            pairs, bucket(pairs, *vocabularies, batch_size=batch_size, widths=widths), corpus
        )
        for name, pairs in sets.items()
    }


def losses(programs: Programs, parameters: Any, given: Examples) -> list[float]:
    """Cross-entropy of a target token, end symbol included, in nats, for each seed."""
    tokens = sum(int((held.target != PAD).sum()) for held in given.buckets.members)
    return (-log_probabilities(programs, parameters, given).sum(axis=1) / tokens).tolist()


def log_probabilities(programs: Programs, parameters: Any, given: Examples) -> np.ndarray:
    """The log-probability of each target, end symbol included, [N, pairs]."""
    pending = [(at, real, loss) for at, real, loss, _ in _forced(programs, parameters, given)]
    seeds = jax.tree.leaves(parameters)[0].shape[0]
    found = np.zeros((seeds, len(given.pairs)))
    for index, real, loss in pending:
        found[:, index] = -np.asarray(loss, np.float64)[:, real]
    return found


def translations(
    programs: Programs, parameters: Any, given: Examples, *, greedy: bool = False
) -> list[list[Words]]:
    """Translations of all pairs, in their order, for each seed."""
    decode = programs.greedy if greedy else programs.search
    pending = []
    for number, rows, real in sweep(given.buckets, programs.batch_size):
        held = given.buckets.members[number]
        source = held.source[rows]
        words = decode[source.shape[1]](parameters, source)
        pending.append((held.index[rows[real]], real, words))
    seeds = jax.tree.leaves(parameters)[0].shape[0]
    found: list[list[Words]] = [[()] * len(given.pairs) for _ in range(seeds)]
    for index, real, words in pending:
        for seed, sentences in enumerate(np.asarray(words)[:, real].tolist()):
            for position, sentence in zip(index.tolist(), sentences, strict=True):
                # What was cut off ends in padding only if it is full of words.
                ended = sentence if EOS in sentence else [*sentence, EOS]
                found[seed][position] = given.corpus.target_vocabulary.decode(ended)
    return found


def attended(
    programs: Programs, parameters: Any, given: Examples
) -> tuple[list[list[Links]], list[Weights]]:
    """The links that attention shows when it reads the references, and its weights.

    Returns:
      For each seed the links of all pairs; and of the first seed all weights [T, S].
    """
    links: list[list[Links]] = []
    weights: list[Weights] = [np.zeros((0, 0), np.float32)] * len(given.pairs)
    for index, real, _, batch in _forced(programs, parameters, given):
        arrays = np.asarray(batch)[:, real]
        links = links or [[frozenset()] * len(given.pairs) for _ in arrays]
        for row, position in enumerate(index.tolist()):
            pair = given.pairs[position]
            lengths = len(pair.source), len(pair.target)
            for seed, array in enumerate(arrays if pair.sure is not None else ()):
                links[seed][position] = metrics.links(array[row], *lengths)
            weights[position] = arrays[0, row, : lengths[1] + 1, : lengths[0] + 1]
    return links, weights


def quality(hypotheses: list[list[Words]], pairs: Sequence[Pair]) -> dict[str, list[float]]:
    """Exact match, token accuracy, BLEU and chrF for each seed, all in 0..100."""
    references = [pair.target for pair in pairs]
    return {
        "exact_match": [100 * metrics.exact_match(h, references) for h in hypotheses],
        "token_accuracy": [100 * metrics.token_accuracy(h, references) for h in hypotheses],
        "bleu": [metrics.bleu(h, references).value for h in hypotheses],
        "chrf": [metrics.chrf(h, references).value for h in hypotheses],
    }


def alignment(links: list[list[Links]], pairs: Sequence[Pair]) -> dict[str, list[float] | None]:
    """Alignment error rate and the links found by class, for each seed in 0..100.

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


def _forced(programs: Programs, parameters: Any, given: Examples):
    """Yield of every batch which pairs are in which rows, losses [N, B], weights [N, B, T, S]."""
    for number, rows, real in sweep(given.buckets, programs.batch_size):
        held = given.buckets.members[number]
        source = held.source[rows]
        target = np.where(real[:, None], held.target[rows], PAD)
        width = source.shape[1], target.shape[1]
        yield held.index[rows[real]], real, *programs.force[width](parameters, source, target)
