"""Windowed attention sees the whole sequence if there are enough layers, more of them if dilated.

Source: Beltagy et al. 2020, section 3.1 (receptive field l x w, and l x d x w dilated).

Method: Which of 64 tokens reach which through 1 to 40 layers, exactly, by products of boolean
masks: windows of 1 to 8 on either side, the window of 2 with dilation 2 and 4, and a window with
one global token.

Criterion: Holds if every window needs ceil(63 / w) layers, no more and no fewer, and dilated
windows see everything too. Holds only undilated if those never do.
"""

from __future__ import annotations

import math

import jax
import numpy as np

from attention_jax.masks import Dilated, Mask, Window, longformer
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, holds_only_if
from experiments.claims.drawing import lines

TOKENS, LAYERS = 64, 40
WINDOWS = (2, 4, 8)


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Count the share of pairs that are connected after each layer."""
    cases: dict[str, Mask] = {f"window {w}": Window(w, w) for w in WINDOWS}
    cases |= {f"window 2, dilation {d}": Dilated(2, 2, d) for d in (2, 4)}
    cases["window 2, one global token"] = longformer(2, 1)
    return {"reached": {name: _reached(mask) for name, mask in cases.items()}}


def _reached(mask: Mask) -> list[float]:
    step = np.asarray(mask.to_dense(TOKENS)).astype(int)
    reach, shares = np.eye(TOKENS, dtype=int), []
    for _ in range(LAYERS):
        reach = ((step @ reach) > 0).astype(int)
        shares.append(float(reach.mean()))
    return shares


def verdict(data: Data) -> Verdict:
    """Judge by the layers that are needed."""
    needed = {
        name: shares.index(1.0) + 1 if 1.0 in shares else None
        for name, shares in data["reached"].items()
    }
    found = "Layers until all see all: " + ", ".join(
        f"{name}: {count or 'never'}" for name, count in needed.items()
    )
    if any(needed[f"window {w}"] != math.ceil((TOKENS - 1) / w) for w in WINDOWS):
        return fails(f"{found}.")
    if any(needed[f"window 2, dilation {d}"] is None for d in (2, 4)):
        return holds_only_if(
            "some head is not dilated; a dilation never mixes its residues", f"{found}."
        )
    return holds(f"{found}.")


def figure(data: Data):
    """Draw the share of connected pairs against the number of layers."""
    return lines(
        range(1, LAYERS + 1),
        data["reached"],
        xlabel="layers",
        ylabel="share of pairs that see each other",
    )
