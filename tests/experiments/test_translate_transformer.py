"""The Transformer as a translator does all that the recurrent one does."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.command_line import UsageError
from experiments.data.vocabulary import BOS, EOS, PAD
from experiments.translate import decode
from experiments.translate.__main__ import main
from experiments.translate.command_line import parse
from experiments.translate.config import Config
from experiments.translate.model import Sizes, token_losses
from experiments.translate.train_step import (
    count_parameters,
    graph_of,
    initial_state,
    quick_options,
    words_of,
)

SIZES = Sizes(
    source_words=11,
    target_words=13,
    width=8,
    attention_size=4,
    readout_size=12,
    model="transformer",
    heads=2,
    layers=2,
    positions="sinusoidal",
)
SOURCE = jnp.array([[4, 5, 6, 7, EOS], [8, 9, EOS, PAD, PAD]], jnp.int32)
TARGET = jnp.array([[4, 9, 5, EOS], [12, EOS, PAD, PAD]], jnp.int32)

quick = functools.partial(jax.jit, compiler_options=quick_options(0))


def drawn(score, sizes=SIZES, dropout=0.0, seeds=()):
    graph, shapes = graph_of(score, sizes, dropout)
    random = np.random.default_rng(0)
    return graph, jax.tree.map(
        lambda x: jnp.asarray(random.normal(size=(*seeds, *x.shape)) / 2, x.dtype), shapes
    )


def forward(graph):
    @quick
    def translate(parameters, source, target, key=None):
        return nnx.merge(graph, parameters)(source, target, key)

    return translate


@pytest.fixture(scope="module")
def additive():
    return drawn("additive")


@pytest.fixture(scope="module")
def translate(additive):
    graph, parameters = additive
    return functools.partial(forward(graph), parameters)


@pytest.mark.slow
def test_weights_are_those_of_the_source(translate):
    logits, weights = translate(SOURCE, TARGET)
    assert logits.shape == (4, 2, 13) and weights.shape == (4, 2, 5)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(weights[:, 1, 3:], 0.0)


@pytest.mark.slow
def test_all_weights_can_be_looked_at(additive, translate):
    graph, parameters = additive
    looked = quick(lambda p: nnx.merge(graph, p).look(SOURCE, TARGET))(parameters)
    shapes = {name: weights.shape for name, weights in looked.items()}
    assert shapes == {
        "cross-attention": (2, 2, 2, 4, 5),
        "encoder": (2, 2, 2, 5, 5),
        "decoder": (2, 2, 2, 4, 4),
    }
    _, weights = translate(SOURCE, TARGET)
    mean = looked["cross-attention"][:, 0].mean(axis=1).swapaxes(0, 1)
    np.testing.assert_allclose(mean, weights, atol=1e-6)
    np.testing.assert_allclose(looked["encoder"].sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(looked["encoder"][1, ..., 3:], 0.0)
    np.testing.assert_array_equal(np.triu(looked["decoder"], 1), 0.0)


@pytest.mark.slow
def test_no_word_sees_itself_or_a_later_one():
    graph, parameters = drawn("additive", SIZES._replace(layers=1))
    translate = functools.partial(forward(graph), parameters)
    logits, _ = translate(SOURCE, TARGET)
    changed, _ = translate(SOURCE, TARGET.at[0, 2].set(11))
    np.testing.assert_array_equal(logits[:3], changed[:3])
    assert jnp.any(logits[3, 0] != changed[3, 0])


@pytest.mark.slow
def test_padding_has_no_effect(translate):
    logits, weights = translate(SOURCE, TARGET)
    padded, more = translate(jnp.pad(SOURCE, ((0, 0), (0, 3))), TARGET)
    np.testing.assert_allclose(logits, padded, atol=1e-4)
    np.testing.assert_allclose(weights, more[:, :, :5], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [pytest.param(SIZES, marks=pytest.mark.slow), SIZES._replace(model="bigru")],
)
def test_logits_of_words_alone_are_those_among_all(sizes):
    graph, parameters = drawn("additive", sizes, dropout=0.5)
    words, where = words_of(TARGET, 7)
    np.testing.assert_array_equal(words, [4, 12, 9, EOS, 5, EOS, PAD])
    keys = jax.random.key(3)
    translate = quick(lambda *given: nnx.merge(graph, parameters)(SOURCE, TARGET, *given))
    logits, weights = translate(keys)
    some, same = translate(keys, where)
    np.testing.assert_allclose(some[:6], logits.reshape(8, 13)[where[:6]], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(same, weights, atol=1e-6)


@pytest.mark.slow
def test_every_parameter_learns(additive):
    graph, parameters = additive

    @quick
    @jax.grad
    def gradient(parameters):
        logits, _ = nnx.merge(graph, parameters)(SOURCE, TARGET)
        return jnp.sum(token_losses(logits, TARGET.T))

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(parameters)):
        assert jnp.any(leaf != 0), jax.tree_util.keystr(path)


@pytest.mark.slow
def test_dropout_follows_its_key_and_differs_from_layer_to_layer(additive):
    graph, parameters = graph_of("additive", SIZES, 0.5)[0], additive[1]
    dropping = functools.partial(forward(graph), parameters)
    plain = dropping(SOURCE, TARGET)[0]
    np.testing.assert_allclose(
        plain, forward(additive[0])(parameters, SOURCE, TARGET)[0], rtol=1e-5
    )
    assert jnp.all(forward(additive[0])(parameters, SOURCE, TARGET, jax.random.key(1))[0] == plain)
    first, again, other = (dropping(SOURCE, TARGET, jax.random.key(n))[0] for n in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert jnp.any(first != other) and jnp.any(first != plain)
    translator = nnx.merge(graph, parameters)
    translator._drop_by(jax.random.key(0))
    streams = [module.rngs for _, module in nnx.iter_modules(translator) if hasattr(module, "rngs")]
    keys = {tuple(jax.random.key_data(stream()).tolist()) for stream in streams}
    # Embedding twice; two layers of two sublayers with attention and one of three.
    assert len(keys) == len(streams) == 2 + 2 * (1 + 1) + 2 * (2 + 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "positions",
    [
        pytest.param("sinusoidal", marks=pytest.mark.slow),
        "rotary",
        pytest.param("none", marks=pytest.mark.slow),
    ],
)
def test_step_by_step_is_the_whole(positions):
    graph, parameters = drawn("scaled_dot", SIZES._replace(positions=positions))

    @quick
    def stepped(parameters):
        translator = nnx.merge(graph, parameters)
        memory = translator.encode(SOURCE)
        carry, previous, found = translator.start(memory, 4), jnp.full(2, BOS, jnp.int32), []
        for word in TARGET.T:
            carry, logits = translator.step(memory, carry, previous)
            found.append(logits)
            previous = word
        return jnp.stack(found)

    expected = forward(graph)(parameters, SOURCE, TARGET)[0]
    np.testing.assert_allclose(stepped(parameters), expected, rtol=1e-3, atol=1e-4)
    swapped = forward(graph)(parameters, SOURCE[:, jnp.array([1, 0, 2, 3, 4])], TARGET)[0]
    blind = np.abs(swapped - expected)[:, 0].max() < 1e-4
    assert blind == (positions == "none")


@pytest.mark.slow
def test_a_beam_of_one_is_greedy_and_a_larger_one_is_not():
    graph, parameters = drawn("scaled_dot", seeds=(2,))
    greedy = quick(functools.partial(decode.greedy, graph, 6))(parameters, SOURCE)
    one = quick(functools.partial(decode.beam, graph, 6, 1, 0.6))(parameters, SOURCE)
    np.testing.assert_array_equal(one, greedy)
    several = quick(functools.partial(decode.beam, graph, 6, 4, 0.0))(parameters, SOURCE)
    losses = [
        quick(functools.partial(decode.force, graph))(parameters, SOURCE, found[0])[0][0]
        for found in (greedy, several)
    ]
    assert jnp.all(losses[1] <= losses[0] + 1e-4)


@pytest.mark.slow
def test_tied_projections_have_fewer_parameters_and_norms_more():
    plain, tied, normed = (
        count_parameters("dot", SIZES._replace(**switch))
        for switch in ({}, {"tied": True}, {"normed": True})
    )
    # Two attentions in each decoder layer and one in each encoder layer.
    assert plain - tied == 6 * (8 * 2 * 4 + 2 * 4)
    assert normed - plain == 6 * 2 * 4


@pytest.mark.slow
def test_initial_parameters_are_all_there_is():
    config = Config(model="transformer", seeds=2, dropout=0.1)
    state = initial_state("scaled_dot", SIZES._replace(layers=1), config)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.parameters))
    assert all(len(leaf) == 2 for leaf in jax.tree.leaves(state.parameters))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--query=current"], "--query is for --model=bigru; leave it out."),
        (["--bridge=zero"], "--bridge is for --model=bigru; leave it out."),
        (["--scores=dot,none"], "--scores: none is for --model=bigru, whose decoder starts from"),
        (["--heads=5"], "--heads is 5, but a divisor of 64 is needed."),
        (["--positions=rotary", "--attention_size=3"], "--positions=rotary turns pairs, but a"),
        (["--model=bigru", "--layers=3"], "--layers is for --model=transformer; leave it out."),
        (["--positions=alibi"], "--positions is alibi, but sinusoidal or rotary or none is needed"),
    ],
)
def test_what_a_model_does_not_know_is_refused_by_name(flags, sentence):
    with pytest.raises(UsageError) as error:
        parse(["--model=transformer", *flags])
    assert str(error.value).startswith(sentence)


@pytest.mark.slow
def test_the_whole_program_with_a_transformer(tmp_path, translate_to_words):
    """Trained, resumed, evaluated with a beam, and asked for a translation with its alignment."""
    flags = [
        *("--model=transformer", "--data=copy", "--width=16", "--heads=2", "--layers=1"),
        *("--train_size=400", "--valid_size=16", "--test_size=16", "--batch_size=16"),
        *("--seeds=2", "--steps=50", "--buckets=1", "--learning_rate=0.003", "--dropout=0.1"),
        *("--scores=scaled_dot", f"--workdir={tmp_path}/run"),
    ]
    code, out, _ = translate_to_words(*flags)
    assert code == 0 and out.splitlines()[-1] == f"{tmp_path}/run/report.html"
    results = json.loads((tmp_path / "run" / "results.json").read_text("utf-8"))
    assert [row["score"] for row in results["mechanisms"]] == ["scaled_dot"]
    assert all(row["sizes"]["model"] == "transformer" for row in results["mechanisms"])
    (tmp_path / "text").write_text("a b c\nd\n", "utf-8")
    asked = (f"--workdir={tmp_path}/run", f"--input={tmp_path}/text", "--mode=translate")
    code, out, _ = translate_to_words(*asked, f"--alignments={tmp_path}/links", "--beam_size=2")
    assert code == 0 and len(out.splitlines()) == 2
    assert len((tmp_path / "links").read_text("utf-8").splitlines()) == 2
    asked = (f"--workdir={tmp_path}/run", "--mode=evaluate", "--beam_size=3")
    code, out, _ = translate_to_words(*asked)
    assert code == 0 and "beam of 3, length penalty 0.6" in out


@pytest.fixture
def translate_to_words(capsys):
    """The main job in this process: exit code and what it says."""

    def run(*arguments):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            code = main(arguments)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run
