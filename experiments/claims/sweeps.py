"""Trainings that several claims look at, done once in a run of the program."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.claims import translating
from experiments.claims.claim import Data, Setting
from experiments.claims.training import Trained

SCORES = ("dot", "scaled_dot", "additive")


@functools.cache
def by_attention_size(setting: Setting) -> Data:
    """Train recurrent translators with scores at several attention sizes.

    Returns:
      The sizes; and for each score, at each size, BLEU, held-out loss of every seed, and the best
      learning rate.
    """
    sizes = setting.pick(tiny=(2,), quick=(2, 16, 256), full=(2, 8, 32, 128, 512))
    given = translating.material(setting)
    data: Data = {"sizes": sizes, "bleu": {}, "loss": {}, "rate": {}}
    for score in SCORES:
        data["bleu"][score], data["loss"][score], data["rate"][score] = [], [], []
        for size in sizes:
            model = translating.recurrent(given, score, size)
            trained = model.train(setting, given)
            data["bleu"][score].append(model.bleu(trained.parameters, given))
            data["loss"][score].append(trained.losses)
            data["rate"][score].append(trained.rate)
    return data


@functools.cache
def transformer(setting: Setting, heads: int, how: str = "") -> tuple[Any, Trained, list[float]]:
    """Train Transformers with so many heads, and `how` one of OPTIONS; return model and BLEU."""
    given = translating.material(setting)
    model = translating.transformer(given, heads, **OPTIONS[how])
    trained = model.train(setting, given)
    return model, trained, model.bleu(trained.parameters, given)


def not_oneself(q_idx: jax.Array, kv_idx: jax.Array) -> jax.Array:
    """Attend to oneself only where there is nothing else (Kitaev et al. 2020, section 2)."""
    return jnp.where(q_idx == kv_idx, -1e5, 0.0)


OPTIONS: Mapping[str, dict[str, Any]] = {
    "": {},
    "summed": {"combine": "sum"},
    "tied": {"share_query_key": True},
    "tied, not oneself": {"share_query_key": True, "bias": not_oneself},
}


@functools.cache
def reversal(setting: Setting, score: str) -> tuple[Any, Trained, translating.Material]:
    """Train recurrent translators to write strings of up to 12 symbols backwards."""
    given = translating.material(setting, "reverse", 12)
    model = translating.recurrent(given, score)
    return model, model.train(setting, given), given
