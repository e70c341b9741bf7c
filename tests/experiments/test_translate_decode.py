"""Beam search against all outputs there are, against itself in plain Python, and against greedy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.data.vocabulary import BOS, EOS, PAD
from experiments.translate import decode
from experiments.translate.decode import length_penalty, search
from experiments.translate.model import Sizes
from experiments.translate.ranges import UP_TO_TEN
from experiments.translate.train_step import graph_of, quick_options

WORDS, LONGEST = 5, 3

quick = functools.partial(jax.jit, compiler_options=quick_options(0))


def tables(searches):
    """For each search the logits of a word after the two before it, [..., W, W, W]."""
    random = np.random.default_rng(searches)
    return jnp.asarray(random.normal(size=(searches, WORDS, WORDS, WORDS)) * 2, jnp.float32)


@functools.cache
def searched(size):
    """Beam search of the outputs of a table; what is carried is the word before the last."""

    @quick
    def run(table, alpha):
        def step(carry, words):
            before, rows = carry
            logits = jax.vmap(lambda table, i, j: table[i, j])(table, before, words)
            return (words, rows), logits

        shape = table.shape[:1]
        before = jnp.full((*shape, size), BOS, jnp.int32)
        rows = jnp.zeros((*shape, size, 2, 3))
        return search(step, (before, rows), shape, size, LONGEST, alpha)

    return run


def outputs():
    """All outputs: words up to EOS, or LONGEST words without one."""
    for length in range(1, LONGEST + 1):
        for words in itertools.product(range(WORDS), repeat=length):
            if EOS not in words[:-1] and (words[-1] == EOS or length == LONGEST):
                yield words


def log_probability(table, words):
    table = np.asarray(table, np.float64)
    log = table - np.log(np.exp(table).sum(-1, keepdims=True))
    history = (BOS, BOS, *words)
    return sum(log[history[n], history[n + 1], word] for n, word in enumerate(words))


def ranked(table, words, alpha):
    return log_probability(table, words) / ((5 + len(words)) / 6) ** alpha


def in_plain_python(table, size, alpha):
    beam = [()]
    for _ in range(LONGEST):
        longer = [
            words + more
            for words in beam
            for more in ([()] if EOS in words else [(word,) for word in range(WORDS)])
        ]
        beam = sorted(longer, key=lambda words: -ranked(table, words, alpha))[:size]
    return beam


def padded(words):
    return list(words) + [PAD] * (LONGEST - len(words))


@pytest.mark.parametrize("alpha", [0.0, 0.6, 3.0])
def test_a_beam_of_all_outputs_finds_the_best_of_all(alpha):
    everything = list(outputs())
    given = tables(searches=4)
    found = searched(len(everything))(given, alpha)
    for number, table in enumerate(given):
        order = sorted(everything, key=lambda words: -ranked(table, words, alpha))
        assert found.words[number].tolist() == [padded(words) for words in order]
        expected = [log_probability(table, words) for words in order]
        np.testing.assert_allclose(found.log_probability[number], expected, rtol=1e-5)
        assert found.length[number].tolist() == [len(words) for words in order]
        assert found.ended[number].tolist() == [EOS in words for words in order]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_small_beam_keeps_what_a_plain_one_keeps(size):
    given = tables(searches=16)
    for alpha in (0.0, 1.0):
        found = searched(size)(given, alpha)
        for number, table in enumerate(given):
            expected = [padded(words) for words in in_plain_python(table, size, alpha)]
            assert found.words[number].tolist() == expected


def test_the_penalty_prefers_longer_outputs():
    given = tables(searches=16)
    everything = len(list(outputs()))
    lengths = [searched(everything)(given, alpha).length[:, 0].mean() for alpha in (0.0, 3.0)]
    assert lengths[1] > lengths[0]
    np.testing.assert_allclose(length_penalty(jnp.array([1, 7]), 0.6), [1.0, 2**0.6], rtol=1e-6)


SIZES = Sizes(source_words=9, target_words=WORDS, width=4, attention_size=3, readout_size=4)
SOURCE = jnp.array([[4, 5, 6, EOS], [8, EOS, PAD, PAD], [7, 4, EOS, PAD]], jnp.int32)


def drawn(query):
    """Two translators that are sure of nothing, and their structure."""
    graph, shapes = graph_of("additive", SIZES._replace(query=query))
    random = np.random.default_rng(0)
    return graph, jax.tree.map(
        lambda x: jnp.asarray(random.normal(size=(2, *x.shape)), x.dtype), shapes
    )


def test_the_largest_penalty_still_ranks():
    """What is beyond float32 makes all outputs alike, and the first of them is padding."""
    (largest,) = {x for x in range(1000) if UP_TO_TEN.contains(x) and not UP_TO_TEN.contains(x + 1)}
    assert jnp.isfinite(length_penalty(jnp.array([1000]), float(largest))).all()


@pytest.mark.slow
@pytest.mark.parametrize("query", ["previous", pytest.param("current", marks=pytest.mark.slow)])
def test_a_translator_finds_its_most_probable_translations(query):
    graph, parameters = drawn(query)
    everything = [padded(words) for words in outputs()]
    best = quick(functools.partial(decode.beam, graph, LONGEST, len(everything), 0.0))
    found = best(parameters, SOURCE)
    target = jnp.asarray(everything, jnp.int32)
    counts = np.array([[n < len(words) for n in range(LONGEST)] for words in outputs()]).T

    @quick
    def log_probabilities(source):
        logits = jax.vmap(lambda p: nnx.merge(graph, p)(source, target)[0])(parameters)
        log = jnp.take_along_axis(jax.nn.log_softmax(logits), target.T[None, ..., None], axis=-1)
        return jnp.sum(jnp.where(counts[None], log[..., 0], 0.0), axis=1)

    for row, source in enumerate(SOURCE):
        of_all = log_probabilities(jnp.broadcast_to(source[None], (len(everything), 4)))
        for seed in range(2):
            assert found[seed, row].tolist() == everything[int(of_all[seed].argmax())]


@pytest.mark.slow
def test_a_beam_of_one_is_greedy():
    graph, parameters = drawn("previous")
    greedy = quick(functools.partial(decode.greedy, graph, 7))(parameters, SOURCE)
    one = quick(functools.partial(decode.beam, graph, 7, 1, 0.6))(parameters, SOURCE)
    np.testing.assert_array_equal(one, greedy)
