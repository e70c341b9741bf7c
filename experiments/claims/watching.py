"""Small encoders that are watched while they train: loss, entropy and logits at every step."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attention_jax import statistics
from attention_jax.nnx import MultiHeadAttention, TokenEncoder
from experiments.claims.tagging import HEADS, SYMBOLS, WIDTH, Batch, draw
from experiments.claims.training import arm_of, cross_entropy
from experiments.translate.train_step import quick_options

Array = jax.Array
LENGTH, EXAMPLES, TOGETHER = 12, 16, 5
# What a loss that is no number, or larger, is noted as.
LARGEST_LOSS = 1000.0
ASKED = {
    "entropy": statistics.over_queries(statistics.entropy),
    "largest logit": statistics.head_largest_logit,
}


def sorting(norm: Any, rates: Sequence[float], seeds: Array, steps: int) -> dict[str, list[Any]]:
    """Train encoders of two layers to sort symbols, at every rate and from every seed.

    Args:
      norm: of queries and keys, or None.
      rates: of Adam, reached after a fifth of the steps.
      seeds: random keys.
      steps: of training, a multiple of five.

    Returns:
      For each rate and seed means over five steps of "loss"; of "entropy", the mean over queries
      and heads of the layer where it is least, as a share of log 12; and of "largest logit".
    """
    run = functools.partial(_run, norm, steps)
    of_rates = jax.vmap(jax.vmap(run, in_axes=(None, 0)), in_axes=(0, None))
    runs = jax.jit(of_rates, compiler_options=quick_options(1))
    found = runs(jnp.asarray(rates, jnp.float32), seeds)
    return {what: _noted(what, values) for what, values in found.items()}


def _noted(what: str, values: Any) -> list[Any]:
    """Return means over five steps with four digits, so that there is less to keep."""
    neutral = {"loss": LARGEST_LOSS, "entropy": 1.0, "largest logit": 0.0}[what]
    finite = np.nan_to_num(np.asarray(values, np.float64), nan=neutral, posinf=1e30, neginf=-1e30)
    finite = np.minimum(finite, LARGEST_LOSS) if what == "loss" else finite
    means = finite.reshape(*finite.shape[:2], -1, TOGETHER).mean(axis=-1)
    return [[[float(f"{x:.4g}") for x in of] for of in of_rate] for of_rate in means]


def _run(norm: Any, steps: int, rate: Array, rng: Array) -> dict[str, Array]:
    """Train one encoder; return what is noted at every step."""

    def build(rngs: nnx.Rngs) -> TokenEncoder:
        sizes = {"hidden_features": 2 * WIDTH, "norm_placement": "before", "max_length": LENGTH}
        attention = functools.partial(MultiHeadAttention, qk_norm=norm)
        sizes |= {"num_heads": HEADS, "num_layers": 2, "attention": attention}
        return TokenEncoder(SYMBOLS + 1, WIDTH, **sizes, rngs=rngs)

    arm = arm_of(build, _loss)
    optimizer = optax.adam(optax.linear_schedule(0.0, 1.0, steps // 5), b2=0.98)

    step = functools.partial(_step, arm.loss, optimizer, (rate, rng))
    parameters = arm.init(rng)
    return jax.lax.scan(step, (parameters, optimizer.init(parameters)), jnp.arange(steps))[1]


def _step(loss: Any, optimizer: Any, given: Any, state: Any, number: Array) -> tuple[Any, Any]:
    rate, rng = given
    parameters, moments = state
    batch = draw(_sorted, jax.random.fold_in(rng, number), LENGTH, LENGTH, EXAMPLES)
    gradient, noted = jax.grad(loss, has_aux=True)(parameters, batch)
    updates, moments = optimizer.update(gradient, moments)
    updates = jax.tree.map(lambda update: rate * update, updates)
    return (optax.apply_updates(parameters, updates), moments), noted


def _sorted(tokens: Array, length: Array) -> Array:
    del length
    return jnp.sort(tokens)


def _loss(model: TokenEncoder, batch: Batch) -> Any:
    logits, layers = model(batch.tokens, statistics=ASKED)
    loss = cross_entropy(logits, batch.labels)
    entropies = jnp.stack([jnp.mean(layer.attention["entropy"]) for layer in layers])
    largest = jnp.stack([jnp.max(layer.attention["largest logit"]) for layer in layers])
    noted = {
        "loss": loss,
        "entropy": jnp.min(entropies) / math.log(LENGTH),
        "largest logit": jnp.max(largest),
    }
    return loss, noted
