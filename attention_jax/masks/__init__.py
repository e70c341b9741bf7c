"""Masks: predicates over indices that compose, draw themselves and know their tiles.

A mask says with one predicate which query may attend to which key, True = may attend:

    causal(q_idx, kv_idx) = q_idx >= kv_idx

Masks close under `&`, `|` and `~`. The same predicate, read over intervals of indices
(`attention_jax.intervals`), tells for every tile whether it is EMPTY, FULL or PARTIAL.
"""

from attention_jax.masks.algebra import (
    Full,
    Mask,
    MaskLike,
    Predicate,
    Shift,
    Table,
    as_mask,
    draw,
)
from attention_jax.masks.common import Causal, Lengths, Prefix, Segment, Window
from attention_jax.masks.graphs import Edges, edges
from attention_jax.masks.grids import GridWindow, swin, window_order
from attention_jax.masks.intervals import EMPTY, FULL, PARTIAL, Lookup
from attention_jax.masks.patterns import (
    Block,
    Chunked,
    Dilated,
    Fixed,
    GlobalTokens,
    Heads,
    Strided,
)
from attention_jax.masks.published import (
    bigbird,
    longformer,
    random_blocks,
    sparse_fixed,
    sparse_strided,
)

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "Block",
    "Causal",
    "Chunked",
    "Dilated",
    "Edges",
    "Fixed",
    "Full",
    "GlobalTokens",
    "GridWindow",
    "Heads",
    "Lengths",
    "Lookup",
    "Mask",
    "MaskLike",
    "Predicate",
    "Prefix",
    "Segment",
    "Shift",
    "Strided",
    "Table",
    "Window",
    "as_mask",
    "bigbird",
    "draw",
    "edges",
    "longformer",
    "random_blocks",
    "sparse_fixed",
    "sparse_strided",
    "swin",
    "window_order",
]
