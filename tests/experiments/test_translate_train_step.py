"""Computation in bfloat16, and on several devices: the same training, within rounding."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.command_line import UsageError
from experiments.data.vocabulary import EOS, PAD
from experiments.translate import train_step
from experiments.translate.command_line import parse
from experiments.translate.compile import num_devices
from experiments.translate.config import Config
from experiments.translate.model import Sizes
from experiments.translate.train_step import Batches, quick_options

ROOT = Path(__file__).parents[2]
SIZES = Sizes(source_words=9, target_words=9, width=8, attention_size=8, readout_size=8)
FLAGS = (
    "--data=copy",
    "--train_size=200",
    "--valid_size=16",
    "--test_size=16",
    "--width=8",
    "--seeds=2",
    "--scores=dot",
    "--steps=20",
    "--evaluate_every=10",
    "--batch_size=16",
    "--buckets=2",
    "--learning_rate=0.001",
)


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
    train = functools.partial(train_step.train, graph, config, [max_words])
    compiled = jax.jit(train, compiler_options=quick_options(0))
    shapes = train_step.abstract_state("additive", sizes, config)
    drawn = functools.partial(train_step.initial_state, "additive", sizes, config)
    batches = Batches([(source, target)], jnp.zeros(1, jnp.int32), rows[None])
    return compiled, shapes, drawn, batches


TRANSFORMER = SIZES._replace(
    model="transformer", attention_size=4, heads=2, layers=1, positions="sinusoidal"
)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [SIZES, pytest.param(TRANSFORMER, marks=pytest.mark.slow)])
def test_products_are_computed_in_bfloat16(sizes):
    for dtype in ("bfloat16", "float32"):
        with jax.numpy_dtype_promotion("standard"):  # optax and flax rely on it
            train, state, _, batch = training(dtype, sizes)
            lines = train.lower(state, batch).as_text().splitlines()
        products = [line for line in lines if "dot_general" in line]
        rounded = sum("bf16" in line for line in products)
        assert rounded > len(products) / 2 if dtype == "bfloat16" else rounded == 0


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [SIZES, TRANSFORMER])
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
@pytest.mark.parametrize("sizes", [SIZES, pytest.param(TRANSFORMER, marks=pytest.mark.slow)])
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
        train = functools.partial(train_step.train, graph, config, [None, None])
        compiled = jax.jit(train, compiler_options=quick_options(0))
        buckets, rows = [(source, target), (source[::-1], target)], jnp.tile(rows, (2, 1, 1, 1))
        order = jnp.array([1, 0], jnp.int32)
        _, losses = compiled(drawn(), Batches(buckets, order, rows))
        _, exchanged = compiled(drawn(), Batches(buckets[::-1], order[::-1], rows))
        _, others = compiled(drawn(), Batches(buckets, order[::-1], rows))
    assert losses.shape == (8, 1)
    np.testing.assert_array_equal(exchanged, losses)
    assert (others != losses).all()


def test_a_batch_is_spread_over_as_many_devices_as_divide_it():
    assert [num_devices(batch, 8) for batch in (64, 12, 7, 1, 9)] == [8, 6, 7, 1, 3]
    assert num_devices(64, 1) == 1


def test_a_type_that_is_not_there():
    with pytest.raises(UsageError, match="--dtype is float16, but float32 or bfloat16"):
        parse(["--dtype=float16"])


@pytest.mark.slow
def test_eight_devices_train_as_one_does(tmp_path):
    """A process with eight virtual devices, and one with a single one."""
    records = []
    for count in (1, 8):
        flags = f"--xla_force_host_platform_device_count={count}"
        folder = tmp_path / str(count)
        done = subprocess.run(
            [sys.executable, "-m", "experiments.translate", *FLAGS, f"--workdir={folder}"],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert ("each batch on 8 devices" in done.stdout) == (count == 8)
        lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
        records.append([json.loads(line) for line in lines])
        config = json.loads((folder / "config.json").read_text("utf-8"))
        assert config["environment"]["device"].startswith(f"{count} x ")
    one, eight = records
    assert len(one) == len(eight) > 2
    for first, second in zip(one, eight, strict=True):
        for name in ("train_loss", "valid_loss"):
            if name in first:
                np.testing.assert_allclose(first[name], second[name], rtol=1e-4)
