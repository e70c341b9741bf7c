"""The data of a run: bucketed arrays, the batches of every step, and the vocabularies it saves."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import metrics
from experiments.command_line import UsageError
from experiments.data import DataError, Reading, Sizes, load
from experiments.data.batches import (
    Buckets,
    bucket,
    choose_widths,
    encoded_lengths,
    rounded_up,
    schedule,
)
from experiments.data.corpus import Corpus, Pair
from experiments.data.subwords import pooled, vocabulary_of, with_subwords
from experiments.data.text import cut, detokenize, spaced
from experiments.data.vocabulary import PAD, Vocabulary
from experiments.translate import guided
from experiments.translate.config import Config
from experiments.translate.marks import read_marked, write_marked

Array = jax.Array

# Widths for evaluation: every shape is compiled twice, and evaluation is short.
_EVALUATION_WIDTHS = 2
# Numbers of target words that are read out are rounded up to a multiple of this.
_WORDS_MULTIPLE = 32

_VOCABULARIES = "vocabularies.json"
_HASHES = "data.json"
_WRITTEN_ANEW = "the run's command writes it anew."


class Examples(NamedTuple):
    """Pairs, encoded and sorted into buckets."""

    pairs: Sequence[Pair]
    buckets: Buckets
    corpus: Corpus

    def weights_of_words(self, number: int, weights: np.ndarray) -> np.ndarray:
        """Return the weights [words + 1, words + 1] of a pair, from those of its rows."""
        pair = self.pairs[number]
        target = self.corpus.target_vocabulary.counts(pair.target)
        source = self.corpus.source_vocabulary.counts(pair.source)
        return pooled(weights, target, source)[: len(target) + 1, : len(source) + 1]


def bucketed(
    sets: Mapping[str, Sequence[Pair]], corpus: Corpus, batch_size: int, multiple: int = 1
) -> dict[str, Examples]:
    """Sort sets of pairs into buckets of a few shapes that all sets share.

    Each width is a multiple of `multiple`, so that later sets need no new compilation.
    """
    vocabularies = corpus.source_vocabulary, corpus.target_vocabulary
    every = [pair for pairs in sets.values() for pair in pairs]
    lengths = encoded_lengths(every, *vocabularies)
    chosen = choose_widths(lengths, _EVALUATION_WIDTHS)
    widths = tuple((rounded_up(s, multiple), rounded_up(t, multiple)) for s, t in chosen)
    found = {}
    for name, pairs in sets.items():
        buckets = bucket(pairs, *vocabularies, batch_size=batch_size, widths=widths)
        found[name] = Examples(pairs, buckets, corpus)
    return found


@dataclasses.dataclass(frozen=True)
class Task:
    """A corpus as buckets of arrays, and the batch of every seed in every step.

    Attributes:
      corpus: the pairs as words, and the vocabularies.
      training: the training pairs in buckets.
      arrays: of each bucket, source [rows, S] and target [rows, T]; for guided alignment also
        links [rows, L, 2], see `guided.links_of`.
      order: the bucket of each chunk of steps, [c].
      rows: the rows of each batch, [c, seeds, steps, B].
      tokens: words and end symbols in each chunk, both sides and all seeds, [c].
      sets: the validation and test sets by name.
    """

    corpus: Corpus
    training: Buckets
    arrays: tuple[tuple[Array, ...], ...]
    order: np.ndarray
    rows: np.ndarray
    tokens: np.ndarray
    sets: Mapping[str, Examples]

    @property
    def widths(self) -> tuple[tuple[int, int], ...]:
        """All shapes (S, T) that are evaluated."""
        widths = (width for given in self.sets.values() for width in given.buckets.widths)
        return tuple(dict.fromkeys(widths))

    @property
    def longest(self) -> int:
        """Words after which a translation is cut off: 1.5 times the longest target in training."""
        return 3 * max(target for _, target in self.training.widths) // 2

    def max_words(self, shares: int = 1) -> tuple[int, ...]:
        """Return of each bucket an upper bound on the target words of a batch, EOS included.

        Args:
          shares: equal parts of a batch; the bound is that of a part.
        """
        words = [(member.target != PAD).sum(1) for member in self.training.members]
        rows = self.rows.reshape(*self.rows.shape[:-1], shares, -1)
        # Rounded up, so that few shapes are compiled, but to no more than all positions.
        most = (rounded_up(found, _WORDS_MULTIPLE) for found in _most(words, self.order, rows))
        positions = (rows.shape[-1] * width for _, width in self.training.widths)
        return tuple(map(min, most, positions))

    def digest(self) -> str:
        """Return the start of the SHA-256 of all sentences as numbers and of all batches."""
        found = hashlib.sha256()
        every = [self.training, *(examples.buckets for examples in self.sets.values())]
        sides = [side for buckets in every for member in buckets.members for side in member[:2]]
        links = (np.asarray(array) for arrays in self.arrays for array in arrays[2:])
        for array in (*sides, *links, self.order, self.rows):
            found.update(repr((array.shape, array.dtype)).encode())
            found.update(np.ascontiguousarray(array).data)
        for vocabulary in (self.corpus.source_vocabulary, self.corpus.target_vocabulary):
            found.update(vocabulary.to_json().encode())
        return found.hexdigest()[:16]


def load_task(config: Config) -> Task:
    """Load the corpus, sort it into buckets, and draw the batches of all steps.

    Raises:
      UsageError: the data cannot be used as asked.
    """
    try:
        corpus = load(
            config.data,
            source=config.source,
            target=config.target,
            sizes=Sizes(config.train_size, config.valid_size, config.test_size),
            seed=config.data_seed,
            max_length=config.max_length,
            min_count=1 if config.has_subwords else config.min_count,
            max_vocabulary=config.max_vocabulary,
            reading=Reading(config.lowercase, config.words == "spaces", config.links_from),
        )
        if config.has_subwords:
            corpus = with_subwords(corpus, config.subwords, config.max_vocabulary)
        training = bucket(
            corpus.train,
            corpus.source_vocabulary,
            corpus.target_vocabulary,
            batch_size=config.batch_size,
            num_buckets=config.buckets,
        )
        schedules = [
            schedule(training, config.steps, config.batch_size, seed, chunk=config.chunk)
            for seed in range(config.seeds)
        ]
    except DataError as error:
        raise UsageError(str(error)) from None
    arrays = tuple((bucket.source, bucket.target) for bucket in training.members)
    if config.guided_alignment:
        links = guided.links_of(corpus, training)
        arrays = tuple((*sides, own) for sides, own in zip(arrays, links, strict=True))
    notice = metrics.tokenizer_notice([pair.target for pair in corpus.test])
    corpus = dataclasses.replace(corpus, notices=(*corpus.notices, *filter(None, [notice])))
    order = schedules[0].bucket
    rows = np.stack([of_seed.rows for of_seed in schedules], axis=1)
    words = [(b.target != PAD).sum(1) for b in training.members]
    lengths = [(b.source != PAD).sum(1) + w for b, w in zip(training.members, words, strict=True)]
    tokens = [lengths[number][taken].sum() for number, taken in zip(order, rows, strict=True)]
    sets = {"valid": corpus.valid, "test": corpus.test, **corpus.extra}
    return Task(
        corpus=corpus,
        training=training,
        arrays=jax.tree.map(jnp.asarray, arrays),
        order=order,
        rows=rows,
        tokens=np.array(tokens),
        sets=bucketed(sets, corpus, config.batch_size),
    )


def _most(words: list[np.ndarray], order: np.ndarray, rows: np.ndarray) -> list[int]:
    """Find the most target words of any batch of each bucket, given those of each of its rows."""
    most = [1] * len(words)
    for number, taken in zip(order, rows, strict=True):
        most[number] = max(most[number], int(words[number][taken].sum(axis=-1).max()))
    return most


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """How a run turns text into words and back.

    Attributes:
      source: vocabulary of the source side.
      target: vocabulary of the target side.
      longest: words after which a translation is cut off.
      at_spaces: split at spaces only, as in text with gold alignments, which count its words.
      lowercase: whether text is lower-cased.
    """

    source: Vocabulary
    target: Vocabulary
    longest: int
    at_spaces: bool
    lowercase: bool

    def words(self, text: str) -> tuple[str, ...]:
        """Split a sentence into words as in training."""
        return cut(text, self.at_spaces, self.lowercase)

    def parts(self, text: str) -> list[tuple[str, ...]]:
        """Split each part of a sentence between spaces into words; together they are `words`."""
        # The space behind a part decides on its hyphen.
        return [self.words(part) for part in re.findall(r"\S+\s?", text)]

    def counts(self, words: tuple[str, ...]) -> tuple[int, ...]:
        """Count the words in each part between spaces of their `text`."""
        return (1,) * len(words) if self.at_spaces else tuple(spaced(words))

    def text(self, words: tuple[str, ...]) -> str:
        """Join words to a line of text."""
        return " ".join(words) if self.at_spaces else detokenize(words)

    def corpus(self, name: str, pairs: tuple[Pair, ...] = ()) -> Corpus:
        """Return a corpus with these vocabularies and the pairs as its test set."""
        return Corpus(name, (), (), pairs, self.source, self.target)


def save_tokenizer(folder: Path, corpus: Corpus, longest: int, config: Config) -> None:
    """Write the vocabularies of a run and the hashes of its data files to its folder, once.

    Raises:
      UsageError: the run began with other data.
    """
    check_data(folder, corpus)
    path = folder / _VOCABULARIES
    # A run that began without hashes may have begun with other data: add none later.
    if corpus.files and not path.exists() and not (folder / _HASHES).exists():
        write_marked(folder / _HASHES, folder, {"files": dict(corpus.files)})
    tokenizer = Tokenizer(
        source=corpus.source_vocabulary,
        target=corpus.target_vocabulary,
        longest=longest,
        at_spaces=corpus.at_spaces,
        lowercase=config.lowercase,
    )
    try:
        held = load_tokenizer(folder)
    except UsageError:
        vocabularies = {side: getattr(tokenizer, side).to_json() for side in ("source", "target")}
        words = {side: json.loads(text) for side, text in vocabularies.items()}
        write_marked(path, folder, {**vars(tokenizer), **words})
        return
    if held != tokenizer:
        raise UsageError(
            f"{path} does not hold the words of --data={config.data}, so that the run began with "
            "others; restore them or give another --workdir."
        )


def check_data(folder: Path, corpus: Corpus) -> None:
    """Refuse a corpus whose files have changed since the run in a folder began.

    Raises:
      UsageError: a file has changed, is gone or is new.
    """
    path = folder / _HASHES
    if not path.exists():
        return
    deleted = "delete it if the data are those that the run began with."
    restored = f"restore the one of this run from a copy, or {deleted}"
    held = read_marked(path, folder, deleted, of_another=restored).get("files")
    if not isinstance(held, dict):
        raise UsageError(f"{path} is damaged; {deleted}")
    for name in {**held, **corpus.files}:
        if held.get(name) != corpus.files.get(name):
            what = "is new" if name not in held else "has changed"
            what = what if name in corpus.files else "is gone"
            raise UsageError(
                f"{name} {what} since the run in {folder} began; restore the data as they were or "
                "give another --workdir."
            )


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a run from its folder.

    Raises:
      UsageError: its file is missing, damaged or that of another run.
    """
    path = folder / _VOCABULARIES
    record = read_marked(path, folder, _WRITTEN_ANEW, of_another=_WRITTEN_ANEW)
    try:
        sides = {side: vocabulary_of(record[side]) for side in ("source", "target")}
        return Tokenizer(**{**record, **sides})
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{path} is damaged; {_WRITTEN_ANEW}") from None
