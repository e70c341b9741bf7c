"""Subwords cut words and join them again; what is measured are words."""

import base64
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.command_line import UsageError
from experiments.data import Sizes, load
from experiments.data.corpus import Corpus, DataError, Pair
from experiments.data.subwords import KINDS, Subwords, pooled, vocabulary_of, with_subwords
from experiments.data.text import detokenize, tokenize
from experiments.data.vocabulary import EOS, SPECIAL, UNK, Vocabulary
from experiments.files import write_sealed
from experiments.translate.config import Config
from experiments.translate.data import bucketed, load_tokenizer, save_tokenizer

ENGLISH = [
    ("the", "lower", "houses", "of", "the", "newest", "towns", "are", "lowest"),
    ("a", "new", "house", "is", "lower", "than", "an", "old", "tower"),
    ("▅", "▁", "a_b", "猫が好き", "👩🏽‍🚀", "."),
]
LEARNT = [kind for kind in KINDS if kind != "none"]


def trained(kind, size=80):
    return Subwords.trained(ENGLISH * 5, kind, size)


@pytest.mark.parametrize("kind", LEARNT)
def test_words_come_back_and_equal_text_gives_equal_pieces(kind):
    model = trained(kind)
    assert model == trained(kind) and len(model) <= 80 + len(SPECIAL)
    assert model.words[: len(SPECIAL)] == SPECIAL
    for words in ENGLISH[:2]:
        ids = model.encode(words)
        assert min(ids) >= len(SPECIAL) and max(ids) < len(model)
        assert model.decode([*ids, EOS, 5]) == words
        assert sum(model.counts(words)) == len(ids) == len(model.pieces(words))
    assert model.decode(model.encode(ENGLISH[2])) == ("_", "_", *ENGLISH[2][2:])
    assert not any(word in model for word in ("<s>", "</s>", "<pad>", "<unk>"))
    assert "houses" in model and "lowhouse" in model and "zebra" not in model
    assert model.decode(model.encode(["lozer"])) == ("lo<unk>er",)
    read = vocabulary_of(json.loads(model.to_json()))
    assert read == model and read.encode(ENGLISH[0]) == model.encode(ENGLISH[0])
    assert model != Vocabulary(["a"]) and Vocabulary(["a"]) != model


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("aehlnorstw", min_size=1, max_size=9), max_size=5))
def test_any_word_of_known_letters_is_known(words):
    for kind in LEARNT:
        model = _MODELS[kind]
        assert UNK not in model.encode(words)
        assert model.decode(model.encode(words)) == tuple(words)


_MODELS = {kind: trained(kind) for kind in LEARNT}


def test_merges_follow_frequency():
    model = trained("bpe")
    assert model.counts(["lower"])[0] < trained("characters").counts(["lower"])[0] == 6


def test_a_size_below_the_alphabet_is_refused():
    with pytest.raises(DataError) as error:
        Subwords.trained([["abc"]], "bpe", 3)
    assert str(error.value) == (
        "The training text has 4 different characters, but only 3 subwords are allowed; set a "
        "larger max_vocabulary."
    )


def test_only_training_text_is_learnt_from(tmp_path):
    lines = [f"{w} haus\t{w} house" for w in ("rot", "blau", "alt", "neu", "gut", "nah")]
    (tmp_path / "train.tsv").write_text("\n".join(lines * 2), "utf-8")
    (tmp_path / "valid.tsv").write_text("rot\trot", "utf-8")
    (tmp_path / "test.tsv").write_text("qqq haus\tqqq house", "utf-8")
    corpus = load(str(tmp_path), min_count=1)
    found = with_subwords(corpus, "bpe", 40)
    assert "q" not in "".join(found.source_vocabulary.words)
    assert found.source_vocabulary.decode(found.source_vocabulary.encode(["qqq"])) == ("<unk>",)
    (notice,) = (n for n in found.notices if "<unk>" in n)
    assert "in training 0.0% of source and 0.0% of target tokens, in test 50.0%" in notice
    others = [notice for notice in found.notices if "<unk>" not in notice]
    assert others == [notice for notice in corpus.notices if "<unk>" not in notice] != []


