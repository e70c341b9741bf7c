"""Parallel corpora for translation: generated with gold alignments, or read from files."""

from experiments.data.corpus import Corpus, DataError, Links, Pair
from experiments.data.files import Reading
from experiments.data.load import GENERATED, load
from experiments.data.splits import Sizes
from experiments.data.text import detokenize, tokenize
from experiments.data.vocabulary import BOS, EOS, PAD, UNK, Vocabulary

__all__ = [
    "BOS",
    "EOS",
    "GENERATED",
    "PAD",
    "UNK",
    "Corpus",
    "DataError",
    "Links",
    "Pair",
    "Reading",
    "Sizes",
    "Vocabulary",
    "detokenize",
    "load",
    "tokenize",
]
