"""Several translators as one: it predicts the mean of their probabilities.

An ensemble has the methods of a translator, so that it decodes, scores and aligns like one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.translate.model import Graph

Array = jax.Array


class Members(NamedTuple):
    """The structures of an ensemble: of each group of alike translators one.

    The parameters of an ensemble are a tuple with those of each group, which have a leading axis
    M of its members.
    """

    graphs: tuple[Graph, ...]


def built(graph: Graph | Members, parameters: Any) -> Any:
    """Return the translator, or the ensemble, of a structure with its parameters."""
    if isinstance(graph, Members):
        return Ensemble(graph.graphs, parameters)
    return nnx.merge(graph, parameters)


class Ensemble:
    """Translators that predict p(w) = 1/M sum_m p_m(w) and attend with the mean of their weights.

    Arrays of memories and carries are [B, M, ...].
    """

    def __init__(self, graphs: tuple[Graph, ...], parameters: tuple[Any, ...]):
        self.groups = tuple(zip(graphs, parameters, strict=True))

    def encode(self, source: Array) -> list[Any]:
        """Read a batch of sources [B, S] with every member."""
        return [
            jax.vmap(lambda own, graph=graph: nnx.merge(graph, own).encode(source), out_axes=1)(p)
            for graph, p in self.groups
        ]

    def start(self, memory: list[Any], longest: int) -> list[Any]:
        """Return the carries of the first step."""

        def begin(graph: Graph, own: Any, memory: Any) -> Any:
            return nnx.merge(graph, own).start(memory, longest)

        return [
            jax.vmap(lambda own, m, graph=graph: begin(graph, own, m), (0, 1), 1)(p, read)
            for (graph, p), read in zip(self.groups, memory, strict=True)
        ]

    def step(self, memory: list[Any], carry: list[Any], previous: Array) -> tuple[list[Any], Array]:
        """Return the next carries and the logits [B, W] of the word after the previous one, [B]."""
        following, every = [], []
        for (graph, parameters), read, state in zip(self.groups, memory, carry, strict=True):

            def one(own: Any, read: Any, state: Any, graph: Graph = graph) -> Any:
                return nnx.merge(graph, own).step(read, state, previous)

            state, logits = jax.vmap(one, (0, 1, 1), (1, 0))(parameters, read, state)
            following.append(state)
            every.append(logits)
        return following, mixed(every)

    def __call__(self, source: Array, target: Array) -> tuple[Array, Array]:
        """Return logits [T, B, W] and weights [T, B, S], as `model.Translator` does.

        The weights are the mean over the members that attend.
        """
        found = [
            jax.vmap(lambda own, graph=graph: nnx.merge(graph, own)(source, target))(p)
            for graph, p in self.groups
        ]
        weights = jnp.concatenate([weights for _, weights in found])
        attends = jnp.any(weights > 0, axis=-1, keepdims=True)
        number = jnp.sum(attends, axis=0, dtype=weights.dtype)
        return mixed([logits for logits, _ in found]), weights.sum(axis=0) / jnp.maximum(number, 1)


def mixed(logits: list[Array]) -> Array:
    """Return the logarithm of the mean of probabilities, from logits [M, ..., W] of each group.

    >>> jnp.exp(mixed([jnp.log(jnp.array([[0.5, 0.5], [1.0, 1.0], [0.2, 0.8]]))]))
    Array([0.4, 0.6], dtype=float32)
    """
    every = jnp.concatenate([jax.nn.log_softmax(own.astype(jnp.float32)) for own in logits])
    return jax.nn.logsumexp(every, axis=0) - jnp.log(float(len(every)))
