"""Most heads are redundant.

Source: Michel, Levy and Neubig 2019; Voita et al. 2019.

Method: In trained Transformers with 4 heads in three attentions (encoder, decoder, decoder to
encoder) each head is left out in turn by zeroing its rows of W^O, and the held-out loss measured
again. Also the entropy of the weights of the decoder's attention to the encoder, and how alike its
heads are (Jensen-Shannon divergence, CKA of the weights).

Criterion: A head is redundant if the loss without it is less than 5% higher. Holds if the interval
over seeds of the share of redundant heads lies above one half, fails if below.

Published: Michel et al. 2019, section 3: most heads of a Transformer can be left out one at a time
without a significant change of BLEU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax import diagnostics
from experiments.claims import translating
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, undecided
from experiments.claims.drawing import bars
from experiments.claims.evidence import shown
from experiments.claims.training import merged
from experiments.claims.translating import trained_transformer
from experiments.significance import interval

HEADS = 4
# Where the output matrix of each attention is.
KINDS = {
    "encoder": "encoder/block_0/attention/out/kernel",
    "decoder": "decoder/block_0/attention/out/kernel",
    "to the encoder": "decoder/block_0/cross_attention/out/kernel",
}


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure the rise of the loss without each head, by attention and seed."""
    given = translating.material(setting)
    model, trained, _ = trained_transformer(setting, HEADS)
    merge, pairs = merged(model.build), (given.valid.source, given.valid.target)

    def of_seed(parameters: Any) -> dict[str, jax.Array]:
        plain, (_, weights) = translating.teacher_forced(
            merge(parameters), pairs, return_weights=True
        )

        loss = partial(_loss, merge, pairs, parameters)
        rises = {
            kind: diagnostics.head_ablation(partial(loss, kind), HEADS) / plain - 1
            for kind in KINDS
        }
        across = weights[0].cross_attention
        apart = ~jnp.eye(HEADS, dtype=bool)[None]
        alike = {
            "entropy": jnp.mean(diagnostics.entropy(across)),
            "js": jnp.mean(diagnostics.jensen_shannon(across), where=apart),
            "cka": jnp.mean(diagnostics.linear_cka(across), where=apart),
        }
        return {**rises, **alike}

    found = jax.jit(jax.vmap(of_seed))(trained.parameters)
    return {name: values.tolist() for name, values in found.items()}


def redundant(data: Data) -> list[float]:
    """Return the share of heads of every seed without which the loss rises by less than 5%."""
    of_kinds = zip(*(data[kind] for kind in KINDS), strict=True)
    of_seeds = [[rise for of_kind in seed for rise in of_kind] for seed in of_kinds]
    return [sum(rise < 0.05 for rise in rises) / len(rises) for rises in of_seeds]


def _loss(
    merge: Callable[[Any], Any], pairs: Any, parameters: Any, kind: str, keep: jax.Array
) -> jax.Array:
    """Return the loss where each head of one kind of attention is multiplied by `keep` [heads]."""

    def cut(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf * keep[:, None, None] if KINDS[kind] in name else leaf

    left = jax.tree_util.tree_map_with_path(cut, parameters)
    return translating.teacher_forced(merge(left), pairs)[0]


def verdict(data: Data) -> Verdict:
    """Judge by the share of redundant heads."""
    share = interval(redundant(data))
    largest = max(rise for kind in KINDS for of_seed in data[kind] for rise in of_seed)
    found = (
        f"The share of heads that can be left out is {shown(redundant(data))}; the most important "
        f"one raises the loss by {100 * largest:.0f}%. Heads to the encoder differ by "
        f"{shown(data['js'])} nats (at most 0.69), CKA {shown(data['cka'])}, entropy "
        f"{shown(data['entropy'])} nats."
    )
    if share.low > 0.5:
        return holds(found)
    return fails(found) if share.high < 0.5 else undecided(found)


def figure(data: Data):
    """Draw what each head is worth; heads are ordered in each seed."""
    ranked = {
        f"{kind}, {n + 1}.": [100 * sorted(seed, reverse=True)[n] for seed in data[kind]]
        for kind in KINDS
        for n in range(HEADS)
    }
    return bars(ranked, xlabel="rise of the loss without the head (%)", marks={"5%": 5})
