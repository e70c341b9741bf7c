"""Training many small models at once: all learning rates and seeds of an arm under one `vmap`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.translate.train_step import quick_options

Array = jax.Array

_HELD_OUT = 1_000_000


class Arm(NamedTuple):
    """A model to train: from a random key to parameters, from parameters and a batch to a loss."""

    init: Callable[[Array], Any]
    loss: Callable[[Any, Any], Array]


class Trained(NamedTuple):
    """Models at the best learning rate: parameters with a leading axis of seeds, held-out losses.

    `swept` has the mean held-out loss of every rate.
    """

    parameters: Any
    losses: list[float]
    rate: float
    swept: dict[str, float]


def train(
    arm: Arm,
    batch: Callable[[Array, Any], Any],
    rng: Array,
    *,
    rates: Sequence[float],
    seeds: int,
    steps: int,
    data: Any = None,
    held_out: Any = None,
) -> Trained:
    """Train every seed at every rate by Adam, and keep the rate with the least held-out loss.

    A seed draws the same parameters and batches in every arm and at every rate, so that arms are
    compared in pairs.

    Args:
      arm: what is trained.
      batch: from a random key and `data` to a batch.
      rng: random key of all seeds.
      rates: largest learning rates; each grows for a tenth of the steps and then falls to zero.
      seeds: models of each rate.
      steps: of training.
      data: arrays that batches are drawn from; where only these differ, nothing is compiled anew.
      held_out: the batch that rates are compared on; one more of `batch` unless given.
    """
    rngs = jax.random.split(rng, seeds)
    test = batch(jax.random.fold_in(rng, _HELD_OUT), data) if held_out is None else held_out
    rates_array = jnp.asarray(rates, jnp.float32)
    # Drawn one operation at a time: jaxlib's orthogonal matrices, many at once inside one program,
    # can wait for each other forever where there are two processors.
    drawn = jax.vmap(lambda rng: arm.init(jax.random.fold_in(rng, _HELD_OUT)))(rngs)
    jax.block_until_ready(drawn)
    parameters, losses = _compiled(arm, batch, steps)(rngs, drawn, rates_array, data, test)
    by_rate = np.asarray(losses, np.float64)
    means = np.nan_to_num(by_rate, nan=np.inf).mean(axis=1)
    best = int(means.argmin())
    return Trained(
        jax.tree.map(lambda leaf: leaf[best], parameters),
        by_rate[best].tolist(),
        float(rates[best]),
        {f"{rate:g}": float(mean) for rate, mean in zip(rates, means, strict=True)},
    )


@functools.cache
def _compiled(arm: Arm, batch: Callable[[Array, Any], Any], steps: int) -> Any:
    # LLVM's full effort takes longer and does not make small models faster.
    every = functools.partial(_every_rate_and_seed, arm, batch, steps)
    return jax.jit(every, compiler_options=quick_options(1))


def _every_rate_and_seed(
    arm: Arm,
    batch: Callable[[Array, Any], Any],
    steps: int,
    rngs: Array,
    drawn: Any,
    rates: Array,
    data: Any,
    test: Any,
) -> tuple[Any, Array]:
    one = functools.partial(_one_rate_and_seed, arm.loss, batch, steps, data)
    of_rate = jax.vmap(one, in_axes=(None, 0, 0))
    parameters = jax.vmap(of_rate, in_axes=(0, None, None))(rates, rngs, drawn)
    of_seed = jax.vmap(lambda own: arm.loss(own, test))
    return parameters, jax.vmap(of_seed)(parameters)


def _one_rate_and_seed(
    loss: Callable[[Any, Any], Array],
    batch: Callable[[Array, Any], Any],
    steps: int,
    data: Any,
    rate: Array,
    rng: Array,
    parameters: Any,
) -> Any:
    """Return parameters after all steps of Adam, whose rate is warmed up and annealed."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10 + 1, steps + 1)
    adam = optax.adam(lambda number: rate * shape(number), b2=0.98)
    optimizer = optax.flatten(optax.chain(optax.clip_by_global_norm(1.0), adam))
    step = functools.partial(_step, loss, optimizer, batch, data, rng)
    state = parameters, optimizer.init(parameters)
    (parameters, _), _ = jax.lax.scan(step, state, jnp.arange(steps))
    return parameters


def _step(
    loss: Callable[[Any, Any], Array],
    optimizer: optax.GradientTransformation,
    batch: Callable[[Array, Any], Any],
    data: Any,
    rng: Array,
    state: Any,
    number: Array,
) -> tuple[Any, None]:
    parameters, moments = state
    given = batch(jax.random.fold_in(rng, number), data)
    gradient = jax.grad(loss)(parameters, given)
    updates, moments = optimizer.update(gradient, moments, parameters)
    return (optax.apply_updates(parameters, updates), moments), None


def arm_of(build: Callable[[nnx.Rngs], Any], loss: Callable[[Any, Any], Array]) -> Arm:
    """Return an arm whose parameters are those of an NNX module.

    Args:
      build: from random streams to a module.
      loss: from the module and a batch to a loss.
    """
    merge = merged(build)
    return Arm(
        lambda rng: nnx.state(build(nnx.Rngs(rng)), nnx.Param),
        lambda parameters, batch: loss(merge(parameters), batch),
    )


def merged(build: Callable[[nnx.Rngs], Any]) -> Callable[[Any], Any]:
    """Return the function from parameters to the module that has them."""
    return functools.partial(nnx.merge, graph_of(build))


def graph_of(build: Callable[[nnx.Rngs], Any]) -> Any:
    """Return the graph of the module that is built, without its parameters."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)
    return graph


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Return the mean cross-entropy of integer labels; a label below zero does not count."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    counted = labels >= 0
    return jnp.sum(losses, where=counted) / jnp.maximum(jnp.sum(counted), 1)


def accuracy(logits: Array, labels: Array) -> Array:
    """Return the share of labels that have the largest logit; a label below zero does not count."""
    right = (jnp.argmax(logits, axis=-1) == labels) & (labels >= 0)
    return jnp.sum(right) / jnp.maximum(jnp.sum(labels >= 0), 1)
