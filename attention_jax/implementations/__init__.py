"""The ways to compute one head of attention, which of them runs, and its map over all heads."""

from attention_jax.implementations.head import Attended
from attention_jax.implementations.merging import merge
from attention_jax.implementations.pallas.primitive import interpreted

__all__ = ["Attended", "interpreted", "merge"]
