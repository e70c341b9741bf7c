"""Guided alignment: a loss that pulls attention to the gold alignments of the training pairs.

Chen, Matusov, Khadivi and Peter 2016, section 3.2, with the cross-entropy of Garg, Peitz, Nallasamy
and Paulik 2019, equation 4.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.command_line import UsageError
from experiments.data.batches import Buckets
from experiments.data.corpus import Corpus, Pair
from experiments.data.vocabulary import Vocabulary

Array = jax.Array

# The least weight whose logarithm is taken.
_LEAST = 1e-9


def links_of(corpus: Corpus, buckets: Buckets) -> tuple[np.ndarray, ...]:
    """Return of each bucket of the training pairs the gold links of its rows, [rows, L, 2].

    A link is the position of a source token and that of a target token. A link of words links all
    their subwords. Rows with fewer than L links end with positions past those of the bucket.

    Raises:
      UsageError: no training pair has a link.
    """
    found = []
    for bucket in buckets.members:
        past = bucket.source.shape[1], bucket.target.shape[1]
        links = [_of_tokens(corpus.train[number], corpus) for number in bucket.index.tolist()]
        padded = np.full((len(links), max(map(len, links)), 2), past, np.int32)
        for row, of_pair in enumerate(links):
            padded[row, : len(of_pair)] = np.array(of_pair, np.int32).reshape(-1, 2)
        found.append(padded)
    if not any(links.size for links in found):
        raise UsageError(
            f"--guided_alignment needs gold alignments of training pairs, and {corpus.name} has "
            "none; give a third column, or files such as train.en-de.align, or leave it out."
        )
    return tuple(found)


def _of_tokens(pair: Pair, corpus: Corpus) -> list[tuple[int, int]]:
    source = _places(pair.source, corpus.source_vocabulary)
    target = _places(pair.target, corpus.target_vocabulary)
    links = sorted(pair.sure or pair.possible or ())
    return [both for i, j in links for both in itertools.product(source[i], target[j])]


def _places(words: Sequence[str], vocabulary: Vocabulary) -> list[range]:
    """Return the positions of the tokens of each word."""
    ends = list(itertools.accumulate(vocabulary.counts(words)))
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def losses(weights: Array, links: Array) -> tuple[Array, Array]:
    r"""Cross-entropy of attention with gold links: -sum_j 1/|G_j| sum_{i in G_j} ln w_ji.

    Args:
      weights: w, [T, B, S].
      links: G, [B, L, 2], positions of source and target tokens; those past S or T are none.

    Returns:
      The sum over the target tokens with a link, and their number.

    >>> weights = jnp.array([[[0.5, 0.25, 0.25]], [[1.0, 0.0, 0.0]]])
    >>> total, count = losses(weights, jnp.array([[[0, 0], [1, 0], [9, 9]]]))
    >>> total, count  # -(ln 1/2 + ln 1/4) / 2
    (Array(1.0397, dtype=float32), Array(1., dtype=float32))
    """
    rows = jnp.arange(links.shape[0])[:, None]
    weights = weights.astype(jnp.float32)
    gold = jnp.zeros_like(weights).at[links[..., 1], rows, links[..., 0]].set(1.0, mode="drop")
    number = jnp.sum(gold, axis=-1)
    logarithms = jnp.log(jnp.maximum(weights, _LEAST))
    total = -jnp.sum(jnp.sum(gold * logarithms, axis=-1) / jnp.maximum(number, 1.0))
    return total, jnp.sum(number > 0, dtype=total.dtype)
