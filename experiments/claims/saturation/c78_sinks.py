"""Attention sinks appear without any need, and a softmax with one more in its sum removes them.

Source: Xiao et al. 2024, section 3.1 (the first tokens, whatever they say); Miller 2023 for the
one.

Method: Causal decoders of one layer learn a text of symbols in which two of them say "copy the
symbol before me", and every other symbol chooses the next one by itself (Guo et al. 2024, section
2). Each text begins with the same token, which says nothing about any other: what a copy needs is
the token before, and what follows another symbol needs no attention at all. Measured is the weight
on the first token, of symbols in the second half of the text that copy nothing, in the head where
it is largest; with softmax, and with softmax plus one.

Criterion: Sinks appear if with softmax the interval over seeds of that weight lies above 0.3 (the
threshold of Gu et al. 2025, section 3; alike to all keys it would be 0.05), and do not if below.
Plus one removes them if its interval lies below 0.3 and it is conclusively lower, and does not if
the interval lies above 0.3. Holds if both are so, only in part if plus one does not remove them,
fails if there are none; undecided unless both arms copy 90% of symbols rightly.

Published: Xiao et al. 2024, figure 2: in most heads of Llama-2-7B from the third layer on, most of
the weight is on the first token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax import normalizers, statistics
from experiments.claims import copying
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, holds_only_if, undecided
from experiments.claims.copying import COPYING, LENGTH, Batch
from experiments.claims.drawing import lines
from experiments.claims.evidence import difference, higher, shown
from experiments.claims.training import accuracy, train
from experiments.significance import interval

SINK = 0.3
ARMS = {"softmax": normalizers.softmax, "plus one": normalizers.softmax_plus_one}
ASKED = {
    "first": statistics.mass(lambda q_idx, kv_idx: kv_idx < 1),
    "total": statistics.mass(lambda q_idx, kv_idx: kv_idx >= 0),
    "received": statistics.received_mass,
}


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure weights on the first token, by arm and seed, and how well copies succeed."""
    data: Data = {"first": {}, "total": {}, "copied": {}, "loss": {}, "received": {}}
    test = copying.batch(jax.random.key(1), None, 128)
    for name, normalizer in ARMS.items():
        arm, merge = copying.decoder(normalizer)
        trained = train(
            arm,
            copying.batch,
            rng,
            rates=setting.pick(tiny=(3e-3,), quick=(3e-3, 1e-2), full=(3e-3, 1e-2)),
            seeds=setting.pick(tiny=2, quick=6, full=8),
            steps=setting.pick(tiny=4, quick=500, full=1500),
            held_out=test,
        )
        of_seed = functools.partial(_looked_at, merge, test)
        found = jax.jit(jax.vmap(of_seed))(trained.parameters)
        for what, values in found.items():
            data[what][name] = values.tolist()
        data["loss"][name] = trained.losses
        data["received"][name] = found["received"].T.tolist()
    return data


def _looked_at(merge: Callable[[Any], Any], batch: Batch, own: Any) -> dict[str, jax.Array]:
    """Return mean weights of symbols that copy nothing, and the share of copies that are right."""
    logits, (layer,) = merge(own)(batch.tokens, statistics=ASKED)
    found, places = layer.attention, jnp.arange(LENGTH)
    copies = (batch.tokens < COPYING) & (places >= 2)[None]
    late = (batch.tokens >= COPYING) & (places >= LENGTH // 2)[None]
    first, total = (
        jnp.mean(found[name], axis=(0, 1), where=late[..., None]) for name in ("first", "total")
    )
    head = jnp.argmax(first)
    received = jnp.mean(found["received"][..., head], axis=0) / (LENGTH - places)
    right = accuracy(logits, jnp.where(copies, batch.following, -1))
    return {"first": first[head], "total": total[head], "received": received, "copied": 100 * right}


def verdict(data: Data) -> Verdict:
    """Judge the weight on the first token."""
    plain, one = (data["first"][name] for name in ARMS)
    loss, loss_of_one = (data["loss"][name] for name in ARMS)
    found = (
        f"The first token gets {shown(plain)} of the weight with softmax, {shown(one)} with plus "
        f"one, whose weights then sum to {shown(data['total']['plus one'])}. The loss is "
        f"{shown(loss)}, with plus one less by {difference(loss, loss_of_one)}; copies succeed in "
        f"{shown(data['copied']['softmax'])} and {shown(data['copied']['plus one'])}%."
    )
    if any(interval(data["copied"][name]).mean < 90 for name in ARMS):
        return undecided(found)
    if interval(plain).high < SINK:
        return fails(found)
    if interval(plain).low <= SINK:
        return undecided(found)
    if interval(one).high < SINK and higher(plain, one):
        return holds(found)
    if interval(one).low > SINK:
        return holds_only_if("nothing is said of plus one, which does not remove them", found)
    return undecided(found)


def figure(data: Data):
    """Draw what each key receives from a query that may attend to it."""
    count = len(next(iter(data["received"].values())))
    return lines(
        range(count),
        data["received"],
        xlabel="position of the key",
        ylabel="mean weight that it receives",
        marks={"threshold of a sink": SINK},
        ylim=(0, 1.02),
    )
