"""Which tiles each device visits at each step, from the mask and the positions it holds.

Queries and keys need not lie in order, so a tile is judged by the smallest and the largest position
of its rows: EMPTY and FULL are true of all positions between, and thus of those that are there.
All devices run one program: where the tiles are known while tracing, each looks up its own in a
table; else it asks the mask at run time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.implementations import choice
from attention_jax.implementations.tiles import FRACTIONS, cover, joined, units_of
from attention_jax.masks import EMPTY, FULL, PARTIAL, Lengths, Mask
from attention_jax.masks.intervals import Interval, classify
from attention_jax.parallel.placement import Placement
from attention_jax.request import Request

MOST_CELLS = 2**24
"""Smaller tiles are not tried where a mask would have to be asked about more of them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """Tiles of the keys that a device has at one step of attention.

    Attributes:
      shift: device d has the keys of device d + shift; None where it has those of all devices.
      pairs: from which device to which the keys move, (source, destination); only where some tile
        of them may be live.
      starts: [D, n, 2], the first query and the first key of each tile, for each device; [1, n, 2]
        where they are the same for all.
      states: [D, n], what each tile is, EMPTY beyond the last; None where only run time knows.
    """

    shift: int | None
    pairs: tuple[tuple[int, int], ...]
    starts: np.ndarray
    states: np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The steps of all devices, in tiles of `tile` = [bt, bk] queries by keys.

    Attributes:
      tile: [bt, bk].
      unit: the first key of a tile is a multiple of this.
      received: how many keys a device has at a step.
      covered: the tiles reach up to this key.
      steps: those in which some device may have a live tile.
      live: [D], the tiles that each device visits, as far as known while tracing.
    """

    tile: tuple[int, int]
    unit: int
    received: int
    covered: int
    steps: tuple[Step, ...]
    live: np.ndarray

    def within(self, mask: Mask, key_length: int) -> Mask:
        """Return the mask without keys beyond the last, whose positions are `key_length`."""
        return mask & Lengths(key_length) if self.covered > self.received else mask

    def states(self, mask: Mask, queries: Any, keys: Any, starts: np.ndarray) -> Any:
        """Ask the mask of a head what the tiles are, at the positions of a device, [n]."""
        grid = classify(mask, _intervals(queries, self.tile[0], 0), _intervals(keys, self.unit, 1))
        return _states_at(_padded(grid, self), starts, self)


def make_plan(request: Request, placement: Placement, gathered: bool) -> Plan:
    """Return the plan whose dearest device has least to do."""
    mask, is_static = choice.known_mask(request.mask, request.sizes)
    share, received = placement.shares
    pairs = share, placement.lengths[1] if gathered else received
    if request.tile_sizes is not None:
        tiles = [choice.clipped(request.tile_sizes, pairs)]
    else:
        rows, columns = choice.CANDIDATES.get(jax.default_backend(), choice.CANDIDATES["default"])
        tiles = {choice.clipped((row, column), pairs) for row in rows for column in columns}
    of_tile = functools.partial(_plan_of, mask, is_static, placement, gathered)
    best, least = None, math.inf
    for tile in sorted(tiles, key=math.prod, reverse=True):
        cells = math.prod(placement.lengths) * FRACTIONS[0] // math.prod(tile)
        if best is not None and cells > MOST_CELLS:
            continue
        plan = of_tile(tile)
        cost = int(plan.live.max()) * (math.prod(tile) + choice.VISIT_PAIRS)
        if cost < least:
            best, least = plan, cost
    assert best is not None  # there is always one tile
    return best


def _plan_of(
    mask: Mask, is_static: bool, placement: Placement, gathered: bool, tile: tuple[int, int]
) -> Plan:
    devices = placement.axis.devices
    queries, keys = placement.known(0), placement.known(1)
    unit = tile[1] // units_of(tile[1])
    rows = -(-placement.shares[0] // tile[0])
    received = placement.lengths[1] if gathered else placement.shares[1]
    units = -(-received // unit)
    empty = Plan(tile, unit, received, units * unit, (), np.zeros(devices, int))
    if queries is None or keys is None:
        is_static = False
        grid = np.full((devices, rows, 1 if gathered else devices, units), PARTIAL, np.int8)
    else:
        q_idx = _intervals(queries, tile[0], 0)
        kv_idx = _intervals(keys.reshape(1, -1) if gathered else keys, unit, 1)
        grid = np.asarray(classify(mask, q_idx, kv_idx)).reshape(devices, rows, -1, units)
    # By step: the keys of device d + shift lie at (d + shift) mod D.
    shifts = [None] if gathered else list(range(devices))
    device = np.arange(devices)
    grid = np.stack([grid[device, :, (device + (s or 0)) % grid.shape[2]] for s in shifts], axis=1)
    moves = {shift: _moves(shift, grid[:, n]) for n, shift in enumerate(shifts)}
    grid = _padded(grid, empty)
    if not is_static:
        grid = grid.max(axis=0, keepdims=True)
    return _covered(grid, empty, is_static, moves)


def _moves(shift: int | None, grid: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Return from which device to which keys move, for the states [D, rows, units] of a step."""
    needed = np.flatnonzero((grid != EMPTY).any(axis=(1, 2))) if shift else []
    return tuple((int(d + (shift or 0)) % len(grid), int(d)) for d in needed)


