"""Deal the positions of a sequence to devices, so that each has the same number of live pairs.

A device that holds a part of the queries visits the live tiles of its rows, whichever device holds
their keys. Cut into consecutive parts, a causal mask gives the last of D devices 2 - 1/D times the
mean. Dealt in blocks, each device has the same number of positions and nearly the same work.

Everything here is NumPy and depends on the mask and the lengths alone: the data pipeline permutes
its arrays once (`permute`), and whoever looks at positions restores them (`restore`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from attention_jax.base import checks
from attention_jax.masks import MaskLike
from attention_jax.parallel.work import Parts, Work, run_of

__all__ = ["BOUND", "Load", "deal", "load", "permute", "restore"]

BOUND = 1.05
"""An order is balanced if the dearest device has at most this many times the mean."""

AIM = 1.01
"""Blocks change places until the dearest device has at most this many times the mean."""

SMALLEST_BLOCK = 8
"""The least block that is tried: fewer rows of a tile cost an accelerator as much as 8 do."""

MOST_BLOCKS = 4096
"""Blocks are not made smaller where there would be more."""

WAITING = 1.1
"""An order that waits at most this many times as long as another may have other merits."""


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
    mean, that one is taken in which the devices of a ring wait least for each other (to 10 %),
    then the one that moves fewest keys, then the one of the largest blocks.

    One order serves a whole batch: work is summed over examples and heads. What a mask knows only
    inside `jit` counts as live; give segments and lengths as arrays of the data pipeline.

    Args:
      mask: as in `attend`.
      lengths: T of a sequence that attends to itself, or (T, S). Keys are dealt as the queries
        are where T = S, else they stay in parts of consecutive positions.
      devices: D; divides T, and S.
      block: positions that stay together, a divisor of T / D. None chooses; blocks smaller than a
        tile are taken only where others reach no balance, and none smaller than 8 or than T / 4096.
        Where none reaches it, as with a row that alone is dearer than a device should be, the best
        order is returned (`load` tells how good).
      tile_sizes: queries and keys of the tiles that work is counted in, each clipped to a block:
        128 unless given, and larger for sequences of more than 2^19.

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
    sizes = [block] if block is not None else _blocks(query_length, devices)
    if block is not None:
        checks.at_least("deal", 1, block=block)
        _divide("deal", "T", query_length, {"devices": devices, "block": block})
    work = Work.of("deal", mask, lengths, tile_sizes)
    whole = [size for size in sizes if size >= work.tile_sizes[0]] or sizes[:1]
    finest = work.between_blocks(query_length // whole[-1], devices) if whole else None
    consecutive = np.arange(devices)[:, None]
    found = [_Deal(consecutive, _between(work, finest, query_length // devices, devices))]
    for size in sizes:
        best = _best(found)
        if best.is_balanced and (len(best.blocks[0]) == 1 or size < whole[-1]):
            break
        if best.is_balanced and best.load.waiting <= WAITING:
            break
        found += _deals(_between(work, finest, size, devices), devices)
    return _best(found).order(query_length)


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
    order = _order("load", "T", order, query_length)
    if key_order is None and query_length == key_length:
        key_order = order
    work = Work.of("load", mask, lengths, tile_sizes)
    spans = tile_sizes is not None
    queries, keys = (
        Parts.of(each, devices, size if spans else min(size, run_of(each, devices)))
        for each, size in zip(
            (order, _order("load", "S", key_order, key_length)), work.tile_sizes, strict=True
        )
    )
    return Load(work.between(queries, keys))


def permute(x: Any, order: Any, axis: int = 1) -> Any:
    """Put positions into the order in which devices hold them: y[b, i] = x[b, order[i]].

    Args:
      x: [B, T, ...], or T at another axis; of NumPy or of JAX, and so is the result.
      order: [T], from `deal`; None leaves x as it is.
      axis: of the positions.

    Raises:
      ShapeError: an order of another length, or one that is not an order of all positions.

    >>> permute(np.array([[10, 11, 12, 13]]), np.array([0, 3, 1, 2]))
    array([[10, 13, 11, 12]])
    """
    if order is None:
        return x
    return _taken(x, _order("permute", "T", order, _size("permute", x, axis)), axis)


def restore(x: Any, order: Any, axis: int = 1) -> Any:
    """Put positions back into their own order: the inverse of `permute`, y[b, order[i]] = x[b, i].

    Args:
      x: [B, T, ...], or T at another axis; of NumPy or of JAX, and so is the result.
      order: [T], as it was given to `permute`.
      axis: of the positions.

    Raises:
      ShapeError: an order of another length, or one that is not an order of all positions.

    >>> restore(np.array([[10, 13, 11, 12]]), np.array([0, 3, 1, 2]))
    array([[10, 11, 12, 13]])
    """
    if order is None:
        return x
    return _taken(x, _order("restore", "T", order, _size("restore", x, axis)).argsort(), axis)


@dataclasses.dataclass(frozen=True, eq=False)
class _Deal:
    """The numbers of the blocks of each device, [D, blocks a device], and pairs between blocks."""

    blocks: np.ndarray
    pairs: np.ndarray

    @functools.cached_property
    def load(self) -> Load:
        """The work of every device."""
        devices = len(self.blocks)
        of_queries = self.pairs[self.blocks].sum(axis=1)
        if self.pairs.shape[1] == self.blocks.size:
            of_queries = of_queries[:, self.blocks.ravel()]
        return Load(of_queries.reshape(devices, devices, -1).sum(axis=2))

    @property
    def is_balanced(self) -> bool:
        """Whether the dearest device is within the bound."""
        return self.load.dearest <= BOUND

    def order(self, length: int) -> np.ndarray:
        """Return the positions of all devices, [T]."""
        positions = np.arange(length, dtype=np.int32).reshape(self.blocks.size, -1)
        return positions[self.blocks].ravel()


def _best(found: list[_Deal]) -> _Deal:
    """Return the order that is best: balanced, with little waiting, few keys that move."""
    balanced = [one for one in found if one.is_balanced]
    if not balanced:
        return min(found, key=lambda one: one.load.dearest)
    least = min(one.load.waiting for one in balanced)
    able = [one for one in balanced if one.load.waiting <= WAITING * least]
    return min(able, key=lambda one: (one.load.moves, one.blocks.size, one.load.waiting))


def _between(work: Work, finest: np.ndarray | None, size: int, devices: int) -> np.ndarray:
    """Return the pairs between blocks of a size, summed up from smaller ones where that is so."""
    blocks = work.lengths[0] // size
    if finest is None or len(finest) % blocks:
        return work.between_blocks(blocks, devices)
    is_self = work.lengths[0] == work.lengths[1]
    columns = blocks if is_self else devices
    return finest.reshape(blocks, len(finest) // blocks, columns, -1).sum(axis=(1, 3))


def _deals(pairs: np.ndarray, devices: int) -> list[_Deal]:
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
    return [_Deal(alike, pairs), _Deal(near, pairs)]


def _exchanged(blocks: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Exchange a block of the dearest device and one of a cheap device while that helps.

    Of the cheapest device that can help at all, those two are exchanged that leave the two devices
    with the most similar work.
    """
    blocks = blocks.copy()
    aim = AIM * costs.sum() / len(blocks)
    for _ in range(blocks.size):
        of_device = costs[blocks].sum(axis=1)
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