def test_weights_of_pieces_are_pooled_to_words():
    weights = np.random.default_rng(0).dirichlet(np.ones(7), size=6)
    found = pooled(weights, [2, 1, 2], [1, 3, 1])
    assert found.shape == (4, 5)
    np.testing.assert_allclose(found.sum(axis=1), 1.0)
    rows = [weights[0:2].mean(0), weights[2], weights[3:5].mean(0), weights[5]]
    expected = [[r[0], r[1:4].sum(), r[4], r[5], r[6]] for r in rows]
    np.testing.assert_allclose(found, expected)
    np.testing.assert_array_equal(pooled(weights, [1] * 5, [1] * 6), weights)


def test_links_and_shapes_of_a_corpus_are_those_of_words():
    model = trained("characters")
    links = frozenset({(0, 1)})
    pair = Pair(("new", "old"), ("a", "house"), links, links)
    corpus = Corpus("", (), (), (pair,), model, model)
    (examples,) = bucketed({"test": (pair,)}, corpus, 1).values()
    assert examples.buckets.widths == ((9, 9),), "8 pieces and EOS"
    weights = np.zeros((9, 9))
    weights[np.arange(9), [0, 1, 2, 3, 3, 2, 1, 0, 8]] = 1  # most of "house" looks at "new"
    found = examples.weights_of_words(0, weights)
    assert found.shape == (3, 3)
    np.testing.assert_allclose(found, [[1, 0, 0], [1, 0, 0], [0, 0, 1]])


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_model_is_kept_sealed_in_the_folder(kind, tmp_path):
    plain = load("copy", sizes=Sizes(train=50, valid=1, test=1))
    config = Config(data="copy", subwords=kind, workdir=str(tmp_path))
    corpus = with_subwords(plain, kind, 99)
    save_tokenizer(tmp_path, corpus, 9, config)
    save_tokenizer(tmp_path, corpus, 9, config)
    assert load_tokenizer(tmp_path).source == corpus.source_vocabulary
    with pytest.raises(UsageError, match="does not hold the words of --data=copy"):
        save_tokenizer(tmp_path, plain, 9, config)
    path = tmp_path / "vocabularies.json"
    held = json.loads(path.read_text("utf-8"))
    del held["sha256"]
    for damaged in ({"sentencepiece": base64.b64encode(b"no model").decode()}, {"other": 1}):
        write_sealed(path, held | {"source": damaged})
        with pytest.raises(UsageError, match=re.escape(f"{path} is damaged; the run's command")):
            load_tokenizer(tmp_path)
    path.write_text(path.read_text("utf-8").replace("target", "tarjet"), "utf-8")
    with pytest.raises(UsageError, match="is damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "私は猫が好きです。でも、犬も「少し」好き!",
        "我喜欢猫，也喜欢狗。",
        "ฉันชอบแมว",
        "Nur 3 Hunde.",
    ],
)
def test_text_without_spaces_comes_back_without_spaces(text):
    assert detokenize(tokenize(text)) == text
    model = Subwords.trained([tokenize(text)] * 9, "characters", 99)
    assert detokenize(model.decode(model.encode(tokenize(text)))) == text


@pytest.mark.slow
def test_a_run_with_subwords_translates_to_words_and_aligns_them(translate, tmp_path, capsys):
    words = ("one", "twenty", "three", "four", "thirteen")
    lines = [f"{a} {b}\t{b} {a}\t1 0" for a in words for b in words]
    (tmp_path / "table.tsv").write_text("\n".join(lines), "utf-8")
    sizes = ("--seeds=1", "--width=8", "--batch_size=4", "--buckets=1", "--steps=50")
    flags = (f"--data={tmp_path}/table.tsv", "--scores=dot", "--subwords=bpe", *sizes)
    workdir = f"--workdir={tmp_path}/run"
    assert translate(*flags, "--max_vocabulary=22", workdir) == 0
    (dot,) = json.loads((tmp_path / "run" / "results.json").read_text("utf-8"))["mechanisms"]
    assert 0 <= dot["metrics"]["alignment_error"]["mean"] <= 100
    report = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "\\u2581" in report and "subwords" in capsys.readouterr().out
    (tmp_path / "in.txt").write_text("one twenty\nfour\n", "utf-8")
    links = tmp_path / "links.txt"
    use = ("--mode=translate", f"--input={tmp_path}/in.txt", f"--alignments={links}", workdir)
    assert translate(*use) == 0
    assert "▁" not in capsys.readouterr().out
    for line, limit in zip(links.read_text("utf-8").splitlines(), (2, 1), strict=True):
        assert all(int(link.split("-")[0]) < limit for link in line.split())
