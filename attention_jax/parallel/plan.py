"""Which tiles each device visits at each step, from the mask and the positions it holds.

Queries and keys need not lie in order, so a tile is judged by the runs of consecutive positions
that it is made of; or, at run time, by the smallest and the largest position of its rows: EMPTY
and FULL are true of all positions between, and thus of those that are there. All devices run one
program: where the tiles are known while tracing, each looks up its own in a table; else it asks
the mask.
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
from attention_jax.implementations.covering import cover, runs_of
from attention_jax.implementations.tiles import FRACTIONS, joined, units_of
from attention_jax.masks import EMPTY, FULL, PARTIAL, Lengths, Mask
from attention_jax.masks.intervals import Interval, classify
from attention_jax.parallel.placement import Placement
from attention_jax.parallel.work import Parts, states_between
from attention_jax.request import Request

DEARER = 1.1
"""Of plans that cost at most this many times as much as the cheapest, the least work is done."""

MOST_CELLS = 2**24
"""Smaller tiles are not tried where a mask would have to be asked about more of them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """Steps of attention between which keys travel on: a loop, with the tiles of each step.

    At step n device d has the keys of device d + first + n stride. They come to the first step
    from the device that holds them, and to any other from the device that had them before.

    Attributes:
      first: 0 where a device has its own keys; None where it has those of all devices.
      stride: see above.
      pairs: from which device to which keys move before the first step, (source, destination).
      onward: the same before every other step. Keys come to a device where some tile of them may
        be live, or may be so on a device that they reach through it.
      starts: [steps, D, n, 2], the first query and the first key of each tile, for each device;
        [steps, 1, n, 2] where they are the same for all.
      states: [steps, D, n], what each tile is, EMPTY beyond the last; None where only run time
        knows.
    """

    first: int | None
    stride: int
    pairs: tuple[tuple[int, int], ...]
    onward: tuple[tuple[int, int], ...]
    starts: np.ndarray
    states: np.ndarray | None

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return len(self.starts)

    @property
    def moves(self) -> list[tuple[tuple[int, int], ...]]:
        """From which device to which keys move, before each step."""
        return [self.pairs, *[self.onward] * (self.steps - 1)]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What all devices do, in tiles of `tile` = [bt, bk] queries by keys.

    Attributes:
      tile: [bt, bk].
      unit: the first key of a tile is a multiple of this.
      received: how many keys a device has at a step.
      covered: the tiles reach up to this key.
      chains: of the steps in which some device may have a live tile.
      live: [D], the tiles that each device visits, as far as known while tracing.
    """

    tile: tuple[int, int]
    unit: int
    received: int
    covered: int
    chains: tuple[Chain, ...]
    live: np.ndarray

    @property
    def dearest(self) -> int:
        """The tiles of the device that visits most."""
        return int(self.live.max())

    def within(self, mask: Mask, key_length: int) -> Mask:
        """Return the mask without keys beyond the last, whose positions are `key_length`."""
        return mask & Lengths(key_length) if self.covered > self.received else mask

    def states(self, mask: Mask, queries: Any, keys: Any, starts: Any) -> Any:
        """Ask the mask of a head what the tiles are, at the positions of a device, [n]."""
        grid = classify(mask, _intervals(queries, self.tile[0], 0), _intervals(keys, self.unit, 1))
        rows, first = starts[:, 0] // self.tile[0], starts[:, 1] // self.unit
        return _states_at(_padded(grid, self), (rows, first), self)


def make_plan(request: Request, placement: Placement, gathered: bool) -> Plan:
    """Return the plan whose dearest device needs least time; of nearly equal ones, least work."""
    mask, is_static = choice.known_mask(request.mask, request.sizes)
    share, received = placement.shares
    pairs = share, placement.lengths[1] if gathered else received
    if request.tile_sizes is not None:
        tiles = [choice.clipped(request.tile_sizes, pairs)]
    else:
        rows, columns = choice.CANDIDATES.get(jax.default_backend(), choice.CANDIDATES["default"])
        tiles = {choice.clipped((row, column), pairs) for row in rows for column in columns}
    of_tile = functools.partial(_plan_of, mask, is_static, placement, gathered)
    plans = []
    for tile in sorted(tiles, key=math.prod, reverse=True):
        cells = math.prod(placement.lengths) * FRACTIONS[0] // math.prod(tile)
        if not plans or cells <= MOST_CELLS:
            plans.append(of_tile(tile))
    costs = [plan.dearest * (math.prod(plan.tile) + choice.VISIT_PAIRS) for plan in plans]
    able = [plan for plan, cost in zip(plans, costs, strict=True) if cost <= DEARER * min(costs)]
    return min(able, key=lambda plan: plan.dearest * math.prod(plan.tile))


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
        grid = _grid(mask, (queries, keys.reshape(1, -1) if gathered else keys), tile[0], unit)
        grid = grid.reshape(devices, rows, -1, units)
    # The keys of device d + shift lie at (d + shift) mod D.
    shifts = [None] if gathered else list(range(devices))
    device = np.arange(devices)
    grid = np.stack([grid[device, :, (device + (s or 0)) % grid.shape[2]] for s in shifts], axis=1)
    needed = (grid != EMPTY).any(axis=(2, 3)).T
    grid = _padded(grid, empty)
    if not is_static:
        grid = grid.max(axis=0, keepdims=True)
    return _covered(grid, empty, is_static, dict(zip(shifts, needed, strict=True)))


def _covered(grid: np.ndarray, empty: Plan, is_static: bool, needed: dict[Any, np.ndarray]) -> Plan:
    """Cover what may be live in the grid [D or 1, shifts, rows, units] by tiles."""
    per_tile = empty.tile[1] // empty.unit
    runs = runs_of((grid != EMPTY).reshape(-1, grid.shape[-1]))
    row, first = cover(runs, per_tile)
    if first.min(initial=0) < 0:  # whole tiles do not fit
        more = -grid.shape[-1] % per_tile
        empty = dataclasses.replace(empty, covered=empty.covered + more * empty.unit)
        grid = _padded(grid, empty)
        row, first = cover(runs._replace(cells=grid.shape[-1]), per_tile)
    starts = np.stack([row % grid.shape[2] * empty.tile[0], first * empty.unit], axis=1)
    states = _states_at(grid.reshape(-1, grid.shape[-1]), (row, first), empty)
    who, shift = np.unravel_index(row // grid.shape[2], grid.shape[:2])
    counts = np.zeros(grid.shape[:2], int)
    np.add.at(counts, (who, shift), 1)
    number = np.arange(len(row)) - np.searchsorted(row // grid.shape[2], row // grid.shape[2])
    shifts = list(needed)
    chains = []
    for run in _runs([s for n, s in enumerate(shifts) if counts[:, n].any()], needed):
        at = [shifts.index(s) for s in run]
        table = np.zeros((len(at), len(grid), counts[:, at].max(), 2), np.int32)
        kinds = np.full(table.shape[:3], EMPTY, np.int8)
        for step, n in enumerate(at):
            of = shift == n
            table[step, who[of], number[of]] = starts[of]
            kinds[step, who[of], number[of]] = states[of]
        chains.append(_chain(run, needed, table, kinds if is_static else None))
    live = np.zeros(len(empty.live), int) + counts.sum(axis=1)
    return dataclasses.replace(empty, chains=tuple(chains), live=live)


def _runs(shifts: list[int | None], needed: dict[int | None, np.ndarray]) -> list[list[int | None]]:
    """Split shifts into runs of one stride: the fewest there are, and of these that move least.

    The keys that a device holds itself are a run of their own, as they do not travel.
    """
    own = [[shift] for shift in shifts if not shift]
    others = [shift for shift in shifts if shift]
    found = []
    for order in (others, others[::-1]):
        runs: list[list[int]] = []
        for shift in order:
            if runs and shift - runs[-1][-1] == (1 if order is others else -1):
                runs[-1].append(shift)
            else:
                runs.append([shift])
        found.append(runs)
    return own + min(found, key=lambda runs: (len(runs), _moved(runs, needed)))


def _moved(runs: list[list[int]], needed: dict[Any, np.ndarray]) -> int:
    """Return how many parts of the keys move."""
    empty = np.zeros((0, 0))
    chains = (_chain(run, needed, np.zeros((len(run), 0)), empty) for run in runs)
    return sum(len(pairs) for chain in chains for pairs in chain.moves)


def _chain(
    run: list[Any],
    needed: dict[Any, np.ndarray],
    starts: np.ndarray,
    states: np.ndarray | None,
) -> Chain:
    """Return the chain of a run of shifts, with the moves that its tiles need."""
    first, stride = run[0] or 0, (run[1] or 0) - (run[0] or 0) if len(run) > 1 else 0
    ever = [needed[run[-1]]]  # whether a device, or one that keys reach through it, needs them
    for shift in run[-2::-1]:
        ever.insert(0, needed[shift] | np.roll(ever[0], stride))
    onward = np.any(ever[1:], axis=0) if len(run) > 1 else []
    pairs = _pairs(first, ever[0]) if run[0] else ()
    return Chain(run[0], stride, pairs, _pairs(stride, onward), starts, states)


def _pairs(shift: int, into: Any) -> tuple[tuple[int, int], ...]:
    """Return the moves to the devices where `into` is true."""
    return tuple((int(d + shift) % len(into), int(d)) for d in np.flatnonzero(into))


def _grid(mask: Mask, positions: tuple[np.ndarray, np.ndarray], rows: int, unit: int) -> np.ndarray:
    """Return what `rows` queries are with `unit` keys, all of these on all devices.

    From the runs of consecutive positions that they are made of; where these are too many, from
    the smallest and the largest position.
    """
    queries, keys = (
        Parts.of(of_devices.ravel(), len(of_devices), size)
        for of_devices, size in zip(positions, (rows, unit), strict=True)
    )
    if len(queries.low) * len(keys.low) <= MOST_CELLS:
        return states_between(mask, queries, keys)
    intervals = _intervals(positions[0], rows, 0), _intervals(positions[1], unit, 1)
    return np.asarray(classify(mask, *intervals))


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


def _states_at(grid: Any, where: tuple[Any, Any], plan: Plan) -> Any:
    """Return what tiles are, [n], from the units [rows, units] that they are made of."""
    return joined(grid, *where, plan.tile[1] // plan.unit)
