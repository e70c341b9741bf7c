"""Additive attention, with more parameters of its own, does better when there is little data.

Source: Sources contradict each other: some say that it does, some that it overfits.

Method: Recurrent translators of the generated grammar with additive and scaled dot-product
attention, with as many steps on few training pairs (100 to 2000) and on all; six seeds or more,
the learning rate of each arm and size swept. Held-out loss of a word.

Criterion: Holds if at the smallest size additive has a conclusively lower loss and the advantage
is larger than with all data; fails if the scaled dot product is conclusively lower there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims import translating
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, undecided
from experiments.claims.drawing import lines
from experiments.claims.evidence import by_size, difference, higher

SCORES = ("additive", "scaled_dot")


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Train both scores on each size."""
    given = translating.material(setting)
    everything = int(given.train.size)
    sizes = setting.pick(tiny=(50,), quick=(200,), full=(100, 500, 2000))
    data: Data = {"sizes": [*sizes, everything], "loss": {}, "rate": {}}
    for score in SCORES:
        model = translating.recurrent(given, score)
        found = [
            model.train(setting, given, given.train._replace(size=jnp.int32(size)))
            for size in data["sizes"]
        ]
        data["loss"][score] = [trained.losses for trained in found]
        data["rate"][score] = [trained.rate for trained in found]
    return data


def verdict(data: Data) -> Verdict:
    """Judge the smallest size."""
    additive, dot = (data["loss"][score] for score in SCORES)
    found = "Loss of scaled dot less that of additive: " + "; ".join(
        f"{difference(dot[n], additive[n])} ({size} pairs)" for n, size in enumerate(data["sizes"])
    )
    least, most = ([b - a for a, b in zip(additive[n], dot[n], strict=True)] for n in (0, -1))
    if higher(additive[0], dot[0]):
        return fails(f"{found}.")
    if higher(dot[0], additive[0]) and np.mean(least) > np.mean(most):
        return holds(f"{found}.")
    return undecided(f"{found}.")


def figure(data: Data):
    """Draw loss against size."""
    return lines(
        data["sizes"],
        data["loss"],
        xlabel="training pairs",
        ylabel="loss of a held-out word",
        xscale="log",
    )


def table(data: Data) -> list[list[str]]:
    """Show losses."""
    loss = {score: data["loss"][score] for score in SCORES}
    return by_size("loss of a held-out word", [f"{size} pairs" for size in data["sizes"]], loss)
