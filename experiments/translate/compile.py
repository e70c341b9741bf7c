"""Compile ahead of time: every shape at once, on all cores, before the clock starts.

Training is data-parallel: every device of every process takes its share of each batch.
Parameters and optimizer are the same everywhere. Each device runs the program of one device on
its share; the only thing they exchange is the sum of the gradients, once a step. Left to XLA, the
recurrences would exchange gradients at every word.
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

from experiments.command_line import UsageError
from experiments.translate import decode, looking, train_step
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
        devices = jax.devices()
        count = len(devices)
        # Without a share of the batch a process would have nothing to do.
        self.several = jax.process_count() > 1
        self.devices = devices if self.several else devices[: num_devices(batch_size, count)]
        self.axis = "batch" if len(self.devices) > 1 else None
        mesh = Mesh(np.array(self.devices), ("batch",))
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.sharded = NamedSharding(mesh, PartitionSpec("batch"))
        self.sharded_steps = NamedSharding(mesh, PartitionSpec(None, None, None, "batch"))
        self._of_seeds = NamedSharding(mesh, PartitionSpec(None, "batch"))

    def training(self, function: Any) -> Any:
        """Compile a function of a state and of batches, run by each device on its share."""
        batches = Batches(self.replicated, self.replicated, self.sharded_steps)
        given = self.replicated, batches
        function = self._split(function, given, self.replicated)
        options = {"in_shardings": given, "out_shardings": self.replicated}
        return jax.jit(function, donate_argnums=0, **options)

    def decoding(self, function: Any, sides: int = 1) -> Any:
        """Compile a function of parameters and arrays [B, ...] whose results are [N, B, ...]."""
        given = (self.replicated, *[self.sharded] * sides)
        function = self._split(function, given, self._of_seeds)
        return jax.jit(function, in_shardings=given, out_shardings=self.replicated)

    def looking(self, function: Any) -> Any:
        """Compile a function of parameters and a few sentences that every device runs."""
        return jax.jit(function, out_shardings=self.replicated)

    def _split(self, function: Any, given: Any, found: NamedSharding) -> Any:
        if self.axis is None:
            return function
        in_specs, out_specs = jax.tree.map(lambda sharding: sharding.spec, (given, found))
        # What is replicated are sums over all devices, which JAX cannot see through an optimizer.
        switches = {"mesh": found.mesh, "check_vma": False}
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, **switches)

    def put(self, tree: Any, sharding: NamedSharding) -> Any:
        """Return arrays that all processes have alike, each with its part on its devices."""
        if not self.several:
            return jax.device_put(tree, sharding)
        return jax.tree.map(functools.partial(_put_part, sharding), tree)

    def largest(self, *numbers: int) -> list[int]:
        """Return the largest of each of a few numbers, over all processes."""
        if not self.several:
            return list(numbers)
        row = np.array([numbers], np.int32)
        shape = len(self.devices), len(numbers)
        rows = jax.make_array_from_callback(shape, self.sharded, lambda _: row)
        return jax.device_get(_largest(self.replicated)(rows)).tolist()

    def fed(self, compiled: Compiled) -> Compiled:
        """Return a compiled function of parameters and sentences that takes NumPy arrays."""
        return functools.partial(self._feed, compiled) if self.several else compiled

    def fed_batches(self, compiled: Compiled) -> Compiled:
        """Return a compiled function of a state and batches that takes NumPy arrays."""
        return functools.partial(self._feed_batches, compiled) if self.several else compiled

    def shown(self, compiled: Compiled) -> Compiled:
        """Return a compiled function of parameters and a few sentences that takes NumPy arrays."""
        return functools.partial(self._show, compiled) if self.several else compiled

    def _show(self, compiled: Compiled, parameters: Any, *sides: np.ndarray) -> Any:
        return compiled(parameters, *self.put(sides, self.replicated))

    def _feed(self, compiled: Compiled, parameters: Any, *sides: np.ndarray) -> Any:
        return compiled(parameters, *self.put(sides, self.sharded))

    def _feed_batches(self, compiled: Compiled, state: State, batches: Batches) -> Any:
        order = self.put(batches.order, self.replicated)
        rows = self.put(batches.rows, self.sharded_steps)
        return compiled(state, batches._replace(order=order, rows=rows))


def check_divides(batch_size: int) -> None:
    """Refuse a batch that the devices of several processes cannot share equally.

    Raises:
      UsageError: one sentence with the numbers, and the nearest sizes that they can share.
    """
    count, processes = jax.device_count(), jax.process_count()
    if processes > 1 and batch_size % count:
        below = batch_size // count * count
        sizes = " or ".join(str(size) for size in (below, below + count) if size)
        raise UsageError(
            f"--batch_size is {batch_size}, which the {count} devices of {processes} processes do "
            f"not divide; give {sizes}."
        )


def _put_part(sharding: NamedSharding, array: Any) -> jax.Array:
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


@functools.cache
def _largest(sharding: NamedSharding) -> Any:
    return jax.jit(functools.partial(jnp.max, axis=0), out_shardings=sharding)


@dataclass(frozen=True)
class Programs:
    """Compiled functions of the translators of one score.

    Attributes:
      train: takes the steps of a round; None where nothing is trained.
      force: reads given translations, by width (S, T).
      greedy: translates greedily, as validation does, by width S.
      search: translates as the configuration asks for, by width S.
      look: returns all weights of the sentences of `looking`; None where nothing is trained.
      batch_size: of all the others.
      seconds: what compilation took.
    """

    train: Compiled
    force: Mapping[tuple[int, int], Compiled]
    greedy: Mapping[int, Compiled]
    search: Mapping[int, Compiled]
    look: Compiled | None
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
    train = placement.fed_batches(compiled.pop(("train", None)))
    look = compiled.pop(("look", None), None)
    by_kind: dict[str, dict[Any, Compiled]] = {"force": {}, "greedy": {}, "search": {}}
    for (kind, width), program in compiled.items():
        by_kind[kind][width] = placement.fed(program)
    return Programs(
        train=train,
        force=by_kind["force"],
        greedy=by_kind["greedy"],
        search=by_kind["search"] or by_kind["greedy"],
        look=look and placement.shown(look),
        batch_size=run.config.batch_size,
        seconds=time.perf_counter() - start,
    )


def _lowered_training(score: str, run: Run, placement: Placement, state: State) -> Any:
    config, task = run.config, run.task
    graph, _ = graph_of(score, run.sizes[score], config.dropout, config.dtype)
    order = _tokens(config.round // config.chunk)
    rows = _tokens(*order.shape, config.seeds, config.chunk, config.batch_size)
    pairs = jax.tree.map(lambda array: _tokens(*array.shape), task.arrays)
    max_words = task.max_words(len(placement.devices))
    train = functools.partial(train_step.train, graph, config, max_words, placement.axis)
    return placement.training(train).lower(state, Batches(pairs, order, rows))


def _lowered_evaluation(
    score: str, run: Run, placement: Placement, state: State
) -> dict[tuple[str, Any], Any]:
    graph, _ = graph_of(score, run.sizes[score])
    size, parameters, lowered = run.config.batch_size, state.parameters, {}
    force = placement.decoding(functools.partial(decode.force, graph), sides=2)
    for width in run.task.widths:
        lowered["force", width] = force.lower(parameters, *(_tokens(size, n) for n in width))
    look = placement.looking(functools.partial(looking.look, graph))
    shown = looking.sentences(run.task)
    lowered["look", None] = look.lower(parameters, *(_tokens(*x.shape) for x in shown[1:]))
    for kind, decoder in _decoders(graph, run.config, run.task.longest).items():
        program = placement.decoding(decoder)
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
        look=None,
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
