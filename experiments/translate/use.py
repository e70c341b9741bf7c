"""After training: evaluate the last good checkpoint of a run, translate with it, score with it."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from attention_jax.base.checks import ShapeError
from experiments import metrics
from experiments.command_line import UsageError, show
from experiments.data.corpus import DataError, Pair
from experiments.data.files import Reader
from experiments.data.text import lines_of, read_lines
from experiments.translate import (
    alignments,
    evaluate,
    evaluation,
    fitting,
    interaction,
    kept,
    results,
    task,
)
from experiments.translate.budget import sizes_of
from experiments.translate.checkpoints import Checkpoints
from experiments.translate.config import Config
from experiments.translate.evaluate import Examples, Weights, Words
from experiments.translate.kept import Languages
from experiments.translate.learning import abstract_state, graph_of
from experiments.translate.programs import Programs, compile_when_called

Found = TypeVar("Found")

_STDIN = "standard input"
# Sentences of similar length share a compiled program.
_MULTIPLE = 8
# Characters of a file's name that the name of its evaluation begins with.
_READABLE = 40


class Translators(NamedTuple):
    """The trained translators of one score, and what gives them text and runs them.

    `step` is that of their checkpoint; `compiled` keeps the programs by length and batch, so that
    none is compiled twice.
    """

    score: str
    config: Config
    languages: Languages
    parameters: Any
    graph: Any
    step: int
    compiled: dict[tuple[int, int], Programs]

    def limit(self, sentence: Words) -> int:
        """Return the number of words after which the translation of a sentence is cut off.

        It is that of training, doubled until it is half as long again as the sentence: it follows
        from the sentence alone, and few of them are compiled.
        """
        limit = self.languages.longest
        while limit < 3 * len(sentence) // 2:
            limit *= 2
        return limit

    def programs(self, longest: int, count: int) -> Programs:
        """Return programs for so many sentences, which cut translations off after some words."""
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
            of_seeds = self.asked(evaluate.translations, pairs, limit)
            for number, words in zip(numbers, of_seeds[0], strict=True):
                found[number] = words
        return found

    def weights(self, pairs: Sequence[Pair]) -> list[Weights]:
        """Return the weights [T, S] with which the first translator reads pairs, EOS included."""
        return self.asked(evaluate.attended, pairs)[1]

    def log_probabilities(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Return the log-probability of each target to the first translator."""
        return self.asked(evaluate.log_probabilities, pairs)[0]

    def asked(
        self,
        ask: Callable[[Programs, Any, Examples], Found],
        pairs: Sequence[Pair],
        longest: int | None = None,
    ) -> Found:
        """Return what `ask` finds in pairs, with programs, parameters and the pairs in buckets.

        Translations are cut off after `longest` words, or as in training.

        Raises:
          UsageError: the score does not reach over the longest of them.
        """
        programs = self.programs(longest or self.languages.longest, len(pairs))
        corpus = self.languages.corpus("input", tuple(pairs))

        def found(multiple: int) -> Found:
            size = programs.batch_size
            given = evaluate.examples({"input": pairs}, corpus, size, multiple)["input"]
            return ask(programs, self.parameters, given)

        try:
            return found(_MULTIPLE)
        except ShapeError:
            pass  # A score may reach over the sentences, and not over as much padding.
        try:
            return found(1)
        except ShapeError as error:
            words = max(len(pair.source) for pair in pairs)
            raise UsageError(
                f"{self.score} does not reach over a sentence of {words} words: "
                f"{fitting.reason(error)}; leave it out, or train with a larger --attention_size."
            ) from None

    def only(self, seed: int) -> Translators:
        """Return one translator of them."""
        return self._replace(parameters=jax.tree.map(lambda x: x[seed][None], self.parameters))


def use(config: Config) -> None:
    """Do what a mode other than training asks for.

    Raises:
      UsageError: the run, its checkpoints or the input cannot be used.
    """
    alignments.check(config)
    modes = {"evaluate": _evaluate, "translate": _translate, "score": _score}
    try:
        modes[config.mode](config)
    except DataError as error:
        raise UsageError(str(error)) from None


def load(score: str, config: Config) -> Translators:
    """Load the translators of a score from the last good checkpoint of a run.

    Raises:
      UsageError: there is none.
    """
    folder = config.directory
    languages = kept.read(folder)
    # The first score of the run is what the others are matched to, so that all of them count.
    every = dataclasses.replace(config, scores=kept.scores_of(folder))
    sizes = sizes_of(every, len(languages.source), len(languages.target))[score]
    graph, _ = graph_of(score, sizes)
    checkpoints = Checkpoints(folder / "checkpoints" / score)
    like = abstract_state(score, sizes, config)
    restored = checkpoints.restore(like, tidy=False)
    for sentence in checkpoints.damaged:
        _tell(sentence)
    if restored is None:
        raise UsageError(f"{checkpoints.folder} holds no checkpoint; train the run first.")
    step, state = restored
    if step < config.steps:
        _tell(f"{score}: the checkpoint is of step {step} of {config.steps}.")
    return Translators(score, config, languages, state.parameters, graph, step, {})


