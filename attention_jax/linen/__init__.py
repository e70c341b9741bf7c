"""Attention modules for Flax Linen, twins of `attention_jax.nnx`: same parameters, same results.

>>> import jax
>>> import jax.numpy as jnp
>>> from attention_jax import linen as attention_linen
>>> attention = attention_linen.AdditiveAttention(8, 16, attention_size=4)
>>> state, memory = jnp.zeros((2, 8)), jnp.zeros((2, 5, 16))
>>> variables = attention.init(jax.random.key(0), state, memory)
>>> context, weights = attention.apply(variables, state, memory)
>>> context.shape, weights.shape
((2, 16), (2, 5))
"""

import attention_jax.layers.tabulate  # noqa: F401  (lets Flax print masks)
from attention_jax.linen.bound import Bound
from attention_jax.linen.decoder import AdditiveAttention, DecoderAttention, GlobalAttention
from attention_jax.linen.linear import LinearAttention, LinformerAttention
from attention_jax.linen.longformer import LongformerAttention
from attention_jax.linen.models import CausalDecoder, EncoderDecoder, PatchEncoder, TokenEncoder
from attention_jax.linen.multi_head import MultiHeadAttention
from attention_jax.linen.transformer import (
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
