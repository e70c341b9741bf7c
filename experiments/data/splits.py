"""From pairs to a corpus: lengths, duplicates, disjoint splits, sizes and vocabularies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from random import Random

from experiments.data.corpus import Corpus, DataError, Pair
from experiments.data.vocabulary import SPECIAL, Vocabulary

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Sizes:
    """How many pairs are wanted of each split; None takes what there is."""

    train: int | None = None
    valid: int | None = None
    test: int | None = None

    def __post_init__(self):
        for split in SPLITS:
            size = getattr(self, split)
            if size is not None and size < 1:
                raise DataError(f"{split}_size is {size}, but at least 1 pair is needed.")


def length(pair: Pair) -> int:
    """The tokens of the longer side."""
    return max(len(pair.source), len(pair.target))


def _shuffled(pairs: Iterable[Pair], seed: int) -> list[Pair]:
    # Sorted by `random()`, whose numbers are the same in every version of Python.
    random = Random(seed)
    return [pair for _, _, pair in sorted((random.random(), n, p) for n, p in enumerate(pairs))]


def _distinct(pairs: Iterable[Pair], seen: set[tuple[str, ...]], count: int, what: str):
    """``count`` pairs with distinct sources; gives up after 200 repeated ones in a row."""
    chosen: list[Pair] = []
    vain = 0
    for pair in pairs:
        if len(chosen) == count:
            break
        if pair.source in seen:
            vain += 1
            if vain == 200:
                raise DataError(
                    f"{what}: only {len(seen)} different sentences were found where "
                    f"{len(seen) + count - len(chosen)} are needed; ask for fewer pairs or a "
                    "larger max_length."
                )
            continue
        vain = 0
        seen.add(pair.source)
        chosen.append(pair)
    return tuple(chosen)


def generated(
    name: str,
    pairs: Iterator[Pair],
    longer: Iterator[Pair],
    sizes: Sizes,
    *,
    max_length: int,
    always: Iterable[Pair] = (),
) -> Corpus:
    """A corpus from endless streams; no source sentence is in two splits.

    The test set is drawn first and the training set last, so that another ``train`` size leaves
    the other splits as they are and a smaller training set begins a larger one. Pairs of
    ``always`` open the training set. ``longer`` gives the extra split ``"long"``, in which both
    sides are longer than any sentence of the others; where there are none, a notice says so.
    """
    opening = tuple(pair for pair in always if length(pair) <= max_length)[: sizes.train]
    seen = {pair.source for pair in opening}
    short = _limited(pairs, 1, max_length, name)
    test = _distinct(short, seen, sizes.test or 0, name)
    valid = _distinct(short, seen, sizes.valid or 0, name)
    train = opening + _distinct(short, seen, (sizes.train or 0) - len(opening), name)
    beyond = _limited(longer, max_length + 1, max_length * 3 // 2, f"{name}: the split long")
    try:
        extra = {"long": _distinct(beyond, seen, sizes.test or 0, f"{name}: the split long")}
        notices = ()
    except DataError as error:
        extra, notices = {}, (f"There is no split of longer sentences: {error}",)
    return Corpus(
        name=name,
        train=train,
        valid=valid,
        test=test,
        extra=extra,
        notices=notices,
        source_vocabulary=Vocabulary.of_sentences(pair.source for pair in train),
        target_vocabulary=Vocabulary.of_sentences(pair.target for pair in train),
    )


def _limited(pairs: Iterator[Pair], shortest: int, longest: int, what: str) -> Iterator[Pair]:
    vain = 0
    for pair in pairs:
        if shortest <= min(len(pair.source), len(pair.target)) and length(pair) <= longest:
            vain = 0
            yield pair
        elif (vain := vain + 1) == 10_000:
            raise DataError(
                f"{what}: no sentence of {shortest} to {longest} words was found; set another "
                "max_length."
            )


def assemble(
    name: str,
    splits: Mapping[str, list[Pair]],
    extra: Mapping[str, list[Pair]],
    sizes: Sizes,
    *,
    seed: int,
    max_length: int,
    min_count: int,
    max_vocabulary: int | None,
    notices: Iterable[str] = (),
) -> Corpus:
    """A corpus from files: long pairs and duplicates leave, missing splits are split off.

    Raises:
      DataError: nothing is left, or too few sentences to split.
    """
    told = list(notices)
    kept = {
        split: _within(pairs, max_length, split, told)
        for split, pairs in {**splits, **extra}.items()
    }
    train = list(dict.fromkeys(kept["train"]))
    if len(train) < len(kept["train"]):
        told.append(f"train: {len(kept['train']) - len(train)} repeated pairs were removed.")
    missing = [split for split in ("test", "valid") if split not in kept]
    if missing:
        kept.update(_split_off(name, train, missing, sizes, seed, told))
        train = kept["train"]
    train = _shuffled(train, seed)
    chosen = {
        split: tuple(_capped(pairs, split, sizes, told))
        for split, pairs in {**kept, "train": train}.items()
    }
    corpus = Corpus(
        name=name,
        train=chosen["train"],
        valid=chosen["valid"],
        test=chosen["test"],
        extra={split: chosen[split] for split in extra},
        source_vocabulary=Vocabulary.of_sentences(
            (pair.source for pair in chosen["train"]), min_count=min_count, max_size=max_vocabulary
        ),
        target_vocabulary=Vocabulary.of_sentences(
            (pair.target for pair in chosen["train"]), min_count=min_count, max_size=max_vocabulary
        ),
    )
    for vocabulary in (corpus.source_vocabulary, corpus.target_vocabulary):
        if len(vocabulary) == len(SPECIAL):
            raise DataError(
                f"{name}: no word occurs min_count={min_count} times in the "
                f"{len(corpus.train)} training pairs; set a smaller min_count."
            )
    told += _overlap(corpus) + unknown_words(corpus)
    return replace(corpus, notices=tuple(told))


def _within(pairs: list[Pair], max_length: int, split: str, told: list[str]) -> list[Pair]:
    kept = [pair for pair in pairs if length(pair) <= max_length]
    if not kept:
        shortest = min(map(length, pairs))
        raise DataError(
            f"{split}: all {len(pairs)} pairs are longer than max_length={max_length} tokens (the "
            f"shortest has {shortest}); set a larger max_length."
        )
    if len(kept) < len(pairs):
        told.append(
            f"{split}: {len(pairs) - len(kept)} of {len(pairs)} pairs are longer than "
            f"max_length={max_length} tokens and were dropped."
        )
    return kept


def _split_off(
    name: str, train: list[Pair], missing: list[str], sizes: Sizes, seed: int, told: list[str]
) -> dict[str, list[Pair]]:
    """Moves whole groups of pairs with the same source, so that the splits stay disjoint."""
    groups: dict[tuple[str, ...], list[Pair]] = defaultdict(list)
    for pair in _shuffled(train, seed):
        groups[pair.source].append(pair)
    if len(groups) <= len(missing):
        sentences = "sentence" if len(groups) == 1 else "sentences"
        wanted = " and ".join((", ".join(["train", *missing[1:]]), missing[0]))
        raise DataError(
            f"{name} has {len(groups)} different source {sentences}, which cannot be split into "
            f"{wanted}; give at least {len(missing) + 1}."
        )
    rest = list(groups.values())
    splits: dict[str, list[Pair]] = {}
    for split in missing:
        wanted = getattr(sizes, split) or max(1, min(1000, len(groups) // 20))
        splits[split] = rest.pop()
        # One group stays for each split still to come, training included.
        while len(splits[split]) < wanted and len(rest) > len(missing) - len(splits) + 1:
            splits[split] += rest.pop()
        told.append(f"{split}: split off from the training pairs, with other source sentences.")
    return splits | {"train": [pair for group in rest for pair in group]}


def _capped(pairs: list[Pair], split: str, sizes: Sizes, told: list[str]) -> list[Pair]:
    wanted = getattr(sizes, split, None)
    if wanted is None or wanted == len(pairs):
        return pairs
    if wanted > len(pairs):
        told.append(f"{split}: {wanted} pairs were asked for, but there are {len(pairs)}.")
    else:
        told.append(f"{split}: {wanted} of {len(pairs)} pairs are used.")
    return pairs[:wanted]


def _overlap(corpus: Corpus) -> list[str]:
    sources = {pair.source for pair in corpus.train}
    found = []
    for split, pairs in (("valid", corpus.valid), ("test", corpus.test), *corpus.extra.items()):
        if again := sum(pair.source in sources for pair in pairs):
            found.append(
                f"{split}: {again} of {len(pairs)} source sentences occur in training as well."
            )
    return found


def unknown_words(corpus: Corpus) -> list[str]:
    """A sentence on the share of <unk> in training and test, if there is any."""

    def share(pairs: tuple[Pair, ...], side: str, vocabulary: Vocabulary) -> float:
        tokens = [word for pair in pairs for word in getattr(pair, side)]
        return sum(word not in vocabulary for word in tokens) / len(tokens)

    shares = [
        100 * share(pairs, side, vocabulary)
        for pairs in (corpus.train, corpus.test)
        for side, vocabulary in (
            ("source", corpus.source_vocabulary),
            ("target", corpus.target_vocabulary),
        )
    ]
    if not any(shares):
        return []
    return [
        f"Words outside the vocabulary are read as <unk>: in training {shares[0]:.1f}% of source "
        f"and {shares[1]:.1f}% of target tokens, in test {shares[2]:.1f}% and {shares[3]:.1f}%."
    ]
