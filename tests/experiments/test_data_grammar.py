"""The generated grammar: checked by hand, by a parser of its own, and by its statistics."""

from collections import Counter
from itertools import chain, islice
from random import Random

import pytest

from experiments.data import DataError, Sizes, grammar, load
from experiments.data.alignments import pharaoh
from experiments.data.grammar import sentences

# Source, target and alignment as a person would write them.
BY_HAND = (
    (
        "my big dog does not secretly carry a quiet small pig today",
        "heute mein Hund großer en ein Schwein kleines stilles heimlich trägt nicht",
        "0-1 1-3 2?1 2-2 2?3 3?4 3?10 4?4 4-11 5-9 6-10 7-5 8-8 9-7 10?5 10-6 10?7 10?8 11-0",
    ),
    (
        "our cat that the dog will quietly like does not find our flower",
        "unsere Katze welche der Hund leise mögen wird en unsere Blume findet nicht",
        "0-0 1?0 1-1 1?2 2-2 3-3 4?3 4-4 5-7 6-5 7-6 8?8 8?11 9?8 9-12 10-11 11-9 12?9 12-10",
    ),
    (
        "your nurse will not quickly hear our wise mouse that dances",
        "deine Pflegerin en unsere Maus weise welche tanzt schnell hören wird nicht",
        "0-0 1?0 1-1 2-10 3?2 3-11 4-8 5-9 6-3 7-5 8?3 8-4 8?5 8?6 9-6 10-7",
    ),
    (
        "a nurse finds a cold quiet nurse because the nurse does not sing tomorrow",
        "eine Pflegerin eine Pflegerin stille kalte findet weil morgen die Pflegerin en singt "
        "nicht",
        "0-0 1?0 1-1 2-6 3-2 4-5 5-4 6?2 6-3 6?4 6?5 7-7 8-9 9?9 9-10 10?11 10?12 11?11 11-13 "
        "12-12 13-8",
    ),
    (
        "their king that dances does not dance behind the tree",
        "ihr König welcher tanzt en der Baum hinter tanzt nicht",
        "0-0 1?0 1-1 1?2 2-2 3-3 4?4 4?8 5?4 5-9 6-8 7-7 8-5 9?5 9-6",
    ),
    ("it hears my child that does not sleep soon",)
    + ("bald es mein Kind welches en schläft nicht hört",)
    + ("0-1 1-8 2-2 3?2 3-3 3?4 4-4 5?5 5?6 6?5 6-7 7-6 8-0",),
)

NOUNS = {noun.english: noun for noun in grammar.BEINGS + grammar.THINGS}
DETERMINERS = {word.english: word.forms for word in grammar.DETERMINERS}
ADJECTIVES = {word.english: word.forms for word in grammar.ADJECTIVES}
PLACES, TIMES, MANNERS, PRONOUNS, CONJUNCTIONS = (
    {word.english: word.german for word in words}
    for words in (
        grammar.PLACES,
        grammar.TIMES,
        grammar.MANNERS,
        grammar.PRONOUNS,
        grammar.CONJUNCTIONS,
    )
)
TRANSITIVE = {form: verb for verb in grammar.TRANSITIVE for form in (verb.english, verb.base)}
VERBS = TRANSITIVE | {
    form: verb for verb in grammar.INTRANSITIVE for form in (verb.english, verb.base)
}


