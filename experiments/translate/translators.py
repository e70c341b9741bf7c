"""The trained translators of one score, or an ensemble: load them, translate sentences."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from attention_jax.base.checks import ShapeError
from experiments.command_line import UsageError
from experiments.data.corpus import Pair, shortened
from experiments.data.vocabulary import Vocabulary
from experiments.translate import evaluate, workdir
from experiments.translate.checkpoints import Checkpoints
from experiments.translate.compile import Programs, compile_when_called
from experiments.translate.config import Config
from experiments.translate.data import Examples, Tokenizer, bucketed, load_tokenizer
from experiments.translate.ensemble import Members
from experiments.translate.evaluate import Trained, Weights, Words
from experiments.translate.prepare import reason, sizes_of
from experiments.translate.train_step import abstract_state, graph_of

Found = TypeVar("Found")

# Widths are rounded up to a multiple, so that sentences of similar length share a program.
_MULTIPLE = 8
# The least weight of a source word that is shown.
_SHOWN = 0.1
# Unknown words of a sentence that are listed.
_LISTED = 10


class Translators(NamedTuple):
    """The trained translators of one score.

    Attributes:
      score: that they attend with.
      config: of their run, and how to decode.
      tokenizer: from text to words and back.
      parameters: with an axis of seeds.
      graph: their structure.
      step: of their checkpoint.
      compiled: programs by longest translation and batch size, so that none is compiled twice.
    """

    score: str
    config: Config
    tokenizer: Tokenizer
    parameters: Any
    graph: Any
    step: int
    compiled: dict[tuple[int, int], Programs]

    def limit(self, sentence: Words) -> int:
        """Return the number of tokens after which the translation of a sentence is cut off.

        It is that of training, doubled until it is 1.5 times the length of the sentence: it
        depends on the sentence alone, and has few values, each of which is compiled.
        """
        limit = self.tokenizer.longest
        while limit < 3 * sum(self.tokenizer.source.counts(sentence)) // 2:
            limit *= 2
        return limit

    def programs(self, longest: int, count: int) -> Programs:
        """Return programs for `count` sentences that cut translations off after `longest` words."""
        key = longest, min(self.config.batch_size, count)
        if key not in self.compiled:
            self.compiled[key] = compile_when_called(self.graph, self.config, *key)
        return self.compiled[key]

    def translations(self, sentences: Sequence[Words]) -> list[Words]:
        """Translate sentences with the first translator."""
        found: list[Words] = [()] * len(sentences)
        limits = [self.limit(words) for words in sentences]
        for limit in sorted(set(limits)):
            numbers = [number for number, own in enumerate(limits) if own == limit]
            pairs = [Pair(sentences[number], ()) for number in numbers]
            of_seeds = self.evaluated(evaluate.translations, pairs, limit)
            for number, words in zip(numbers, of_seeds[0], strict=True):
                found[number] = words
        return found

    def weights(self, pairs: Sequence[Pair]) -> list[Weights]:
        """Return the weights [T, S] with which the first translator reads pairs, EOS included."""
        return self.evaluated(evaluate.attended, pairs)[1]

    def log_probabilities(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Return the log-probability of each target to the first translator."""
        return self.evaluated(evaluate.log_probabilities, pairs)[0]

    def evaluated(
        self,
        measure: Callable[[Trained, Examples], Found],
        pairs: Sequence[Pair],
        longest: int | None = None,
    ) -> Found:
        """Return `measure` of the translators on pairs of sentences.

        Translations are cut off after `longest` words, or as in training.

        Raises:
          UsageError: the longest sentence is too long for the score.
        """
        trained = Trained(
            self.parameters, self.programs(longest or self.tokenizer.longest, len(pairs))
        )
        try:
            return measure(trained, self._examples(pairs, trained, _MULTIPLE))
        except ShapeError:
            pass  # The score may take the sentences, but not as much padding.
        try:
            return measure(trained, self._examples(pairs, trained, 1))
        except ShapeError as error:
            words = max(len(pair.source) for pair in pairs)
            raise UsageError(
                f"{self.score} cannot take a sentence of {words} words: "
                f"{reason(error)}; leave it out, or train with a larger --attention_size."
            ) from None

    def _examples(self, pairs: Sequence[Pair], trained: Trained, multiple: int) -> Examples:
        corpus = self.tokenizer.corpus("input", tuple(pairs))
        size = trained.programs.batch_size
        return bucketed({"input": pairs}, corpus, size, multiple)["input"]

    def of_seed(self, seed: int) -> Translators:
        """Return the translator of one seed alone."""
        return self._replace(parameters=jax.tree.map(lambda x: x[seed][None], self.parameters))


