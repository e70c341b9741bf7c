"""One switch at a time: which state asks, how decoding begins, tied and normed projections."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax.base.parameters import bind_parameters, initialize
from experiments.command_line import UsageError
from experiments.data.vocabulary import BOS, EOS, PAD
from experiments.translate.command_line import parse
from experiments.translate.mechanisms import score_of
from experiments.translate.model import Sizes
from experiments.translate.train_step import count_parameters, graph_of, quick_options

SIZES = Sizes(source_words=11, target_words=13, width=6, attention_size=5, readout_size=6)
SOURCE = jnp.array([[4, 5, 6, 7, EOS], [8, 9, EOS, PAD, PAD]], jnp.int32)
TARGET = jnp.array([[4, 9, 5, EOS], [12, EOS, PAD, PAD]], jnp.int32)
UNTIEABLE = ("bilinear", "concat", "location", "shared_projection")

quick = functools.partial(jax.jit, compiler_options=quick_options(0))


def translator(**switches):
    """A translator whose parameters are all far from zero."""
    graph, shapes = graph_of("additive", SIZES._replace(**switches))
    random = np.random.default_rng(1)
    drawn = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), shapes)
    return nnx.merge(graph, drawn)


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["additive", "cosine", "low_rank_bilinear"])
def test_tied_projections_are_equal_projections(name):
    rows = jax.random.normal(jax.random.key(2), (7, 6))
    query, key = rows[:3], rows[3:]
    tied = score_of(name, 6, 6, 5, tied=True)
    values = initialize(jax.random.key(1), dict(tied.parameters))
    untied = score_of(name, 6, 6, 5)
    (added,) = set(untied.parameters) - set(values)
    both = {**values, added: values[added.replace("key", "query")]}
    expected = bind_parameters(untied, both)(query, key)
    np.testing.assert_array_equal(bind_parameters(tied, values)(query, key), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dot", "additive", "bilinear"])
def test_normed_rows_have_no_length(name):
    normed = score_of(name, 6, 6, 5, normed=True)
    values = initialize(jax.random.key(1), dict(normed.parameters))
    if name == "additive":
        values["value"] += 1
    score = bind_parameters(normed, values)
    query, key = jax.random.normal(jax.random.key(2), (2, 4, 6))
    logits = score(query, key)
    np.testing.assert_allclose(score(3 * query, 0.5 * key), logits, rtol=1e-4, atol=1e-5)
    plain = bind_parameters(
        score_of(name, 6, 6, 5), {k: v for k, v in values.items() if not k.endswith("_gain")}
    )
    assert jnp.any(jnp.abs(plain(query, key) - logits) > 1e-2)
    if name == "dot":
        rows = [query @ values["query_matrix"], key @ values["key_matrix"]]
        rows = [x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True)) for x in rows]
        np.testing.assert_allclose(logits, rows[0] @ rows[1].T, rtol=1e-4, atol=1e-4)


def test_scores_that_have_nothing_to_tie_or_to_norm_are_refused():
    for name in UNTIEABLE:
        sentence = f"--projections=tied: {name} has no two projections to tie."
        with pytest.raises(UsageError, match=sentence):
            parse([f"--scores=dot,{name}", "--projections=tied"])
    with pytest.raises(UsageError, match="--qk_norm: location takes no notice of keys"):
        parse(["--scores=location", "--qk_norm"])
    with pytest.raises(UsageError, match=r"scores\.bilinear has no two projections to tie"):
        score_of("attention_jax.scores.bilinear", 6, 6, 5, tied=True)
    controls = parse(["--scores=uniform,none", "--projections=tied", "--qk_norm"])
    assert controls.scores == ("uniform", "none")


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--query=next", "--query is next, but previous or current is needed."),
        ("--bridge=none", "--bridge is none, but dense or zero is needed."),
        ("--projections=", "--projections is , but untied or tied is needed."),
    ],
)
def test_a_switch_that_is_not_there(flag, sentence):
    with pytest.raises(UsageError) as error:
        parse([flag])
    assert str(error.value) == sentence
