"""Masks that are graphs: who may attend to whom, listed."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.intervals import Interval, Truth, bounds, known
from attention_jax.masks import Mask

__all__ = ["Edges", "edges"]

Array = jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Edges(Mask):
    """A graph: query i may attend to the keys neighbors[i], [T, R]; -1 stands for none.

    `edges` makes one of a list of pairs. Leading axes [B] or [B, N] give each example or head its
    own graph.

    >>> from attention_jax.masks import draw
    >>> print(draw(Edges([[0, 1], [2, -1], [-1, -1]]), 3))
    ██·
    ··█
    ···
    """

    neighbors: Any
    example_rank: ClassVar[dict[str, int]] = {"neighbors": 2}

    def __post_init__(self) -> None:
        if isinstance(self.neighbors, list | tuple):
            object.__setattr__(self, "neighbors", np.asarray(self.neighbors, np.int32))

    def entries(self, field: str, query_length: int, key_length: int) -> dict[str, int]:
        # Of more nodes than there are queries, the first are asked about.
        return {"T": query_length} if self.neighbors.shape[-2] < query_length else {}

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        if isinstance(q_idx, Interval) and isinstance(kv_idx, Interval):
            return self._of_tiles(q_idx, kv_idx)
        neighbors = jnp.asarray(self.neighbors)
        rows = neighbors.at[q_idx].get(mode="fill", fill_value=-1, wrap_negative_indices=False)
        return jnp.any((rows == jnp.expand_dims(kv_idx, -1)) & (rows >= 0), axis=-1)

    def _of_tiles(self, q_idx: Interval, kv_idx: Interval) -> Truth:
        """Count the edges within each tile [nq, nk]: none, all that there can be, or some."""
        module = np if isinstance(self.neighbors, np.ndarray) else jnp
        neighbors = module.sort(self.neighbors, axis=-1)
        twice = neighbors[:, 1:] == neighbors[:, :-1]
        once = module.concatenate([module.ones_like(neighbors[:, :1], bool), ~twice], axis=1)

        low, high = (bound.reshape(1, 1, -1) for bound in bounds(kv_idx))
        within = once[:, :, None] & (neighbors[:, :, None] >= low) & (neighbors[:, :, None] <= high)
        until = module.pad(within.sum(axis=1).cumsum(axis=0), ((1, 0), (0, 0)))  # [T + 1, nk]
        first, past = q_idx.low.reshape(-1), q_idx.high.reshape(-1) + 1
        last = len(neighbors)
        count = until[module.clip(past, 0, last)] - until[module.clip(first, 0, last)]
        possible = (q_idx.high - q_idx.low + 1) * (kv_idx.high - kv_idx.low + 1)
        return known(count == 0, count == possible)


def edges(pairs: Any, length: int) -> Edges:
    """Build the mask of a graph of `length` nodes from its edges (query, key), [E, 2].

    Graph attention is attention under it: GAT (Velickovic et al. 2018) and GATv2 (Brody, Alon and
    Yahav 2022) with `scores.additive` and a leaky ReLU. Self-loops are edges like others.

    Raises:
      ValueError: pairs that are not [E, 2], or name a node that is not there.

    >>> from attention_jax.masks import draw
    >>> print(draw(edges([(0, 0), (0, 2), (1, 1), (2, 0)], length=3), 3))
    █·█
    ·█·
    █··
    """
    listed = np.asarray(pairs, np.int32).reshape(-1, 2) if len(pairs) == 0 else np.asarray(pairs)
    if listed.ndim != 2 or listed.shape[1] != 2:
        raise ValueError(f"edges: pairs must be [E, 2], (query, key), got shape {listed.shape}.")
    if listed.size and (listed.min() < 0 or listed.max() >= length):
        raise ValueError(
            f"edges: nodes are numbered from 0 to {length - 1}, got one of number "
            f"{listed.min() if listed.min() < 0 else listed.max()}."
        )
    queries, keys = np.unique(listed, axis=0).T
    degree = np.bincount(queries, minlength=length)
    place = np.arange(len(queries)) - np.repeat(degree.cumsum() - degree, degree)
    neighbors = np.full((length, max(degree.max(initial=0), 1)), -1, np.int32)
    neighbors[queries, place] = keys
    return Edges(neighbors)
