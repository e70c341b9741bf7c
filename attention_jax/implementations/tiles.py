"""Which tiles of the T x S plane are worked on, and in what order.

From the interval reading of the mask: EMPTY tiles are never visited, FULL tiles are visited
without the mask, PARTIAL ones with it. What is known while tracing shapes the program itself;
what is known only inside `jit` (segments, lengths) decides at run time, on the same program.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from attention_jax.intervals import EMPTY
from attention_jax.masks import Mask


class Plan(NamedTuple):
    """The tiles to visit.

    `pairs [n, 2]` holds row and column of every tile that may be live, row by row, and is always
    known while tracing. `states [n]` says what each is: a NumPy array where the mask is known
    while tracing, else a JAX array.
    """

    pairs: np.ndarray
    states: Any

    @property
    def is_static(self) -> bool:
        """Whether the whole plan is known while tracing."""
        return isinstance(self.states, np.ndarray)


def make_plan(
    mask: Mask, query_length: int, key_length: int, query_size: int, key_size: int
) -> Plan:
    """Read the mask over the grid of tiles."""
    grid = (query_length, key_length, query_size, key_size)
    possible = np.asarray(mask.static().tiles(*grid))
    pairs = np.argwhere(possible != EMPTY).astype(np.int32)
    states = mask.tiles(*grid)[pairs[:, 0], pairs[:, 1]]
    return Plan(pairs, states)
