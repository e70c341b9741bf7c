"""The size of tiles that costs least: the pairs of all of them, and what it takes to visit them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, ClassVar

import numpy as np

from attention_jax.implementations.covering import BLOCK, Judged, cover
from attention_jax.implementations.tiles import Plan, make_plan, pairs_together, units_of
from attention_jax.masks import Lookup, Mask

CANDIDATES = {
    "cpu": ((128, 256, 512), (128, 256, 384, 512)),
    "default": ((256, 512, 1024), (256, 512, 1024)),
}
"""Queries and keys of a tile to choose from. On CPU a 512 x 512 tile of float32 fills the level-2
cache."""

MIXED_PAIRS = {"cpu": 2**18, "default": 2**21}
"""Where maps mix heads, a tile of all of them has at most so many pairs."""

VISIT_PAIRS = 95_000
"""The cost of visiting a tile beyond that of its pairs, in pairs (fitted on a 2-core CPU)."""

MOST_TILES = 2**15
"""Once there is a plan, none is tried that has surely more tiles: to plan them takes too long."""

LESS = 0.98
"""No plan is looked for that saves less than the rest of this part of the cost."""

LEAST_CELL = 2**10
"""Cells of fewer pairs are not judged to know how many pairs all tiles have at least."""

SAMPLE_PAIRS = 2**31
"""Where tiles have more pairs, those of about so many pairs of the plane are counted."""

SAMPLE_CELLS = 2**23
"""The same is done where more cells have to be judged one by one, as of random blocks."""

LEAST_BANDS = 8
"""That is done in at least so many bands of queries, each as high as the highest tile."""

GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it are spread evenly between whole numbers, whatever the period of a mask is."""


def cheapest_tile(
    mask: Mask, pairs: tuple[int, int], is_static: bool, platform: str, heads: int = 1
) -> tuple[int, int]:
    """Return the queries and keys of the tiles whose pairs and visits together cost least.

    Args:
      mask: as far as it is known while tracing (`Mask.static`).
      pairs: the numbers of queries and keys, [T, S].
      is_static: whether the whole mask is known while tracing.
      platform: the one that the tiles are for.
      heads: a tile is of so many heads, which maps mix.
    """
    tiles = {clipped(tile, pairs) for tile in _candidates(platform, heads)}
    sample = _bands(mask, pairs, max(rows for rows, _ in tiles))
    size, width = _common(tiles)
    # Where tiles are clipped, cells may be too many.
    judged = Judged.of(*sample, size) if math.prod(size) >= LEAST_CELL else None
    fewest = _fewest_pairs(judged, size, width)
    share = sample[1][0] / pairs[0]
    asked = 0 if judged is None else judged.within.size
    if fewest > SAMPLE_PAIRS * share or asked > SAMPLE_CELLS * share:
        mask, pairs = sample
    elif sample[1] != pairs:
        judged = None if judged is None else Judged.of(mask, pairs, size)
        fewest = _fewest_pairs(judged, size, width)
    chosen, least = None, math.inf
    for tile in sorted(tiles, key=math.prod, reverse=True):
        # No plan has fewer pairs, nor more of them at a visit.
        together = max(math.prod(tile), pairs_together(platform))
        if fewest * (1 + VISIT_PAIRS / together) >= LESS * least:
            continue
        if chosen is not None and fewest > MOST_TILES * math.prod(tile):
            continue
        plan = make_plan(mask, pairs, tile, is_static, judged=_judged_for(tile, judged, size))
        plan = dataclasses.replace(plan, platform=platform)
        if len(plan.starts) * math.prod(tile) >= least:  # whatever its visits cost
            continue
        cost = _cost(plan)
        if cost < least:
            chosen, least = tile, cost
    assert chosen is not None  # the first costs less than infinity
    return chosen


def _common(tiles: set[tuple[int, int]]) -> tuple[tuple[int, int], int]:
    """Return the largest cells, of [queries, keys], that tiles of every size consist of.

    And of how many cells beside each other the smallest one that divides all tiles does.
    """
    rows, columns = (math.gcd(*sizes) for sizes in zip(*tiles, strict=True))
    unit = math.gcd(columns, *(tile[1] // units_of(tile[1]) for tile in tiles))
    return (rows, unit), columns // unit


def _judged_for(
    tile: tuple[int, int], judged: Judged | None, size: tuple[int, int]
) -> Judged | None:
    """Return what the units of tiles are, of what their cells of a size are; None to ask the mask.

    To ask for the smallest cells alone, and once, takes less than to ask for those of every tile.
    """
    whole = tile[0], tile[1] // units_of(tile[1])
    many = [unit // cell for unit, cell in zip(whole, size, strict=True)]
    if judged is None or any(BLOCK % number for number in many):
        return None
    return judged.joined(*many)


def _fewest_pairs(judged: Judged | None, size: tuple[int, int], width: int) -> int:
    """Return how many pairs the tiles have at least, of whichever size: those that divide all."""
    if judged is None:
        return 0
    row, _ = cover(judged.live, width)
    return len(row) * width * math.prod(size)


def clipped(tile: tuple[int, int], pairs: tuple[int, int]) -> tuple[int, int]:
    """Return a tile that is no larger than the plane."""
    return min(tile[0], pairs[0]), min(tile[1], pairs[1])


def _candidates(platform: str, heads: int) -> list[tuple[int, int]]:
    """Return the tiles to choose from; those of several heads have as many pairs together."""
    if heads == 1:
        return list(itertools.product(*CANDIDATES.get(platform, CANDIDATES["default"])))
    most = MIXED_PAIRS.get(platform, MIXED_PAIRS["default"]) // heads
    sizes = [2**power for power in range(4, 11)]
    fitting = [tile for tile in itertools.product(sizes, sizes) if math.prod(tile) <= most]
    largest = max(map(math.prod, fitting), default=0)
    return [tile for tile in fitting if math.prod(tile) == largest] or [(sizes[0], sizes[0])]


def _cost(plan: Plan) -> int:
    """Return what the visits of a plan cost, counted in pairs.

    Tiles of one group are visited many at a time for the price of one; of several groups some
    are, and are not counted so; those of a mask that only run time knows are visited one by one.
    """
    is_one_group = plan.is_static and len(plan.visits) == 1
    visits = len(plan.visits[0].queries) if is_one_group else len(plan.starts)
    return len(plan.starts) * math.prod(plan.tile) + visits * VISIT_PAIRS


def _bands(mask: Mask, pairs: tuple[int, int], rows: int) -> tuple[Mask, tuple[int, int]]:
    """Return the mask at some bands of queries below each other, and its pairs; or all of it."""
    bands = pairs[0] // rows
    sample = max(LEAST_BANDS, SAMPLE_PAIRS // (rows * pairs[1]))
    if bands <= sample:
        return mask, pairs
    number = np.arange(sample)
    band = ((number + (number + 0.5) * GOLDEN % 1) * bands / sample).astype(np.int32)
    return _Bands(mask, band * np.int32(rows), rows), (sample * rows, pairs[1])


@dataclasses.dataclass(frozen=True)
class _Bands(Mask):
    """A mask at bands of `rows` queries that begin at `first [n]`, put below each other."""

    mask: Mask
    first: Any
    rows: int
    example_rank: ClassVar[dict[str, int]] = {"first": 1}

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        return self.mask(Lookup(self.first)[q_idx // self.rows] + q_idx % self.rows, kv_idx)
