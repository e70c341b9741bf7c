"""Which implementation runs, in tiles of which size, and what that costs: rules in the open."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from attention_jax.implementations.tiles import TOGETHER_PAIRS, Plan, make_plan, make_visits
from attention_jax.masks import FULL, PARTIAL, Mask, batch_axes
from attention_jax.masks.intervals import Unknown

DENSE_PAIRS = 256 * 256
"""At and below this many pairs T x S of a head, None picks "dense": the whole plane is one tile."""

CANDIDATES = {
    "cpu": ((128, 256, 512), (128, 256, 384, 512)),
    "default": ((256, 512, 1024), (256, 512, 1024)),
}
"""Queries and keys of a tile to choose from. On CPU a 512 x 512 tile of float32 fills the level-2
cache."""

VISIT_PAIRS = 95_000
"""What visiting a tile costs beside its pairs, counted in pairs (fitted on a 2-core CPU)."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What would run for one head; `str()` says it in a few lines.

    Attributes:
      implementation: name.
      heads: number of heads times examples.
      tile: queries and keys a tile, [bt, bk].
      empty, partial, full: number of tiles of each kind of one head; for a mask that is known
        only inside `jit`, PARTIAL counts those that cannot be ruled out while tracing.
      flops: floating-point operations of the two matrix products, all heads, forward.
      bytes: memory of temporaries beside inputs and outputs, forward.
    """

    implementation: str
    heads: int
    tile: tuple[int, int]
    empty: int
    partial: int
    full: int
    flops: int
    bytes: int

    def __str__(self) -> str:
        rows, columns = self.tile
        return (
            f"{self.implementation}: {self.heads} heads, tiles of {rows} x {columns}: "
            f"{self.empty} empty (skipped), {self.partial} partial, {self.full} full\n"
            f"{self.flops / 1e9:.3g} GFLOP and {self.bytes / 2**20:.3g} MiB of temporaries forward"
        )


def choose(sizes: dict[str, int], able: list[str]) -> str:
    """Return what None stands for, among the implementations that are able.

    "dense" where all pairs of a head fit in one tile or nothing else is able; "cudnn" before
    "tiled".
    """
    if sizes["T"] * sizes["S"] <= DENSE_PAIRS:
        return "dense"
    return next(name for name in ("cudnn", "tiled", "dense") if name in able)


def choose_tile(mask: Mask, sizes: dict[str, int], platform: str | None = None) -> tuple[int, int]:
    """Return the tile for which pairs and visits together cost least."""
    rows, columns = CANDIDATES.get(platform or jax.default_backend(), CANDIDATES["default"])
    query_length, key_length = max(sizes["T"], 1), max(sizes["S"], 1)
    known = _of_every_example(mask, sizes)
    is_known = not any(isinstance(leaf, Unknown) for leaf in jax.tree.leaves(known))

    tiles = {
        (min(row, query_length), min(column, key_length)) for row in rows for column in columns
    }
    chosen, least, certain = (0, 0), math.inf, 0
    for tile in sorted(tiles, key=math.prod, reverse=True):
        # No plan visits fewer pairs than those of FULL tiles, nor more of them at a visit.
        if certain * (1 + VISIT_PAIRS / max(math.prod(tile), *TOGETHER_PAIRS.values())) >= least:
            continue
        plan = make_plan(known, query_length, key_length, *tile)
        if len(plan.starts) * math.prod(tile) >= least:  # whatever its visits cost
            continue
        cost = _cost(plan, query_length, tile, is_known)
        if cost < least:
            chosen, least = tile, cost
        full = plan.starts[plan.states == FULL]
        ends = np.minimum(full + tile, (query_length, key_length))
        certain = max(certain, np.prod(ends - full, axis=1).sum())
    return chosen


def _cost(plan: Plan, query_length: int, tile: tuple[int, int], is_known: bool) -> int:
    """Return what the visits of a plan cost, counted in pairs.

    Tiles of one group are visited many at a time for the price of one; of several groups some
    are, and are not counted so; those of a mask that only run time knows are visited one by one.
    """
    groups = make_visits(plan, query_length, *tile)
    visits = len(groups[0].queries) if is_known and len(groups) == 1 else len(plan.starts)
    return len(plan.starts) * math.prod(tile) + visits * VISIT_PAIRS


def describe(
    implementation: str, mask: Mask, sizes: dict[str, int], tile: tuple[int, int], itemsize: int
) -> Choice:
    """Count tiles, operations and bytes of what would run."""
    heads = sizes["B"] * sizes["N"]
    depth = sizes["Q"] + sizes["V"]
    query_length, key_length = sizes["T"], sizes["S"]
    if implementation == "dense":
        tile = (max(query_length, 1), max(key_length, 1))
    plan = make_plan(_of_every_example(mask, sizes), query_length, key_length, *tile)
    partial, full = (int((plan.states == state).sum()) for state in (PARTIAL, FULL))
    grid = -(-query_length // tile[0]) * -(-key_length // tile[1])
    visited = grid if implementation == "dense" else partial + full
    pairs = visited * tile[0] * tile[1]
    held = (
        2 * heads * pairs
        if implementation == "dense"
        else 2 * _largest_visit(plan, query_length, tile) + heads * query_length * (sizes["V"] + 1)
    )
    return Choice(
        implementation,
        heads,
        tile,
        grid - partial - full,
        partial,
        full,
        flops=2 * heads * pairs * depth,
        bytes=held * itemsize,
    )


def _largest_visit(plan: Plan, query_length: int, tile: tuple[int, int]) -> int:
    """Return how many pairs are held at once."""
    visits = make_visits(plan, query_length, *tile)
    return max((one.height for one in visits), default=0) * tile[1]


def sequential_axes(mask_axes: Any) -> str:
    """Return the axes to loop over instead of vectorising.

    On CPU all: one head at a time keeps its tiles in cache. Elsewhere those along which a mask
    known only at run time differs, so that a skipped tile is really skipped.
    """
    if jax.default_backend() == "cpu":
        return "BKG"
    return "".join(letter for letter in "BKG" if any(letter in axes for axes in mask_axes))


def _of_every_example(mask: Mask, sizes: dict[str, int]) -> Mask:
    """Return the mask as far as it is known while tracing and the same for all examples."""
    mask, letters = batch_axes.of_mask("attend", mask, sizes)
    leaves, structure = jax.tree.flatten(mask.static())
    known = [Unknown() if axes else leaf for axes, leaf in zip(letters, leaves, strict=True)]
    return structure.unflatten(known)
