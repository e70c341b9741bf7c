"""Data-parallel training: every local device takes its share of each batch.

Parameters and optimizer are the same everywhere; XLA adds up the gradients.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def count(batch_size: int, available: int) -> int:
    """Return on how many devices a batch is spread: the most that divide it.

    >>> count(12, 8)
    6
    """
    return max(n for n in range(1, available + 1) if batch_size % n == 0)


class Placement:
    """Where arrays are: everywhere, or in shares of their axis B."""

    def __init__(self, batch_size: int):
        devices = jax.local_devices()
        self.devices = devices[: count(batch_size, len(devices))]
        mesh = Mesh(np.array(self.devices), ("batch",))
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.shares = NamedSharding(mesh, PartitionSpec("batch"))
        self.shares_of_steps = NamedSharding(mesh, PartitionSpec(None, None, None, "batch"))

    def of_training(self) -> dict[str, Any]:
        """Return options of `jax.jit` for functions of state, pairs, order, rows [c, N, n, B]."""
        here = self.everywhere
        return {"in_shardings": (here, here, here, self.shares_of_steps), "out_shardings": here}

    def of_sentences(self, sides: int) -> dict[str, Any]:
        """Return options of `jax.jit` for functions of parameters and one or two sides [B, ...]."""
        return {"in_shardings": (self.everywhere, *[self.shares] * sides)}