def _evaluate(config: Config) -> None:
    for score in kept.scores_of(config.directory):
        if score not in config.scores and not kept.is_begun(config.directory, score):
            _tell(f"{score} has no checkpoint and is left out.")
    loaded = [load(score, config) for score in config.scores]
    if config.input:
        name, pairs = _pairs_of_file(config, loaded[0].languages)
    else:
        name, pairs = _pairs_of_split(config)
    records = []
    for translators in loaded:
        found = translators.asked(functools.partial(evaluation.of_set, translators.score), pairs)
        records.append({"score": translators.score, "step": translators.step, **found.measured})
    languages = loaded[0].languages
    signatures = results.signatures(languages.lowercase, languages.at_spaces)
    path = evaluation.report(config, name, len(pairs), signatures, records)
    show(path.absolute())


def _translate(config: Config) -> None:
    translators = load(config.scores[0], config).only(config.translator)
    if not config.input and sys.stdin.isatty():
        interaction.converse(translators, sys.stdin, sys.stdout)
        return
    lines = _lines(config)
    sentences = [translators.languages.words(line) for line in lines]
    _tell_unknown(translators.languages, [(words, ()) for words in sentences])
    full = [number for number, words in enumerate(sentences) if words]
    found: list[Words] = [()] * len(lines)
    for number, words in zip(
        full, translators.translations([sentences[n] for n in full]) if full else (), strict=True
    ):
        found[number] = words
    for words in found:
        show(translators.languages.text(words))
    _write_alignments(translators, [Pair(*both) for both in zip(sentences, found, strict=True)])


def _score(config: Config) -> None:
    translators = load(config.scores[0], config).only(config.translator)
    pairs = []
    for number, line in enumerate(lines := _lines(config), 1):
        source, tab, target = line.partition("\t")
        words = translators.languages.words
        pair = Pair(words(source), words(target.partition("\t")[0]))
        if not (tab and pair.source and pair.target):
            raise UsageError(
                f"{config.input or _STDIN} line {number} is not source<TAB>target, two sentences "
                "with one tab between them."
            )
        pairs.append(pair)
    if not lines:
        return
    _tell_unknown(translators.languages, [(pair.source, pair.target) for pair in pairs])
    for value in translators.log_probabilities(pairs):
        show(f"{value:.4f}")
    _write_alignments(translators, pairs)


def _lines(config: Config) -> list[str]:
    if config.input:
        return read_lines(Path(config.input))
    return lines_of(sys.stdin.buffer.read(), _STDIN)


def _pairs_of_split(config: Config) -> tuple[str, Sequence[Pair]]:
    given = task.read(config)
    kept.check_data(config.directory, given.corpus)
    sets = given.sets
    if config.split not in sets:
        raise UsageError(f"--split: there is no {config.split!r}; choose from {', '.join(sets)}.")
    return config.split, sets[config.split].pairs


def _pairs_of_file(config: Config, languages: Languages) -> tuple[str, Sequence[Pair]]:
    reader = Reader(config.source, config.target, languages.lowercase, languages.at_spaces)
    path = Path(config.input)
    if not path.is_file():
        raise UsageError(f"--input {path} is no file; give a table of pairs, source<TAB>target.")
    splits, _ = reader.read(str(path))
    for notice in reader.notices:
        _tell(notice)
    # Files of one name in two folders are two sets.
    return f"input-{path.stem[:_READABLE]}-{reader.files[str(path)][:8]}", splits["train"]


def _tell_unknown(languages: Languages, sentences: Sequence[tuple[Words, Words]]) -> None:
    """Name the words that will be read as <unk>, line by line."""
    sides = ("source", languages.source), ("target", languages.target)
    for number, sentence in enumerate(sentences, 1):
        found = {
            side: " ".join(interaction.unknown(words, vocabulary))
            for words, (side, vocabulary) in zip(sentence, sides, strict=True)
        }
        said = ", ".join(f"{words} ({side})" for side, words in found.items() if words)
        if said:
            _tell(f"line {number}: read as <unk>: {said}")


def _write_alignments(translators: Translators, pairs: Sequence[Pair]) -> None:
    """Write for each line the links that attention shows, counted in words from 0."""
    if not translators.config.alignments:
        return
    full = [number for number, pair in enumerate(pairs) if pair.source and pair.target]
    lines = [""] * len(pairs)
    weights = translators.weights([pairs[n] for n in full]) if full else []
    for number, array in zip(full, weights, strict=True):
        lengths = len(pairs[number].source), len(pairs[number].target)
        lines[number] = metrics.pharaoh(metrics.links(array, *lengths))
    alignments.write(Path(translators.config.alignments), lines)


def _tell(sentence: str) -> None:
    print(f"translate: {sentence}", file=sys.stderr)
