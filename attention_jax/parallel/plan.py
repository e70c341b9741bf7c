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

import jax.numpy as jnp
import numpy as np

from attention_jax.implementations import cheapest, choice
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

CHUNKS = (16, 8, 4, 2)
"""In how many chunks the keys of a device may travel: the first of these whose devices hardly wait
for each other; else in one."""

WAIT = 1.05
"""By chunks, the devices may wait so many times as long for each other as without."""


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """Steps of attention between which keys travel on: a loop, with the tiles of each step.

    At step n device d has a chunk of the keys of device d + first + n stride. It comes to the first
    step from the device that holds it, and to any other from the device that had it before; then
    all steps follow for the next chunk.

    Attributes:
      first: 0 where a device has its own keys; None where it has those of all devices.
      stride: see above.
      pairs: from which device to which keys move before the first step, (source, destination).
      onward: the same before every other step. Keys come to a device where some tile of them may
        be live, or may be so on a device that they reach through it.
      starts: [C, steps, D, n, 2], the first query and the first key of each tile, for each chunk
        and device; [C, steps, 1, n, 2] where they are the same for all devices.
      states: [C, steps, D, n], what each tile is, EMPTY beyond the last; None where only run time
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
        return self.starts.shape[1]

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
      chunks: in how many parts the keys of a device travel, C. Of [S / D] = [R, C, bk] keys, the
        c-th chunk has [:, c], so that devices which hold early and late positions have both in it.
      received: how many keys a device has at a step: of one chunk.
      covered: the tiles reach up to this key of a chunk.
      chains: of the steps in which some device may have a live tile.
      live: [D], the tiles that each device visits, as far as known while tracing.
    """

    tile: tuple[int, int]
    unit: int
    chunks: int
    received: int
    covered: int
    chains: tuple[Chain, ...]
    live: np.ndarray

    @property
    def heads(self) -> int:
        """The heads of a visit."""
        return 1

    @property
    def largest_visit(self) -> int:
        """The queries of a visit: those of a tile."""
        return self.tile[0]

    @property
    def dearest(self) -> int:
        """The tiles of the device that visits most."""
        return int(self.live.max())

    def within(self, mask: Mask, key_length: int) -> Mask:
        """Return the mask without keys beyond the last, whose positions are `key_length`."""
        return mask & Lengths(key_length) if self.covered > self.received else mask

    def states(self, mask: Mask, queries: Any, keys: Any, starts: Any) -> Any:
        """Ask the mask of a head what the tiles are, at the positions of a device, [n]."""
        intervals = _intervals(queries, self.tile[0], 0), _intervals(keys, self.unit, 1)
        grid = jnp.asarray(classify(mask, *intervals))
        rows, first = starts[:, 0] // self.tile[0], starts[:, 1] // self.unit
        return _states_at(_padded(grid, self), (rows, first), self)