class Parser:
    """Parses an English sentence with one word of lookahead, and translates it.

    It never has a choice, which is the proof that a sentence has one analysis and one translation.
    """

    def __init__(self, words):
        self.words = list(words)

    def peek(self):
        return self.words[0] if self.words else ""

    def take(self):
        return self.words.pop(0)

    def sentence(self):
        result = self.clause()
        while self.words:
            result += [CONJUNCTIONS[self.take()], *self.clause()]
        return result

    def clause(self):
        subject = [PRONOUNS[self.take()]] if self.peek() in PRONOUNS else self.noun_phrase()
        predicate = self.predicate()
        time = [TIMES[self.take()]] if self.peek() in TIMES else []
        return time + subject + predicate

    def verb(self):
        auxiliary = self.take() if self.peek() in ("does", "will") else ""
        negative = self.peek() == "not" and bool(self.take())
        assert auxiliary != "does" or negative
        manner = [MANNERS[self.take()]] if self.peek() in MANNERS else []
        word = self.take()
        verb = VERBS[word]
        assert word == (verb.base if auxiliary else verb.english)
        form = [verb.infinitive, "wird"] if auxiliary == "will" else [verb.german]
        end = ["nicht"] if negative else []
        return word in TRANSITIVE, ["en"] if negative else [], manner + form + end

    def predicate(self, simple=False):
        transitive, before, after = self.verb()
        if transitive:
            return before + self.noun_phrase(simple) + after
        return before + (self.place() if self.peek() in PLACES else []) + after

    def place(self):
        postposition = PLACES[self.take()]
        return [*self.noun_phrase(simple=True), postposition]

    def noun_phrase(self, simple=False):
        forms = DETERMINERS[self.take()]
        adjectives = []
        while self.peek() in ADJECTIVES:
            adjectives.insert(0, ADJECTIVES[self.take()])
        noun = NOUNS[self.take()]
        result = [forms[noun.gender], noun.german, *(forms[noun.gender] for forms in adjectives)]
        if not simple and self.peek() in PLACES:
            result += self.place()
        if not simple and self.peek() == "that":
            self.take()
            result.append(grammar.RELATIVE.forms[noun.gender])
            if self.peek() in DETERMINERS:
                subject = self.noun_phrase(simple=True)
                _, before, after = self.verb()
                result += subject + before + after
            else:
                result += self.predicate(simple=True)
        return result


def translations(word):
    """All German words that an English word can stand for."""
    if word in NOUNS:
        return {NOUNS[word].german}
    if word in VERBS:
        return {VERBS[word].german, VERBS[word].infinitive}
    for forms in (DETERMINERS, ADJECTIVES, {"that": grammar.RELATIVE.forms}):
        if word in forms:
            return set(forms[word])
    single = PLACES | TIMES | MANNERS | PRONOUNS | CONJUNCTIONS | {"will": "wird", "not": "nicht"}
    return {single[word]} if word in single else set()


@pytest.fixture(scope="module")
def spoken():
    return list(islice(sentences(Random(0)), 3000))


@pytest.fixture(scope="module")
def corpus():
    return load("grammar")


@pytest.mark.parametrize(("source", "target", "alignment"), BY_HAND)
def test_hand_checked_sentences(spoken, source, target, alignment):
    pair = next(pair for pair in spoken if " ".join(pair.source) == source)
    assert " ".join(pair.target) == target
    assert pharaoh(pair.sure, pair.possible) == alignment


@pytest.mark.parametrize("elaboration", [1.0, 2.1])
def test_every_translation_is_the_only_one_a_parser_finds(elaboration):
    for pair in islice(sentences(Random(1), elaboration), 2000):
        assert Parser(pair.source).sentence() == list(pair.target)


def test_sure_links_translate_and_leave_out_only_what_has_no_counterpart(spoken):
    for pair in spoken:
        for i, j in pair.sure:
            assert pair.target[j] in translations(pair.source[i])
        linked = Counter(j for _, j in pair.sure)
        assert linked == Counter(j for j, word in enumerate(pair.target) if word != "en")
        linked = Counter(i for i, _ in pair.sure)
        assert linked == Counter(i for i, word in enumerate(pair.source) if word != "does")


