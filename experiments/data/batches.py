"""Padded batches of few shapes, and the order in which training visits them.

Sentences of similar length share a bucket, an array of one shape: one compilation each. The
schedule says for every step which rows of which bucket it trains on. It is a pure function of
the step and the seed, so that a resumed run sees exactly what an uninterrupted one would have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from experiments.data.corpus import DataError, Pair
from experiments.data.vocabulary import EOS, PAD, Vocabulary

Widths = tuple[tuple[int, int], ...]

# Longest list of candidate widths a side; the search costs its fourth power.
_CANDIDATES = 40
# Chunks among which the order of buckets is shuffled.
_WINDOW = 8


class Bucket(NamedTuple):
    """Pairs of similar length: ``source`` [n, S] and ``target`` [n, T] int32, each with EOS.

    ``index`` [n] holds the position of each row in the pairs that were given.
    """

    source: np.ndarray
    target: np.ndarray
    index: np.ndarray


@dataclass(frozen=True)
class Buckets:
    """All pairs, each in one bucket; the last bucket is the widest."""

    members: tuple[Bucket, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each bucket."""
        return tuple(len(bucket.index) for bucket in self.members)

    @property
    def widths(self) -> Widths:
        """(S, T) of each bucket, EOS included."""
        return tuple((b.source.shape[1], b.target.shape[1]) for b in self.members)

    @property
    def occupancy(self) -> float:
        """The share of slots that hold a token of a sentence or its EOS instead of padding."""
        arrays = [side for bucket in self.members for side in (bucket.source, bucket.target)]
        return float(sum((a != PAD).sum() for a in arrays) / sum(a.size for a in arrays))


class Schedule(NamedTuple):
    """Which rows to train on: chunk c takes its n steps from bucket ``bucket[c]``.

    ``bucket`` [C] int32; ``rows`` [C, n, B] int32, row numbers inside that bucket.
    """

    bucket: np.ndarray
    rows: np.ndarray


class Batch(NamedTuple):
    """``rows`` [B] of bucket ``bucket``; where ``real`` [B] is False a row is padding."""

    bucket: int
    rows: np.ndarray
    real: np.ndarray


def bucket(
    pairs: Sequence[Pair],
    source_vocabulary: Vocabulary,
    target_vocabulary: Vocabulary,
    *,
    batch_size: int,
    widths: Widths | None = None,
    num_buckets: int = 3,
) -> Buckets:
    """Encodes ``pairs`` in at most ``num_buckets`` buckets with the least padding possible.

    No bucket gets fewer rows than ``batch_size``, if there are as many. With ``widths``, those of
    another set, shapes (and compilations) are shared; longer pairs get one more bucket.
    """
    if not pairs:
        raise DataError("There are no pairs to put into batches; give at least one.")
    lengths = encoded_lengths(pairs, source_vocabulary, target_vocabulary)
    if widths is None:
        widths = choose_widths(lengths, num_buckets, minimum=batch_size)
    elif (lengths > np.array(widths).max(axis=0)[None, :]).any():
        widest = np.maximum(lengths.max(axis=0), np.array(widths).max(axis=0))
        widths = (*widths, (int(widest[0]), int(widest[1])))
    fits = (lengths[:, None, :] <= np.array(widths)[None, :, :]).all(axis=-1)
    chosen = fits.argmax(axis=1)
    members = []
    for number, (source_width, target_width) in enumerate(widths):
        index = np.flatnonzero(chosen == number).astype(np.int32)
        held = [pairs[i] for i in index.tolist()]
        if held:
            sources = pad([source_vocabulary.encode(p.source) for p in held], source_width)
            targets = pad([target_vocabulary.encode(p.target) for p in held], target_width)
            members.append(Bucket(sources, targets, index))
    return Buckets(tuple(members))


def encoded_lengths(
    pairs: Iterable[Pair], source_vocabulary: Vocabulary, target_vocabulary: Vocabulary
) -> np.ndarray:
    """[n, 2]: the integers of both sides of each pair, EOS included."""
    sides = (
        (source_vocabulary.counts(p.source), target_vocabulary.counts(p.target)) for p in pairs
    )
    return np.array([(sum(source) + 1, sum(target) + 1) for source, target in sides])


def pad(sequences: Sequence[list[int]], width: int) -> np.ndarray:
    """[n, width] int32: each sequence, EOS, and padding.

    >>> pad([[7], [8, 9]], 3).tolist()
    [[7, 2, 0], [8, 9, 2]]
    """
    rows = np.full((len(sequences), width), PAD, np.int32)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence) + 1] = [*sequence, EOS]
    return rows


