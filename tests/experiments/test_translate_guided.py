"""Guided alignment: links of words and subwords, the loss, and the data that it needs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.command_line import UsageError
from experiments.data import Sizes, load
from experiments.data.corpus import Corpus, DataError, Pair
from experiments.data.subwords import Subwords
from experiments.data.vocabulary import Vocabulary
from experiments.translate import guided, train_step
from experiments.translate.command_line import parse
from experiments.translate.config import Config
from experiments.translate.data import bucketed, load_task
from experiments.translate.model import Sizes as ModelSizes

LINKS = frozenset({(0, 1), (1, 0)})


def links_of(vocabulary, *pairs):
    corpus = Corpus("mine", pairs, (), (), vocabulary, vocabulary)
    buckets = bucketed({"train": pairs}, corpus, 1)["train"].buckets
    found = {}
    for bucket, links in zip(buckets.members, guided.links_of(corpus, buckets), strict=True):
        for number, row in zip(bucket.index.tolist(), links.tolist(), strict=True):
            past = [bucket.source.shape[1], bucket.target.shape[1]]
            found[number] = [tuple(link) for link in row if link != past]
    return found


def test_links_of_words_and_of_their_pieces():
    pairs = Pair(("a", "bc"), ("bc", "a"), LINKS, LINKS), Pair(("a",), ("a",))
    possible = Pair(("a",), ("a",), frozenset(), frozenset({(0, 0)}))
    assert links_of(Vocabulary(["a", "bc"]), *pairs, possible) == {
        0: [(0, 1), (1, 0)],
        1: [],
        2: [(0, 0)],
    }
    characters = Subwords.trained([["a", "bc"]] * 9, "characters", 9)  # ▁ a ▁ b c
    both = [(i, j) for i in (0, 1) for j in (3, 4)] + [(i, j) for i in (2, 3, 4) for j in (0, 1, 2)]
    assert links_of(characters, *pairs) == {0: both, 1: []}


def test_without_any_link_it_is_refused(tmp_path):
    (tmp_path / "plain.tsv").write_text("".join(f"{w} x\tx {w}\n" for w in "abcdefgh"))
    config = Config(data=f"{tmp_path}/plain.tsv", guided_alignment=1.0, batch_size=1, min_count=1)
    with pytest.raises(UsageError) as error:
        load_task(config)
    assert str(error.value) == (
        f"--guided_alignment needs gold alignments of training pairs, and {tmp_path}/plain.tsv has "
        "none; give a third column, or files such as train.en-de.align, or leave it out."
    )
    with pytest.raises(UsageError, match="--guided_alignment: none has no attention to guide"):
        parse(["--guided_alignment=1", "--scores=dot,none"])
    with pytest.raises(UsageError, match="--guided_alignment is -1"):
        parse(["--guided_alignment=-1"])


def test_the_loss_is_least_at_the_gold_alignment():
    links = jnp.array([[[0, 1], [1, 0], [9, 9]], [[0, 0], [1, 0], [2, 0]]])
    gold = np.zeros((3, 2, 4), np.float32)
    gold[1, 0, 0] = gold[0, 0, 1] = 1
    gold[0, 1, :3] = 1 / 3
    logits, hopeless = np.zeros((3, 2, 4), np.float32), np.zeros((3, 2, 4), jnp.bfloat16)

    @functools.partial(jax.jit, compiler_options=train_step.quick_options(0))
    def measured(gold, logits, hopeless, links):
        least, number = guided.losses(gold, links)
        of_logits = jax.value_and_grad(lambda x: guided.losses(jax.nn.softmax(x), links)[0])
        return least, number, *of_logits(logits), guided.losses(hopeless, links)[0]

    least, number, even, gradient, most = measured(gold, logits, hopeless, links)
    assert number == 3 and least == pytest.approx(np.log(3), rel=1e-6)
    assert even == pytest.approx(3 * np.log(4), rel=1e-6)
    pulled = [[[0.25], [0.25]], [[0.25], [0.0]], [[0.0], [0.0]]]  # at words with a link
    np.testing.assert_allclose(gradient, pulled - gold, atol=1e-6)
    assert most.dtype == jnp.float32 and jnp.isfinite(most)


@pytest.mark.slow
def test_training_adds_the_weighted_loss():
    config = Config(guided_alignment=0.5, label_smoothing=0.0)
    sizes = ModelSizes(source_words=9, target_words=9, width=4, attention_size=4, readout_size=4)
    graph, _ = train_step.graph_of("dot", sizes)
    parameters = nnx.state(train_step.translator_of("dot", sizes, rngs=nnx.Rngs(0)), nnx.Param)
    source = jnp.array([[4, 5, 2], [6, 2, 0]])
    target = jnp.array([[5, 4, 2], [7, 2, 0]])
    links = jnp.array([[[0, 1], [1, 0]], [[3, 3], [3, 3]]])
    rows, rng = jnp.array([1, 0, 0]), jax.random.key(0)

    @functools.partial(jax.jit, compiler_options=train_step.quick_options(0))
    def all_losses(parameters):
        buckets = (train_step._Bucket(None, None, source, target, own) for own in (None, links))
        found = [train_step._loss(graph, config, own, parameters, rows, rng) for own in buckets]
        _, weights = nnx.merge(graph, parameters)(source, target)
        return *found, weights

    with jax.numpy_dtype_promotion("standard"):
        plain, both, weights = all_losses(parameters)
    guide = -np.log([weights[1, 0, 0], weights[0, 0, 1]]).mean()
    assert both - plain == pytest.approx(0.5 * guide, rel=1e-4)


TEXT = {"en": "a b\nc\n", "de": "x y\nz\n"}


def written(folder, **files):
    for name, text in {**{f"train.{n}": t * 4 for n, t in TEXT.items()}, **files}.items():
        (folder / name).write_text(text)
    sizes = Sizes(train=None, valid=1, test=1)
    return load(str(folder), sizes=sizes, min_count=1)


@pytest.mark.parametrize("languages", ["en-de", "de-en"])
def test_alignments_in_a_file_of_their_own(languages, tmp_path):
    link = "0-1" if languages == "en-de" else "1-0"
    valid = {"valid.en": "a b", "valid.de": "x y", "test.en": "a b", "test.de": "x y"}
    lines = {f"train.{languages}.align": f"{link}\n\n" * 4}
    corpus = written(tmp_path, **valid, **lines)
    found = {pair.source: pair.sure for pair in corpus.train}
    assert found == {("a", "b"): frozenset({(0, 1)}), ("c",): None}
    assert corpus.at_spaces and f"{tmp_path}/train.{languages}.align" in corpus.files
    assert any(f"train.{languages}.align has gold alignments" in note for note in corpus.notices)


def test_alignments_of_other_lines_or_words_are_refused(tmp_path):
    few = {"train.en-de.align": "0-0\n"}
    with pytest.raises(DataError) as error:
        written(tmp_path, **few)
    assert str(error.value) == (
        f"{tmp_path}/train.en has 8 lines but {tmp_path}/train.en-de.align has 1; line n of one "
        "must belong to line n of the other."
    )
    outside = {"train.en-de.align": "0-2\n\n" * 4}
    sentence = re.escape(
        f"{tmp_path}/train.en-de.align line 1: the alignment links 0 to 2, outside"
    )
    with pytest.raises(DataError, match=sentence):
        written(tmp_path, **outside)
