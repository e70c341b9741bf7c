"""Attention is a bridge for gradients: they reach the source without fading with distance.

Source: Bahdanau et al. 2015, section 1, and lectures on vanishing gradients in recurrent
translators.

Method: The recurrent translators of claim 74, trained to write strings backwards. The norm of the
gradient of the logit of the right word j with respect to all source embeddings, over test strings
of 8 symbols and more, for j up to 8: the slope of its logarithm against j, with additive attention
and without. With attention, also the correlation of the gradient at each source word with the
weight it gets.

Criterion: Holds if the slope without attention is conclusively lower, more negative, and the
interval of that with attention is above half of it. Fails if attention's is conclusively the lower
one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims.claim import Data, Setting, Verdict, fails, holds, undecided
from experiments.claims.drawing import lines
from experiments.claims.evidence import difference, higher, shown
from experiments.claims.training import merged
from experiments.claims.translating import trained_reversal
from experiments.data.vocabulary import PAD
from experiments.significance import interval

WORDS = 8
ARMS = {"additive": "additive", "without attention": "none"}


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure norms of gradients by arm, word and seed, and the correlation with the weights."""
    data: Data = {}
    for name, score in ARMS.items():
        model, trained, given = trained_reversal(setting, score)
        long = np.asarray(jnp.sum(given.test.target != PAD, axis=1) > WORDS)
        source = given.test.source[long][:16]
        target = given.test.target[long][:16]

        of_seed = partial(_norms, merged(model.build), source, target)
        norms, correlation = jax.jit(jax.vmap(of_seed))(trained.parameters)
        data[name] = {"norms": norms.T.tolist(), "correlation": correlation.tolist()}
    return data


def _norms(merge: Callable[[Any], Any], source: jax.Array, target: jax.Array, own: Any) -> Any:
    """Return norms of the gradients of the first words, and their correlation with the weights."""
    rows = merge(own).encoder.embedding(source)
    logits = partial(_logits, merge, source, target, own)
    gradients, weights = jax.jacrev(logits, has_aux=True)(rows)
    sizes = jnp.linalg.norm(gradients, axis=-1).swapaxes(0, 1)  # [B, T, S]
    norms = jnp.mean(jnp.sqrt(jnp.sum(sizes**2, axis=-1)), axis=0)
    return norms, jnp.corrcoef(sizes.reshape(-1), weights.reshape(-1))[0, 1]


def _logits(
    merge: Callable[[Any], Any],
    source: jax.Array,
    target: jax.Array,
    own: Any,
    embedded: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return the logits of the first target words, summed over sentences, and all weights."""
    model = merge(own)
    # Every source word has its own row, and so its own gradient.
    model.encoder.embedding = lambda tokens: embedded.swapaxes(0, 1)
    found, weights = model(source, target)
    right = jnp.take_along_axis(found, target.T[..., None], axis=-1)[:WORDS, :, 0]
    return jnp.sum(right, axis=1), weights.swapaxes(0, 1)[:, :WORDS]


def slopes(data: Data, name: str) -> list[float]:
    """Return the slope of the logarithm of the norms against the word, for each seed."""
    norms = np.log(np.asarray(data[name]["norms"]))
    return np.polyfit(np.arange(len(norms)), norms, 1)[0].tolist()


def verdict(data: Data) -> Verdict:
    """Judge by the slopes."""
    bridged, plain = (slopes(data, name) for name in ARMS)
    found = (
        f"Log-slope per word {shown(bridged)} with attention, {shown(plain)} without: "
        f"{difference(bridged, plain)}. With attention the gradient at a source word and its "
        f"weight correlate {shown(data['additive']['correlation'])}."
    )
    half = interval(plain).mean / 2
    if higher(bridged, plain) and interval(bridged).low > half:
        return holds(found)
    return fails(found) if higher(plain, bridged) else undecided(found)


def figure(data: Data):
    """Draw norms against the word."""
    series = {name: data[name]["norms"] for name in ARMS}
    count = range(1, 1 + len(next(iter(series.values()))))
    return lines(
        count, series, xlabel="target word j", ylabel="norm of gradient at the source", yscale="log"
    )
