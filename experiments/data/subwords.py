"""Vocabularies of subwords: words are cut into pieces, and pieces are joined to words again.

Text stays words everywhere else: a vocabulary of subwords has the methods of one of words, so that
metrics and alignments count words.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from experiments.data.corpus import Corpus, DataError
from experiments.data.splits import unknown_words
from experiments.data.vocabulary import SPECIAL, UNK, Vocabulary

KINDS = ("none", "bpe", "unigram", "characters")

# Begins the first piece of each word.
_MARK = "▁"
# Characters that sentencepiece needs for itself, and what is read in their place.
_INSTEAD = str.maketrans({_MARK: "_", "▅": "_"})
_FIELD = "sentencepiece"


class Subwords(Vocabulary):
    """Pieces of words behind the four special symbols, with the methods of `Vocabulary`.

    What is not known of a word is read as `<unk>`, also what is spelled like a special symbol.
    The model is one of sentencepiece (Kudo and Richardson 2018).

    >>> model = Subwords.trained([["hot", "dog"], ["hotdog"]] * 9, "characters", 99)
    >>> model.pieces(["dog", "hot"])
    ['▁', 'd', 'o', 'g', '▁', 'h', 'o', 't']
    >>> model.decode(model.encode(["dog", "hat"])), model.counts(["hotdog"])
    (('dog', 'h<unk>t'), [7])
    """

    def __init__(self, model: bytes):
        import sentencepiece

        self.model = model
        self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._known: dict[str, list[int]] = {}
        count = self._processor.get_piece_size()
        super().__init__(self._processor.id_to_piece(n) for n in range(len(SPECIAL), count))

    @classmethod
    def trained(cls, sentences: Iterable[Iterable[str]], kind: str, size: int) -> Subwords:
        """Learn at most `size` pieces from sentences; equal sentences give equal pieces.

        Args:
          sentences: of words.
          kind: `bpe` (Sennrich, Haddow and Birch 2016), `unigram` (Kudo 2018) or `characters`.
          size: pieces without the special symbols.

        Raises:
          DataError: the size is smaller than the number of different characters.
        """
        import sentencepiece

        lines = [" ".join(map(_unmarked, words)) for words in sentences]
        alphabet = {_MARK, *"".join(lines).replace(" ", "")}
        if size < len(alphabet):
            raise DataError(
                f"The training text has {len(alphabet)} different characters, but only {size} "
                "subwords are allowed; set a larger max_vocabulary."
            )
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            model_type="char" if kind == "characters" else kind,
            vocab_size=size + len(SPECIAL),
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",
            max_sentence_length=2**30,
            **dict(zip(("pad_id", "bos_id", "eos_id", "unk_id"), range(4), strict=True)),
            # Sums over several threads would depend on their order.
            num_threads=1,
            minloglevel=2,
        )
        return cls(written.getvalue())

    @classmethod
    def from_record(cls, record: Any) -> Subwords:
        """The inverse of ``to_json``, from the value in JSON.

        Raises:
          ValueError: it is no model.
        """
        try:
            return cls(base64.b64decode(record[_FIELD], validate=True))
        except RuntimeError as error:
            raise ValueError(str(error)) from None

    def __contains__(self, word: str) -> bool:
        return UNK not in self._of(word)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Subwords) and self.model == other.model

    def __hash__(self) -> int:
        return hash(self.model)

    def __repr__(self) -> str:
        return f"Subwords({len(self)} symbols)"

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """The integers of the pieces of words; no BOS or EOS is added."""
        return [number for word in tokens for number in self._of(word)]

    def counts(self, tokens: Iterable[str]) -> list[int]:
        """The number of pieces of each word."""
        return [len(self._of(word)) for word in tokens]

    def pieces(self, tokens: Iterable[str]) -> list[str]:
        """The pieces of words."""
        return [self.words[number] for number in self.encode(tokens)]

    def decode(self, ids: Iterable[int]) -> tuple[str, ...]:
        """The words of the pieces up to the first EOS."""
        return tuple(word for word in "".join(super().decode(ids)).split(_MARK) if word)

    def to_json(self) -> str:
        """The model as JSON."""
        return json.dumps({_FIELD: base64.b64encode(self.model).decode()})

    def _of(self, word: str) -> list[int]:
        if word not in self._known:
            self._known[word] = self._processor.encode(_unmarked(word))
        return self._known[word]


def _unmarked(word: str) -> str:
    return word.translate(_INSTEAD)


def vocabulary_of(record: Any) -> Vocabulary:
    """The vocabulary of words or subwords from the value of its ``to_json``.

    Raises:
      ValueError: it is none.
    """
    return Subwords.from_record(record) if isinstance(record, dict) else Vocabulary(record)


def with_subwords(corpus: Corpus, kind: str, size: int) -> Corpus:
    """A corpus with vocabularies of subwords, each learnt from its side of the training pairs.

    Raises:
      DataError: the size is smaller than the number of different characters.
    """
    sides = {
        f"{side}_vocabulary": Subwords.trained(
            (getattr(pair, side) for pair in corpus.train), kind, size
        )
        for side in ("source", "target")
    }
    found = replace(corpus, **sides)
    of_words = unknown_words(corpus)
    others = tuple(notice for notice in corpus.notices if notice not in of_words)
    return replace(found, notices=(*others, *unknown_words(found)))


def pooled(weights: np.ndarray, queries: Sequence[int], keys: Sequence[int]) -> np.ndarray:
    """Weights of words from weights [T, S] of pieces: the sum over keys, the mean over queries.

    What follows the pieces, the end symbol and padding, is kept as it is.

    Args:
      weights: of pieces.
      queries: the number of pieces of each word.
      keys: the same for the keys.

    >>> pooled(np.array([[0.5, 0.25, 0.25], [0.0, 0.5, 0.5]]), [2], [1, 2])
    array([[0.25, 0.75]])
    """
    for axis, counts in ((0, queries), (1, keys)):
        if len(counts) == sum(counts):  # each word is a piece
            continue
        rest = np.ones(weights.shape[axis] - sum(counts), int)
        sizes = np.concatenate([np.asarray(counts, int), rest])
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(int)
        weights = np.add.reduceat(weights, starts, axis=axis)
        if axis == 0:
            weights = weights / sizes[:, None]
    return weights
