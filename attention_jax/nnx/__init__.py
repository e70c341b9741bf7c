"""Attention modules for Flax NNX: thin, they create parameters and call the library's functions.

>>> import jax.numpy as jnp
>>> from flax import nnx
>>> from attention_jax import nnx as attention_nnx
>>> attention = attention_nnx.AdditiveAttention(8, 16, rngs=nnx.Rngs(0))
>>> state, memory = jnp.zeros((2, 8)), jnp.zeros((2, 5, 16))
>>> context, weights = nnx.jit(lambda attention, *x: attention(*x))(attention, state, memory)
>>> context.shape, weights.shape
((2, 16), (2, 5))
"""

import attention_jax.layers.tabulate  # noqa: F401  (lets Flax print masks)
from attention_jax.nnx.bound import Bound
from attention_jax.nnx.decoder import AdditiveAttention, DecoderAttention, GlobalAttention
from attention_jax.nnx.linear import LinearAttention, LinformerAttention
from attention_jax.nnx.longformer import LongformerAttention
from attention_jax.nnx.models import CausalDecoder, EncoderDecoder, PatchEncoder, TokenEncoder
from attention_jax.nnx.multi_head import MultiHeadAttention
from attention_jax.nnx.transformer import (
    Embedding,
    FeedForward,
    TransformerBlock,
    TransformerStack,
)

__all__ = [
    "AdditiveAttention",
    "Bound",
    "CausalDecoder",
    "DecoderAttention",
    "Embedding",
    "EncoderDecoder",
    "FeedForward",
    "GlobalAttention",
    "LinearAttention",
    "LinformerAttention",
    "LongformerAttention",
    "MultiHeadAttention",
    "PatchEncoder",
    "TokenEncoder",
    "TransformerBlock",
    "TransformerStack",
]
