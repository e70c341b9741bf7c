"""Deal the positions of a sequence to devices, so that each has the same number of live pairs.

A device that holds a part of the queries visits the live tiles of its rows, whichever device holds
their keys. Cut into consecutive parts, a causal mask gives the last of D devices 2 - 1/D times the
mean. Dealt in blocks, each device has the same number of positions and nearly the same work.

Everything here is NumPy and depends on the mask and the lengths alone: the data pipeline permutes
its arrays once (`orders.permute`), and whoever looks at positions restores them
(`orders.restore`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from attention_jax.base import checks
from attention_jax.implementations import cheapest
from attention_jax.masks import MaskLike
from attention_jax.parallel.orders import order_of
from attention_jax.parallel.work import Parts, Work, run_of

__all__ = ["BOUND", "Load", "deal", "load"]

BOUND = 1.05
"""An order is balanced if the dearest device has at most this many times the mean."""

AIM = 1.01
"""Blocks change places until the dearest device has at most this many times the mean."""

MOST_CELLS = 2**24
"""Blocks are not made smaller where the mask would have to be asked about more tiles."""

MOST_ROUNDS = 4
"""Small blocks change places at most this often."""

LARGER = (2, 4)
"""A ring takes tiles about so many times as large as those that work is counted in."""

SLOWER = 1.02
"""An order that takes a ring at most this many times as long as another may have other merits."""


@dataclasses.dataclass(frozen=True, eq=False)
class Load:
    """The work of every device: pairs in tiles that are not EMPTY.

    Attributes:
      pairs: [D, D], of the queries of one device with the keys of another, all examples and heads.
    """

    pairs: np.ndarray

    @property
    def devices(self) -> np.ndarray:
        """The pairs of each device, [D]."""
        return self.pairs.sum(axis=1)

    @functools.cached_property
    def dearest(self) -> float:
        """The work of the device that has most of it, over the mean; 1 is balanced."""
        total = self.devices.sum()
        return float(self.devices.max() * len(self.pairs) / total) if total else 1.0

    @functools.cached_property
    def waiting(self) -> float:
        """The time of a ring whose devices wait for each other at every step; 1 is no waiting.

        Counted in the time of the mean device. At step r device d attends to the keys of d + r.
        """
        device, total = np.arange(len(self.pairs)), self.devices.sum()
        steps = [self.pairs[device, (device + r) % len(device)].max() for r in device]
        return float(sum(steps) * len(device) / total) if total else 1.0

    @property
    def moves(self) -> int:
        """The parts of the keys that the device receives which receives most, D - 1 at most."""
        needed = (self.pairs > 0) & ~np.eye(len(self.pairs), dtype=bool)
        return int(needed.sum(axis=1).max())

    def __str__(self) -> str:
        return (
            f"{len(self.pairs)} devices, {self.devices.sum():.3g} pairs in live tiles: the dearest "
            f"has {self.dearest:.3f} times the mean, and one receives keys of {self.moves} others"
        )


def deal(
    mask: MaskLike,
    lengths: int | tuple[int, int],
    devices: int,
    *,
    block: int | None = None,
    tile_sizes: tuple[int, int] | None = None,
) -> np.ndarray:
    """Return an order of positions, [T], in which each of D equal parts has the same work.

    Device d holds the positions `order[d T / D : (d + 1) T / D]`, whole blocks of consecutive
    positions, in ascending order. Where consecutive parts are balanced, as for a window, they are
    returned: few keys move then. Else, of orders whose dearest device has at most `BOUND` times the
    mean, that one is taken with which a ring is fastest (to 2 %), as its devices wait for each
    other at every step and its tiles span blocks; then the one that moves fewest keys.

    One order serves a whole batch: work is summed over examples and heads. What a mask knows only
    inside `jit` counts as live; give segments and lengths as arrays of the data pipeline.

    Args:
      mask: as in `attend`.
      lengths: T of a sequence that attends to itself, or (T, S). Keys are dealt as the queries
        are where T = S, else they stay in parts of consecutive positions.
      devices: D; divides T, and S.
      block: positions that stay together, a divisor of T / D. None chooses: blocks of a tile or
        more; and where none of these reach balance, few smaller ones change places, so that most
        positions stay together. Where nothing reaches it, as with a row that alone is dearer than
        a device should be, the best order is returned (`load` tells how good).
      tile_sizes: queries and keys of the tiles that work is counted in, which end where
        consecutive positions do: 128 unless given, and larger for sequences of more than 2^19.

    Raises:
      ShapeError: lengths that devices and blocks do not divide, or a mask of other lengths.
      ValueError: a number below 1.

    >>> from attention_jax.masks import Causal
    >>> deal(Causal(), 16, devices=2, block=4)
    array([ 0,  1,  2,  3, 12, 13, 14, 15,  4,  5,  6,  7,  8,  9, 10, 11],
          dtype=int32)
    """
    lengths = _lengths("deal", lengths, devices)
    query_length = lengths[0]
    if block is not None:
        checks.at_least("deal", 1, block=block)
        _divide("deal", "T", query_length, {"devices": devices, "block": block})
    work = Work.of("deal", mask, lengths, tile_sizes)
    sizes = _blocks(query_length // devices, work.tile_sizes[0]) if block is None else [block]
    finest = work.between_blocks(query_length // sizes[-1], devices) if sizes else None
    consecutive = _Deal(np.arange(query_length, dtype=np.int32), devices, work)
    found = [consecutive]
    if not consecutive.is_balanced or block is not None:
        for size in sizes:
            blocks = query_length // size
            found += _deals(work, _summed(work, finest, blocks, devices), devices)
    for size in _smaller(work, query_length // devices) if block is None else []:
        if any(one.is_balanced for one in found):
            break
        costs = work.of_blocks(query_length // size)
        found += [_refined(one, costs) for one in {consecutive, _best(found)}]
    return _best(found).order


def load(
    mask: MaskLike,
    lengths: int | tuple[int, int],
    devices: int,
    order: Any = None,
    *,
    key_order: Any = None,
    tile_sizes: tuple[int, int] | None = None,
) -> Load:
    """Return the work of every device: what `deal` balances.

    Args:
      mask: as in `attend`.
      lengths: T, or (T, S).
      devices: D; divides T, and S.
      order: of the queries, [T], as from `deal`; None stands for consecutive positions.
      key_order: of the keys, [S]; that of the queries where T = S.
      tile_sizes: queries and keys of the tiles that work is counted in. A tile that spans blocks
        from different places is EMPTY if it is so in all of them. None takes those of `deal`, which
        span one.

    Raises:
      ShapeError: lengths that devices do not divide, a mask of other lengths, or an order that is
        not one of all positions.

    >>> from attention_jax.masks import Causal
    >>> found = load(Causal(), 1024, devices=4)
    >>> found.devices // 128**2  # live tiles of 128 x 128
    array([ 3,  7, 11, 15])
    >>> dealt = load(Causal(), 1024, devices=4, order=deal(Causal(), 1024, devices=4))
    >>> round(found.dearest, 2), dealt.dearest
    (1.67, 1.0)
    """
    query_length, key_length = lengths = _lengths("load", lengths, devices)
    order = order_of("load", "T", order, query_length)
    if key_order is None and query_length == key_length:
        key_order = order
    work = Work.of("load", mask, lengths, tile_sizes)
    orders = order, order_of("load", "S", key_order, key_length)
    return _load(work, orders, devices, spans=tile_sizes is not None)


def _load(work: Work, orders: tuple[Any, Any], devices: int, spans: bool) -> Load:
    parts = (
        Parts.of(order, devices, size, spans)
        for order, size in zip(orders, work.tile_sizes, strict=True)
    )
    return Load(work.between(*parts))


@dataclasses.dataclass(frozen=True, eq=False)
class _Deal:
    """An order, [T]; `given` are the pairs between parts, where they are known."""

    order: np.ndarray
    devices: int
    work: Work
    given: np.ndarray | None = None

    @functools.cached_property
    def load(self) -> Load:
        """The work of every device."""
        if self.given is not None:
            return Load(self.given)
        is_self = self.work.lengths[0] == self.work.lengths[1]
        keys = self.order if is_self else np.arange(self.work.lengths[1])
        return _load(self.work, (self.order, keys), self.devices, spans=False)

    @functools.cached_property
    def time(self) -> float:
        """The time of a ring with the larger tiles that suit it, counted in pairs."""
        is_self = self.work.lengths[0] == self.work.lengths[1]
        orders = self.order, self.order if is_self else np.arange(self.work.lengths[1])
        times = []
        for larger in LARGER:
            rows, columns = tile = tuple(larger * size for size in self.work.tile_sizes)
            work = dataclasses.replace(self.work, tile_sizes=tile)
            load = _load(work, orders, self.devices, spans=True)
            visits = 1 + cheapest.VISIT_PAIRS / (rows * columns)
            times.append(load.waiting * load.devices.mean() * visits)
        return min(times)

    @functools.cached_property
    def runs(self) -> int:
        """How many runs of consecutive positions there are."""
        return int((np.diff(self.order) != 1).sum())

    @property
    def is_balanced(self) -> bool:
        """Whether the dearest device is within the bound."""
        return self.load.dearest <= BOUND


def _best(found: list[_Deal]) -> _Deal:
    """Return the order that is best: balanced, with a fast ring, few keys that move."""
    balanced = [one for one in found if one.is_balanced]
    if len(balanced) < 2:
        return min(balanced or found, key=lambda one: one.load.dearest)
    least = min(one.time for one in balanced)
    able = [one for one in balanced if one.time <= SLOWER * least]
    return min(able, key=lambda one: (one.load.moves, one.runs, one.time))


def _summed(work: Work, finest: np.ndarray | None, blocks: int, devices: int) -> np.ndarray:
    """Return the pairs between blocks, summed up from smaller ones where that is so."""
    if finest is None or len(finest) % blocks:
        return work.between_blocks(blocks, devices)
    is_self = work.lengths[0] == work.lengths[1]
    columns = blocks if is_self else devices
    return finest.reshape(blocks, len(finest) // blocks, columns, -1).sum(axis=(1, 3))


def _deals(work: Work, pairs: np.ndarray, devices: int) -> list[_Deal]:
    """Deal blocks to devices in two ways, and exchange blocks until the work is the same.

    From consecutive parts few blocks change places. Dealt by their work, forth and back, every
    device has blocks of every kind, and devices wait less for each other.
    """
    costs = pairs.sum(axis=1)
    consecutive = np.arange(len(costs)).reshape(devices, -1)
    by_work = np.argsort(-costs, kind="stable").reshape(-1, devices)
    by_work[1::2] = by_work[1::2, ::-1]
    near, alike = (_exchanged(blocks, costs) for blocks in (consecutive, by_work.T))
    alike = alike[np.argsort(alike[:, 0])]
    return [_of_blocks(work, blocks, pairs) for blocks in (alike, near)]


def _of_blocks(work: Work, blocks: np.ndarray, pairs: np.ndarray) -> _Deal:
    """Return the order of the blocks [D, blocks a device], whose pairs are known."""
    devices = len(blocks)
    of_queries = pairs[blocks].sum(axis=1)
    if pairs.shape[1] == blocks.size:
        of_queries = of_queries[:, blocks.ravel()]
    given = of_queries.reshape(devices, devices, -1).sum(axis=2)
    return _Deal(_positions(blocks, work.lengths[0]), devices, work, given)


def _positions(blocks: np.ndarray, length: int) -> np.ndarray:
    """Return the positions of all devices, [T], each with its blocks."""
    return np.arange(length, dtype=np.int32).reshape(blocks.size, -1)[blocks].ravel()


def _refined(deal: _Deal, costs: np.ndarray) -> _Deal:
    """Exchange few blocks of another order, smaller than those that it is made of.

    What a block costs is counted as if all others were in order; by how much that is wrong for a
    device is known when they have changed places, and then they do so again.
    """
    devices, size = deal.devices, len(deal.order) // len(costs)
    if run_of(deal.order, devices) % size:
        return deal
    for _ in range(MOST_ROUNDS):
        blocks = deal.order.reshape(devices, -1, size)[:, :, 0] // size
        wrong = deal.load.devices - costs[blocks].sum(axis=1)
        order = _positions(_exchanged(blocks, costs, wrong), len(deal.order))
        following = _Deal(order, devices, deal.work)
        deal = min(deal, following, key=lambda one: one.load.dearest)
        if deal is not following or deal.is_balanced:
            break
    return deal


def _exchanged(blocks: np.ndarray, costs: np.ndarray, more: Any = 0) -> np.ndarray:
    """Exchange a block of the dearest device and one of a cheap device while that helps.

    A device has the costs of its blocks and `more`, which stays.

    Of the cheapest device that can help at all, those two are exchanged that leave the two devices
    with the most similar work.
    """
    blocks = blocks.copy()
    aim = AIM * (costs[blocks].sum(axis=1) + more).mean()
    for _ in range(blocks.size):
        of_device = costs[blocks].sum(axis=1) + more
        dear = int(of_device.argmax())
        if of_device[dear] <= aim:
            break
        for cheap in np.argsort(of_device, kind="stable"):
            gap = of_device[dear] - of_device[cheap]
            given, taken = _best_exchange(costs[blocks[dear]], costs[blocks[cheap]], gap)
            places = [dear, cheap], [given, taken]
            gain = -np.diff(costs[blocks[places]])
            if 0 < gain < gap:
                blocks[places] = blocks[places][::-1]
                break
        else:
            break
    return np.sort(blocks, axis=1)


def _best_exchange(dear: np.ndarray, cheap: np.ndarray, gap: int) -> tuple[int, int]:
    """Return which two costs to exchange, so that their difference is nearest to half the gap."""
    by_cost = np.argsort(cheap, kind="stable")
    wanted = dear - gap / 2
    above = np.searchsorted(cheap[by_cost], wanted)
    near = np.stack([np.maximum(above - 1, 0), np.minimum(above, len(cheap) - 1)])
    miss = np.abs(cheap[by_cost[near]] - wanted)
    side, given = np.unravel_index(miss.argmin(), miss.shape)
    return int(given), int(by_cost[near[side, given]])


def _blocks(share: int, tile: int) -> list[int]:
    """Return divisors of T / D, each at most half of the one before, down to a tile if any is."""
    divisors = [n for n in range(share // 2, 0, -1) if share % n == 0]
    found: list[int] = []
    for divisor in divisors:
        if 2 * divisor <= (found[-1] if found else share) and (divisor >= tile or not found):
            found.append(divisor)
    return found


def _smaller(work: Work, share: int) -> list[int]:
    """Return divisors of T / D below the size of a tile, each at most half of the one before."""
    tiles = work.lengths[1] // work.tile_sizes[1]
    found = [min(work.tile_sizes[0], share)]
    for divisor in range(found[0] // 2, 0, -1):
        cells = work.lengths[0] // divisor * tiles
        if share % divisor == 0 and 2 * divisor <= found[-1] and cells <= MOST_CELLS:
            found.append(divisor)
    return found[1:]


def _lengths(operation: str, lengths: Any, devices: int) -> tuple[int, int]:
    """Return T and S, which the devices divide."""
    both = tuple(lengths) if isinstance(lengths, tuple | list) else (lengths, lengths)
    checks.at_least(operation, 1, devices=devices)
    for letter, length in zip("TS", both, strict=True):
        checks.at_least(operation, 1, **{letter: length})
        _divide(operation, letter, int(length), {"devices": devices})
    return both


def _divide(operation: str, letter: str, length: int, by: dict[str, int]) -> None:
    """Require a length that is a multiple of a product."""
    product = math.prod(by.values())
    if length % product:
        what = " x ".join(f"{name} = {number}" for name, number in by.items())
        what += f", which is {product}" * (len(by) > 1)
        raise checks.ShapeError(
            f"{operation}: the length {letter} = {length} must be a multiple of {what}; pad the "
            f"sequence to {-(-length // product) * product}."
        )
