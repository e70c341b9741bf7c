"""Training of the recurrent translator, and of the same model in PyTorch.

A turn is a round of the program: chunks of steps (forward, backward, optimizer) between two
synchronisations with the host. All see the same batches. Tokens are words and end symbols, without
padding.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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
    """The translators of a score, one for each seed, and the pairs they learn."""

    score: str
    sizes: Sizes
    config: Config
    task: Task


def learner_of(score: str, config: Config) -> Learner:
    """Load the pairs and derive the sizes of the translator."""
    given = _load(config)
    words = given.corpus.source_vocabulary, given.corpus.target_vocabulary
    return Learner(score, sizes_of(config, *map(len, words))[score], config, given)


class JaxTraining:
    """The compiled training of the program."""

    def __init__(self, learner: Learner):
        score, sizes, config, given = learner
        placement = Placement(config.batch_size)
        state = train_step.initial_state(score, sizes, config), given.arrays
        self.state, self.arrays = jax.device_put(state, placement.replicated)
        self.order, self.rows = given.order, given.rows
        run = Run(config, given, {score: sizes})
        self.programs = compile_all(score, run, self.state, evaluate=False)

    def __call__(self, chunks: range) -> np.ndarray:
        """Train on some chunks of steps."""
        batches = Batches(self.arrays, self.order[chunks], self.rows[chunks])
        self.state, losses = self.programs.train(self.state, batches)
        return jax.device_get(losses)


class TorchTraining:
    """The same training in PyTorch, one translator after the other."""

    def __init__(self, learner: Learner):
        from experiments.benchmark.torch_translator import Trainer, choose_threads

        score, sizes, config, given = learner
        self.order, self.rows = given.order, given.rows
        drawn = nnx.to_pure_dict(train_step.initial_state(score, sizes, config).parameters)
        pairs = [(source, target) for source, target, *_ in given.arrays]
        # The first one is only used to choose the number of threads.
        first, *self.trainers = (
            Trainer(score, sizes, config, _of_seed(drawn, seed), pairs)
            for seed in (0, *range(config.seeds))
        )
        self.threads = choose_threads(first, self._rows(range(1), 0))

    def __call__(self, chunks: range) -> np.ndarray:
        """Train on some chunks of steps."""
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(self.threads)
        losses = [
            trainer.train(self._rows(chunks, seed)) for seed, trainer in enumerate(self.trainers)
        ]
        return np.stack(losses, axis=1)

    def _rows(self, chunks: range, seed: int) -> list[tuple[int, np.ndarray]]:
        return [(self.order[chunk], self.rows[chunk, seed]) for chunk in chunks]


def _of_seed(parameters: Any, seed: int) -> Any:
    return jax.tree.map(lambda x: x[seed], parameters)


def groups(data: str, scale: int) -> Iterator[Group]:
    """Return the cases of training at the default size and at that of Multi30k.

    Args:
      data: a folder with Multi30k; without it, synthetic sentences of its size are used.
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
    """Compare one seed with one in PyTorch, and all seeds at once with as many one by one."""
    several = f", {config.seeds} seeds"
    names = {1: ""} if config.seeds == 1 else {1: "", config.seeds: several}
    kinds = {"JAX": JaxTraining} | ({"PyTorch": TorchTraining} if HAS_TORCH else {})
    programs = {
        kind + name: functools.partial(
            program_of, build, score, dataclasses.replace(config, seeds=seeds)
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


def program_of(build: Callable[[Learner], Train], score: str, config: Config) -> Program:
    """Return the program that trains for one turn and returns the number of tokens."""
    learner = learner_of(score, config)
    train, tokens = build(learner), learner.task.tokens
    length = config.round // config.chunk
    rounds = [range(start, start + length) for start in range(0, len(tokens), length)]
    turns = itertools.cycle((chunks, int(tokens[chunks].sum())) for chunks in rounds)

    def turn() -> int:
        chunks, num_tokens = next(turns)
        train(chunks)
        return num_tokens

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
