"""Pointing at a key: the smallest task that trains a score and nothing else.

Keys are drawn at random, the query is a noisy copy of one of them (perhaps projected by another
matrix, so that depths differ), and the score has to be largest for that key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax import bind
from attention_jax.base.parameters import Parameter, initialize, parameters_of
from experiments.claims.training import Arm, accuracy, cross_entropy

Array = jax.Array


class Batch(NamedTuple):
    """Examples: query [B, Hq], key [B, S, Hk] and the index [B] of the right key."""

    query: Array
    key: Array
    index: Array


class Task(NamedTuple):
    """Sizes of the task; the views of query and key are fixed random matrices."""

    query_depth: int = 16
    key_depth: int = 16
    latent: int = 8
    keys: int = 16
    examples: int = 64
    noise: float = 0.3

    def batch(self, rng: Array, data: None = None) -> Batch:
        """Draw examples."""
        del data
        which, latents, noise = jax.random.split(rng, 3)
        index = jax.random.randint(which, (self.examples,), 0, self.keys)
        latent = jax.random.normal(latents, (self.examples, self.keys, self.latent))
        asked = jnp.take_along_axis(latent, index[:, None, None], axis=1)[:, 0]
        asked = asked + self.noise * jax.random.normal(noise, asked.shape)
        views = jax.random.split(jax.random.key(7))
        return Batch(
            asked @ _view(views[0], self.latent, self.query_depth),
            latent @ _view(views[1], self.latent, self.key_depth),
            index,
        )


def arm(score: Callable[..., Any], task: Task, attention_size: int | None = None) -> Arm:
    """Return the arm that trains the declared parameters of a score."""
    declared = parameters_of(score, task.query_depth, task.key_depth, attention_size)
    # Matrices are drawn alike, so that the score is the only difference between arms.
    glorot = jax.nn.initializers.glorot_uniform()
    drawn = {
        name: Parameter(own.shape, glorot) if len(own.shape) == 2 else own
        for name, own in declared.items()
    }

    def init(rng: Array) -> dict[str, Array]:
        return initialize(rng, drawn)

    def loss(parameters: Any, batch: Batch) -> Array:
        return cross_entropy(logits(score, parameters, batch), batch.index)

    return Arm(init, loss)


def logits(score: Callable[..., Any], parameters: Any, batch: Batch) -> Array:
    """Return the logits [B, S] of a score with parameters."""
    bound = bind(score, **parameters)
    return jax.vmap(lambda query, key: bound(query[None], key)[0])(batch.query, batch.key)


def right(score: Callable[..., Any], parameters: Any, batch: Batch) -> Array:
    """Return the accuracy of every seed, [N]."""
    return jax.vmap(lambda own: accuracy(logits(score, own, batch), batch.index))(parameters)


def _view(rng: Array, latent: int, depth: int) -> Array:
    return jax.random.normal(rng, (latent, depth)) / latent**0.5
