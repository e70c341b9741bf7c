"""Load any corpus by its name or path; generate the tasks of copying and reversing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random

from experiments.data import grammar, numbers
from experiments.data.corpus import Corpus, DataError, Pair
from experiments.data.files import Reader, Reading
from experiments.data.splits import Sizes, assemble, generated

GENERATED = ("grammar", "numbers", "copy", "reverse")
# Generated sentences are at most this long; the split "long" holds longer ones.
_LONGEST = {"grammar": 21, "numbers": 9, "copy": 12, "reverse": 12, "files": 60}
_SYMBOLS = tuple("abcdefghijklmnopqrst")


def load(
    data: str,
    *,
    source: str = "en",
    target: str = "de",
    sizes: Sizes = Sizes(),  # noqa: B008  it is frozen
    seed: int = 0,
    max_length: int | None = None,
    min_count: int = 2,
    max_vocabulary: int | None = 10_000,
    reading: Reading = Reading(),  # noqa: B008  it is frozen
) -> Corpus:
    """The corpus named by ``data``; it depends on the arguments (and the files) alone.

    Args:
      data: ``grammar``, ``numbers``, ``copy`` or ``reverse`` for a generated corpus; FILE.tsv with
        columns source, target and, if there is one, gold alignment; DIRECTORY with ``train.en``,
        ``train.de`` and so on, or ``train.tsv``; or PREFIX of files like ``PREFIX.train.en``.
      source: ending of the source files, or the name or number of a column of FILE.tsv.
      target: the same for the target.
      sizes: pairs of each split; by default 20000 generated pairs to train on, 500 to validate on
        and 1000 to test on, or all in the files; where a file of validation or test pairs is
        missing, 5% of the training pairs (at most 1000).
      seed: of the generator, of splitting and of the order of the training pairs.
      max_length: tokens of the longer side, without EOS; longer pairs are dropped and counted.
      min_count: words of the training files seen less often are read as ``<unk>``.
      max_vocabulary: the most frequent words of the training files that are kept, for each side.
      reading: how files are read. Text is split at spaces only, and keeps its case, also where the
        training set has gold alignments; all sets are cut into words as the training set is.

    Raises:
      DataError: an argument or a file cannot be used; one sentence says which, where and why.
    """
    if max_length is not None and max_length < 1:
        raise DataError(f"max_length is {max_length}, but at least 1 token is needed.")
    if min_count < 1:
        raise DataError(f"min_count is {min_count}, but at least 1 is needed to keep a word.")
    if max_vocabulary is not None and max_vocabulary < 1:
        raise DataError(f"max_vocabulary is {max_vocabulary}, but at least 1 word is needed.")
    if not data:
        raise DataError("The name of the data is empty; name a generated corpus or a path.")
    longest = max_length or _LONGEST.get(data, _LONGEST["files"])
    if data not in GENERATED:
        if reading.links_from not in (0, 1):
            raise DataError(f"links_from is {reading.links_from}, but 0 or 1 is needed.")
        at_spaces = reading.at_spaces or None
        reader = Reader(source, target, reading.lowercase, at_spaces, reading.links_from)
        corpus = assemble(
            data,
            *reader.read_splits(data),
            sizes,
            seed=seed,
            max_length=longest,
            min_count=min_count,
            max_vocabulary=max_vocabulary,
            notices=reader.notices,
        )
        return replace(corpus, files=reader.files, at_spaces=bool(reader.at_spaces))
    sizes = Sizes(sizes.train or 20_000, sizes.valid or 500, sizes.test or 1_000)
    streams, always = _streams(data, seed, longest)
    return generated(data, *streams, sizes, max_length=longest, always=always)


def _streams(data: str, seed: int, longest: int):
    """Endless pairs, endless longer ones, and pairs that training must contain."""
    first, second = Random(f"{data} {seed}"), Random(f"{data} {seed} long")
    if data == "grammar":
        brief, elaborate = min(1.0, longest / 10), max(1.0, longest / 10)
        return (grammar.sentences(first, brief), grammar.sentences(second, elaborate)), ()
    if data == "numbers":
        # Numbers below a hundred teach the words, some of which occur nowhere else.
        below_hundred = [numbers.translate(n) for n in range(100)]
        return (numbers.sentences(first), numbers.sentences(second)), below_hundred
    reverse = data == "reverse"
    return (
        _copies(first, longest=longest, reverse=reverse),
        _copies(second, longest=longest * 3 // 2, reverse=reverse),
    ), ()


def _copies(random: Random, *, longest: int, reverse: bool) -> Iterator[Pair]:
    """Strings of 1 to ``longest`` symbols, without end; the longer ones are not rarer."""
    while True:
        length = 1 + int(random.random() * longest)
        source = tuple(_SYMBOLS[int(random.random() * len(_SYMBOLS))] for _ in range(length))
        links = frozenset((length - 1 - j if reverse else j, j) for j in range(length))
        yield Pair(source, source[::-1] if reverse else source, links, links)
