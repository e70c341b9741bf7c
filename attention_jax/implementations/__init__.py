"""The ways to compute one head of attention; none imports another."""

from attention_jax.implementations.merging import merge

__all__ = ["merge"]
