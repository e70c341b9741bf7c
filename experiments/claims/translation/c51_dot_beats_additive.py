"""Dot-product attention translates better than additive attention.

Source: Inferred from the success of the Transformer; its paper has no such ablation.

Method: Recurrent translators of the generated grammar that differ in their score alone, at several
attention sizes d; six seeds or more, the learning rate of each arm swept, BLEU of greedy
translations.

Criterion: Holds if the scaled dot product is conclusively higher than additive at every size,
fails if additive is conclusively higher at some size and never lower; holds only at some sizes if
both occur.

Published: Britz et al. 2017 (WMT15 En-De, newstest2013): at d = 128, 256, 512 and 1024
multiplicative (unscaled) 22.03, 22.33, 21.78 and 18.22 BLEU, additive 22.23, 22.33, 22.47 and
22.10; without attention 9.98. Luong et al. 2015, table 4: dot 18.6, general 17.3, local-p general
19.0. Bahdanau et al. 2015: additive 26.75 against 17.82 without attention.
"""

from __future__ import annotations

import jax

from experiments.claims.claim import Data, Setting, Verdict, fails, holds, holds_only_if, undecided
from experiments.claims.drawing import lines
from experiments.claims.evidence import by_size, difference, higher, learned
from experiments.claims.translating import SCORES, by_attention_size


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Train all scores at all sizes."""
    return by_attention_size(setting)


def verdict(data: Data) -> Verdict:
    """Judge size by size."""
    pairs = list(zip(data["bleu"]["scaled_dot"], data["bleu"]["additive"], strict=True))
    found = "BLEU of scaled dot less that of additive: " + "; ".join(
        f"{difference(*pair)} (d = {size})" for size, pair in zip(data["sizes"], pairs, strict=True)
    )
    ahead = [
        size
        for size, (dot, additive) in zip(data["sizes"], pairs, strict=True)
        if higher(dot, additive)
    ]
    behind = [
        size
        for size, (dot, additive) in zip(data["sizes"], pairs, strict=True)
        if higher(additive, dot)
    ]
    if not all(learned(*pair) for pair in pairs):
        return undecided(f"{found}.")
    if len(ahead) == len(pairs):
        return holds(f"{found}.")
    if behind and not ahead:
        return fails(f"{found}.")
    if ahead and behind:
        return holds_only_if(f"d is {', '.join(map(str, ahead))}", f"{found}.")
    return undecided(f"{found}.")


def figure(data: Data):
    """Draw BLEU against the attention size."""
    return lines(
        data["sizes"], data["bleu"], xlabel="attention size d", ylabel="BLEU", xscale="log"
    )


def table(data: Data) -> list[list[str]]:
    """Show ours and the published figures."""
    sizes = [f"here, d = {size}" for size in data["sizes"]]
    bleu = {score: data["bleu"][score] for score in SCORES}
    britz = [
        [f"Britz et al. 2017, d = {size}", dot, "–", additive]
        for size, dot, additive in zip(
            (128, 256, 512, 1024),
            ("22.03", "22.33", "21.78", "18.22"),
            ("22.23", "22.33", "22.47", "22.10"),
            strict=True,
        )
    ]
    return [*by_size("BLEU (not of the same data)", sizes, bleu), *britz]