def _blocks(length: int, devices: int) -> list[int]:
    """Return divisors of T / D, each at most half of the one before, from T / 2 D down."""
    share = length // devices
    divisors = [n for n in range(share // 2, SMALLEST_BLOCK - 1, -1) if share % n == 0]
    found: list[int] = []
    for divisor in divisors:
        if length // divisor <= MOST_BLOCKS and 2 * divisor <= (found[-1] if found else share):
            found.append(divisor)
    return found


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


def _order(operation: str, letter: str, order: Any, length: int) -> Any:
    """Return an order of all positions as an array; one known only in `jit` is not looked at."""
    if order is None:
        return np.arange(length, dtype=np.int32)
    is_traced = isinstance(order, jax.core.Tracer)
    order = order if is_traced else np.asarray(order)
    is_order = order.shape == (length,) and jnp.issubdtype(order.dtype, jnp.integer)
    if is_order and not is_traced:
        is_order = np.array_equal(np.sort(order), np.arange(length))
    if not is_order:
        raise checks.ShapeError(
            f"{operation}: an order [{letter}] must hold each of the {length} positions once, as "
            f"parallel.deal returns it, got {order.dtype} of shape {order.shape}."
        )
    return order


def _size(operation: str, x: Any, axis: int) -> int:
    """Return the size of an axis."""
    shape = np.shape(x)
    if not -len(shape) <= axis < len(shape):
        raise checks.ShapeError(f"{operation}: x has no axis {axis}, got shape {shape}.")
    return shape[axis]


def _taken(x: Any, order: Any, axis: int) -> Any:
    is_numpy = isinstance(order, np.ndarray) and not isinstance(x, jax.Array)
    return np.take(x, order, axis) if is_numpy else jnp.take(x, order, axis)