def rounded_up(count: int, multiple: int) -> int:
    """The next multiple, or the count itself if it is one.

    >>> rounded_up(33, 32), rounded_up(32, 32)
    (64, 32)
    """
    return -(-count // multiple) * multiple


def choose_widths(lengths: np.ndarray, num_widths: int, minimum: int = 1) -> Widths:
    """At most ``num_widths`` growing widths (S, T) of least padding for ``lengths`` [n, 2].

    A pair goes to the first width that holds both its sides, so with N(S, T) pairs no longer than
    (S, T) the cost of a chain of widths is the sum of (N_i - N_{i-1}) (S_i + T_i): the shortest
    path over candidate widths, found by dynamic programming, with at least ``minimum`` pairs each.
    """
    sides = [_candidates(lengths[:, side]) for side in (0, 1)]
    grid = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 2)
    counts = np.zeros([len(side) for side in sides], int)
    np.add.at(counts, tuple(map(np.searchsorted, sides, lengths.T)), 1)
    held = counts.cumsum(axis=0).cumsum(axis=1).reshape(-1)
    enough = held >= min(minimum, len(lengths))
    grid, held = grid[enough], held[enough]
    slots = grid.sum(axis=1)
    added = held[None, :] - held[:, None]
    follows = (grid[:, None, :] <= grid[None, :, :]).all(axis=-1) & (added >= minimum)
    step = np.where(follows, added * slots[None, :], np.inf)
    costs, origins = [held * slots.astype(float)], []
    for _ in range(num_widths - 1):
        path = costs[-1][:, None] + step
        origins.append(path.argmin(axis=0))
        costs.append(path.min(axis=0))
    best = min(range(len(costs)), key=lambda n: costs[n][-1])
    chain = [len(grid) - 1]
    for origin in reversed(origins[:best]):
        chain.append(int(origin[chain[-1]]))
    return tuple((int(grid[i, 0]), int(grid[i, 1])) for i in reversed(chain))


def _candidates(lengths: np.ndarray) -> np.ndarray:
    distinct = np.unique(lengths)
    if len(distinct) <= _CANDIDATES:
        return distinct
    return np.unique(np.quantile(lengths, np.linspace(0, 1, _CANDIDATES), method="higher"))


def schedule(
    buckets: Buckets, steps: int, batch_size: int, seed: int, *, chunk: int = 25
) -> Schedule:
    """The rows of every training step; the first steps of a longer schedule are the same.

    Each bucket is visited in proportion to its rows and gives them in shuffled rounds, all once
    before any is given again, so that all rows are used about equally often. The order of buckets
    does not depend on ``seed``: schedules of several seeds can be stacked and trained together.

    Raises:
      DataError: the batch is empty or larger than the set, or the seed negative.
      ValueError: ``steps`` is no multiple of ``chunk``.
    """
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}, but at least 1 pair is needed.")
    if batch_size > (total := sum(buckets.sizes)):
        raise DataError(
            f"batch_size is {batch_size}, but there are only {total} pairs to train on; set a "
            "smaller batch_size."
        )
    if seed < 0:
        raise DataError(f"seed is {seed}, but it must be 0 or greater.")
    if chunk < 1 or steps < 1 or steps % chunk:
        raise ValueError(
            f"schedule: expected steps to be a positive multiple of chunk, got steps={steps} and "
            f"chunk={chunk}; round steps up."
        )
    order = _bucket_order(buckets.sizes, steps // chunk)
    rows = np.empty((len(order), chunk, batch_size), np.int32)
    for number, size in enumerate(buckets.sizes):
        visits = np.flatnonzero(order == number)
        slots = len(visits) * chunk * batch_size
        rounds = [_permutation(size, seed, number, n) for n in range(-(-slots // size))]
        stream = np.concatenate([np.empty(0, np.int64), *rounds])[:slots]
        rows[visits] = stream.reshape(len(visits), chunk, batch_size)
    return Schedule(order, rows)


def _bucket_order(sizes: Sequence[int], chunks: int) -> np.ndarray:
    """Order buckets in proportion to their rows, then shuffle the order inside each window."""
    total, visits, order = sum(sizes), [0] * len(sizes), []
    for chunk in range(1, rounded_up(chunks, _WINDOW) + 1):
        behind = [size * chunk - total * n for size, n in zip(sizes, visits, strict=True)]
        order.append(behind.index(max(behind)))
        visits[order[-1]] += 1
    windows = np.array(order, np.int32).reshape(-1, _WINDOW)
    shuffled = [window[_permutation(_WINDOW, n)] for n, window in enumerate(windows)]
    return np.concatenate(shuffled)[:chunks]


def _permutation(size: int, *seed: int) -> np.ndarray:
    # The raw bits of a named generator are the same in every version of numpy.
    return np.argsort(np.random.PCG64(seed).random_raw(size), kind="stable")


def sweep(buckets: Buckets, batch_size: int) -> Iterator[Batch]:
    """Every row once, in batches of exactly ``batch_size``; the last of a bucket is padded."""
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}, but at least 1 pair is needed.")
    for number, size in enumerate(buckets.sizes):
        for start in range(0, size, batch_size):
            rows = np.arange(start, start + batch_size)
            yield Batch(number, np.minimum(rows, size - 1).astype(np.int32), rows < size)