def make_plan(request: Request, placement: Placement, gathered: bool, platform: str) -> Plan:
    """Return the plan whose dearest device needs least time; of nearly equal ones, least work."""
    mask, is_static = choice.known_mask(request.mask, request.sizes)
    share, received = placement.shares
    pairs = share, placement.lengths[1] if gathered else received
    if request.tile_sizes is not None:
        tiles = [cheapest.clipped(request.tile_sizes, pairs)]
    else:
        rows, columns = cheapest.CANDIDATES.get(platform, cheapest.CANDIDATES["default"])
        tiles = {cheapest.clipped((row, column), pairs) for row in rows for column in columns}
    units = [tile[1] // units_of(tile[1]) for tile in tiles]
    grids = _Grids.of(mask, placement, [tile[0] for tile in tiles], units)
    of_tile = functools.partial(_plan_of, grids, is_static, placement, gathered)
    plans = []
    for tile in sorted(tiles, key=math.prod, reverse=True):
        cells = math.prod(placement.lengths) * FRACTIONS[0] // math.prod(tile)
        if not plans or cells <= MOST_CELLS:
            plans.append(of_tile(tile))
    costs = [plan.dearest * (math.prod(plan.tile) + cheapest.VISIT_PAIRS) for plan in plans]
    able = [plan for plan, cost in zip(plans, costs, strict=True) if cost <= DEARER * min(costs)]
    return min(able, key=lambda plan: plan.dearest * math.prod(plan.tile))


def _plan_of(
    grids: _Grids, is_static: bool, placement: Placement, gathered: bool, tile: tuple[int, int]
) -> Plan:
    devices = placement.axis.devices
    unit = tile[1] // units_of(tile[1])
    rows = -(-placement.shares[0] // tile[0])
    held = placement.lengths[1] if gathered else placement.shares[1]
    units = -(-held // unit)
    if grids.positions is None:
        is_static = False
        grid = np.full((devices, rows, 1 if gathered else devices, units), PARTIAL, np.int8)
    else:
        grid = grids.whole(tile[0], unit) if gathered else grids.by_device(tile[0], unit)
    # The keys of device d + shift lie at (d + shift) mod D.
    shifts = [None] if gathered else list(range(devices))
    device = np.arange(devices)
    grid = np.stack([grid[device, :, (device + (s or 0)) % grid.shape[2]] for s in shifts], axis=1)
    live = grid != EMPTY
    needed = live.any(axis=(2, 3)).T
    tiles = 0 if gathered or held % tile[1] else held // tile[1]
    chunks = _chunks(live.sum(axis=2), tiles)
    grid = np.moveaxis(_by_chunk(grid, chunks, tiles), -2, 2)
    received = held // chunks
    covered = -(-received // unit) * unit
    empty = Plan(tile, unit, chunks, received, covered, (), np.zeros(devices, int))
    grid = _padded(grid, empty)
    if not is_static:
        grid = grid.max(axis=0, keepdims=True)
    return _covered(grid, empty, is_static, dict(zip(shifts, needed, strict=True)))


def _chunks(live: np.ndarray, tiles: int) -> int:
    """Return in how many chunks keys travel, given the live units [D, shifts, units].

    The keys of a device are so many `tiles`, 0 if not whole ones. Devices wait for each other at
    each step of each chunk.
    """
    able = [n for n in CHUNKS if tiles and tiles % n == 0]
    by_turn = ((n, _by_chunk(live, n, tiles).sum(axis=-1)) for n in [1, *able])
    waiting = {n: int(units.max(axis=0).sum()) for n, units in by_turn}
    return next((n for n in able if waiting[n] <= WAIT * waiting[1]), 1)


def _by_chunk(grid: np.ndarray, chunks: int, tiles: int) -> np.ndarray:
    """Part the units [..., units] of all keys of a device into chunks, [..., C, units]."""
    front = grid.shape[:-1]
    if chunks == 1:
        return grid.reshape(*front, 1, -1)
    grid = grid.reshape(*front, tiles // chunks, chunks, -1).swapaxes(-3, -2)
    return grid.reshape(*front, chunks, -1)


def _covered(grid: np.ndarray, empty: Plan, is_static: bool, needed: dict[Any, np.ndarray]) -> Plan:
    """Cover what may be live in the grid [D or 1, shifts, C, rows, units] by tiles."""
    per_tile = empty.tile[1] // empty.unit
    runs = runs_of((grid != EMPTY).reshape(-1, grid.shape[-1]))
    row, first = cover(runs, per_tile)
    if first.min(initial=0) < 0:  # whole tiles do not fit
        more = -grid.shape[-1] % per_tile
        empty = dataclasses.replace(empty, covered=empty.covered + more * empty.unit)
        grid = _padded(grid, empty)
        row, first = cover(runs._replace(cells=grid.shape[-1]), per_tile)
    front, rows = grid.shape[:3], grid.shape[3]
    starts = np.stack([row % rows * empty.tile[0], first * empty.unit], axis=1)
    states = _states_at(grid.reshape(-1, grid.shape[-1]), (row, first), empty)
    place = row // rows
    who, shift, chunk = np.unravel_index(place, front)
    counts = np.bincount(place, minlength=math.prod(front)).reshape(front)
    number = np.arange(len(row)) - np.searchsorted(place, place)
    shifts = list(needed)
    chains = []
    for run in _runs([s for n, s in enumerate(shifts) if counts[:, n].any()], needed):
        at = [shifts.index(s) for s in run]
        table = np.zeros((front[2], len(at), front[0], counts[:, at].max(), 2), np.int32)
        kinds = np.full(table.shape[:4], EMPTY, np.int8)
        for step, n in enumerate(at):
            of = shift == n
            table[chunk[of], step, who[of], number[of]] = starts[of]
            kinds[chunk[of], step, who[of], number[of]] = states[of]
        chains.append(_chain(run, needed, table, kinds if is_static else None))
    live = np.zeros(len(empty.live), int) + counts.sum(axis=(1, 2))
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
    chains = (_chain(run, needed, np.zeros((1, len(run))), empty) for run in runs)
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


@dataclasses.dataclass(frozen=True, eq=False)
class _Grids:
    """What the mask is over tiles of several sizes; it is asked once, about parts of all of them.

    Attributes:
      mask: as far as it is known.
      positions: of queries and keys by device, [D, T / D] and [D, S / D]; None if not known.
      part: the largest size, [queries, keys], that divides all others; None if there would be too
        many of these.
    """

    mask: Mask
    positions: tuple[np.ndarray, np.ndarray] | None
    part: tuple[int, int] | None

    @classmethod
    def of(cls, mask: Mask, placement: Placement, rows: list[int], units: list[int]) -> _Grids:
        """Prepare for tiles with one of these numbers of queries, and of keys."""
        queries, keys = placement.known(0), placement.known(1)
        if queries is None or keys is None:
            return cls(mask, None, None)
        part = math.gcd(*rows), math.gcd(*units)
        number = math.prod(
            -(-share // of) for share, of in zip(placement.shares, part, strict=True)
        )
        is_little = number * placement.axis.devices**2 <= MOST_CELLS // 4
        return cls(mask, (queries, keys), part if is_little else None)

    @functools.cached_property
    def of_parts(self) -> np.ndarray:
        """What the parts are, [D, parts, D, parts]."""
        assert self.part is not None
        return self.asked(*self.part)

    def by_device(self, rows: int, unit: int) -> np.ndarray:
        """Return what `rows` queries are with `unit` keys, [D, tiles, D, units]."""
        if self.part is None:
            return self.asked(rows, unit)
        least = most = self.of_parts
        for axis, size, part in ((1, rows, self.part[0]), (3, unit, self.part[1])):
            least = _in_groups(least, axis, size // part).min(axis=axis + 1)
            most = _in_groups(most, axis, size // part).max(axis=axis + 1)
        return np.where(least == most, least, np.int8(PARTIAL))

    def whole(self, rows: int, unit: int) -> np.ndarray:
        """Return the same where all keys are cut together, [D, tiles, 1, units]."""
        assert self.positions is not None
        queries, keys = self.positions
        return dataclasses.replace(self, positions=(queries, keys.reshape(1, -1))).asked(rows, unit)

    def asked(self, rows: int, unit: int) -> np.ndarray:
        """Ask the mask, [D, tiles, D, units].

        From the runs of consecutive positions that rows are made of; where these are too many, from
        the smallest and the largest position.
        """
        assert self.positions is not None
        positions = self.positions
        shape = [
            number
            for of_devices, size in zip(positions, (rows, unit), strict=True)
            for number in (len(of_devices), -(-of_devices.shape[1] // size))
        ]
        queries, keys = (
            Parts.of(of_devices.ravel(), len(of_devices), size)
            for of_devices, size in zip(positions, (rows, unit), strict=True)
        )
        if len(queries.low) * len(keys.low) <= MOST_CELLS:
            return states_between(self.mask, queries, keys).reshape(shape)
        intervals = _intervals(positions[0], rows, 0), _intervals(positions[1], unit, 1)
        return np.asarray(classify(self.mask, *intervals)).reshape(shape)


def _in_groups(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Part an axis into groups of a size; the last group has its last entry as often as needed."""
    more = [(0, 0)] * x.ndim
    more[axis] = 0, -x.shape[axis] % size
    x = np.pad(x, more, mode="edge") if more[axis][1] else x
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


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
