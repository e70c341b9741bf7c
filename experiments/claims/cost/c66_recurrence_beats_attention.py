"""A recurrent layer, O(n d^2), is faster than attention, O(n^2 d), once n exceeds d.

Source: Vaswani et al. 2017, section 4 and table 1 (attention is faster while n is below d).

Method: Processor time of a GRU (a scan over n, d x d products) and of self-attention with its
projections, both of width 64 and batch 1, forward, for n of 16 to 8192; where the curves cross, by
interpolation. Bytes of temporaries that the compiler plans are reported beside.

Criterion: Holds if the recurrence is faster from 2 d at the latest. If it wins further out, the
claim needs that length as its condition; fails if it never does.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.nnx import MultiHeadAttention
from experiments.benchmark.measure import (
    Program,
    compiled,
    mebibytes_of,
    milliseconds_of,
    take_turns,
)
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, holds_only_if
from experiments.claims.drawing import lines
from experiments.claims.evidence import shown

WIDTH = 64


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure milliseconds by length and turn."""
    lengths = setting.pick(
        tiny=(8, 16), quick=(16, 64, 256, 1024, 4096, 8192), full=(16, 64, 256, 1024, 4096, 16384)
    )
    layer = MultiHeadAttention(1, WIDTH, rngs=nnx.Rngs(rng))
    cell = nnx.GRUCell(WIDTH, WIDTH, rngs=nnx.Rngs(rng))

    def recurrence(x: jax.Array) -> jax.Array:
        _, states = jax.lax.scan(cell, jnp.zeros((1, WIDTH)), x.swapaxes(0, 1))
        return states

    meters, held = {}, {"attention": [], "recurrence": []}
    for n in lengths:
        x = jax.random.normal(rng, (1, n, WIDTH))
        for name, function in {"attention": layer, "recurrence": recurrence}.items():
            called = compiled(Program(lambda x, f=function: f(x), (x,)))
            meters[f"{name}@{n}"] = milliseconds_of(called, (x,))
            held[name].append(mebibytes_of(called))
    costs = take_turns(meters, setting.pick(tiny=2, quick=9, full=25))
    return {
        "lengths": lengths,
        "mebibytes": held,
        **{
            name: [[cost.cpu for cost in costs[f"{name}@{n}"]] for n in lengths]
            for name in ("attention", "recurrence")
        },
    }


def crossing(data: Data) -> float | None:
    """Return the length beyond which the recurrence is faster, by medians; None if it is not."""
    n = np.log(data["lengths"])
    ahead = np.log([np.median(of) for of in data["attention"]])
    ahead -= np.log([np.median(of) for of in data["recurrence"]])
    if ahead[-1] <= 0:
        return None
    last = int(np.flatnonzero(ahead <= 0)[-1]) if (ahead <= 0).any() else 0
    if ahead[last] > 0:
        return float(data["lengths"][0])
    share = -ahead[last] / (ahead[last + 1] - ahead[last])
    return math.exp(n[last] + share * (n[last + 1] - n[last]))


def verdict(data: Data) -> Verdict:
    """Judge by where the curves cross."""
    at, longest = crossing(data), data["lengths"][-1]
    found = (
        f"At n = {longest}: attention {shown(data['attention'][-1])} ms, recurrence "
        f"{shown(data['recurrence'][-1])} ms, for d = {WIDTH}; temporaries of "
        f"{data['mebibytes']['attention'][-1]:.1f} and {data['mebibytes']['recurrence'][-1]:.1f} "
        f"MiB."
    )
    if at is None:
        return fails(f"{found} The recurrence is never faster up to there.")
    if at <= data["lengths"][0]:
        return holds(f"{found} It is faster from n = {at:.0f}, long before d.")
    if at <= 2 * WIDTH:
        return holds(f"{found} They cross at n = {at:.0f}.")
    return holds_only_if(f"n exceeds about {at:.0f}, {at / WIDTH:.1f} d", found)


def figure(data: Data):
    """Draw both times against the length."""
    series = {name: data[name] for name in ("attention", "recurrence")}
    return lines(
        data["lengths"],
        series,
        xlabel="length n",
        ylabel="ms of processor",
        xscale="log",
        yscale="log",
        xmarks={"n = d": WIDTH},
    )
