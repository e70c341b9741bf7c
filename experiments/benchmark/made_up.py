"""A corpus of the size of Multi30k, German and English, where the real one is not at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np

PAIRS = 28_997
WORDS = {"de": 5_379, "en": 4_561}
# Of the logarithms of the lengths.
MEANS, DEVIATIONS, CORRELATION = (2.468, 2.522), (0.324, 0.296), 0.852
SHORTEST, LONGEST = 2, 44


def write(folder: Path, pairs: int = PAIRS) -> None:
    """Write `train.de` and `train.en`: as many words, and sentences as long.

    Words are drawn evenly, so that none occurs too seldom to be kept.
    """
    random = np.random.default_rng(0)
    rest = (1 - CORRELATION**2) ** 0.5
    correlated = random.normal(size=(pairs, 2)) @ np.array([[1, CORRELATION], [0, rest]])
    lengths = np.exp(MEANS + correlated * DEVIATIONS).round().clip(SHORTEST, LONGEST).astype(int)
    for of_side, (ending, words) in zip(lengths.T, WORDS.items(), strict=True):
        sentences = (random.integers(words, size=length) for length in of_side)
        lines = (" ".join(f"w{word}" for word in sentence) for sentence in sentences)
        (folder / f"train.{ending}").write_text("\n".join(lines) + "\n", encoding="utf-8")
