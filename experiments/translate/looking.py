"""Where translators look while they learn: all weights of a few sentences after each validation.

They are kept in a log of their own, from which the report makes a page to explore.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from attention_jax.diagnostics import Explorer, View
from experiments.data.batches import pad
from experiments.data.corpus import Corpus, Pair
from experiments.translate.data import Task
from experiments.translate.model import Graph
from experiments.translate.workdir import Record

Array = jax.Array

END = "<eos>"
# How many sentences are drawn and explored.
_PICTURED = 3
# Source lengths and largest target length of sentences that are drawn.
_READABLE, _TALLEST = range(6, 15), 20
# Weights of a report: with more, steps are left out.
_MOST = 2_000_000
_TITLE = "Where the translators look"
# The field with the weights of a record, and that with the numbers of an array.
LOOK, _KIND = "weights", "float16"


class Sentences(NamedTuple):
    """Pairs whose weights are kept, as rows, source [B, S] and target [B, T].

    The words of the pairs are tokens of the rows: subwords, which then have no gold alignment.
    """

    pairs: Sequence[Pair]
    source: np.ndarray
    target: np.ndarray


def pictured(pairs: Sequence[Pair]) -> list[int]:
    """Choose sentences to draw: of readable length, those with the most reordering."""

    def crossings(pair: Pair) -> int:
        order = [source for _, source in sorted((j, i) for i, j in pair.sure or ())]
        return sum(a > b for n, a in enumerate(order) for b in order[n + 1 :])

    def is_readable(pair: Pair) -> bool:
        return len(pair.source) in _READABLE and len(pair.target) <= _TALLEST

    readable = [i for i, pair in enumerate(pairs) if is_readable(pair)] or range(len(pairs))
    return sorted(readable, key=lambda i: (-crossings(pairs[i]), i))[:_PICTURED]


def sentences(task: Task) -> Sentences:
    """Return the sentences of the validation set whose weights are kept."""
    valid, corpus = task.sets["valid"].pairs, task.corpus
    chosen = [valid[number] for number in pictured(valid)]
    rows = (
        [corpus.source_vocabulary.encode(pair.source) for pair in chosen],
        [corpus.target_vocabulary.encode(pair.target) for pair in chosen],
    )
    pairs = [_as_tokens(pair, corpus) for pair in chosen]
    return Sentences(pairs, *(pad(side, max(map(len, side)) + 1) for side in rows))


def _as_tokens(pair: Pair, corpus: Corpus) -> Pair:
    source = tuple(corpus.source_vocabulary.pieces(pair.source))
    target = tuple(corpus.target_vocabulary.pieces(pair.target))
    same = len(source) == len(pair.source) and len(target) == len(pair.target)
    return Pair(source, target, *((pair.sure, pair.possible) if same else ()))


def look(graph: Graph, parameters: Any, source: Array, target: Array) -> dict[str, Array]:
    """Return all weights with which translators read pairs.

    Args:
      graph: structure of the translators.
      parameters: with a leading axis of seeds.
      source: [B, S].
      target: [B, T].

    Returns:
      By name of the attention: weights [seeds, B, L, N, queries, keys].
    """
    return jax.vmap(functools.partial(_look_one_seed, graph, source, target))(parameters)


def _look_one_seed(graph: Graph, source: Array, target: Array, parameters: Any) -> dict[str, Array]:
    return nnx.merge(graph, parameters).look(source, target)


def record(score: str, step: int, weights: Mapping[str, Array]) -> Record:
    """Return a line of the log; of translators with several layers or heads seed 0 alone."""
    return {"score": score, "step": step, LOOK: {n: _text(w) for n, w in weights.items()}}


def _text(weights: Any) -> Record:
    array = np.asarray(weights).astype("<f2")
    if array.shape[2:4] != (1, 1):
        array = array[:1]
    return {"shape": array.shape, _KIND: base64.b64encode(array.tobytes()).decode()}


def _array(held: Record) -> np.ndarray:
    content = base64.b64decode(held[_KIND])
    return np.frombuffer(content, "<f2").reshape(held["shape"])


def explorer(
    logs: Mapping[str, Sequence[Record]], pairs: Sequence[Pair], several_layers: bool
) -> Explorer | None:
    """Return a page to explore what was kept; None if nothing was.

    Args:
      logs: of each score its records.
      pairs: the sentences.
      several_layers: whether each translator has several layers and heads. Scores and seeds are
        else shown beside each other.
    """
    logs = {score: [r for r in records if LOOK in r] for score, records in logs.items()}
    logs = {score: records for score, records in logs.items() if records and records[-1][LOOK]}
    if not logs or not pairs:
        return None
    views = _of_layers(logs, pairs) if several_layers else _of_seeds(logs, pairs)
    return Explorer(views, _TITLE)


def _of_seeds(logs: Mapping[str, Sequence[Record]], pairs: Sequence[Pair]) -> dict[str, View]:
    """Return a view of each sentence, with a row for each score and a column for each seed."""
    common = set.intersection(*({r["step"] for r in records} for records in logs.values()))
    views = {}
    held = {score: _stacked(records, common, _MOST // len(logs)) for score, records in logs.items()}
    for number, pair in enumerate(pairs):
        source, target, gold = _words(pair)
        # [steps, seeds, B, 1, 1, T, S] of each score to [steps, scores, seeds, T, S]
        every = [
            weights[:, :, number, 0, 0, : len(target), : len(source)]
            for (weights,) in (of_score[1].values() for of_score in held.values())
        ]
        steps = next(iter(held.values()))[0]
        views[f"sentence {number + 1}"] = View(
            np.stack(every, axis=1),
            target,
            source,
            steps,
            sides=("target", "source"),
            axes=("score", "seed"),
            layers=list(held),
            gold=gold,
        )
    return views


def _of_layers(logs: Mapping[str, Sequence[Record]], pairs: Sequence[Pair]) -> dict[str, View]:
    """Return views of each score, sentence and attention, with layers and heads of seed 0."""
    views = {}
    for score, records in logs.items():
        steps, held = _stacked(records, {r["step"] for r in records}, _MOST // len(logs))
        for number, pair in enumerate(pairs):
            source, target, gold = _words(pair)
            for name, weights in held.items():
                queries = source if name == "encoder" else target
                keys = target if name == "decoder" else source
                names = [score] * (len(logs) > 1) + [f"sentence {number + 1}", name]
                views[", ".join(names)] = View(
                    weights[:, 0, number, :, :, : len(queries), : len(keys)],
                    queries,
                    keys,
                    steps,
                    sides=_SIDES[name],
                    gold=() if queries is source or keys is target else gold,
                )
    return views


_SIDES = {
    "cross-attention": ("target", "source"),
    "encoder": ("source", "source, attended to"),
    "decoder": ("target", "target, attended to"),
}


def _stacked(
    records: Sequence[Record], wanted: set[int], most: int
) -> tuple[list[int], dict[str, np.ndarray]]:
    """Return steps and the weights of each attention after each of them, a few if they are many."""
    kept = [record for record in records if record["step"] in wanted]
    size = sum(int(np.prod(held["shape"])) for held in kept[-1][LOOK].values())
    count = max(1, min(len(kept), most // size))
    chosen = np.linspace(len(kept) - 1, 0, count).round().astype(int)[::-1]
    kept = [kept[at] for at in chosen]
    names = kept[-1][LOOK]
    stacks = {name: np.stack([_array(r[LOOK][name]) for r in kept]) for name in names}
    return [record["step"] for record in kept], stacks


def _words(pair: Pair) -> tuple[list[str], list[str], list[tuple[int, int]]]:
    """Return source and target with their end, and the gold links (target, source)."""
    gold = sorted((j, i) for i, j in pair.sure or ())
    return [*pair.source, END], [*pair.target, END], gold
