"""Compiling ahead of time: every shape at once, on all cores, before the clock starts."""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from experiments.data.batches import Buckets, Widths
from experiments.translate import decoding, learning
from experiments.translate.config import Config
from experiments.translate.devices import Placement
from experiments.translate.learning import Graph, State, graph_of
from experiments.translate.model import Sizes

Compiled = Any


@dataclass(frozen=True)
class Programs:
    """Compiled functions: `train` takes the steps of a round, the others serve one width each.

    `greedy` translates in validation, `search` as the configuration asks for. `train` is None where
    nothing is trained.
    """

    train: Compiled
    force: Mapping[tuple[int, int], Compiled]
    greedy: Mapping[int, Compiled]
    search: Mapping[int, Compiled]
    batch_size: int
    seconds: float


def compile_all(
    score: str,
    sizes: Sizes,
    config: Config,
    placement: Placement,
    state: State,
    data: Buckets,
    most_words: Sequence[int],
    widths: Widths,
    longest: int,
) -> Programs:
    """Compile training on the buckets of `data`, and translating sentences of `widths`.

    `most_words` tells of each bucket how many target words a batch of it has at most.
    """
    start = time.perf_counter()
    trained, _ = graph_of(score, sizes, config.dropout, config.dtype)
    graph, _ = graph_of(score, sizes)
    words = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    order = words((config.round // config.chunk,))
    rows = words((*order.shape, config.seeds, config.chunk, config.batch_size))
    pairs = tuple((words(b.source.shape), words(b.target.shape)) for b in data.members)
    # On several devices each keeps its share of all positions.
    most = most_words if len(placement.devices) == 1 else [None] * len(pairs)
    take_steps = functools.partial(learning.train, trained, config, most)
    train = jax.jit(take_steps, donate_argnums=0, **placement.of_training())
    lowered: dict[Any, Any] = {("train", None): train.lower(state, pairs, order, rows)}
    for width in widths:
        force = jax.jit(functools.partial(decoding.force, graph), **placement.of_sentences(2))
        source, target = (words((config.batch_size, length)) for length in width)
        lowered["force", width] = force.lower(state.parameters, source, target)
    for length in {width[0] for width in widths}:
        source = words((config.batch_size, length))
        for kind, decode in _decoders(graph, config, longest).items():
            decoder = jax.jit(decode, **placement.of_sentences(1))
            lowered[kind, length] = decoder.lower(state.parameters, source)
    with ThreadPoolExecutor() as pool:
        compiled = dict(zip(lowered, pool.map(_compile, lowered.values()), strict=True))
    by_kind = {
        kind: {key: program for (name, key), program in compiled.items() if name == kind}
        for kind in ("force", "greedy", "search")
    }
    return Programs(
        train=compiled["train", None],
        force=by_kind["force"],
        greedy=by_kind["greedy"],
        search=by_kind["search"] or by_kind["greedy"],
        batch_size=config.batch_size,
        seconds=time.perf_counter() - start,
    )


def compile_when_called(graph: Graph, config: Config, longest: int, batch_size: int) -> Programs:
    """Return programs that are compiled for each shape when it comes first; none trains."""
    decoders = _decoders(graph, config, longest)
    decode = {kind: _for_any_shape(decoder) for kind, decoder in decoders.items()}
    return Programs(
        train=None,
        force=_for_any_shape(functools.partial(decoding.force, graph)),
        greedy=decode["greedy"],
        search=decode.get("search", decode["greedy"]),
        batch_size=batch_size,
        seconds=0.0,
    )


def _for_any_shape(function: Any) -> Mapping[Any, Compiled]:
    compiled = jax.jit(function, compiler_options=learning.quick_options(1))
    return collections.defaultdict(lambda: compiled)


def _decoders(graph: Graph, config: Config, longest: int) -> dict[str, Any]:
    decoders = {"greedy": functools.partial(decoding.greedy, graph, longest)}
    if config.beam_size > 1:
        options = (config.beam_size, config.length_penalty)
        decoders["search"] = functools.partial(decoding.beam, graph, longest, *options)
    return decoders


def _compile(lowered: Any) -> Compiled:
    # LLVM's full effort takes half as long again and does not make these loops faster.
    return lowered.compile(learning.quick_options(1))
