"""Several heads beat one by 1 to 2 BLEU.

Source: Summaries of Vaswani et al. 2017, section 3.2.2 and table 3 (A).

Method: Transformers of width 32 that translate the generated grammar with 1, 2, 4 and 8 heads of
32/h features; six seeds or more, the learning rate of each arm swept, BLEU of greedy translations.

Criterion: Of several heads the number with the least held-out loss counts. Holds if the interval
of its gain over one head lies within 1 to 2 and is conclusive; fails if it is conclusively more
than 2 or less than 1.

Published: Vaswani et al. 2017, table 3 (A), newstest2013: 1 head 24.9, 4 heads 25.5, 8 heads 25.8,
16 heads 25.8, 32 heads 25.4 BLEU: 0.9 at best, and too many heads lose again.
"""

from __future__ import annotations

import jax
import numpy as np

from experiments.claims.claim import Data, Setting, Verdict, fails, holds, undecided
from experiments.claims.drawing import lines
from experiments.claims.evidence import difference, higher, learned, shown, within
from experiments.claims.translating import trained_transformer


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Train Transformers with several numbers of heads."""
    heads = setting.pick(tiny=(1, 4), quick=(1, 4, 8), full=(1, 2, 4, 8, 16))
    found = [trained_transformer(setting, n) for n in heads]
    losses = [float(np.mean(trained.losses)) for _, trained, _ in found]
    return {"heads": heads, "bleu": [bleu for _, _, bleu in found], "loss": losses}


def verdict(data: Data) -> Verdict:
    """Judge the number of heads with the least held-out loss beside one."""
    one, *others = data["bleu"]
    best = int(np.argmin(data["loss"][1:]))
    found = (
        ", ".join(
            f"{n} heads {shown(of)}" for n, of in zip(data["heads"], data["bleu"], strict=True)
        )
        + f" BLEU; the best gains {difference(others[best], one)}."
    )
    if not learned(others[best]):
        return undecided(found)
    if within(others[best], one, 1, 2) and higher(others[best], one):
        return holds(found)
    if higher(others[best], [x + 2 for x in one]):
        return fails(f"{found} They beat it by more.")
    if higher([x + 1 for x in one], others[best]):
        return fails(f"{found} They do not beat it by that much.")
    return undecided(found)


def figure(data: Data):
    """Draw BLEU against the number of heads."""
    return lines(
        data["heads"],
        {"generated grammar": data["bleu"]},
        xlabel="heads",
        ylabel="BLEU",
        xscale="log",
    )


def table(data: Data) -> list[list[str]]:
    """Show ours beside the published figures."""
    published = {1: "24.9", 4: "25.5", 8: "25.8", 16: "25.8", 32: "25.4"}
    rows = [
        [str(n), shown(of), published.get(n, "–")]
        for n, of in zip(data["heads"], data["bleu"], strict=True)
    ]
    return [["heads", "BLEU, generated grammar", "BLEU, Vaswani et al. 2017"], *rows]
