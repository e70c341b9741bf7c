"""Masks given as graphs: the keys that each query may attend to, listed."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.base.remembering import remembered
from attention_jax.masks.algebra import Mask
from attention_jax.masks.intervals import Interval, Truth, indices, known

__all__ = ["Edges", "edges"]

Array = jax.Array

LARGEST_TABLE = 2**26
"""Pieces of the plane whose edges are counted in one table."""


@dataclasses.dataclass(frozen=True)
class Edges(Mask):
    """A graph: query i may attend to the keys neighbors[i], [T, R]; -1 stands for none.

    `edges` makes one of a list of pairs. All rows have the length R of the longest: one node of
    many neighbors costs T x R numbers, and every pair that is computed is compared with R. Leading
    axes [B] or [B, N] give each example or head its own graph.

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
            object.__setattr__(self, "neighbors", np.asarray(self.neighbors))
        super().__post_init__()

    def entries(self, field: str, query_length: int, key_length: int) -> dict[str, int]:
        # Of a graph with more nodes than queries, the first are used.
        return {"T": query_length} if self.neighbors.shape[-2] < query_length else {}

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        if isinstance(q_idx, Interval) and isinstance(kv_idx, Interval):
            return self._of_tiles(q_idx, kv_idx)
        neighbors = jnp.asarray(self.neighbors)
        rows = neighbors.at[q_idx].get(mode="fill", fill_value=-1, wrap_negative_indices=False)
        return jnp.any((rows == jnp.expand_dims(kv_idx, -1)) & (rows >= 0), axis=-1)

    def _of_tiles(self, q_idx: Interval, kv_idx: Interval) -> Truth:
        """Count the edges within each tile: none, all that there can be, or some."""
        queries, keys = remembered(Edges._listed, self)
        possible = (q_idx.high - q_idx.low + 1) * (kv_idx.high - kv_idx.low + 1)
        limits = q_idx.low, q_idx.high, kv_idx.low, kv_idx.high
        if not any(isinstance(array, jax.Array) for array in (queries, *limits)):
            # No row of a tile that is wider than there are neighbors is full.
            may_be_full = bool(np.any(kv_idx.high - kv_idx.low < self.neighbors.shape[-1]))
            count = _count_pieces(queries, keys, q_idx, kv_idx, may_be_full)
            if count is not None:
                return known(count == 0, may_be_full & (count == possible))
        count = _count(queries, keys, q_idx, kv_idx)
        return known(count == 0, count == possible)

    def _listed(self) -> tuple[Any, Any]:
        """List every edge once, its query and its key, [E]."""
        return _distinct(self.neighbors)


def _distinct(neighbors: Any) -> tuple[Any, Any]:
    """List every edge once, its query and its key, [E]; the key -1 is none, known only in `jit`."""
    if isinstance(neighbors, np.ndarray):
        keys = np.sort(neighbors, axis=1)
        is_edge = keys >= 0
        is_edge[:, 1:] &= keys[:, 1:] != keys[:, :-1]
        return np.nonzero(is_edge)[0].astype(np.int32), keys[is_edge]
    keys = jnp.sort(neighbors.astype(jnp.int32), axis=-1)
    again = jnp.pad(keys[:, 1:] == keys[:, :-1], ((0, 0), (1, 0)))
    queries = jnp.broadcast_to(indices(len(keys))[:, None], keys.shape)
    return queries.ravel(), jnp.where(again, -1, keys).ravel()


def _count_pieces(
    queries: np.ndarray, keys: np.ndarray, q_idx: Interval, kv_idx: Interval, exactly: bool
) -> np.ndarray | None:
    """Count the edges within each tile in one step each; unless `exactly`, 1 stands for some.

    None where a tile has a limit of another one inside. Else all edges between the same two limits
    are in the same tiles, and counted in one table.
    """
    rows = _pieces(queries, q_idx)
    columns = _pieces(keys, kv_idx)
    if rows is None or columns is None or rows.number * columns.number > LARGEST_TABLE:
        return None
    piece = rows.of_node * np.int32(columns.number) + columns.of_node
    table = np.zeros(rows.number * columns.number, np.int32 if exactly else np.int8)
    if exactly:
        piece, many = np.unique(piece, return_counts=True)
        table[piece] = many
    else:
        table[piece] = 1
    count = table[rows.of_tile * np.int32(columns.number) + columns.of_tile]
    return np.where(rows.is_empty | columns.is_empty, 0, count)


class _Pieces(NamedTuple):
    """An axis, cut wherever a tile begins or ends: the piece of each node, and of each tile."""

    number: int
    of_node: np.ndarray
    of_tile: np.ndarray
    is_empty: np.ndarray


def _pieces(nodes: np.ndarray, tiles: Interval) -> _Pieces | None:
    """Cut an axis; None if a tile is more than one piece."""
    length = int(nodes.max(initial=-1)) + 1
    begin, end = (np.clip(limit, 0, length) for limit in (tiles.low, tiles.high + 1))
    is_cut = np.zeros(length + 1, bool)
    is_cut[begin] = is_cut[end] = True
    piece = is_cut.cumsum(dtype=np.int32)
    of_tile = piece[begin]
    many = piece[end] - of_tile
    if many.max(initial=0) > 1:
        return None
    return _Pieces(int(piece[-1]) + 1, piece[nodes], of_tile, many < 1)


def _count(queries: Any, keys: Any, q_idx: Interval, kv_idx: Interval) -> Any:
    """Count the edges within each tile in O(E + tiles), in steps of a binary search.

    The plane is cut wherever a tile begins or ends. One pass over the edges counts those of every
    piece; the sums of these up to each cut give those of a tile by four of its corners.
    """
    limits = [(one.low, one.high + 1) for one in (q_idx, kv_idx)]
    arrays = (queries, *limits[0], *limits[1])
    module = jnp if any(isinstance(array, jax.Array) for array in arrays) else np
    cuts = [module.concatenate([x.ravel() for x in pair]) for pair in limits]
    cuts = [np.unique(at) if module is np else jnp.sort(at) for at in cuts]
    row, column = (
        module.searchsorted(at, nodes, side="right")
        for at, nodes in zip(cuts, (queries, keys), strict=True)
    )
    height, width = (len(at) + 1 for at in cuts)
    piece = module.where(keys >= 0, row * width + column, height * width)
    of_pieces = (
        np.bincount(piece, minlength=height * width + 1)
        if module is np
        else jnp.bincount(piece, length=height * width + 1)
    )
    of_pieces = of_pieces[:-1].astype(np.int32).reshape(height, width)
    until = of_pieces.cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32)
    (first, past), (left, right) = (
        [module.searchsorted(at, limit) for limit in pair]
        for at, pair in zip(cuts, limits, strict=True)
    )
    if first.ndim == left.ndim == 2 and first.shape[1] == left.shape[0] == 1:
        # All tiles of some rows: whole rows are read, then whole columns.
        rows = until[past[:, 0]] - until[first[:, 0]]
        return rows[:, right[0]] - rows[:, left[0]]
    return until[past, right] - until[first, right] - until[past, left] + until[first, left]


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
