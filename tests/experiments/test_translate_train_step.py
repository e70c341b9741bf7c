"""Computation in bfloat16, and on several devices: the same training, within rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data.vocabulary import EOS, PAD
from experiments.translate import train_step
from experiments.translate.config import Config
from experiments.translate.model import Sizes
from experiments.translate.train_step import (
    Batches,
    State,
    averaged,
    optimizer_of,
    quick_options,
)

SIZES = Sizes(source_words=9, target_words=9, width=8, attention_size=8, readout_size=8)


def training(dtype, sizes=SIZES, max_words=None, seeds=2):
    """Four steps of training, compiled or not, and what they are applied to."""
    config = Config(seeds=seeds, steps=4, batch_size=3, dtype=dtype, learning_rate=1e-3)
    graph, _ = train_step.graph_of("additive", sizes, dtype=dtype)
    random = np.random.default_rng(0)
    words = random.integers(4, 9, size=(2, 6, 5))
    words[..., -1] = EOS
    words[1, ::2, 3:] = EOS, PAD
    source, target = jnp.asarray(words, jnp.int32)
    rows = jnp.asarray(random.integers(0, 6, size=(2, 4, 3)), jnp.int32)[:seeds]
    train = functools.partial(train_step.train, graph, config, [max_words], None)
    compiled = jax.jit(train, compiler_options=quick_options(0))
    shapes = train_step.abstract_state("additive", sizes, config)
    drawn = functools.partial(train_step.initial_state, "additive", sizes, config)
    batches = Batches([(source, target)], jnp.zeros(1, jnp.int32), rows[None])
    return compiled, shapes, drawn, batches


TRANSFORMER = SIZES._replace(
    model="transformer", attention_size=4, heads=2, layers=1, positions="sinusoidal"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [SIZES, pytest.param(TRANSFORMER, marks=[pytest.mark.slow, pytest.mark.exhaustive])]
)
def test_products_are_computed_in_bfloat16(sizes):
    for dtype in ("bfloat16", "float32"):
        with jax.numpy_dtype_promotion("standard"):  # optax and flax rely on it
            train, state, _, batch = training(dtype, sizes)
            lines = train.lower(state, batch).as_text().splitlines()
        products = [line for line in lines if "dot_general" in line]
        rounded = sum("bf16" in line for line in products)
        assert rounded > len(products) / 2 if dtype == "bfloat16" else rounded == 0


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [SIZES, pytest.param(TRANSFORMER, marks=pytest.mark.exhaustive)])
def test_what_is_kept_is_float32_and_near_to_what_float32_gives(sizes):
    found = []
    for dtype in ("bfloat16", "float32"):
        with jax.numpy_dtype_promotion("standard"):
            train, _, drawn, batch = training(dtype, sizes)
            found.append(train(drawn(), batch))
    (state, losses), (plain, expected) = found
    for leaf in jax.tree.leaves((state.parameters, losses)):
        assert leaf.dtype == jnp.float32
    np.testing.assert_allclose(losses, expected, rtol=0.03)
    assert jnp.any(losses != expected)
    moved = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), state.parameters, plain.parameters)
    assert max(map(float, jax.tree.leaves(moved))) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [SIZES, pytest.param(TRANSFORMER, marks=[pytest.mark.slow, pytest.mark.exhaustive])]
)
def test_padding_that_is_left_out_changes_nothing(sizes):
    found = []
    for max_words in (None, 14):
        with jax.numpy_dtype_promotion("standard"):
            train, _, drawn, batch = training("float32", sizes, max_words, seeds=1)
            found.append(train(drawn(), batch))
    (state, losses), (other, again) = found
    np.testing.assert_allclose(again, losses, rtol=1e-5)
    for left, right in zip(*map(jax.tree.leaves, (other, state)), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_seed_alone_learns_what_it_learns_among_others():
    found = []
    for seeds in (1, 2):
        with jax.numpy_dtype_promotion("standard"):
            train, _, drawn, batch = training("float32", seeds=seeds)
            found.append(train(drawn(), batch))
    (alone, losses), (among, both) = found
    np.testing.assert_allclose(losses[:, 0], both[:, 0], rtol=1e-5)
    parameters = (alone.parameters, among.parameters)
    for left, right in zip(*map(jax.tree.leaves, parameters), strict=True):
        assert len(left) == 1 and len(right) == 2
        np.testing.assert_allclose(left[0], right[0], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_each_chunk_takes_its_batches_from_its_bucket():
    with jax.numpy_dtype_promotion("standard"):
        _, _, drawn, ([(source, target)], _, rows) = training("float32", seeds=1)
        config = Config(seeds=1, steps=8, batch_size=3, learning_rate=1e-3)
        graph, _ = train_step.graph_of("additive", SIZES)
        train = functools.partial(train_step.train, graph, config, [None, None], None)
        compiled = jax.jit(train, compiler_options=quick_options(0))
        buckets, rows = [(source, target), (source[::-1], target)], jnp.tile(rows, (2, 1, 1, 1))
        order = jnp.array([1, 0], jnp.int32)
        _, losses = compiled(drawn(), Batches(buckets, order, rows))
        _, exchanged = compiled(drawn(), Batches(buckets[::-1], order[::-1], rows))
        _, others = compiled(drawn(), Batches(buckets, order[::-1], rows))
    assert losses.shape == (8, 1)
    np.testing.assert_array_equal(exchanged, losses)
    assert (others != losses).all()


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.9), (3, 0.99), (1000, 0.9999)])
def test_a_warmup_of_nearly_all_steps_leaves_one_to_the_cosine(steps, warmup):
    optimizer = optimizer_of(Config(steps=steps, warmup=warmup))
    parameters = {"x": jnp.ones(1)}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, _ = optimizer.update(parameters, optimizer.init(parameters), parameters)
    assert jnp.isfinite(updates["x"]) and (updates["x"] == 0) == (steps > 1)


def test_the_mean_is_over_the_ends_of_the_last_rounds():
    config = Config(steps=8, evaluate_every=2, average=0.5)
    assert config.round == 2
    state = State(jnp.int32(0), {"x": jnp.zeros(2)}, (), {"x": jnp.zeros(2)})
    means = []
    for step, value in ((2, 1.0), (4, 5.0), (6, 10.0), (8, 20.0)):
        state = averaged(
            config, state._replace(step=jnp.int32(step), parameters={"x": jnp.full(2, value)})
        )
        means.append(state)
    assert [float(jnp.max(s.evaluated["x"])) for s in means] == [1.0, 5.0, 10.0, 15.0]
    plain = State(jnp.int32(8), {"x": jnp.ones(2)}, ())
    assert averaged(Config(), plain) is plain and plain.evaluated is plain.parameters