def _covered(
    grid: np.ndarray, empty: Plan, is_static: bool, moves: dict[int | None, tuple[Any, ...]]
) -> Plan:
    """Cover what may be live in the grid [D or 1, steps, rows, units] by tiles."""
    shifts = list(moves)
    per_tile = empty.tile[1] // empty.unit
    live = (grid != EMPTY).reshape(-1, grid.shape[-1])
    row, first = cover(live, per_tile)
    if first.min(initial=0) < 0:  # whole tiles do not fit
        more = -grid.shape[-1] % per_tile
        empty = dataclasses.replace(empty, covered=empty.covered + more * empty.unit)
        grid = _padded(grid, empty)
        row, first = cover((grid != EMPTY).reshape(-1, grid.shape[-1]), per_tile)
    who, step, row = np.unravel_index(row, grid.shape[:3])
    starts = np.stack([row * empty.tile[0], first * empty.unit], axis=1).astype(np.int32)
    states = np.zeros(len(starts), np.int8)
    for at in np.unique(who * len(shifts) + step):
        of = who * len(shifts) + step == at
        whole = grid[at // len(shifts), at % len(shifts)]
        states[of] = _states_at(whole, starts[of], empty)
    devices = len(empty.live)
    steps, live = [], np.zeros(devices, int)
    for number, shift in enumerate(shifts):
        of = [np.flatnonzero((who == d) & (step == number)) for d in range(len(grid))]
        counts = np.array([len(which) for which in of])
        if not counts.any():
            continue
        live += counts
        table = np.zeros((len(grid), counts.max(), 2), np.int32)
        kinds = np.full(table.shape[:2], EMPTY, np.int8)
        for d, which in enumerate(of):
            table[d, : len(which)], kinds[d, : len(which)] = starts[which], states[which]
        steps.append(Step(shift, moves[shift], table, kinds if is_static else None))
    return dataclasses.replace(empty, steps=tuple(steps), live=live)


def _intervals(positions: Any, size: int, axis: int) -> Interval:
    """Return the smallest and the largest position of each `size` rows of each device.

    Of [D, T] or [T] positions; along axis 0 or 1 of the grid of tiles.
    """
    module = np if isinstance(positions, np.ndarray) else jnp
    rows = positions.reshape(-1, positions.shape[-1])
    more = -rows.shape[1] % size
    if more:
        rows = module.concatenate([rows, module.repeat(rows[:, -1:], more, axis=1)], axis=1)
    tiles = rows.reshape(-1, size)
    shape = (-1, 1) if axis == 0 else (1, -1)
    return Interval(tiles.min(axis=1).reshape(shape), tiles.max(axis=1).reshape(shape))


def _padded(grid: Any, plan: Plan) -> Any:
    """Fill a grid [..., units] up to the keys that tiles cover; keys beyond the last are EMPTY."""
    module = np if isinstance(grid, np.ndarray) else jnp
    within = plan.received // plan.unit
    units = np.arange(grid.shape[-1])
    # Of a unit with the last key and some beyond it not all pairs are allowed.
    cut = np.broadcast_to(units == within, grid.shape) & (plan.received % plan.unit > 0)
    grid = module.where(cut & (grid == FULL), module.asarray(PARTIAL, grid.dtype), grid)
    more = plan.covered // plan.unit - grid.shape[-1]
    widths = [(0, 0)] * (grid.ndim - 1) + [(0, more)]
    return module.pad(grid, widths, constant_values=EMPTY) if more else grid


def _states_at(grid: Any, starts: np.ndarray, plan: Plan) -> Any:
    """Return what tiles are, [n], from the units [rows, units] that they are made of."""
    rows, first = (starts // (plan.tile[0], plan.unit)).T
    return joined(grid, rows, first, plan.tile[1] // plan.unit)
