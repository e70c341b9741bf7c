"""Which method splits the sequence, and what it costs: rules in the open."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from attention_jax.implementations import choice
from attention_jax.parallel.placement import Placement
from attention_jax.parallel.plan import make_plan
from attention_jax.request import Request

METHODS = ("ring", "all_gather", "all_to_all")

GATHERED = 2**24
"""None gathers keys and values that take at most this many bytes: one transfer, not D - 1."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Split:
    """What would run on each device; `str()` says it in a few lines.

    Attributes:
      method: name.
      devices: D, the parts of the sequence.
      tile: queries and keys a tile, [bt, bk].
      live: the tiles of a head that each device visits, D numbers; for a mask that is known
        only inside `jit`, those that cannot be ruled out while tracing.
      steps: how many transfers wait for each other in turn, forward.
      bytes: what the device that receives most receives forward, all heads and examples.
    """

    method: str
    devices: int
    tile: tuple[int, int]
    live: tuple[int, ...]
    steps: int
    bytes: int

    @property
    def dearest(self) -> float:
        """Tiles of the device that visits most, over the mean; 1 is balanced."""
        total = sum(self.live)
        return max(self.live) * len(self.live) / total if total else 1.0

    def __str__(self) -> str:
        rows, columns = self.tile
        return (
            f"{self.method}: {self.devices} devices, at most {max(self.live)} tiles of {rows} x "
            f"{columns} on one, {self.dearest:.3f} times the mean\n"
            f"{self.steps} transfers, at most {self.bytes / 2**20:.3g} MiB received forward"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """A method, and its plan; None where `dense` runs on whole sequences of some heads.

    `platform` is the one that both are for; None where they are the same on all.
    """

    split: Split
    plan: Any
    platform: str | None = None


def choose(request: Request, placement: Placement, method: str | None, platform: str) -> Choice:
    """Return the method that is asked for, or the one that moves least, with tiles for a platform.

    None stands for "all_to_all" where nothing else can do the normalizer, or where it moves no
    more bytes than a ring; else for "all_gather" where keys and values are small (`GATHERED`) and
    a ring would move all of them; else for "ring".

    Raises:
      ValueError: an unknown name, or a method that cannot do what is asked.
    """
    if method is not None:
        if method not in METHODS:
            raise ValueError(
                f"parallel.attend: method must be None or one of {', '.join(METHODS)}, got "
                f"{method!r}."
            )
        reason = lacks(method, request, placement)
        if reason is not None:
            raise ValueError(f"parallel.attend: method {method!r} {reason}")
        return _described(method, request, placement, platform)
    able = [name for name in METHODS if lacks(name, request, placement) is None]
    if not able:
        reasons = " ".join(f"{name!r} {lacks(name, request, placement)}" for name in METHODS)
        raise ValueError(f"parallel.attend: no method can do this: {reasons}")
    found = {name: _described(name, request, placement, platform) for name in able}
    if "ring" not in found:
        return found[able[0]]
    ring = found["ring"].split
    if "all_to_all" in found and found["all_to_all"].split.bytes <= ring.bytes:
        return found["all_to_all"]
    gathered = found["all_gather"].split
    if 0 < gathered.bytes <= min(GATHERED, ring.bytes):
        return found["all_gather"]
    return found["ring"]


def by_platform(
    request: Request, placement: Placement, method: str | None, platform: str | None
) -> list[Choice]:
    """Choose for a platform; for None, for CPUs and for others, or once where that is the same."""
    if platform is not None:
        chosen = choose(request, placement, method, platform)
        return [dataclasses.replace(chosen, platform=platform)]
    on_cpu = choose(request, placement, method, "cpu")
    other = choose(request, placement, on_cpu.split.method, "tpu")
    if on_cpu.split.tile == other.split.tile:
        return [on_cpu]
    return [dataclasses.replace(on_cpu, platform="cpu"), dataclasses.replace(other, platform="tpu")]


def lacks(method: str, request: Request, placement: Placement) -> str | None:
    """Say what a method cannot do of what is asked, or None if it can do all of it."""
    devices, heads = placement.axis.devices, request.sizes["K"]
    if method == "all_to_all" and heads % devices:
        return (
            f"gives each of the {devices} devices of axis {placement.axis.name!r} the same number "
            f"of key heads, got K = {heads}; use 'ring' or 'all_gather'."
        )
    how = request.streaming
    if method != "all_to_all" and (how is None or not how.merges):
        return (
            f"joins blocks of keys, and {request.normalizer_name} needs a whole row of logits; use "
            "'all_to_all'."
        )
    return None


def _described(method: str, request: Request, placement: Placement, platform: str) -> Choice:
    devices, sizes = placement.axis.devices, request.sizes
    rows = [
        share * sizes["B"] * x.dtype.itemsize
        for share, x in ((placement.shares[0], request.query), (placement.shares[1], request.key))
    ]
    keys_and_values = rows[1] * sizes["K"] * (sizes["H"] + sizes["V"])
    if method == "all_to_all":
        is_dense = request.streaming is None or _is_small(request)
        plan = None if is_dense else choice.plan_for(request, platform)
        tile, tiles = (request.pairs, 1) if plan is None else (plan.tile, len(plan.starts))
        moved = rows[0] * sizes["N"] * (sizes["Q"] + sizes["V"]) + keys_and_values
        split = Split(
            method,
            devices,
            tile,
            (tiles * sizes["N"] // devices,) * devices,
            2 * (devices > 1),
            moved * (devices - 1) // devices,
        )
        return Choice(split, plan)
    plan = make_plan(request, placement, method == "all_gather", platform)
    live = tuple(int(n) for n in plan.live)
    if method == "all_gather":
        moved = keys_and_values * (devices - 1) * bool(plan.chains)
        return Choice(Split(method, devices, plan.tile, live, int(moved > 0), moved), plan)
    moves = [pairs for chain in plan.chains for pairs in chain.moves if pairs]
    into = [destination for pairs in moves for _, destination in pairs]
    most, steps = int(np.bincount(into, minlength=1).max()), len(moves)
    return Choice(Split(method, devices, plan.tile, live, steps, most * keys_and_values), plan)


def _is_small(request: Request) -> bool:
    return request.sizes["T"] * request.sizes["S"] <= choice.DENSE_PAIRS
