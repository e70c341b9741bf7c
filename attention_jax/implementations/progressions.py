"""Tables of integers that a program computes from a few numbers, instead of holding them.

The places of tiles run in progressions: along a row of tiles the first key grows by the same, and
from row to row the number of tiles does. So a table is cut into runs with one step from each row to
the next, and the table of where these runs begin is cut into pieces in which each column is a
quadratic of the row's number. However long the table is, this is one program: of a causal mask or a
window the text has the same length for every length of the sequence. What has no such order is held
as it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SHORT = 64
"""A table of so many numbers is held as it is: to compute it takes as long a program."""

SAMPLE, SAMPLES = 4096, 8
"""The most frequent step is looked for among so many rows; whether a table has an order is told by
so many that lie in so many places."""

PERIODS = (1, 2, 3, 4, 5, 6)
"""Rows that take turns are in order if so many are taken together, as the tiles of each row are."""

_WITHIN: dict[str, Any] = {"mode": "promise_in_bounds", "wrap_negative_indices": False}
_SORTED: dict[str, Any] = {**_WITHIN, "unique_indices": True, "indices_are_sorted": True}


class Way(Protocol):
    """A way to compute a table."""

    @property
    def held(self) -> int:
        """How long its program is, as the number of integers that make as long a text."""
        ...

    def __call__(self) -> jax.Array | np.ndarray:
        """Return the table [n, c]."""
        ...


def computed(table: np.ndarray) -> jax.Array | np.ndarray:
    """Return a table of int32 [n, c], computed from as few numbers as are found to suffice.

    >>> table = np.arange(2000, dtype=np.int32)[:, None] * 3 + 5
    >>> jax.eval_shape(lambda: computed(table)).shape
    (2000, 1)
    """
    return shortest(table)()


def shortest(table: np.ndarray) -> Way:
    """Return the way to compute a table whose program is shortest of those that are known."""
    if table.size <= SHORT:
        return _AsItIs(table)
    return _without_runs(table, _runs(table))


def _without_runs(table: np.ndarray, other: Way | None = None) -> Way:
    """Return the shortest of the table as it is, the pieces with each period, and another way."""
    found = min((way for way in (_AsItIs(table), other) if way is not None), key=_held)
    for period in PERIODS:
        pieces = _pieces(table, period, most=found.held)
        found = found if pieces is None else pieces
    return found


def _held(way: Way) -> int:
    return way.held


class _AsItIs(NamedTuple):
    """The table, as a constant of the program."""

    table: np.ndarray

    @property
    def held(self) -> int:
        return self.table.size

    def __call__(self) -> np.ndarray:
        return self.table


class _Pieces(NamedTuple):
    """Pieces of rows in which each column is a quadratic; `period` rows are taken as one.

    `begin [p]` is the first row of a piece; `value`, `slope` and `curve` [p, c] are the numbers
    there, and their first and second differences. `rest` is what follows the last whole period.
    """

    begin: np.ndarray
    value: np.ndarray
    slope: np.ndarray
    curve: np.ndarray
    length: int
    columns: int
    rest: np.ndarray

    @property
    def held(self) -> int:
        many = len(self.begin)
        return SHORT * (1 if many == 1 else 3) + many + 3 * self.value.size + self.rest.size

    def __call__(self) -> jax.Array:
        place = jnp.arange(self.length, dtype=jnp.int32)
        parts = [self.value, self.slope, self.curve]
        if len(self.begin) == 1:
            past, at = place[:, None], [part if part.any() else None for part in parts]
        else:
            table = np.concatenate([self.begin[:, None], *parts], axis=1).astype(np.int32)
            found = jnp.asarray(table).at[_piece_of(self.begin, self.length)].get(**_WITHIN)
            past, at = (place - found[:, 0])[:, None], jnp.split(found[:, 1:], 3, axis=1)
        value, slope, curve = at
        terms = [
            value,
            None if slope is None else slope * past,
            # past (past - 1) / 2, whose product may not fit where the half of it does
            None if curve is None else curve * ((past >> 1) * (past - 1 + (past & 1))),
        ]
        total = jnp.zeros((self.length, self.value.shape[1]), jnp.int32)
        for term in terms:
            total = total if term is None else total + term
        whole = total.reshape(-1, self.columns)
        return jnp.concatenate([whole, self.rest]) if len(self.rest) else whole


class _Runs(NamedTuple):
    """Runs of rows that grow by the same `step` [c].

    `starts` computes [r, 1 + c]: of each run but the first, the place of its first row and how far
    this row is from the one before it. `first [c]` is the first row of all.
    """

    first: np.ndarray
    starts: Way
    step: np.ndarray
    length: int

    @property
    def held(self) -> int:
        return 2 * SHORT + self.starts.held

    def __call__(self) -> jax.Array:
        starts = jnp.asarray(self.starts())
        steps = jnp.broadcast_to(self.step, (self.length, len(self.step)))
        steps = steps.at[starts[:, 0]].set(starts[:, 1:], **_SORTED)
        return lax.cumsum(steps) + (self.first - self.step)[None, :]


def _piece_of(begin: np.ndarray, length: int) -> jax.Array:
    """Return for each of `length` places the number of the piece that it lies in."""
    marks = jnp.zeros(length, jnp.int32).at[begin].set(1, **_SORTED)
    return lax.cumsum(marks) - 1


def _runs(table: np.ndarray) -> _Runs | None:
    """Return the runs of the most frequent step, if there are few."""
    steps = np.diff(table, axis=0)
    middle = max(0, (len(steps) - SAMPLE) // 2)
    found, many = np.unique(steps[middle : middle + SAMPLE], axis=0, return_counts=True)
    step = found[np.argmax(many)]
    before = np.flatnonzero((steps != step).any(axis=1))
    if 2 * len(before) * (1 + table.shape[1]) > table.size:
        return None
    starts = np.concatenate([before[:, None] + 1, steps[before]], axis=1).astype(np.int32)
    return _Runs(table[0], _without_runs(starts), step, len(table))


def _breaks(values: np.ndarray) -> np.ndarray:
    """Return which rows do not go on in the quadratic of the three before them."""
    return np.flatnonzero(np.diff(values, 3, axis=0).any(axis=1)) + 3


def _may_be_pieces(values: np.ndarray) -> bool:
    """Tell from some of the rows whether pieces may hold much less than the table.

    Of more breaks than half the rows there is a piece every six rows, which holds half as much.
    """
    if len(values) < 2 * SAMPLE:
        return True
    samples = np.linspace(0, len(values) - SAMPLE // SAMPLES, SAMPLES, dtype=int)
    rows = samples[:, None] + np.arange(SAMPLE // SAMPLES)
    breaks = sum(len(_breaks(values[part].astype(np.int64))) for part in rows)
    return 2 * breaks < rows.size


def _pieces(table: np.ndarray, period: int, most: int) -> _Pieces | None:
    """Return the pieces of quadratics of so many rows at a time, if they hold less than `most`."""
    length = len(table) // period
    values = table[: length * period].reshape(length, period * table.shape[1])
    if not length or not _may_be_pieces(values):
        return None
    values = values.astype(np.int64)
    breaks = _breaks(values)
    of_piece = 1 + 3 * values.shape[1]
    if len(breaks) * of_piece >= 3 * most:  # a piece ends at the third of them at the latest
        return None
    starts, start = [0], 0
    for following in breaks.tolist():
        # Three rows are a quadratic whatever they are; the next one that is not begins a piece.
        if following >= start + 3:
            start = following
            starts.append(start)
    if len(starts) * of_piece >= most:
        return None
    begin = np.array(starts)
    past = np.diff(begin, append=length)
    one, two = (values[np.minimum(begin + n, length - 1)] for n in (1, 2))
    slope = np.where(past[:, None] > 1, one - values[begin], 0)
    curve = np.where(past[:, None] > 2, two - 2 * one + values[begin], 0)
    parts = {"begin": begin, "value": values[begin], "slope": slope, "curve": curve}
    parts = {name: part.astype(np.int32) for name, part in parts.items()}
    rest = table[length * period :]
    found = _Pieces(**parts, length=length, columns=table.shape[1], rest=rest)
    return found if found.held < most else None
