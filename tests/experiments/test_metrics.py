"""Metrics against hand-computed values and sacrebleu on plain text."""

import importlib.util
import math
import sys
import types

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from experiments.data import Pair, Sizes, load
from experiments.data.text import detokenize
from experiments.metrics import (
    alignment_quality,
    bleu,
    chrf,
    chrf_plus_plus,
    comet,
    exact_match,
    links,
    pharaoh,
    signatures,
    token_accuracy,
    tokenizer_notice,
    tokenizer_of,
)

LINKS = st.frozensets(st.tuples(st.integers(0, 4), st.integers(0, 4)))


def pair(sure, possible):
    return Pair(("s",) * 5, ("t",) * 5, frozenset(sure), frozenset(possible))


def test_exact_match_and_token_accuracy():
    references = [("a", "b"), ("c",), ("d", "e", "f"), ("g",)]
    hypotheses = [["a", "b"], ("c", "c"), ("d", "x"), ()]
    assert exact_match(hypotheses, references) == 1 / 4
    assert token_accuracy(hypotheses, references) == (2 + 1 + 1 + 0) / (2 + 2 + 3 + 1)
    assert exact_match(references, references) == token_accuracy(references, references) == 1.0


def test_unk_never_matches_the_text():
    assert exact_match([("the", "<unk>")], [("the", "walrus")]) == 0.0


@pytest.mark.parametrize("metric", [exact_match, token_accuracy, bleu, chrf])
def test_every_reference_needs_a_hypothesis(metric):
    with pytest.raises(ValueError) as error:
        metric([("a",)], [("a",), ("b",)])
    assert str(error.value) == (
        f"{metric.__name__}: expected one hypothesis for each of at least one reference, got 1 "
        "hypotheses and 2 references."
    )
    with pytest.raises(ValueError, match="got 0 hypotheses and 0 references"):
        metric([], [])


def test_bleu_and_chrf_are_sacrebleu_on_the_text():
    hypotheses = [("the", "dog", ",", "it", "'s", "a", "big", "dog", "."), ("no", "cat")]
    references = [("the", "dog", ",", "it", "'s", "a", "dog", "."), ("no", "cat", "is", "here")]
    texts = ["the dog, it's a big dog.", "no cat"], [["the dog, it's a dog.", "no cat is here"]]
    assert bleu(hypotheses, references).value == sacrebleu.corpus_bleu(*texts).score
    assert chrf(hypotheses, references).value == sacrebleu.corpus_chrf(*texts).score
    assert bleu(hypotheses, references).signature.startswith(
        "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:"
    )
    assert chrf(hypotheses, references).signature.startswith(
        "nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:"
    )
    for name, metric in (("bleu", bleu), ("chrf", chrf)):
        found = metric(hypotheses, references).signature
        assert signatures()[name] == found
        assert signatures(lowercased=True)[name] == found.replace("case:mixed", "case:lc")
    perfect = [("a", "b", "c", "d", "e")]
    assert bleu(perfect, perfect).value == pytest.approx(100)
    assert bleu([()], perfect).value == 0.0


@pytest.mark.parametrize(
    ("references", "tokenizer"),
    [
        ([("ein", "Hund", "猫")], "13a"),
        ([("我", "喜欢", "猫", "。"), ("vs", ".")], "zh"),
        ([("ฉันชอบแมว",)], "char"),
        ([("고양이를", "좋아해요")], "13a"),
        ([()], "13a"),
        ([("123", "!")], "13a"),
    ],
)
def test_bleu_takes_the_tokenizer_of_the_language(references, tokenizer):
    assert tokenizer_of(references) == tokenizer
    texts = [detokenize(words) for words in references]
    found = bleu(references, references)
    expected = sacrebleu.corpus_bleu(texts, [texts], tokenize=tokenizer).score
    assert found.value == expected and f"tok:{tokenizer}" in found.signature
    assert signatures(references)["bleu"] == found.signature
    notice = tokenizer_notice(references)
    assert notice is None if tokenizer == "13a" else tokenizer in str(notice)


def test_several_references_and_chrf_with_words_are_those_of_sacrebleu():
    hypotheses = [("the", "dog", "sleeps", "."), ("no", "cat", "is", "here")]
    first = [("the", "dog", "is", "asleep", "."), ("there", "is", "no", "cat")]
    second = [("the", "dog", "sleeps", "now", "."), ("no", "cat", "is", "here")]
    texts = [[detokenize(words) for words in side] for side in (hypotheses, first, second)]
    found = bleu(hypotheses, first, second)
    assert found.value == sacrebleu.corpus_bleu(texts[0], texts[1:]).score
    assert found.value > bleu(hypotheses, first).value
    assert found.signature == signatures(first, further=1)["bleu"]
    plain = sacrebleu.corpus_chrf(texts[0], texts[1:]).score
    assert chrf(hypotheses, first, second).value == plain
    both = sacrebleu.corpus_chrf(texts[0], texts[1:2], word_order=2)
    assert chrf_plus_plus(hypotheses, first).value == both.score != plain
    with pytest.raises(ValueError, match="bleu: expected one hypothesis for each"):
        bleu(hypotheses, first, second[:1])


