"""The translator in PyTorch computes what the one in JAX does, and both do equal work."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmark import measure, translating
from experiments.benchmark.measure import Program, compared
from experiments.benchmark.run import row_of, shown
from experiments.benchmark.suites import Comparison
from experiments.translate import train_step
from experiments.translate.command_line import parse
from experiments.translate.model import Sizes
from experiments.translate.train_step import graph_of, initial_state

SIZES = Sizes(11, 13, width=8, attention_size=6, readout_size=4)
SOURCE = [[4, 5, 6, 2, 0, 0], [7, 8, 9, 10, 4, 2], [2, 0, 0, 0, 0, 0]]
TARGET = [[5, 6, 2, 0], [4, 12, 11, 2], [9, 2, 0, 0]]


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(params=["additive", "scaled_dot"])
def pair(request, torch):
    """The same translator twice: a function in JAX and a module in PyTorch, and its size."""
    from flax import nnx

    from experiments.benchmark.torch_translator import Translator, weights_like

    state = initial_state(request.param, SIZES, parse(["--seeds=1"]))
    # Biases begin as zeros, which would hide where they belong.
    keys = iter(jax.random.split(jax.random.key(0), 99))
    parameters = jax.tree.map(
        lambda x: x[0] + 0.1 * jax.random.normal(next(keys), x[0].shape), state.parameters
    )
    ours = nnx.merge(graph_of(request.param, SIZES)[0], parameters)
    peer = Translator(request.param, SIZES)
    peer.load_state_dict(weights_like(nnx.to_pure_dict(parameters)))
    return ours, peer, train_step.count_parameters(request.param, SIZES)


def test_both_have_as_many_parameters(pair):
    _, peer, count = pair
    assert sum(parameter.numel() for parameter in peer.parameters()) == count


def test_both_have_the_same_logits(pair, torch):
    ours, peer, _ = pair
    expected, _ = ours(jnp.array(SOURCE), jnp.array(TARGET))
    with torch.no_grad():
        found = peer(torch.tensor(SOURCE), torch.tensor(TARGET))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("score", ["additive", "scaled_dot"])
def test_both_learn_the_same(score, torch):
    """Every loss of ten steps agrees: the same batches, gradients, clipping, rate and updates."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        learner = translating.learner_of(
            score, parse([*translating.QUICK, "--steps=10", "--seeds=2"])
        )
        ours, peer = translating.JaxTraining(learner), translating.TorchTraining(learner)
        expected, found = ours(range(2)), peer(range(2))
    assert expected.shape == (10, 2) and expected[-1].mean() < expected[0].mean()
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_rate_in_torch_is_that_of_the_program(torch):
    import optax

    from experiments.benchmark.torch_translator import share_of_rate

    config = parse(["--steps=50", "--warmup=0.2"])
    expected = optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 50, end_value=0.01)
    for step in range(55):
        assert share_of_rate(config, step) == pytest.approx(float(expected(step)), abs=1e-6)


def test_a_rate_is_one_over_the_cost():
    tokens = iter([1, 1000, 2000])
    meter = measure.seconds_a_token(Program(lambda: next(tokens), jit=False))
    assert 0 < meter().wall < 1 and next(tokens) == 2000, "the first call is no turn"
    costs = compared([measure.Cost(1e-5, 1e-5)], [measure.Cost(4e-5, 2e-5)])
    row = row_of(Comparison("case", "JAX", "PyTorch", 2), costs, "tokens/s")
    assert row["ours_median"] == pytest.approx(100_000)
    assert row["peer_median"] == pytest.approx(25_000)
    assert row["ratio"] == pytest.approx(4) and row["met"]
    assert shown(row["ours_median"]) == "100,000"


@pytest.mark.parametrize("has_torch", [True, False])
def test_groups_compare_what_is_equal_work(monkeypatch, has_torch):
    monkeypatch.setattr(translating, "HAS_TORCH", has_torch)
    groups = list(translating.groups("", scale=64))
    assert [group.unit for group in groups] == ["tokens/s"] * 4
    pairs = [(c.ours, c.peer) for c in groups[0].comparisons]
    with_torch = [("JAX", "PyTorch"), ("JAX, 3 seeds", "PyTorch, 3 seeds")] if has_torch else []
    assert pairs == [*with_torch, ("JAX, 3 seeds", "JAX")]
    for group in groups:
        assert {name for c in group.comparisons for name in (c.ours, c.peer)} <= set(group.programs)


def test_synthetic_sentences_are_as_long_as_those_of_multi30k(tmp_path):
    translating.write_synthetic(tmp_path, 2000)
    sides = [(tmp_path / f"train.{e}").read_text().splitlines() for e in ("de", "en")]
    lengths = np.array([[len(line.split()) for line in side] for side in sides])
    np.testing.assert_allclose(lengths.mean(axis=1), [12.4, 13.0], atol=0.3)
    np.testing.assert_allclose(lengths.std(axis=1), [4.2, 4.0], atol=0.3)
    assert np.corrcoef(lengths)[0, 1] == pytest.approx(0.86, abs=0.03)
    words = {word for line in sides[0] for word in line.split()}
    assert 5_000 < len(words) <= translating.WORDS["de"]


@pytest.mark.slow
def test_a_turn_counts_the_tokens_of_all_seeds(monkeypatch):
    config = parse([*translating.QUICK, "--seeds=2"])
    seen = []
    program = translating.program_of(lambda learner: seen.append, "additive", config)
    given = translating.learner_of("additive", dataclasses.replace(config, seeds=1)).task
    both, one = program.function(), int(given.tokens.sum())
    assert 1.5 * one < both < 2.5 * one and seen == [range(5)]
