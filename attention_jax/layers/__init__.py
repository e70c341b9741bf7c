"""Layers as the two Flax APIs share them: heads, multi-head attention, Transformer blocks."""

from attention_jax.layers.heads import HeadSizes, Projected, Projections
from attention_jax.layers.linear import LinearLayer, LinformerLayer
from attention_jax.layers.multi_head import MultiHead

__all__ = ["HeadSizes", "LinearLayer", "LinformerLayer", "MultiHead", "Projected", "Projections"]