def test_comet_gets_plain_text(monkeypatch, tmp_path):
    given = {}

    class Model:
        def predict(self, data, gpus, progress_bar):
            given.update(data=data, gpus=gpus)
            return types.SimpleNamespace(system_score=0.75)

    fake = types.SimpleNamespace(
        download_model=lambda name: f"downloaded {name}",
        load_from_checkpoint=lambda path: given.update(path=path) or Model(),
    )
    monkeypatch.setitem(sys.modules, "comet", fake)
    words = [("ein", "hund", ".")], [("a", "dog", ".")], [("the", "dog", ".")]
    assert comet("wmt", *words) == 75.0
    assert given["data"] == [{"src": "ein hund.", "mt": "a dog.", "ref": "the dog."}]
    assert given["path"] == "downloaded wmt" and given["gpus"] == 0
    assert comet(str(tmp_path), *words) == 75.0 and given["path"] == str(tmp_path)


@pytest.mark.parametrize("installed", [True, False])
def test_japanese_is_cut_by_mecab_where_it_is_installed(installed, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    references = [("私は猫が好きです", "。")]
    assert tokenizer_of(references) == ("ja-mecab" if installed else "char")
    notice = str(tokenizer_notice(references))
    assert ("install sacrebleu[ja]" in notice) is not installed
    assert ("ja-mecab." in notice) is installed


def test_links_take_the_argmax_and_leave_out_eos_and_padding():
    weights = np.zeros((4, 5))
    weights[[0, 1, 2, 3], [1, 0, 2, 1]] = 1.0
    assert links(weights, 2, 3) == {(1, 0), (0, 1)}
    assert links(weights, 3, 4) == {(1, 0), (0, 1), (2, 2), (1, 3)}
    assert links(weights, 3, 0) == links(weights, 0, 3) == frozenset()
    assert links(np.full((1, 3), 1 / 3), 3, 1) == {(0, 0)}


def test_weights_that_are_too_small_are_refused():
    with pytest.raises(ValueError) as error:
        links(np.ones((2, 3)), 4, 2)
    assert str(error.value) == (
        "links: expected weights [T, S] with T >= 2 and S >= 4, got shape (2, 3)."
    )


def test_alignment_quality_by_hand():
    gold = [pair({(0, 0), (1, 1)}, {(0, 0), (1, 1), (2, 2)}), pair({(3, 3)}, {(3, 3)})]
    found = [frozenset({(0, 0), (2, 2), (4, 4)}), frozenset({(3, 3)})]
    quality = alignment_quality(found, gold)
    assert quality.error_rate == pytest.approx(1 - (2 + 3) / (4 + 3))
    assert quality.precision == pytest.approx(3 / 4)
    assert quality.recall == pytest.approx(2 / 3)


@given(st.lists(st.tuples(LINKS, LINKS, LINKS), min_size=1))
def test_alignment_error_rate_is_between_zero_and_one(triples):
    gold = [pair(sure, sure | more) for sure, more, _ in triples]
    quality = alignment_quality([found for _, _, found in triples], gold)
    if any(found or sure for sure, _, found in triples):
        assert 0 <= quality.error_rate <= 1
    else:
        assert math.isnan(quality.error_rate)
    if any(sure for sure, _, _ in triples):
        between = alignment_quality([p.sure for p in gold], gold)
        assert between == (0.0, 1.0, 1.0)
        assert alignment_quality([p.possible for p in gold], gold).error_rate == 0.0


def test_pairs_without_gold_are_left_out():
    bare = Pair(("a",), ("b",))
    some = frozenset({(0, 0)})
    assert alignment_quality([some, some], [bare, pair(some, some)]) == (0.0, 1.0, 1.0)
    assert all(math.isnan(value) for value in alignment_quality([some], [bare]))


def test_gold_alignments_of_the_grammar_score_perfectly_and_the_diagonal_does_not():
    test = load("grammar", sizes=Sizes(train=200, valid=1, test=200)).test
    assert alignment_quality([p.sure for p in test], test).error_rate == 0.0
    diagonal = [
        frozenset((min(j, len(p.source) - 1), j) for j in range(len(p.target))) for p in test
    ]
    assert alignment_quality(diagonal, test).error_rate > 0.4


def test_pharaoh():
    assert pharaoh(frozenset({(10, 0), (2, 1)})) == "2-1 10-0"
