"""Training of the recurrent translator: what the program runs, and the same model in PyTorch.

A turn is what the program does between two synchronisations with the host, some chunks of steps:
forward, backward, optimizer. In every turn all see the same batches, of which the tokens of
sentences and their ends count, no padding.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from experiments.benchmark.measure import Program
from experiments.benchmark.programs import HAS_TORCH
from experiments.benchmark.suites import Comparison, Group
from experiments.translate import train_step
from experiments.translate.command_line import parse
from experiments.translate.compile import Placement, compile_all
from experiments.translate.config import Config
from experiments.translate.data import Task, load_task
from experiments.translate.model import Sizes
from experiments.translate.prepare import Run, sizes_of
from experiments.translate.train_step import Batches

MULTI30K = pathlib.Path(__file__).parents[1] / "configs" / "multi30k_de_en.flags"
QUICK = ("--width=4", "--batch_size=4", "--buckets=1", "--train_size=60", "--steps=25")

# Multi30k, German and English: pairs, and words of each language.
PAIRS = 28_997
WORDS = {"de": 5_379, "en": 4_561}
# Of the logarithms of the sentence lengths.
MEANS, DEVIATIONS, CORRELATION = (2.468, 2.522), (0.324, 0.296), 0.852
SHORTEST, LONGEST = 2, 44

Train = Callable[[range], np.ndarray]
"""Takes the steps of a round's chunks, and returns the losses of every step and seed, [n, N]."""


class Learner(NamedTuple):
    """What is trained: the translators of a score, one for each seed, and on which pairs."""

    score: str
    sizes: Sizes
    config: Config
    task: Task


def learner_of(score: str, config: Config) -> Learner:
    """Load the pairs and derive the sizes of the translator."""
    given = _load(config)
    words = given.corpus.source_vocabulary, given.corpus.target_vocabulary
    return Learner(score, sizes_of(config, *map(len, words))[score], config, given)


def in_jax(learner: Learner) -> Train:
    """Return the training that the program does, compiled."""
    score, sizes, config, given = learner
    state = train_step.initial_state(score, sizes, config)
    placement = Placement(config.batch_size)
    state, arrays = jax.device_put((state, given.arrays), placement.replicated)
    programs = compile_all(score, Run(config, given, {score: sizes}), state, evaluate=False)

    def train(chunks: range) -> np.ndarray:
        nonlocal state
        batches = Batches(arrays, given.order[chunks], given.rows[chunks])
        state, losses = programs.train(state, batches)
        return jax.device_get(losses)

    return train


def in_torch(learner: Learner) -> Train:
    """Return the same training in PyTorch, one translator after the other."""
    import torch  # pyright: ignore[reportMissingImports]

    from experiments.benchmark.torch_translator import Trainer, choose_threads

    score, sizes, config, given = learner
    drawn = nnx.to_pure_dict(train_step.initial_state(score, sizes, config).parameters)

    def trainer(seed: int) -> Trainer:
        parameters = jax.tree.map(lambda x: x[seed], drawn)
        return Trainer(score, sizes, config, parameters, given.arrays)

    def rows(chunks: range, seed: int) -> list[tuple[int, np.ndarray]]:
        return [(given.order[chunk], given.rows[chunk, seed]) for chunk in chunks]

    threads = choose_threads(trainer(0), rows(range(1), 0))
    trainers = [trainer(seed) for seed in range(config.seeds)]

    def train(chunks: range) -> np.ndarray:
        torch.set_num_threads(threads)
        return np.stack(
            [of_seed.train(rows(chunks, seed)) for seed, of_seed in enumerate(trainers)], axis=1
        )

    return train


def groups(data: str, scale: int) -> Iterator[Group]:
    """Train at the default size, and at that of Multi30k.

    Args:
      data: a folder with Multi30k; without it, as many sentences as long are made up.
      scale: other than 1, everything is tiny.
    """
    quick = QUICK if scale > 1 else ()
    yield from _of_size(parse(quick), 2)
    with tempfile.TemporaryDirectory() as folder:
        if not data:
            write_synthetic(pathlib.Path(folder), PAIRS // scale)
        yield from _of_size(
            parse([f"--flagfile={MULTI30K}", f"--data={data or folder}", *quick]), 1.5
        )


def _of_size(config: Config, target: float) -> Iterator[Group]:
    for score in config.scores:
        yield _group(f"width {config.width}, {score}", score, config, target)


def _group(case: str, score: str, config: Config, target: float) -> Group:
    """Compare one seed with one in PyTorch, and all of them at once with as many in turn."""
    several = f", {config.seeds} seeds"
    names = {1: ""} if config.seeds == 1 else {1: "", config.seeds: several}
    kinds = {"JAX": in_jax} | ({"PyTorch": in_torch} if HAS_TORCH else {})
    programs = {
        kind + name: functools.partial(
            _program, build, score, dataclasses.replace(config, seeds=seeds)
        )
        for kind, build in kinds.items()
        for seeds, name in names.items()
    }
    comparisons = [
        Comparison(case, f"JAX{name}", f"PyTorch{name}", target)
        for name in names.values()
        if HAS_TORCH
    ]
    if config.seeds > 1:
        comparisons.append(Comparison(case, f"JAX{several}", "JAX", 1))
    return Group("tokens/s", programs, comparisons)


def _program(build: Callable[[Learner], Train], score: str, config: Config) -> Program:
    learner = learner_of(score, config)
    train, tokens = build(learner), learner.task.tokens
    length = config.round // config.chunk
    starts = itertools.cycle(range(0, len(tokens), length))

    def turn() -> int:
        start = next(starts)
        train(range(start, start + length))
        return int(tokens[start : start + length].sum())

    return Program(turn, jit=False)


_load = functools.cache(load_task)


def write_synthetic(folder: pathlib.Path, pairs: int = PAIRS) -> None:
    """Write `train.de` and `train.en` with as many words and sentence lengths as Multi30k.

    Words are drawn uniformly, so that none is too rare to be kept.
    """
    random = np.random.default_rng(0)
    rest = (1 - CORRELATION**2) ** 0.5
    correlated = random.normal(size=(pairs, 2)) @ np.array([[1, CORRELATION], [0, rest]])
    lengths = np.exp(MEANS + correlated * DEVIATIONS).round().clip(SHORTEST, LONGEST).astype(int)
    for of_side, (ending, words) in zip(lengths.T, WORDS.items(), strict=True):
        sentences = (random.integers(words, size=length) for length in of_side)
        lines = (" ".join(f"w{word}" for word in sentence) for sentence in sentences)
        (folder / f"train.{ending}").write_text("\n".join(lines) + "\n", encoding="utf-8")
