"""Attention over a sequence that several devices share."""

from attention_jax.parallel.balance import BOUND, Load, deal, load, permute, restore

__all__ = ["BOUND", "Load", "deal", "load", "permute", "restore"]
