"""Words to integers and back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable

PAD, BOS, EOS, UNK = range(4)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


class Vocabulary:
    """An ordered set of words behind the four special symbols pad=0, bos=1, eos=2, unk=3.

    A word of the text that is spelled like a special symbol is read as ``<unk>``, so that text
    can never end or pad a sentence.

    >>> words = Vocabulary(["the", "dog"])
    >>> words.encode(["the", "cat"])
    [4, 3]
    >>> words.decode([4, 3, 5, 2, 4])
    ('the', '<unk>', 'dog')
    """

    def __init__(self, words: Iterable[str]):
        self.words = (*SPECIAL, *words)
        self._ids = {word: index for index, word in enumerate(self.words) if index >= len(SPECIAL)}
        if len(self._ids) + len(SPECIAL) != len(self.words):
            raise ValueError("Vocabulary: a word is listed twice; list every word once.")

    @classmethod
    def of_sentences(
        cls,
        sentences: Iterable[Iterable[str]],
        *,
        min_count: int = 1,
        max_size: int | None = None,
    ) -> Vocabulary:
        """The words that occur at least ``min_count`` times, the most frequent first.

        ``max_size`` counts words, without the special symbols; ties are broken by spelling.
        """
        counts = Counter(word for sentence in sentences for word in sentence)
        known = (word for word in counts if counts[word] >= min_count and word not in SPECIAL)
        return cls(sorted(known, key=lambda word: (-counts[word], word))[:max_size])

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self._ids

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.words == other.words

    def __hash__(self) -> int:
        return hash(self.words)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} symbols)"

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """The integers of ``tokens``; no BOS or EOS is added."""
        return [self._ids.get(token, UNK) for token in tokens]

    def counts(self, tokens: Iterable[str]) -> list[int]:
        """The number of integers of each token."""
        return [1 for _ in tokens]

    def pieces(self, tokens: Iterable[str]) -> list[str]:
        """The text of each integer of ``tokens``."""
        return list(tokens)

    def decode(self, ids: Iterable[int]) -> tuple[str, ...]:
        """The words up to the first EOS; any other special symbol is shown, not hidden."""
        words = []
        for index in ids:
            if index == EOS:
                break
            words.append(self.words[index])
        return tuple(words)

    def to_json(self) -> str:
        """One JSON list of the words, without the special symbols."""
        return json.dumps(self.words[len(SPECIAL) :], ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        """The inverse of ``to_json``."""
        return cls(json.loads(text))
