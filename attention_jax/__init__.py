"""Exact attention in JAX: any score, any mask, every derivative, in memory linear in the sequence.

>>> import jax, jax.numpy as jnp
>>> from attention_jax import attend, bind, masks, scores
>>> x = jax.random.normal(jax.random.key(0), (2, 9, 4, 8))  # [B, T, N, H]
>>> attend(x, x, x, score=scores.cosine, mask=masks.Causal() & masks.Window(3, 0)).shape
(2, 9, 4, 8)
"""

from attention_jax import masks, normalizers, scores
from attention_jax.attention import attend, explain
from attention_jax.binding import bind, per_head
from attention_jax.merging import merge

__all__ = ["attend", "bind", "explain", "masks", "merge", "normalizers", "per_head", "scores"]
