"""What would run for one call, in tiles of which size, and what that costs: `explain`."""

from __future__ import annotations

import dataclasses
import math

import jax

from attention_jax.implementations import choice, mixed_choice, temporaries
from attention_jax.implementations.pallas import choosing
from attention_jax.implementations.tiles import Plan
from attention_jax.masks import FULL, PARTIAL, batch_axes
from attention_jax.request import Request


@jax.tree_util.register_static
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
      bytes: memory of temporaries beyond inputs and outputs, forward.
      gradient_bytes: the same of the gradients of query, key and value, which are all that is
        returned; None where it is not known, as on a CPU.
      at_once: number of heads that are computed at once.
      passes: how the normalizer goes over the tiles, in words; empty for "dense" and "cudnn".
      together: number of heads of a tile; more than one where maps mix them.
      mixing_flops: those of `flops` that the maps take.
      why: what is a kernel, or why generated kernels were not chosen; empty on a CPU, and where an
        implementation was asked for.
    """

    implementation: str
    heads: int
    tile: tuple[int, int]
    empty: int
    partial: int
    full: int
    flops: int
    bytes: int
    gradient_bytes: int | None = None
    at_once: int = 1
    passes: str = ""
    together: int = 1
    mixing_flops: int = 0
    why: str = ""

    def __str__(self) -> str:
        rows, columns = self.tile
        passes = f"; {self.passes}" if self.passes else ""
        why = f"\n{self.why}" if self.why else ""
        together = f", {self.at_once} at once" if 1 < self.at_once < self.heads else ""
        of_heads = f" of {self.together} heads" if self.together > 1 else ""
        mixing = f" ({self.mixing_flops / 1e9:.3g} to mix heads)" if self.mixing_flops else ""
        gradients = self.gradient_bytes
        of_gradients = "" if gradients is None else f", {gradients / 2**20:.3g} MiB with gradients"
        return (
            f"{self.implementation}: {self.heads} heads{together}, tiles of {rows} x {columns}"
            f"{of_heads}: "
            f"{self.empty} empty (skipped), {self.partial} partial, {self.full} full\n"
            f"{self.flops / 1e9:.3g} GFLOP{mixing} and {self.bytes / 2**20:.3g} MiB of temporaries "
            f"forward{of_gradients}{passes}{why}"
        )


def describe(request: Request, platform: str | None = None) -> Choice:
    """Count tiles, operations and bytes of what would run."""
    platform = choice.known_platform(platform)
    name = choice.choose(request, platform)
    apart = None if name == "dense" else mixed_choice.of_contexts(request)
    if apart is not None:
        found = describe(dataclasses.replace(apart, implementation=name), platform)
        words = [found.passes, "the contexts of heads are then mixed"]
        return dataclasses.replace(found, passes="; ".join(filter(None, words)))
    sizes = request.sizes
    heads = sizes["B"] * sizes["N"]
    query_length, key_length = request.pairs
    if name == "dense":
        whole = max(query_length, 1), max(key_length, 1)
        plan = choice.plan_for(dataclasses.replace(request, tile_sizes=whole), platform)
        visited = grid = 1 if all(request.pairs) else 0
    else:
        plan = choice.plan_for(request, platform, name=name)
        visited = len(plan.starts)
        grid = -(-query_length // plan.tile[0]) * -(-key_length // plan.tile[1])
    partial, full = (int((plan.states == state).sum()) for state in (PARTIAL, FULL))
    pairs = visited * math.prod(plan.tile)
    at_once = _at_once(name, request, plan, platform)
    flops, mixing = 2 * heads * pairs * (sizes["Q"] + sizes["V"]), 0
    if request.mixes:
        of_pair = mixed_choice.operations(request, name, plan.tile)
        flops, mixing = (sizes["B"] * pairs * count for count in of_pair)
    needed = name, request, plan, at_once, platform
    return Choice(
        name,
        heads,
        plan.tile,
        grid - partial - full,
        partial,
        full,
        flops=flops,
        bytes=temporaries.expected(*needed),
        gradient_bytes=temporaries.of_gradients(*needed),
        at_once=at_once,
        passes=_passes(name, request),
        together=plan.heads,
        mixing_flops=mixing,
        why="" if request.implementation else _why(name, request, platform),
    )


def _why(name: str, request: Request, platform: str) -> str:
    """Say of what kernels are generated, or why there are none."""
    if platform == "cpu" or name in ("dense", "cudnn"):
        return ""
    if name != "pallas":
        return f"no kernels: {(choice.kernels_lack(request, platform) or '').rstrip('.')}"
    return f"kernels of {choosing.described(request)}"


def _passes(name: str, request: Request) -> str:
    how = request.streaming
    if request.mixes and name == "tiled":
        return mixed_choice.passes(request)
    return "" if how is None or name in ("dense", "cudnn") else how.passes


def _at_once(name: str, request: Request, plan: Plan, platform: str) -> int:
    """Return how many heads are vectorised."""
    sizes = {x: request.sizes[x] for x in "BK"} | {"G": request.groups}
    heads = math.prod(sizes.values())
    if name != "tiled":
        return heads
    if request.mixes:
        of_example = {"B": sizes["B"]}
        batch = 1
        if platform != "cpu":
            axes = batch_axes.of_mask("attend", request.mask, request.sizes)[1]
            groups = choice.elsewhere(None, plan, axes).at_once(of_example, "B", "B")
            batch = groups.get("B", sizes["B"])
        return batch * request.sizes["N"]
    if platform == "cpu":
        return 1
    _, mask_axes = batch_axes.of_mask("attend", request.mask, request.sizes)
    axes = [letters.replace("N", "KG") for letters in mask_axes]
    order = "BKG" if request.groups > 1 else "BK"
    groups = choice.elsewhere(None, plan, axes, platform).at_once(sizes, order, order)
    return math.prod(groups.get(letter, sizes[letter]) for letter in order)
