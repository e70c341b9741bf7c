"""Trained translators translate sentences of any length, and say what they cannot."""

import dataclasses
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.command_line import UsageError
from experiments.data.corpus import Pair
from experiments.data.vocabulary import Vocabulary
from experiments.translate.command_line import parse
from experiments.translate.config import Config
from experiments.translate.conversation import converse
from experiments.translate.data import Tokenizer
from experiments.translate.evaluate import evaluate
from experiments.translate.model import Sizes
from experiments.translate.train_step import graph_of
from experiments.translate.translators import Translators, alignment, load


@pytest.fixture(scope="module")
def samples(done):
    outcome = json.loads((done[1] / "outcomes" / "dot.json").read_text("utf-8"))
    return [{k: " ".join(v) for k, v in sample.items()} for sample in outcome["samples"]]


@pytest.mark.slow
def test_a_conversation_shows_where_words_were_read(done, samples):
    translators = load("dot", parse(["--mode=translate", f"--workdir={done[1]}"])).of_seed(0)
    answers = io.StringIO()
    converse(translators, io.StringIO(f"{samples[0]['source']} zebra\n\n"), answers)
    lines = answers.getvalue().split("\n")
    assert lines[2] == "  read as <unk>: zebra"
    words = lines[1].removeprefix("> ").split()
    assert [line.split()[0] for line in lines[3 : 3 + len(words)]] == words
    assert lines[3 + len(words) :] == ["> ", ""]


@pytest.mark.slow
def test_a_second_sentence_of_like_length_compiles_nothing(done):
    translators = load("dot", parse(["--mode=translate", f"--workdir={done[1]}"])).of_seed(0)
    sentences = [("one", "two")], [("five",)]
    for given in sentences:
        translators.translations(given)
    (programs,) = translators.compiled.values()
    assert next(iter(programs.greedy.values()))._cache_size() == 1


@pytest.fixture
def endless(done):
    """A translator that always says the same word and never ends, trained on few words."""
    translators = load("dot", parse(["--mode=translate", f"--workdir={done[1]}"])).of_seed(0)
    logits = jnp.zeros(len(translators.tokenizer.target)).at[-1].set(1e3)
    parameters = translators.parameters
    parameters["decoder"]["output"]["bias"][...] = logits[None]
    return translators._replace(compiled={}, parameters=parameters)


@pytest.mark.slow
@pytest.mark.parametrize("beam_size", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_translation_is_cut_off_by_the_length_of_its_sentence_alone(endless, beam_size):
    translators = endless._replace(config=dataclasses.replace(endless.config, beam_size=beam_size))
    longest = translators.tokenizer.longest
    found = translators.translations([("one",), longest * ("two",), ("five",)])
    assert [len(words) for words in found] == [longest, 2 * longest, longest]
    assert translators.limit(3 * longest * ("two",)) == 8 * longest


@pytest.mark.slow
def test_an_evaluation_cuts_off_where_training_did(endless):
    longest = endless.tokenizer.longest
    pairs = [Pair(longest * ("two",), ("two",)), Pair(("one",), ("one",))]
    found = endless.evaluated(functools.partial(evaluate, "dot"), pairs)
    assert [len(words) for words in found.translations[0]] == [longest, longest]


@pytest.fixture
def nearsighted():
    """Translators whose score reaches over four words and the end symbol, and no more padding."""
    config = Config(scores=("location",), seeds=1)
    words = Vocabulary(["a", "b"])
    sizes = Sizes(len(words), len(words), width=4, attention_size=5, readout_size=4)
    tokenizer = Tokenizer(words, words, longest=6, at_spaces=True, lowercase=False)
    graph, shapes = graph_of("location", sizes)
    random = np.random.default_rng(0)
    parameters = jax.tree.map(
        lambda x: jnp.asarray(random.normal(size=(1, *x.shape)), x.dtype), shapes
    )
    return Translators("location", config, tokenizer, parameters, graph, 0, {})


TOO_LONG = (
    "location cannot take a sentence of 5 words: location: weight [Q, L] has L = 5 "
    "positions, too few for S = 6 keys; leave it out, or train with a larger --attention_size."
)


@pytest.mark.slow
def test_a_sentence_that_a_score_does_not_reach_over_is_one_sentence(nearsighted):
    fits, other = ("a", "b", "a", "b"), 5 * ("a",)
    assert nearsighted.log_probabilities([Pair(fits, ("a",))]).shape == (1,)
    for ask in (
        lambda: nearsighted.log_probabilities([Pair(fits, fits), Pair(other, ("a",))]),
        lambda: nearsighted.translations([other]),
        lambda: nearsighted.weights([Pair(other, ("a",))]),
    ):
        with pytest.raises(UsageError) as error:
            ask()
        assert str(error.value) == TOO_LONG


@pytest.mark.slow
def test_a_conversation_goes_on_after_a_sentence_that_is_too_long(nearsighted):
    answers = io.StringIO()
    converse(nearsighted, io.StringIO("a a a a a\nb b b b b\n\n"), answers)
    assert answers.getvalue().split("\n")[1:] == [f"> {TOO_LONG}", f"> {TOO_LONG}", "> ", ""]


def test_the_darkest_words_of_a_row_are_named():
    weights = np.array([[0.5, 0.4, 0.1], [0.05, 0.04, 0.91]])
    assert alignment(("a", "b"), ("x", "yy"), weights) == [
        "  x   a 50%  b 40%  <eos> 10%",
        "  yy  <eos> 91%",
    ]
