"""Compile ahead of time: every shape at once, on all cores, before the clock starts.

Training is data-parallel: every local device takes its share of each batch. Parameters and
optimizer are the same everywhere; XLA sums the gradients.
"""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.translate import decode, train_step
from experiments.translate.config import Config
from experiments.translate.model import Graph
from experiments.translate.prepare import Run
from experiments.translate.train_step import Batches, State, graph_of

Compiled = Any


def num_devices(batch_size: int, available: int) -> int:
    """Return the largest number of available devices that divides a batch.

    >>> num_devices(12, 8)
    6
    """
    return max(n for n in range(1, available + 1) if batch_size % n == 0)


class Placement:
    """Data parallelism: arrays replicated on all devices, or sharded along their axis B."""

    def __init__(self, batch_size: int):
        devices = jax.local_devices()
        self.devices = devices[: num_devices(batch_size, len(devices))]
        mesh = Mesh(np.array(self.devices), ("batch",))
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.sharded = NamedSharding(mesh, PartitionSpec("batch"))
        self.sharded_steps = NamedSharding(mesh, PartitionSpec(None, None, None, "batch"))

    def of_training(self) -> dict[str, Any]:
        """Return options of `jax.jit` for functions of a state and batches."""
        batches = Batches(self.replicated, self.replicated, self.sharded_steps)
        return {"in_shardings": (self.replicated, batches), "out_shardings": self.replicated}

    def of_sentences(self, sides: int) -> dict[str, Any]:
        """Return options of `jax.jit` for functions of parameters and arrays [B, ...]."""
        return {"in_shardings": (self.replicated, *[self.sharded] * sides)}


@dataclass(frozen=True)
class Programs:
    """Compiled functions of the translators of one score.

    Attributes:
      train: takes the steps of a round; None where nothing is trained.
      force: reads given translations, by width (S, T).
      greedy: translates greedily, as validation does, by width S.
      search: translates as the configuration asks for, by width S.
      batch_size: of all of them.
      seconds: what compilation took.
    """

    train: Compiled
    force: Mapping[tuple[int, int], Compiled]
    greedy: Mapping[int, Compiled]
    search: Mapping[int, Compiled]
    batch_size: int
    seconds: float


def compile_all(score: str, run: Run, state: State, *, evaluate: bool = True) -> Programs:
    """Compile the training of a score, and unless told otherwise its evaluation."""
    start = time.perf_counter()
    placement = Placement(run.config.batch_size)
    lowered: dict[Any, Any] = {("train", None): _lowered_training(score, run, placement, state)}
    if evaluate:
        lowered |= _lowered_evaluation(score, run, placement, state)
    with ThreadPoolExecutor() as pool:
        compiled = dict(zip(lowered, pool.map(_compile, lowered.values()), strict=True))
    by_kind: dict[str, dict[Any, Compiled]] = {"force": {}, "greedy": {}, "search": {}}
    for (kind, width), program in compiled.items():
        by_kind.setdefault(kind, {})[width] = program
    return Programs(
        train=compiled["train", None],
        force=by_kind["force"],
        greedy=by_kind["greedy"],
        search=by_kind["search"] or by_kind["greedy"],
        batch_size=run.config.batch_size,
        seconds=time.perf_counter() - start,
    )


def _lowered_training(score: str, run: Run, placement: Placement, state: State) -> Any:
    config, task = run.config, run.task
    graph, _ = graph_of(score, run.sizes[score], config.dropout, config.dtype)
    order = _tokens(config.round // config.chunk)
    rows = _tokens(*order.shape, config.seeds, config.chunk, config.batch_size)
    pairs = tuple(
        (_tokens(*b.source.shape), _tokens(*b.target.shape)) for b in task.training.members
    )
    # On several devices each keeps its share of all positions.
    max_words = task.max_words if len(placement.devices) == 1 else [None] * len(pairs)
    train = functools.partial(train_step.train, graph, config, max_words)
    program = jax.jit(train, donate_argnums=0, **placement.of_training())
    return program.lower(state, Batches(pairs, order, rows))


def _lowered_evaluation(
    score: str, run: Run, placement: Placement, state: State
) -> dict[tuple[str, Any], Any]:
    graph, _ = graph_of(score, run.sizes[score])
    size, parameters, lowered = run.config.batch_size, state.parameters, {}
    force = jax.jit(functools.partial(decode.force, graph), **placement.of_sentences(2))
    for width in run.task.widths:
        lowered["force", width] = force.lower(parameters, *(_tokens(size, n) for n in width))
    for kind, decoder in _decoders(graph, run.config, run.task.longest).items():
        program = jax.jit(decoder, **placement.of_sentences(1))
        for length in {width[0] for width in run.task.widths}:
            lowered[kind, length] = program.lower(parameters, _tokens(size, length))
    return lowered


def _tokens(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def compile_when_called(graph: Graph, config: Config, longest: int, batch_size: int) -> Programs:
    """Return programs that are compiled for each shape at its first call; none trains."""
    decoders = _decoders(graph, config, longest)
    compiled = {kind: _for_any_shape(decoder) for kind, decoder in decoders.items()}
    return Programs(
        train=None,
        force=_for_any_shape(functools.partial(decode.force, graph)),
        greedy=compiled["greedy"],
        search=compiled.get("search", compiled["greedy"]),
        batch_size=batch_size,
        seconds=0.0,
    )


def _for_any_shape(function: Any) -> Mapping[Any, Compiled]:
    compiled = jax.jit(function, compiler_options=train_step.quick_options(1))
    return collections.defaultdict(lambda: compiled)


def _decoders(graph: Graph, config: Config, longest: int) -> dict[str, Any]:
    decoders = {"greedy": functools.partial(decode.greedy, graph, longest)}
    if config.beam_size > 1:
        options = (config.beam_size, config.length_penalty)
        decoders["search"] = functools.partial(decode.beam, graph, longest, *options)
    return decoders


def _compile(lowered: Any) -> Compiled:
    # LLVM's full effort takes 1.5 times as long and does not make these loops faster.
    return lowered.compile(train_step.quick_options(1))
