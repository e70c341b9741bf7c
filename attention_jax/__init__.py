"""Exact attention in JAX: any score, any mask, every derivative, in memory linear in the sequence.

>>> import jax, jax.numpy as jnp
>>> from attention_jax import attend, masks, scores
>>> x = jax.random.normal(jax.random.key(0), (2, 9, 4, 8))  # [B, T, N, H]
>>> attend(x, x, x, score=scores.cosine, mask=masks.Causal() & masks.Window(3, 0)).shape
(2, 9, 4, 8)
"""

from attention_jax import (
    base,
    diagnostics,
    head_maps,
    linear,
    masks,
    normalizers,
    positions,
    scores,
    statistics,
)
from attention_jax.attention import attend, explain
from attention_jax.base import Parameter, ShapeError, bind, learned, per_example, per_head
from attention_jax.implementations import Attended, merge

__all__ = [
    "Attended",
    "Parameter",
    "ShapeError",
    "attend",
    "base",
    "bind",
    "diagnostics",
    "explain",
    "head_maps",
    "learned",
    "linear",
    "masks",
    "merge",
    "normalizers",
    "per_example",
    "per_head",
    "positions",
    "scores",
    "statistics",
]
