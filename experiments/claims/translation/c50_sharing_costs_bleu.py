"""Sharing the projections of queries and keys costs 1 to 2 BLEU.

Source: Folklore without a source; Kitaev et al. 2020, section 5, find no loss for shared-QK.

Method: Transformers that translate the generated grammar, with separate and with shared
projections of queries and keys in self-attention, and shared with tokens that do not attend to
themselves; six seeds or more, the learning rate of each arm swept, BLEU of greedy translations.

Criterion: Holds if the interval of the loss of BLEU over seeds lies within 1 to 2 and is
conclusive; fails if it is conclusive and outside, or lies within 1 of zero; else it cannot be
decided.
"""

from __future__ import annotations

import jax

from experiments.claims.claim import Data, Setting, Verdict, fails, holds, undecided
from experiments.claims.drawing import bars
from experiments.claims.evidence import difference, higher, learned, shown, within
from experiments.claims.translating import trained_transformer

HEADS = 4
ARMS = {"separate": "", "shared": "tied", "shared, not oneself": "tied, not oneself"}


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Train the three arms."""
    trained = {name: trained_transformer(setting, HEADS, how) for name, how in ARMS.items()}
    return {"bleu": {name: bleu for name, (_, _, bleu) in trained.items()}}


def verdict(data: Data) -> Verdict:
    """Judge by the loss of BLEU by sharing."""
    bleu = data["bleu"]
    separate, shared = bleu["separate"], bleu["shared"]
    found = (
        ", ".join(f"{name} {shown(of)}" for name, of in bleu.items())
        + f" BLEU; loss by sharing {difference(separate, shared)}."
    )
    if not learned(separate):
        return undecided(found)
    if within(separate, shared, 1, 2) and higher(separate, shared):
        return holds(found)
    beyond = higher(separate, [x + 2 for x in shared]) or higher(shared, separate)
    return fails(found) if beyond or within(separate, shared, -1, 1) else undecided(found)


def figure(data: Data):
    """Draw BLEU of each arm."""
    return bars(data["bleu"], xlabel="BLEU")