def load(score: str, config: Config) -> Translators:
    """Load the translators of a score from the last valid checkpoint of a run.

    Raises:
      UsageError: there is none.
    """
    folder = config.directory
    tokenizer = load_tokenizer(folder)
    # Sizes may be matched to the first score of the run: all scores of the run are needed.
    every = dataclasses.replace(config, scores=workdir.run_scores(folder))
    sizes = sizes_of(every, len(tokenizer.source), len(tokenizer.target))[score]
    graph, _ = graph_of(score, sizes)
    checkpoints = Checkpoints.of_run(folder, score)
    like = abstract_state(score, sizes, config)
    restored = checkpoints.restore(like, tidy=False)
    for sentence in checkpoints.damaged:
        tell(sentence)
    if restored is None:
        raise UsageError(f"{checkpoints.folder} holds no checkpoint; train the run first.")
    step, state = restored
    if step < config.steps:
        tell(f"{score}: the checkpoint is of step {step} of {config.steps}.")
    return Translators(score, config, tokenizer, state.evaluated, graph, step, {})


def load_ensemble(config: Config) -> Translators:
    """Load all translators of the scores of a run, and of its --members, as one.

    Raises:
      UsageError: a run has no checkpoint, or its --members have other vocabularies, hold no run, or
        are named twice.
    """
    _check_differ(config)
    groups = [load(score, config) for score in config.scores]
    for folder in config.members:
        given = {"workdir": folder, "mode": config.mode}
        try:
            other = workdir.trained_config(dataclasses.replace(Config(), **given), given)
        except UsageError as error:
            sentence = str(error).removeprefix("--workdir ").replace("--workdir", "folder")
            raise UsageError(f"--members: {sentence}") from None
        more = [load(score, other) for score in other.scores]
        same = dataclasses.replace(more[0].tokenizer, longest=groups[0].tokenizer.longest)
        if same != groups[0].tokenizer:
            raise UsageError(
                f"--members: {folder} has other vocabularies than {config.directory}; an ensemble "
                "needs runs of the same data."
            )
        groups += more
    sizes = [jax.tree.leaves(group.parameters)[0].shape[0] for group in groups]
    names = ", ".join(dict.fromkeys(group.score for group in groups))
    first = groups[0]
    return first._replace(
        score="none" if names == "none" else f"ensemble of {sum(sizes)} ({names})",
        graph=Members(tuple(group.graph for group in groups)),
        parameters=jax.tree.map(lambda x: x[None], tuple(group.parameters for group in groups)),
        step=min(group.step for group in groups),
    )


def _check_differ(config: Config) -> None:
    """Refuse a run that would be in the ensemble twice."""
    seen = {config.directory.resolve()}
    for folder in config.members:
        path = Path(folder).resolve()
        if path in seen:
            raise UsageError(
                f"--members: {folder} is in the ensemble already; name every run once, the one of "
                "--workdir not at all."
            )
        seen.add(path)


def alignment(source: Sequence[str], target: Sequence[str], weights: np.ndarray) -> list[str]:
    """Return a line for each target word: the source words with at least a tenth of the weight.

    >>> alignment(("red", "dog"), ("Hund",), np.array([[0.04, 0.85, 0.11], [0.0, 0.0, 1.0]]))
    ['  Hund  dog 85%  <eos> 11%']
    """
    names = [*map(shortened, source), "<eos>"]
    shown = [shortened(word) for word in target]
    widest = max(map(len, shown))
    lines = []
    for word, row in zip(shown, weights, strict=False):
        order = np.argsort(-row, kind="stable")
        seen = [f"{names[i]} {row[i]:.0%}" for i in order if row[i] >= _SHOWN]
        lines.append("  ".join(["", word.ljust(widest), *seen]))
    return lines


def unknown(words: Sequence[str], vocabulary: Vocabulary) -> str:
    """Return the words of a sentence that are not in a vocabulary, each once, as a short text."""
    found = [word for word in dict.fromkeys(words) if word not in vocabulary]
    rest = [f"and {len(found) - _LISTED:,} more"] if len(found) > _LISTED else []
    return " ".join([*map(shortened, found[:_LISTED]), *rest])


def tell(sentence: str) -> None:
    """Print a sentence on standard error."""
    print(f"translate: {sentence}", file=sys.stderr)
