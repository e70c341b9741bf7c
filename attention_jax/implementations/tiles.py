"""Which tiles of the T x S plane are worked on, and in what order.

From the interval reading of the mask: EMPTY tiles are never visited, FULL tiles are visited
without the mask (but for those that `group` joins to a PARTIAL one), PARTIAL ones with it. What
is known while tracing shapes the program itself; what is known only inside `jit` (segments,
lengths) decides at run time, on the same program.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.masks import EMPTY, FULL, PARTIAL, Mask

TOGETHER_PAIRS = {"cpu": 2**19}
"""Tiles that are visited together have about so many pairs."""

LARGE_PAIRS = 2**18
"""A tile of so many pairs gains nothing from others beside it, only from those below it."""

MOST_TOGETHER = 8
"""So many rows of tiles are visited together at most."""

LANES = 4
"""Tiles that are visited together are so many operations beside each other where they are low.

XLA's CPU runtime computes a batch of products of few rows on one core, but several batches at
once; it lets another core help only where many operations are ready.
"""

LOW_ROWS, LOW_PAIRS = 256, 2**14
"""Tiles of fewer rows are low; of fewer pairs they are not worth operations of their own."""

FRACTIONS = (3, 4)
"""A tile begins at a multiple of its width divided by the first of these that divides it."""


class Plan(NamedTuple):
    """The tiles to visit.

    `starts [n, 2]` holds the first query and the first key of every tile that may be live, row by
    row, and is always known while tracing. `states [n]` says what each is: a NumPy array where
    the mask is known while tracing, else a JAX array. Together they reach up to `key_length`,
    beyond the last key where that is no multiple of what tiles begin at.
    """

    starts: np.ndarray
    states: Any
    key_length: int

    @property
    def is_static(self) -> bool:
        """Whether the whole plan is known while tracing."""
        return isinstance(self.states, np.ndarray)


class Visits(NamedTuple):
    """Tiles that a loop visits `together` at a time, each `rows` queries high.

    `queries [n]` is the first query of a visit; the tiles of a visit lie below each other, and
    `keys [n, together]` are their first keys. They are computed as `lanes` batches.
    """

    masked: bool
    rows: int
    together: int
    queries: np.ndarray
    keys: np.ndarray
    lanes: int = 1

    @property
    def height(self) -> int:
        """Queries of a visit."""
        return self.rows * self.together


def make_visits(plan: Plan, query_length: int, query_size: int, key_size: int) -> list[Visits]:
    """Return in which groups the tiles of a plan are visited."""
    if not plan.is_static:
        visits = Visits(True, query_size, 1, plan.starts[:, 0], plan.starts[:, 1:])
        return [visits] if len(plan.starts) else []
    rows = -(-query_length // query_size)
    pairs = TOGETHER_PAIRS.get(jax.default_backend(), 0)
    many = min(pairs / (query_size * key_size), rows, MOST_TOGETHER)
    tall = 2 ** int(np.log2(max(1, many)))
    groups = group(plan, query_size, tall, 1 if query_size * key_size >= LARGE_PAIRS else tall)
    if query_size >= LOW_ROWS or query_size * key_size < LOW_PAIRS:
        return groups
    return [visits._replace(lanes=min(LANES, visits.together)) for visits in groups]


def group(plan: Plan, query_size: int, tall: int, together: int) -> list[Visits]:
    """Make few large visits of many small tiles, for a plan that is known while tracing.

    Tiles below each other in `tall` rows of tiles become one where one of them is FULL, with the
    mask if one is PARTIAL: on a FULL tile it costs less than a visit of its own. Of what is left,
    as many tiles of one kind as all of `together` rows have are visited at once, with keys of
    their own.
    """
    row, key, full = plan.starts[:, 0] // query_size, plan.starts[:, 1], plan.states == FULL
    wide = np.max(key, initial=0) + 1
    column, inverse, height = np.unique(
        row // tall * wide + key, return_inverse=True, return_counts=True
    )
    of_full = np.bincount(inverse, full, len(column))
    is_tall = (height == tall) & (of_full > 0)
    with_mask = of_full[is_tall] < tall
    column = column[is_tall]
    rest = ~is_tall[inverse]
    order = np.lexsort((full[rest], row[rest]))
    row, key, full = row[rest][order], key[rest][order], full[rest][order]
    number = np.arange(len(row)) - np.searchsorted(2 * row + full, 2 * row + full)
    visit, place, many = np.unique(
        (row // together * 2 + full) * wide + number, return_inverse=True, return_counts=True
    )
    keys = np.zeros((len(visit), together), int)
    keys[place, row % together] = key
    at_once, alone = many == together, many[place] < together
    first, is_full = visit // wide // 2 * together, visit // wide % 2 == 1
    found = [
        *(
            Visits(masked, tall * query_size, 1, column[of] // wide * tall, column[of] % wide)
            for masked, of in ((False, ~with_mask), (True, with_mask))
        ),
        *(
            Visits(masked, query_size, together, first[of], keys[of])
            for masked, of in ((False, at_once & is_full), (True, at_once & ~is_full))
        ),
        *(
            Visits(masked, query_size, 1, row[of], key[of])
            for masked, of in ((False, alone & full), (True, alone & ~full))
        ),
    ]
    return [
        visits._replace(
            queries=(visits.queries * query_size).astype(np.int32),
            keys=visits.keys.astype(np.int32).reshape(-1, visits.together),
        )
        for visits in found
        if len(visits.queries)
    ]


def make_plan(
    mask: Mask, query_length: int, key_length: int, query_size: int, key_size: int
) -> Plan:
    """Cover what may be live of each row of tiles by as few tiles as possible.

    Rows of tiles lie on a grid; within a row a tile begins where it is needed, to a fraction of
    its width, so that a band of keys is covered by one tile and not by the two that it touches.
    """
    per_tile = next((parts for parts in FRACTIONS if key_size % parts == 0), 1)
    unit = key_size // per_tile
    grid = (query_length, key_length, query_size, unit)
    live = np.asarray(mask.static().tiles(*grid)) != EMPTY
    rows, units = _cover(live, per_tile)
    if units.min(initial=0) < 0:  # whole tiles do not fit
        live = np.pad(live, ((0, 0), (0, -live.shape[1] % per_tile)))
        rows, units = _cover(live, per_tile)
    covered = live.shape[1] * unit
    starts = np.stack([rows * query_size, units * unit], axis=1).astype(np.int32)
    if not (units % per_tile).any():
        states = mask.tiles(query_length, covered, query_size, key_size)
        return Plan(starts, states[rows, units // per_tile], covered)
    states = mask.tiles(query_length, covered, query_size, unit)
    states = states[rows[:, None], units[:, None] + np.arange(per_tile)]
    numpy = np if isinstance(states, np.ndarray) else jnp
    least, most = states.min(axis=1), states.max(axis=1)
    partial = numpy.asarray(PARTIAL, states.dtype)
    return Plan(starts, numpy.where(least == most, least, partial), covered)


def _cover(live: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Cover the live cells of every row by the fewest intervals of one width, none overlapping.

    Returns the row and the first cell of each. The first interval begins at the first live cell,
    the next at the first that is left; then those that stick out at the end are pushed back, and
    push back those before them; where there is no room, to before the first cell.
    """
    rows, cells = live.shape
    following = np.full((rows, cells + 1), cells)  # the first live cell from here on
    following[:, :-1][live] = np.nonzero(live)[1]
    following = np.minimum.accumulate(following[:, ::-1], axis=1)[:, ::-1]
    found = []
    begin = following[:, 0]
    while (begin < cells).any():
        found.append(begin)
        begin = following[np.arange(rows), np.minimum(begin + width, cells)]
    end = np.full(rows, cells)
    for number in reversed(range(len(found))):
        exists = found[number] < cells
        found[number] = np.where(exists, np.minimum(found[number], end - width), cells)
        end = np.where(exists, found[number], end)
    starts = np.stack(found, axis=1) if found else np.zeros((rows, 0), int)
    row, number = np.nonzero(starts < cells)
    return row, starts[row, number]
