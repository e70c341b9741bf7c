"""Decoding token by token with a cache gives what the full forward pass gives.

Source: Assumed by every implementation of generation.

Method: The logits of a causal decoder of two layers over 24 tokens, in one pass and with a key and
value cache in pieces of 1, of 5, and of a prompt of 17 and then single tokens; for learned
positions, rotary positions and additive scores.

Criterion: Holds if the largest difference is below 1e-4 of the largest logit in float32.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax import positions, scores
from attention_jax.nnx import CausalDecoder, MultiHeadAttention
from experiments.claims.claim import Data, Setting, Verdict, fails, holds
from experiments.claims.drawing import bars

LENGTH = 24
PIECES = {"single tokens": [1] * 24, "pieces of 5": [5, 5, 5, 5, 4], "prompt": [17] + [1] * 7}


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure differences of logits by model and pieces."""
    rotary = partial(MultiHeadAttention, position=positions.rotary)
    additive = partial(MultiHeadAttention, score=scores.additive)
    models = {
        "learned positions": {"max_length": LENGTH},
        "rotary": {"attention": rotary},
        "additive": {"max_length": LENGTH, "attention": additive},
    }
    kinds = setting.pick(tiny=("rotary",), quick=tuple(models), full=tuple(models))
    tokens = jax.random.randint(rng, (2, LENGTH), 0, 20)

    def differences(options: dict) -> dict[str, float]:
        model = CausalDecoder(20, 32, num_heads=4, num_layers=2, rngs=nnx.Rngs(rng), **options)
        decode = nnx.jit(lambda model, tokens, caches: model.decode(tokens, caches))
        whole = model(tokens)
        found = {}
        for name, sizes in PIECES.items():
            caches, logits, at = model.init_cache(2, LENGTH), [], 0
            for size in sizes:
                given, caches = decode(model, tokens[:, at : at + size], caches)
                logits.append(given)
                at += size
            worst = jnp.max(jnp.abs(jnp.concatenate(logits, axis=1) - whole))
            found[name] = float(worst / jnp.max(jnp.abs(whole)))
        return found

    return {
        f"{kind}, {name}": worst
        for kind in kinds
        for name, worst in differences(models[kind]).items()
    }


def verdict(data: Data) -> Verdict:
    """Judge by the largest difference."""
    worst = max(data, key=lambda name: data[name])
    found = f"Largest relative difference {data[worst]:.1e} ({worst}) in {len(data)} cases."
    return holds(found) if data[worst] < 1e-4 else fails(found)


def figure(data: Data):
    """Draw all differences."""
    least = {name: max(worst, 1e-9) for name, worst in data.items()}
    return bars(least, xlabel="largest relative difference", xscale="log", marks={"1e-4": 1e-4})
