"""Queries and keys of different depth call for additive attention.

Source: Given as the advantage of additive attention in lectures; Bahdanau et al. 2015 had such
depths.

Method: Pointing at a key when queries have 16 features and keys 24, by additive, general
(bilinear) and low-rank bilinear scores with as nearly equal numbers of parameters as possible; six
seeds or more, the learning rate of each arm swept, accuracy on new examples.

Criterion: Holds if additive is conclusively higher than both others; fails if one of them is
conclusively higher than additive, or within 1 point of it over the whole interval.
"""

from __future__ import annotations

import jax

from attention_jax import scores
from experiments.claims import pointing, training
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, undecided
from experiments.claims.drawing import bars
from experiments.claims.evidence import difference, higher, shown, within

# 16 x 24 = 384 parameters, (16 + 24) 10 = 400, (16 + 24 + 2) 9 = 378.
ARMS = {"additive": 9, "bilinear": None, "low_rank_bilinear": 10}


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Train the three arms."""
    task = pointing.Task(query_depth=16, key_depth=24, latent=8, noise=0.5)
    given = task._replace(examples=setting.pick(tiny=64, quick=2048, full=8192)).batch(rng)
    data: Data = {"accuracy": {}, "parameters": {}}
    for name, size in ARMS.items():
        score = getattr(scores, name)
        trained = training.train(
            pointing.arm(score, task, size),
            task.batch,
            jax.random.key(0),
            rates=setting.pick(
                tiny=(1e-2,), quick=(3e-3, 1e-2, 3e-2), full=(1e-3, 3e-3, 1e-2, 3e-2)
            ),
            seeds=setting.pick(tiny=2, quick=6, full=8),
            steps=setting.pick(tiny=20, quick=800, full=4000),
        )
        right = pointing.right(score, trained.parameters, given)
        data["accuracy"][name] = (100 * right).tolist()
        leaves = jax.tree.leaves(trained.parameters)
        data["parameters"][name] = sum(leaf[0].size for leaf in leaves)
    return data


def verdict(data: Data) -> Verdict:
    """Judge additive beside each of the others."""
    accuracy = data["accuracy"]
    additive, *others = (accuracy[name] for name in ARMS)
    found = (
        ", ".join(
            f"{name} {shown(accuracy[name])}% ({data['parameters'][name]} parameters)"
            for name in ARMS
        )
        + f"; general less additive {difference(others[0], additive)}."
    )
    if all(higher(additive, other) for other in others):
        return holds(found)
    rivals = any(higher(other, additive) or within(other, additive, -1, 1) for other in others)
    return fails(found) if rivals else undecided(found)


def figure(data: Data):
    """Draw accuracies."""
    return bars(data["accuracy"], xlabel="points right (%)")
