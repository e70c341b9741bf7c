"""More heads have more parameters.

Source: Common belief about multi-head attention; against it, Vaswani et al. 2017, section 3.2.2.

Method: Parameters of `nnx.MultiHeadAttention` of width 256 are counted for 1 to 16 heads, with
256/h features a head, as is usual, and with 64 features a head.

Criterion: Holds if the count grows in both cases, fails if in neither; else it needs its
condition.
"""

from __future__ import annotations

import jax
from flax import nnx

from attention_jax.nnx import MultiHeadAttention
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, holds_only_if
from experiments.claims.drawing import lines

WIDTH = 256
HEADS = (1, 2, 4, 8, 16)


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Count parameters."""
    return {
        "heads": HEADS,
        "depth 256/h": [_count(heads, WIDTH // heads) for heads in HEADS],
        "depth 64": [_count(heads, 64) for heads in HEADS],
    }


def _count(heads: int, depth: int) -> int:
    def build() -> MultiHeadAttention:
        return MultiHeadAttention(
            heads, WIDTH, query_depth=depth, value_depth=depth, rngs=nnx.Rngs(0)
        )

    layer = nnx.eval_shape(build)
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param)))


def verdict(data: Data) -> Verdict:
    """Judge by whether either count grows."""
    usual, fixed = data["depth 256/h"], data["depth 64"]
    found = (
        f"From {data['heads'][0]} to {data['heads'][-1]} heads: {usual[0]:,} to {usual[-1]:,} "
        f"parameters with 256/h features a head, {fixed[0]:,} to {fixed[-1]:,} with 64."
    )
    grows = usual[-1] > usual[0], fixed[-1] > fixed[0]
    if all(grows):
        return holds(found)
    return holds_only_if("the depth of a head is kept", found) if grows[1] else fails(found)


def figure(data: Data):
    """Draw both counts."""
    series = {name: data[name] for name in ("depth 256/h", "depth 64")}
    return lines(data["heads"], series, xlabel="heads", ylabel="parameters", xscale="log")
