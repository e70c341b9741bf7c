"""What is learned: the pairs as arrays, and which of them each seed sees in each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from experiments.command_line import UsageError
from experiments.data import DataError, Sizes, load
from experiments.data.batches import Buckets, bucket, rounded_up, schedule
from experiments.data.corpus import Corpus
from experiments.data.vocabulary import PAD
from experiments.translate.config import Config
from experiments.translate.evaluate import Examples, examples

Array = jax.Array

_WORDS_TOGETHER = 32


@dataclass(frozen=True)
class Task:
    """A corpus made ready for training.

    Chunk c takes its steps from bucket `order[c]`, and seed n in step i of it the rows
    `rows[c, n, i]`; `tokens[c]` counts words and end symbols of both sides, for all seeds. No
    batch of bucket b has more target words, end symbols included, than `most_words[b]`.
    """

    corpus: Corpus
    training: Buckets
    arrays: tuple[tuple[Array, Array], ...]
    order: np.ndarray
    rows: np.ndarray
    tokens: np.ndarray
    most_words: tuple[int, ...]
    sets: Mapping[str, Examples]

    @property
    def widths(self) -> tuple[tuple[int, int], ...]:
        """All shapes (S, T) that are evaluated."""
        widths = (width for given in self.sets.values() for width in given.buckets.widths)
        return tuple(dict.fromkeys(widths))

    @property
    def longest(self) -> int:
        """Words after which a translation is cut off: half as long again as any in training."""
        return 3 * max(target for _, target in self.training.widths) // 2


def read(config: Config) -> Task:
    """Load the corpus and lay out all steps.

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
            min_count=config.min_count,
            max_vocabulary=config.max_vocabulary,
            lowercase=config.lowercase,
        )
        training = bucket(
            corpus.train,
            corpus.source_vocabulary,
            corpus.target_vocabulary,
            batch_size=config.batch_size,
            count=config.buckets,
        )
        schedules = [
            schedule(training, config.steps, config.batch_size, seed, chunk=config.chunk)
            for seed in range(config.seeds)
        ]
    except DataError as error:
        raise UsageError(str(error)) from None
    order = schedules[0].bucket
    rows = np.stack([of_seed.rows for of_seed in schedules], axis=1)
    words = [(b.target != PAD).sum(1) for b in training.members]
    lengths = [(b.source != PAD).sum(1) + w for b, w in zip(training.members, words, strict=True)]
    tokens = [lengths[number][taken].sum() for number, taken in zip(order, rows, strict=True)]
    # Rounded up, so that few shapes are compiled, but to no more than all positions.
    most_words = (rounded_up(most, _WORDS_TOGETHER) for most in _most_words(words, order, rows))
    positions = (config.batch_size * width for _, width in training.widths)
    sets = {"valid": corpus.valid, "test": corpus.test, **corpus.extra}
    return Task(
        corpus=corpus,
        training=training,
        arrays=tuple((jnp.asarray(b.source), jnp.asarray(b.target)) for b in training.members),
        order=order,
        rows=rows,
        tokens=np.array(tokens),
        most_words=tuple(map(min, most_words, positions)),
        sets=examples(sets, corpus, config.batch_size),
    )


def _most_words(words: list[np.ndarray], order: np.ndarray, rows: np.ndarray) -> list[int]:
    """Find the most target words of any batch of each bucket, given those of each of its rows."""
    most = [1] * len(words)
    for number, taken in zip(order, rows, strict=True):
        most[number] = max(most[number], int(words[number][taken].sum(axis=-1).max()))
    return most
