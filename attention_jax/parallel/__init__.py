"""Attention whose sequence is split over the devices of a mesh axis."""

from attention_jax.parallel.balance import BOUND, Load, deal, load
from attention_jax.parallel.methods import METHODS, Split
from attention_jax.parallel.orders import permute, restore
from attention_jax.parallel.sequence import attend, explain

__all__ = [
    "BOUND",
    "METHODS",
    "Load",
    "Split",
    "attend",
    "deal",
    "explain",
    "load",
    "permute",
    "restore",
]
