"""For small d_k additive attention is better, for large d_k the scaled dot product.

Source: Common reading of Vaswani et al. 2017, section 3.2.1, which says that both are alike for
small d_k and that additive outperforms the unscaled dot product for larger ones.

Method: The recurrent translators of claim 51: held-out loss of a word with dot, scaled dot and
additive attention against the attention size d, after equally many steps.

Criterion: Holds if the loss of additive is conclusively lower at the smallest size and that of the
scaled dot product at the largest. Fails if either is conclusively the other way round.

Published: Britz et al. 2017: unscaled multiplicative attention falls from 22.33 BLEU at d = 256 to
18.22 at d = 1024, additive stays at 22.10.
"""

from __future__ import annotations

import jax

from experiments.claims.claim import Data, Setting, Verdict, fails, holds, undecided
from experiments.claims.drawing import lines
from experiments.claims.evidence import by_size, difference, higher
from experiments.claims.translating import SCORES, by_attention_size


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Train all scores at all sizes."""
    return by_attention_size(setting)


def verdict(data: Data) -> Verdict:
    """Judge both ends."""
    sizes, loss = data["sizes"], data["loss"]
    dot, scaled, additive = ((loss[name][0], loss[name][-1]) for name in SCORES)
    found = (
        f"Loss of scaled dot less that of additive: {difference(scaled[0], additive[0])} at "
        f"d = {sizes[0]}, {difference(scaled[1], additive[1])} at d = {sizes[-1]}, where unscaled "
        f"dot less scaled dot is {difference(dot[1], scaled[1])}."
    )
    if higher(scaled[0], additive[0]) and higher(additive[1], scaled[1]):
        return holds(found)
    if higher(additive[0], scaled[0]) or higher(scaled[1], additive[1]):
        return fails(found)
    return undecided(found)


def figure(data: Data):
    """Draw the loss against the attention size."""
    return lines(
        data["sizes"],
        data["loss"],
        xlabel="attention size d",
        ylabel="loss of a held-out word",
        xscale="log",
    )


def table(data: Data) -> list[list[str]]:
    """Show losses."""
    loss = {score: data["loss"][score] for score in SCORES}
    return by_size("loss of a held-out word", [f"d = {size}" for size in data["sizes"]], loss)
