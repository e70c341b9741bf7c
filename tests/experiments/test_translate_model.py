"""The translator: its cell, its attention with the previous state, and padding without effect."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attention_jax.nnx import DecoderAttention
from experiments.data.vocabulary import BOS, EOS, PAD
from experiments.translate import decode
from experiments.translate.checks import CONTROLS, SCORES
from experiments.translate.mechanisms import score_of
from experiments.translate.model import Sizes, gated, token_losses
from experiments.translate.train_step import (
    count_parameters,
    graph_of,
    quick_options,
)

SIZES = Sizes(source_words=11, target_words=13, width=6, attention_size=5, readout_size=6)
SOURCE = jnp.array([[4, 5, 6, 7, EOS], [8, 9, EOS, PAD, PAD]], jnp.int32)
TARGET = jnp.array([[4, 9, 5, EOS], [12, EOS, PAD, PAD]], jnp.int32)

quick = functools.partial(jax.jit, compiler_options=quick_options(0))


def drawn(shapes, seed=1):
    """Parameters that are all far from zero, where one would hide another."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), shapes)


def draw(score, seed=0):
    return drawn(graph_of(score, SIZES)[1], seed)


def forward(graph):
    """The translator as a compiled function of parameters, source, target and perhaps a key."""

    @quick
    def translate(parameters, source, target, key=None):
        return nnx.merge(graph, parameters)(source, target, key)

    return translate


@pytest.fixture(scope="module")
def graph():
    return graph_of("additive", SIZES)[0]


@pytest.fixture(scope="module")
def parameters():
    return draw("additive")


@pytest.fixture(scope="module")
def translate(graph, parameters):
    return functools.partial(forward(graph), parameters)


@pytest.mark.slow
@pytest.mark.parametrize("score", SCORES + CONTROLS[:1])
def test_every_score_attends_and_every_parameter_of_it_learns(score):
    attention = DecoderAttention(
        score_of(score, 6, 6, 5), 6, memory_features=6, attention_size=5, rngs=nnx.Rngs(0)
    )
    graph, parameters = nnx.split(attention, nnx.Param)
    state, memory, wanted = (
        jax.random.normal(jax.random.key(n), shape)
        for n, shape in enumerate([(2, 6), (2, 5, 6), (2, 6)])
    )

    def read(parameters):
        attention = nnx.merge(graph, parameters)
        context, weights = attention(state, attention.keys(memory), SOURCE != PAD)
        return jnp.sum(context * wanted), weights

    # Moved away from zeros, where one would hide another.
    parameters = jax.tree.map(lambda x, moved: x + moved, parameters, drawn(parameters))
    weights = quick(read)(parameters)[1]
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(weights[1, 3:], 0.0)
    gradient = quick(jax.grad(lambda p: read(p)[0]))(parameters)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path)
        # Softmax takes no notice of what all keys of a source share.
        is_shared = score == "trilinear" and "'query_weight'" in name
        is_shared |= score == "normalized_additive" and "'offset'" in name
        assert (jnp.max(jnp.abs(leaf)) > 1e-5) != is_shared, name


@pytest.mark.slow
@pytest.mark.parametrize("score", ["additive", "none"])
def test_every_parameter_of_a_translator_learns(score):
    graph, _ = graph_of(score, SIZES)

    def loss(parameters):
        logits, _ = nnx.merge(graph, parameters)(SOURCE, TARGET)
        return jnp.sum(token_losses(logits, TARGET.T))

    for path, leaf in jax.tree_util.tree_leaves_with_path(quick(jax.grad(loss))(draw(score))):
        assert jnp.any(leaf != 0), jax.tree_util.keystr(path)


