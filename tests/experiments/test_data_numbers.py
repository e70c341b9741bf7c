"""Number words against num2words, and their alignments by hand."""

from random import Random

import pytest

from experiments.data import Sizes, load
from experiments.data.alignments import pharaoh
from experiments.data.numbers import LIMIT, translate


def english(n):
    num2words = pytest.importorskip("num2words").num2words
    return num2words(n, lang="en").replace(",", "").replace("-", " ")


def german(n):
    num2words = pytest.importorskip("num2words").num2words
    # num2words writes einhunderteinstausend; in a compound German says ein, as in eintausend.
    return num2words(n, lang="de").replace("einstausend", "eintausend")


def sample():
    """Every form below 1000 and of whole thousands, the borders, and numbers at random."""
    random = Random(0)
    yield from range(1200)
    yield from range(1000, LIMIT, 1000)
    yield from range(LIMIT - 200, LIMIT)
    yield from (int(random.random() * LIMIT) for _ in range(3000))


@pytest.mark.slow
def test_both_languages_agree_with_num2words():
    for n in sample():
        pair = translate(n)
        assert (" ".join(pair.source), "".join(pair.target)) == (english(n), german(n))


@pytest.mark.parametrize(
    ("n", "source", "target", "alignment"),
    [
        (0, "zero", "null", "0-0"),
        (1, "one", "eins", "0-0"),
        (21, "twenty one", "ein und zwanzig", "0?1 0-2 1-0 1?1"),
        (30, "thirty", "dreißig", "0-0"),
        (101, "one hundred and one", "ein hundert eins", "0-0 1-1 3-2"),
        (1000, "one thousand", "ein tausend", "0-0 1-1"),
        (
            342_516,
            "three hundred and forty two thousand five hundred and sixteen",
            "drei hundert zwei und vierzig tausend fünf hundert sechzehn",
            "0-0 1-1 3?3 3-4 4-2 4?3 5-5 6-6 7-7 9-8",
        ),
        (
            901_031,
            "nine hundred and one thousand and thirty one",
            "neun hundert ein tausend ein und dreißig",
            "0-0 1-1 3-2 4-3 6?5 6-6 7-4 7?5",
        ),
    ],
)
def test_hand_checked_numbers(n, source, target, alignment):
    pair = translate(n)
    assert (" ".join(pair.source), " ".join(pair.target)) == (source, target)
    assert pharaoh(pair.sure, pair.possible) == alignment


def test_every_morpheme_is_linked_and_only_and_has_no_counterpart():
    for n in sample():
        pair = translate(n)
        assert {j for _, j in pair.possible} == set(range(len(pair.target)))
        unlinked = set(range(len(pair.source))) - {i for i, _ in pair.possible}
        assert {pair.source[i] for i in unlinked} <= {"and"}


@pytest.mark.parametrize("n", [-1, LIMIT])
def test_numbers_outside_the_range_are_refused(n):
    with pytest.raises(
        ValueError, match=rf"^translate: expected a number in 0..999999, got {n}\.$"
    ):
        translate(n)


def test_the_corpus_is_disjoint_knows_every_word_and_has_a_longer_split():
    corpus = load("numbers", sizes=Sizes(train=2000, valid=100, test=100))
    splits = (corpus.train, corpus.valid, corpus.test, corpus.extra["long"])
    assert len({pair.source for split in splits for pair in split}) == 2300
    for split in splits:
        for pair in split:
            assert all(word in corpus.source_vocabulary for word in pair.source)
            assert all(word in corpus.target_vocabulary for word in pair.target)
    assert max(len(pair.source) for pair in corpus.train) == 9
    assert min(len(pair.source) for pair in corpus.extra["long"]) > 9
    assert corpus == load("numbers", sizes=Sizes(train=2000, valid=100, test=100))


def test_lengths_beyond_the_numbers_leave_no_longer_split():
    corpus = load("numbers", max_length=40, sizes=Sizes(train=150, valid=10, test=10))
    assert dict(corpus.extra) == {}
    assert corpus.notices == (
        "There is no split of longer sentences: numbers: the split long: no sentence of 41 to 60 "
        "words was found; set another max_length.",
    )


@pytest.mark.parametrize("data", ["copy", "reverse"])
def test_copy_and_reverse(data):
    corpus = load(data, sizes=Sizes(train=300, valid=20, test=20))
    for pair in corpus.train + corpus.extra["long"]:
        assert pair.target == (pair.source if data == "copy" else pair.source[::-1])
        assert {(pair.source[i], j) for i, j in pair.sure} == {
            (word, j) for j, word in enumerate(pair.target)
        }
    assert min(len(pair.source) for pair in corpus.extra["long"]) > 12
