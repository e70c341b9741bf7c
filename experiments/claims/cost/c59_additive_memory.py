"""Additive attention needs more memory than dot-product attention because of its parameters.

Source: Comparison tables in blogs and lectures; Vaswani et al. 2017, section 3.2.1, only say that
dot products are faster and more space-efficient in practice.

Method: Bytes of temporaries that the compiler plans for the gradient of one head with respect to
the queries, bytes of the parameters, and processor time of programs that take turns: scaled dot
product; additive by the textbook's broadcast to [T, S, A]; additive by `attend`, dense and tiled.

Criterion: Holds if the parameters are at least half of what textbook additive attention needs
beyond the dot product; fails if they are below a tenth.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from attention_jax import attend, bind, scores
from attention_jax.base.parameters import initialize, parameters_of
from experiments.benchmark.measure import (
    Program,
    compiled,
    mebibytes_of,
    milliseconds_of,
    take_turns,
)
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, undecided
from experiments.claims.drawing import bars
from experiments.claims.evidence import shown

DEPTH = 64


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Read temporaries from the analysis of the compiler."""
    length = setting.pick(tiny=64, quick=1024, full=2048)
    rows = jax.random.normal(rng, (3, length, DEPTH))
    own = initialize(rng, parameters_of(scores.additive, DEPTH, DEPTH, DEPTH))

    def textbook(query: jax.Array, memory: jax.Array, value: jax.Array) -> jax.Array:
        features = (query @ own["query_weight"])[:, None] + memory @ own["key_weight"] + own["bias"]
        return jax.nn.softmax(jnp.tanh(features) @ own["value"]) @ value

    def one_head(query: jax.Array, *others: jax.Array, **options) -> jax.Array:
        of_layout = (x[None, :, None] for x in (query, *others))
        return attend(*of_layout, **options)[0, :, 0]

    additive = bind(scores.additive, **own)
    programs = {
        "dot, dense": partial(one_head, implementation="dense"),
        "dot, tiled": partial(one_head, implementation="tiled"),
        "additive, textbook": textbook,
        "additive, dense": partial(one_head, score=additive, implementation="dense"),
        "additive, tiled": partial(one_head, score=additive, implementation="tiled"),
    }

    def gradient(function):
        of_loss = jax.grad(lambda *arrays: jnp.sum(function(*arrays) ** 2))
        return compiled(Program(of_loss, tuple(rows)))

    called = {name: gradient(function) for name, function in programs.items()}
    meters = {name: milliseconds_of(program, tuple(rows)) for name, program in called.items()}
    costs = take_turns(meters, setting.pick(tiny=2, quick=5, full=15))
    return {
        "length": length,
        "parameters": sum(x.size for x in jax.tree.leaves(own)) * 4 / 2**20,
        "temporaries": {name: mebibytes_of(program) for name, program in called.items()},
        "milliseconds": {name: [cost.cpu for cost in of] for name, of in costs.items()},
    }


def verdict(data: Data) -> Verdict:
    """Judge by the share of the parameters in the excess of memory."""
    held, parameters = data["temporaries"], data["parameters"]
    excess = held["additive, textbook"] - held["dot, dense"]
    share = parameters / max(excess, 1e-9)
    found = (
        f"At length {data['length']} textbook additive attention holds "
        f"{held['additive, textbook']:.1f} "
        f"MiB, the dense dot product {held['dot, dense']:.1f}; the parameters are {parameters:.3f} "
        f"MiB, {100 * share:.2g}% of the difference. It is the T x S x A array; without it "
        f"additive needs {held['additive, tiled']:.2f} MiB (tiled; the dot product "
        f"{held['dot, tiled']:.2f}), and {shown(data['milliseconds']['additive, tiled'])} instead "
        f"of {shown(data['milliseconds']['additive, textbook'])} ms of processor."
    )
    if excess > 0 and share < 0.1:
        return fails(found)
    return holds(found) if excess > 0 and share >= 0.5 else undecided(found)


def figure(data: Data):
    """Draw bytes on a logarithmic axis."""
    held = data["temporaries"] | {"parameters": data["parameters"]}
    return bars(held, xlabel="MiB", xscale="log")


def table(data: Data) -> list[list[str]]:
    """Show bytes and time."""
    rows = [
        [name, f"{held:.2f}", shown(data["milliseconds"][name])]
        for name, held in data["temporaries"].items()
    ]
    return [["gradient of one head", "MiB of temporaries", "ms of processor"], *rows]