@pytest.mark.slow
def test_controls_attend_to_all_alike_and_to_nothing():
    for score, weight in (("uniform", 1 / 3), ("none", 0.0)):
        _, weights = forward(graph_of(score, SIZES)[0])(draw(score), SOURCE, TARGET)
        np.testing.assert_allclose(weights[:, 1, :3], weight, rtol=1e-6)
        np.testing.assert_array_equal(weights[:, 1, 3:], 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("score", ["additive", "none"])
def test_logits_of_some_words_are_those_of_all(score):
    translator = nnx.merge(graph_of(score, SIZES)[0], draw(score))
    every, _ = translator(SOURCE, TARGET)
    some = jnp.array([0, 5, 3])
    found, _ = translator(SOURCE, TARGET, None, some)
    np.testing.assert_allclose(found, every.reshape(8, -1)[some], rtol=1e-5)


@pytest.mark.slow
def test_attention_is_asked_with_the_previous_state(translate):
    """The word y_1 enters the state s_2, so that it moves the weights of y_3 and not of y_2."""
    _, weights = translate(SOURCE, TARGET)
    _, changed = translate(SOURCE, TARGET.at[0, 0].set(7))
    np.testing.assert_array_equal(weights[:2], changed[:2])
    assert jnp.any(weights[2, 0] != changed[2, 0])
    np.testing.assert_array_equal(weights[:, 1], changed[:, 1])


@pytest.mark.slow
def test_no_word_sees_itself_or_a_later_one(translate):
    logits, _ = translate(SOURCE, TARGET)
    changed, _ = translate(SOURCE, TARGET.at[0, 2].set(11))
    np.testing.assert_array_equal(logits[:3], changed[:3])
    assert jnp.any(logits[3, 0] != changed[3, 0])


@pytest.mark.slow
def test_padding_has_no_effect(translate):
    logits, weights = translate(SOURCE, TARGET)
    wide = jnp.pad(SOURCE, ((0, 0), (0, 3)))
    padded, more = translate(wide, jnp.pad(TARGET, ((0, 0), (0, 2))))
    np.testing.assert_allclose(logits, padded[:4], atol=1e-4)
    np.testing.assert_allclose(weights, more[:4, :, :5], atol=1e-5)
    alone, _ = translate(SOURCE[1:, :3], TARGET[1:, :2])
    np.testing.assert_allclose(logits[:2, 1:], alone, atol=1e-4)


def test_the_cell_is_a_gated_recurrent_unit():
    random = np.random.default_rng(0)
    state, share, own = (random.normal(size=(3, n)).astype(np.float32) for n in (4, 12, 12))

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    n, r, z = np.split(share, 3, axis=1)
    r_own, z_own, m = np.split(own, 3, axis=1)
    z = sigmoid(z + z_own)
    expected = z * state + (1 - z) * np.tanh(n + sigmoid(r + r_own) * m)
    found = gated(*map(jnp.asarray, (state, share, own)))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.slow
def test_the_encoder_reads_in_both_directions(graph, parameters):
    mask = (SOURCE != PAD).T

    @quick
    def annotate(embedded):
        return nnx.merge(graph, parameters).encoder(embedded, mask)[0]

    embedded = jax.random.normal(jax.random.key(0), (5, 2, 6))
    annotations, changed = annotate(embedded), annotate(embedded.at[2, 0].add(1.0))
    differs = np.asarray(annotations != changed)[0].reshape(5, 2, 3).any(-1)
    # Forward states from position 2 on, backward states up to it.
    np.testing.assert_array_equal(differs, [[0, 1], [0, 1], [1, 1], [1, 0], [1, 0]])


@pytest.mark.slow
def test_dropout_follows_its_key(translate, parameters):
    dropping = functools.partial(forward(graph_of("additive", SIZES, 0.5)[0]), parameters)
    plain, _ = translate(SOURCE, TARGET)
    np.testing.assert_array_equal(dropping(SOURCE, TARGET)[0], plain)
    first, again, other = (dropping(SOURCE, TARGET, jax.random.key(n))[0] for n in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert jnp.any(first != other)
    assert jnp.any(first != plain)


@pytest.mark.slow
def test_greedy_chooses_the_best_word_again_and_again():
    longest = 6
    graph, _ = graph_of("scaled_dot", SIZES)
    translate = forward(graph)
    of_seeds = [draw("scaled_dot", seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_seeds)
    found = quick(functools.partial(decode.greedy, graph, longest))(stacked, SOURCE)
    for seed, parameters in enumerate(of_seeds):
        words = np.full((2, longest), PAD, np.int32)
        for position in range(longest):
            logits, _ = translate(parameters, SOURCE, jnp.asarray(words))
            ended = (words == EOS).any(axis=1)
            words[:, position] = np.where(ended, PAD, np.argmax(logits[position], axis=-1))
        np.testing.assert_array_equal(found[seed], words)


@pytest.mark.slow
def test_greedy_stops_at_the_end_of_every_sentence(graph, parameters):
    translator = nnx.merge(graph, parameters)
    bias = translator.decoder.output.bias
    assert bias is not None
    bias[...] = bias[...].at[EOS].set(100.0)
    stacked = jax.tree.map(lambda leaf: leaf[None], nnx.state(translator, nnx.Param))
    found = quick(functools.partial(decode.greedy, graph, 9))(stacked, SOURCE)
    np.testing.assert_array_equal(found, [[[EOS] + [PAD] * 8] * 2])


@pytest.mark.slow
def test_forced_losses_are_those_of_the_model(graph, parameters, translate):
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), parameters)
    losses, weights = quick(functools.partial(decode.force, graph))(stacked, SOURCE, TARGET)
    logits, expected = translate(SOURCE, TARGET)
    np.testing.assert_allclose(losses, [token_losses(logits, TARGET.T).sum(axis=0)] * 2, rtol=1e-4)
    np.testing.assert_allclose(weights[1], expected.swapaxes(0, 1), atol=1e-5)


def test_the_first_word_is_given_the_begin_symbol(graph, parameters, translate):
    @quick
    def first_logits(source):
        translator = nnx.merge(graph, parameters)
        memory = translator.encode(source)
        carry = translator.start(memory, longest=1)
        return translator.step(memory, carry, jnp.full(2, BOS, jnp.int32))[1]

    logits, _ = translate(SOURCE, TARGET)
    np.testing.assert_allclose(logits[0], first_logits(SOURCE), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_are_those_of_smoothed_labels(smoothing):
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.normal(size=(4, 2, 13)), jnp.float32)
    labels = optax.smooth_labels(jax.nn.one_hot(TARGET.T, 13), smoothing)
    expected = jnp.where(TARGET.T == PAD, 0.0, optax.softmax_cross_entropy(logits, labels))
    found = token_losses(logits, TARGET.T, smoothing)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def translator(**switches):
    """A translator whose parameters are all far from zero."""
    graph, shapes = graph_of("additive", SIZES._replace(**switches))
    return nnx.merge(graph, drawn(shapes))


@pytest.fixture(scope="module")
def current():
    return translator(query="current")


@pytest.mark.slow
def test_the_current_state_has_seen_the_previous_word(current):
    """The word y_1 enters the state s_2, which asks for the context of y_2."""
    translate = quick(lambda target: current(SOURCE, target)[1])
    weights, changed = translate(TARGET), translate(TARGET.at[0, 0].set(7))
    np.testing.assert_array_equal(weights[:1], changed[:1])
    assert jnp.any(weights[1, 0] != changed[1, 0])
    np.testing.assert_array_equal(weights[:, 1], changed[:, 1])


def test_which_state_asks_does_not_change_the_parameters():
    previous, current = (
        jax.tree.map(jnp.shape, nnx.state(translator(query=query), nnx.Param))
        for query in ("previous", "current")
    )
    assert previous == current


def test_the_first_step_of_the_current_state_sees_no_context():
    """Before any word was written, there is no context to hand on; afterwards there is."""

    @quick
    def states(scale):
        current = translator(query="current")
        context = current.decoder.context
        assert context is not None
        context.kernel[...] = scale * context.kernel[...]
        memory = current.encode(SOURCE)
        carry = current.start(memory, longest=2)
        first, _ = current.step(memory, carry, jnp.full(2, BOS, jnp.int32))
        second, _ = current.step(memory, first, TARGET[:, 0])
        return first[0], second[0]

    first, second = states(1.0)
    changed_first, changed_second = states(2.0)
    np.testing.assert_array_equal(first, changed_first)
    assert jnp.any(second != changed_second)


@pytest.mark.slow
@pytest.mark.parametrize("query", ["previous", "current"])
def test_step_by_step_is_the_whole(query):
    made = translator(query=query)

    @quick
    def stepped():
        memory = made.encode(SOURCE)
        carry, previous, found = made.start(memory, longest=4), jnp.full(2, BOS, jnp.int32), []
        for word in TARGET.T:
            carry, logits = made.step(memory, carry, previous)
            found.append(logits)
            previous = word
        return jnp.stack(found)

    expected = quick(lambda: made(SOURCE, TARGET)[0])()
    np.testing.assert_allclose(stepped(), expected, rtol=1e-4, atol=1e-4)


def test_without_a_bridge_decoding_begins_with_zeros():
    dense, zero = (count_parameters("dot", SIZES._replace(bridge=b)) for b in ("dense", "zero"))
    assert dense - zero == SIZES.width * (SIZES.width + 1)
    (state,) = quick(lambda: translator(bridge="zero").encode(SOURCE).carry)()
    np.testing.assert_array_equal(state, 0.0)