def test_possible_links_are_agreement_negation_and_support(spoken):
    seen = Counter()
    for pair in spoken:
        assert pair.sure <= pair.possible
        for i, j in pair.possible - pair.sure:
            english, german = pair.source[i], pair.target[j]
            if english in NOUNS:
                gender = NOUNS[english].gender
                agreeing = chain(grammar.DETERMINERS, grammar.ADJECTIVES, (grammar.RELATIVE,))
                assert german in {word.forms[gender] for word in agreeing}
                seen["agreement"] += 1
            elif english == "does":
                assert german == "en" or german in {verb.german for verb in VERBS.values()}
                seen["support"] += 1
            else:
                assert (english, german) == ("not", "en")
                seen["negation"] += 1
        assert {j for _, j in pair.possible} == set(range(len(pair.target)))
    assert set(seen) == {"agreement", "support", "negation"}


@pytest.mark.slow
def test_every_construction_occurs(corpus):
    words = Counter(word for pair in corpus.train for word in set(pair.target))
    share = {word: count / len(corpus.train) for word, count in words.items()}
    assert share["en"] == share["nicht"] > 0.2
    assert sum(share[form] for form in grammar.RELATIVE.forms) > 0.2
    assert share["wird"] > 0.2
    assert sum(share[word.german] for word in grammar.PLACES) > 0.3
    fronted = sum(pair.target[0] in TIMES.values() for pair in corpus.train)
    assert fronted / len(corpus.train) > 0.3


@pytest.mark.slow
def test_the_lexicon_has_the_promised_size_and_is_one_to_one(corpus):
    assert len(corpus.source_vocabulary) == 4 + 110
    assert len(corpus.target_vocabulary) == 4 + 155
    english = [word for word in corpus.source_vocabulary.words[4:] if word != "does"]
    lemmas = {frozenset(translations(word)) for word in english}
    german = list(chain.from_iterable(lemmas))
    assert len(german) == len(set(german)) == 155 - len({"en"})


def test_every_word_is_frequent_in_training(corpus):
    for side in ("source", "target"):
        counts = Counter(word for pair in corpus.train for word in getattr(pair, side))
        assert min(counts.values()) > 250


def test_splits_are_disjoint_and_of_the_promised_size(corpus):
    splits = (corpus.train, corpus.valid, corpus.test, corpus.extra["long"])
    assert [len(split) for split in splits] == [20_000, 500, 1_000, 1_000]
    assert len({pair.source for split in splits for pair in split}) == 22_500


def test_the_long_split_is_longer_than_anything_else_on_both_sides(corpus):
    usual = corpus.train + corpus.valid + corpus.test
    assert max(len(pair.source) for pair in usual) == 21
    assert max(len(pair.target) for pair in usual) == 21
    for pair in corpus.extra["long"]:
        assert min(len(pair.source), len(pair.target)) >= 22
        assert max(len(pair.source), len(pair.target)) <= 31
        assert Parser(pair.source).sentence() == list(pair.target)


def test_the_same_seed_gives_the_same_corpus_and_another_another():
    sizes = Sizes(train=50, valid=5, test=5)
    assert load("grammar", seed=3, sizes=sizes) == load("grammar", seed=3, sizes=sizes)
    assert load("grammar", seed=3, sizes=sizes).test != load("grammar", seed=4, sizes=sizes).test


def test_a_smaller_training_set_begins_a_larger_one_with_the_same_test_set():
    small, large = (load("grammar", sizes=Sizes(train, 20, 20)) for train in (100, 300))
    assert small.train == large.train[:100]
    assert (small.valid, small.test, small.extra) == (large.valid, large.test, large.extra)


def test_max_length_moves_the_border():
    corpus = load("grammar", max_length=8, sizes=Sizes(train=200, valid=20, test=20))
    assert max(len(pair.source) for pair in corpus.train) <= 8
    assert all(9 <= len(pair.source) <= 12 for pair in corpus.extra["long"])


def test_impossible_sizes_are_refused():
    with pytest.raises(
        DataError, match=r"^grammar: only \d+ different sentences were found where "
    ):
        load("grammar", max_length=2, sizes=Sizes(train=20_000))
    with pytest.raises(DataError, match=r"^grammar: no sentence of 1 to 1 words was found; "):
        load("grammar", max_length=1)
