"""An ensemble predicts the mean of probabilities, attends with the mean of weights, and decodes."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.command_line import UsageError
from experiments.translate import decode
from experiments.translate.command_line import parse
from experiments.translate.config import Config
from experiments.translate.ensemble import Members, built
from experiments.translate.model import Sizes
from experiments.translate.train_step import graph_of, quick_options
from experiments.translate.translators import load_ensemble

SIZES = Sizes(source_words=9, target_words=9, width=4, attention_size=4, readout_size=4)
SOURCE = jnp.array([[4, 5, 6, 2], [7, 8, 2, 0]])
TARGET = jnp.array([[5, 6, 2], [4, 2, 0]])


def drawn(score, seeds):
    graph, shapes = graph_of(score, SIZES)
    random = np.random.default_rng(len(score))
    return graph, jax.tree.map(
        lambda x: jnp.asarray(random.normal(size=(seeds, *x.shape)), x.dtype), shapes
    )


@functools.partial(jax.jit, static_argnums=0, compiler_options=quick_options(0))
def measured(graph, parameters):
    """Logits and weights of given words, and logits step by step."""
    whole = built(graph, parameters)
    logits, weights = whole(SOURCE, TARGET)
    memory = whole.encode(SOURCE)
    carry, steps = whole.start(memory, 3), []
    for previous in (jnp.array([1, 1]), *TARGET.T[:2]):
        carry, found = whole.step(memory, carry, previous)
        steps.append(found)
    return logits, weights, jnp.stack(steps)


@functools.partial(jax.jit, static_argnums=0, compiler_options=quick_options(0))
def searched(graph, parameters):
    alone = jax.tree.map(lambda x: x[None], parameters)
    return decode.beam(graph, 4, 2, 0.6, alone, SOURCE)


@pytest.mark.slow
def test_probabilities_and_weights_are_the_mean_of_those_of_all_members():
    groups = [drawn("dot", 2), drawn("none", 1)]
    graphs, parameters = zip(*groups, strict=True)
    with jax.numpy_dtype_promotion("standard"):
        logits, weights, steps = measured(Members(graphs), parameters)
        every = [
            measured(graph, jax.tree.map(lambda x, seed=seed: x[seed], own))
            for graph, own in groups
            for seed in range(jax.tree.leaves(own)[0].shape[0])
        ]
    assert len(every) == 3
    mean = np.mean([jax.nn.softmax(one[0]) for one in every], axis=0)
    np.testing.assert_allclose(np.exp(logits), mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(jax.nn.softmax(steps), mean, rtol=1e-4, atol=1e-6)
    attending = np.mean([one[1] for one in every[:2]], axis=0)
    np.testing.assert_allclose(weights, attending, rtol=1e-4, atol=1e-6)

    graph, own = groups[0]
    twice = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), own)
    with jax.numpy_dtype_promotion("standard"):
        again = searched(Members((graph,)), (twice,))
        once = searched(graph, jax.tree.map(lambda x: x[0], own))
    assert (again == once).all() and again.shape == (1, 2, 4)


def test_what_does_not_fit_an_ensemble_is_refused(tmp_path):
    for flags, sentence in (
        (["--ensemble"], "--ensemble is for --mode=evaluate or translate or score; leave it out."),
        (
            ["--members=a", "--mode=score"],
            "--members is for an --ensemble; give both, or leave it out.",
        ),
        (
            ["--ensemble", "--mode=score", "--translator=1"],
            "--translator is one of the --ensemble; leave one of them out.",
        ),
    ):
        with pytest.raises(UsageError) as error:
            parse([*flags, f"--workdir={tmp_path}/run"])
        assert str(error.value) == sentence


def test_members_are_other_runs_and_are_named_once(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    for members, sentence in (
        ((f"{tmp_path}/other/../run",), "is in the ensemble already; name every run once"),
        ((str(other), str(other)), "is in the ensemble already; name every run once"),
        ((str(other),), "holds no run that can translate (config.json is missing)"),
    ):
        config = Config(scores=(), workdir=str(run), mode="evaluate", members=members)
        with pytest.raises(UsageError) as error:
            load_ensemble(config)
        assert str(error.value).startswith(f"--members: {members[-1]} {sentence}")


@pytest.mark.slow
def test_an_ensemble_of_two_folders_is_evaluated_and_translates(done, translate, capsys, tmp_path):
    """Two runs that are the same are an ensemble that translates as either does."""
    folder = done[1]
    use = (f"--workdir={folder}", "--ensemble", f"--members={tmp_path / 'copy'}")
    shutil.copytree(folder, tmp_path / "copy")
    assert translate("--mode=evaluate", *use) == 0
    printed = capsys.readouterr().out
    assert "ensemble of 2 (dot)" in printed and "so that there is no interval" in printed
    (row,) = json.loads((folder / "evaluations" / "test-ensemble.json").read_text("utf-8"))[
        "scores"
    ]
    (dot,) = json.loads((folder / "results.json").read_text("utf-8"))["mechanisms"]
    for name in ("exact_match", "bleu", "alignment_error"):
        assert row[name]["values"] == pytest.approx(dot["metrics"][name]["values"], abs=1e-4)
    assert row["loss"]["values"] == pytest.approx(dot["metrics"]["test_loss"]["values"], abs=1e-4)
