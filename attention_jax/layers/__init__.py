"""Layers as the two Flax APIs share them: heads, multi-head attention, Transformer blocks."""

from attention_jax.layers.generation import generate
from attention_jax.layers.heads import (
    HeadOptions,
    HeadSizes,
    ProjectedMemory,
    Projections,
    apply_position,
)
from attention_jax.layers.linear import LinearLayer, LinformerLayer
from attention_jax.layers.mixing import differential, multi_token
from attention_jax.layers.multi_head import MultiHead
from attention_jax.layers.options import BlockOptions, StackOptions, by_layer
from attention_jax.layers.transformer import BlockWeights

__all__ = [
    "BlockOptions",
    "BlockWeights",
    "HeadOptions",
    "HeadSizes",
    "LinearLayer",
    "LinformerLayer",
    "MultiHead",
    "ProjectedMemory",
    "Projections",
    "StackOptions",
    "apply_position",
    "by_layer",
    "differential",
    "generate",
    "multi_token",
]
