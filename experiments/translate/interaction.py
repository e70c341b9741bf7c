"""Translating sentence by sentence at a terminal, with the words that each word was read from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

import numpy as np

from experiments.command_line import UsageError
from experiments.data.corpus import Pair
from experiments.data.vocabulary import Vocabulary

if TYPE_CHECKING:
    from experiments.translate.use import Translators

_PROMPT = "> "
_SEEN = 0.1


def converse(translators: Translators, questions: TextIO, answers: TextIO) -> None:
    """Translate each line as it comes, until the end of the input or Ctrl-C."""
    print("One sentence a line; an empty one leaves.", file=answers)
    while True:
        answers.write(_PROMPT)
        answers.flush()
        try:
            line = questions.readline()
        except KeyboardInterrupt:
            line = ""
        except UnicodeDecodeError:
            print("This is not UTF-8.", file=answers)
            continue
        words = translators.languages.words(line)
        if not words:
            print(file=answers)
            return
        try:
            lines = answer(translators, words)
        except UsageError as error:
            lines = [str(error)]
        for text in lines:
            print(text, file=answers)


def answer(translators: Translators, words: tuple[str, ...]) -> list[str]:
    """Return the translation of a sentence, and where each of its words was read from."""
    languages = translators.languages
    (found,) = translators.translations([words])
    lines = [languages.text(found)]
    unread = unknown(words, languages.source)
    if unread:
        lines.append(f"  read as <unk>: {' '.join(unread)}")
    if translators.score != "none" and found:
        (weights,) = translators.weights([Pair(words, found)])
        lines += alignment(words, found, weights)
    return lines


def alignment(source: Sequence[str], target: Sequence[str], weights: np.ndarray) -> list[str]:
    """Return a line for each target word: the source words that had a tenth of the attention.

    >>> alignment(("red", "dog"), ("Hund",), np.array([[0.04, 0.85, 0.11], [0.0, 0.0, 1.0]]))
    ['  Hund  dog 85%  <eos> 11%']
    """
    names = [*source, "<eos>"]
    widest = max(map(len, target))
    lines = []
    for word, row in zip(target, weights, strict=False):
        order = np.argsort(-row, kind="stable")
        seen = [f"{names[i]} {row[i]:.0%}" for i in order if row[i] >= _SEEN]
        lines.append("  ".join(["", word.ljust(widest), *seen]))
    return lines


def unknown(words: Sequence[str], vocabulary: Vocabulary) -> list[str]:
    """Return the words of a sentence that are not in a vocabulary, each of them once."""
    return [word for word in dict.fromkeys(words) if word not in vocabulary]
