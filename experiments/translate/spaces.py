"""Links that count the words of a line between its spaces, as other programs do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments import metrics
from experiments.data.corpus import Links, Pair
from experiments.data.subwords import pooled


class Line(NamedTuple):
    """A pair as the translators read it, and the number of its words in each part between spaces.

    Attributes:
      pair: the words.
      source: how many of them each part of the source has, 0 where it has only what is invisible.
      target: the same for the target.
    """

    pair: Pair
    source: tuple[int, ...]
    target: tuple[int, ...]

    def links(self, weights: np.ndarray) -> Links:
        """Return the alignment of the parts, from the weights [T, S] of the words.

        >>> line = Line(Pair(("a", ".", "b"), ("c", "d")), (2, 0, 1), (1, 1))
        >>> weights = np.array([[0.3, 0.3, 0.4, 0.0], [0.0, 0.2, 0.8, 0.0], [0.0, 0.0, 0.0, 1.0]])
        >>> sorted(line.links(weights))
        [(0, 0), (2, 1)]
        """
        sources, targets = _filled(self.source), _filled(self.target)
        counts = [self.target[j] for j in targets], [self.source[i] for i in sources]
        found = metrics.links(pooled(weights, *counts), len(sources), len(targets))
        return frozenset((sources[i], targets[j]) for i, j in found)


def _filled(counts: Sequence[int]) -> list[int]:
    return [position for position, count in enumerate(counts) if count]
