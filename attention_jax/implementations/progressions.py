"""Tables of integers that a program computes from a few numbers, instead of holding them.

The places of tiles run in progressions: along a row of tiles the first key grows by the same, and
from row to row the number of tiles does. A table is cut into pieces in which each column is a
quadratic of the row's number, and the table of these pieces is cut again, as long as that makes it
shorter. What has no such order is held as it is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

SHORT = 1024
"""A table of so many numbers is held as it is: to compute it takes as long a program."""


PERIODS = (1, 2, 3, 4, 5, 6)
"""Rows that take turns are in order if so many are taken together, as the tiles of each row are."""


def computed(table: np.ndarray) -> jax.Array | np.ndarray:
    """Return a table of int32 [n, c], computed from as few numbers as are found to suffice.

    >>> table = np.arange(2000, dtype=np.int32)[:, None] * 3 + 5
    >>> jax.eval_shape(lambda: computed(table)).shape
    (2000, 1)
    """
    found = [_pieces(_folded(table, period)) for period in PERIODS] if table.size > SHORT else []
    sizes = [table.size if pieces is None else pieces.size for pieces in found]
    if not sizes or min(sizes) == table.size:
        return table
    best = int(np.argmin(sizes))
    folded, pieces = _folded(table, PERIODS[best]), found[best]
    assert pieces is not None  # it is the shortest
    of_pieces = _evaluated(pieces, *folded.shape).reshape(-1, table.shape[1])
    rest = table[len(of_pieces) :]
    return jnp.concatenate([of_pieces, rest]) if len(rest) else of_pieces


def _folded(table: np.ndarray, period: int) -> np.ndarray:
    """Put so many rows side by side, as many as there are whole periods."""
    whole = len(table) // period
    return table[: whole * period].reshape(whole, period * table.shape[1])


def _evaluated(pieces: np.ndarray, length: int, columns: int) -> jax.Array:
    """Return the table [length, columns] of its pieces."""
    held = computed(pieces)
    place = jnp.arange(length, dtype=jnp.int32)
    piece = jnp.searchsorted(jnp.asarray(held[:, 0]), place, side="right") - 1
    at = jnp.asarray(held)[piece]
    past = (place - at[:, 0])[:, None]
    # past (past - 1) / 2, whose product may not fit where the half of it does
    triangle = past // 2 * (past - 1 + past % 2)
    value, slope, curve = (at[:, 1 + n * columns : 1 + (n + 1) * columns] for n in range(3))
    return value + slope * past + curve * triangle


def _pieces(table: np.ndarray) -> np.ndarray | None:
    """Return a row for each piece: its first place, and values, first and second differences there.

    None if there is nothing, or the pieces are too many to be worth it.
    """
    length, columns = table.shape
    if not length:
        return None
    values = table.astype(np.int64)
    breaks = np.flatnonzero(np.diff(values, 3, axis=0).any(axis=1)) + 3
    starts, start = [], 0
    while start < length:
        starts.append(start)
        if 2 * (1 + 3 * columns) * len(starts) > values.size:
            return None
        # Three rows are a quadratic whatever they are; the next one that is not begins a piece.
        following = np.searchsorted(breaks, start + 3)
        start = int(breaks[following]) if following < len(breaks) else length
    begin = np.array(starts)
    past = np.diff(begin, append=length)
    one, two = (values[np.minimum(begin + n, length - 1)] for n in (1, 2))
    slope = np.where(past[:, None] > 1, one - values[begin], 0)
    curve = np.where(past[:, None] > 2, two - 2 * one + values[begin], 0)
    return np.concatenate([begin[:, None], values[begin], slope, curve], axis=1).astype(np.int32)
