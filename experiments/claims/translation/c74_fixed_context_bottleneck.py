"""A context vector of fixed size is a bottleneck: without attention, long sequences suffer.

Source: Cho et al. 2014 (properties of neural machine translation); Bahdanau et al. 2015, figure 2.

Method: Recurrent translators are trained to write strings of 1 to 12 symbols backwards, without
attention, with the mean of the source as context, and with additive attention; six seeds or more,
the learning rate of each arm swept. The share of symbols that are right, given those before, by
length.

Criterion: Holds if for 9 symbols and more additive attention is conclusively better than both
controls, and both lose conclusively from the shortest strings to the longest. Fails if a control
is conclusively no worse than attention for the longest.

Published: Bahdanau et al. 2015, test set without unknown words: 26.75 BLEU (RNNsearch-50) against
17.82 (RNNencdec-50) on all sentences.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.claims.claim import Data, Setting, Verdict, fails, holds, undecided
from experiments.claims.drawing import lines
from experiments.claims.evidence import difference, higher, shown
from experiments.claims.training import accuracy, merged
from experiments.claims.translating import trained_reversal
from experiments.data.vocabulary import PAD

ARMS = {"no attention": "none", "mean of the source": "uniform", "additive": "additive"}
BOUNDS = ((1, 4), (5, 8), (9, 12))


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Train the arms and measure accuracy by length and seed."""
    data: Data = {"lengths": [high for _, high in BOUNDS], "right": {}}
    for name, score in ARMS.items():
        model, trained, given = trained_reversal(setting, score)
        of_seed = partial(_right, merged(model.build), given.test.source, given.test.target)
        found = jax.jit(jax.vmap(of_seed))(trained.parameters)
        data["right"][name] = [values.tolist() for values in found]
    return data


def _right(
    merge: Callable[[Any], Any], source: jax.Array, target: jax.Array, own: Any
) -> list[jax.Array]:
    """Return the percentage of right symbols in strings of each range of lengths."""
    logits = merge(own)(source, target)[0].swapaxes(0, 1)
    lengths = jnp.sum(target != PAD, axis=1) - 1
    symbols = jnp.arange(target.shape[1])[None] < lengths[:, None]
    ranges = [(lengths >= low) & (lengths <= high) for low, high in BOUNDS]
    return [
        100 * accuracy(logits, jnp.where(symbols & inside[:, None], target, -1))
        for inside in ranges
    ]


def verdict(data: Data) -> Verdict:
    """Judge the longest strings, then what length costs the controls."""
    *controls, attention = (data["right"][name] for name in ARMS)
    longest = attention[-1]
    found = ", ".join(
        f"{name} {shown(of[0])}% to {shown(of[-1])}%" for name, of in data["right"].items()
    )
    found = (
        f"Right symbols from the shortest to the longest strings: {found}. Attention less none: "
        f"{difference(longest, controls[0][-1])}."
    )
    if any(higher(control[-1], longest) for control in controls):
        return fails(found)
    ahead = all(higher(longest, control[-1]) for control in controls)
    lose = all(higher(control[0], control[-1]) for control in controls)
    return holds(found) if ahead and lose else undecided(found)


def figure(data: Data):
    """Draw accuracy against length."""
    return lines(
        data["lengths"],
        data["right"],
        xlabel="symbols, up to",
        ylabel="right symbols (%)",
        ylim=(0, 102),
    )
