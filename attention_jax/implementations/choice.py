"""Which implementation runs, and in tiles of which size: rules in the open."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from attention_jax.base.binding import function_of
from attention_jax.base.remembering import remembered
from attention_jax.head_maps import NO_HALO
from attention_jax.implementations import cudnn, machine, mixed_choice
from attention_jax.implementations.cheapest import cheapest_tile, clipped
from attention_jax.implementations.lifting import Elsewhere
from attention_jax.implementations.pallas import choosing
from attention_jax.implementations.tiles import LatePlan, Plan, make_plan, plan_of_any_length
from attention_jax.masks import PARTIAL, Mask, batch_axes
from attention_jax.masks.algebra import is_constant
from attention_jax.masks.intervals import Unknown
from attention_jax.normalizers import Elementwise, LogSum, Ordered, is_queried
from attention_jax.request import Request

PLATFORMS = ("cpu", "gpu", "tpu")

IMPLEMENTATIONS = ("dense", "tiled", "pallas", "cudnn")

DENSE_PAIRS = 256 * 256
"""At and below this many pairs T x S of a head, None picks "dense": the whole plane is one tile."""

TILE_OF_ANY_LENGTH = 256, 256
"""Queries and keys of a tile where a length is a symbol of `jax.export`."""


def known_platform(platform: str | None = None) -> str:
    """Return the name of a platform, None that of this process.

    Raises:
      ValueError: another one than PLATFORMS.
    """
    platform = jax.default_backend() if platform is None else platform
    if platform not in PLATFORMS:
        raise ValueError(
            f"explain: platform must be None or one of {', '.join(PLATFORMS)}, got {platform!r}."
        )
    return platform


def choose(request: Request, platform: str | None = None) -> str:
    """Return the implementation that runs, whose name is one of IMPLEMENTATIONS.

    None stands for "dense" where all pairs of a head fit in one tile or nothing else is able;
    "cudnn" comes before "pallas", which is chosen where its kernels are known to be lowered, and
    that before "tiled". A length that is a symbol (`jax.export`) may be a long one.

    Raises:
      ValueError: an unknown name, or one that cannot do what is asked.
    """
    name = request.implementation
    if name is None:
        if _knows_lengths(request) and math.prod(request.pairs) <= DENSE_PAIRS:
            return "dense"
        if lacks("cudnn", request, platform) is None:
            return "cudnn"
        if kernels_lack(request, platform) is None:
            return "pallas"
        return "tiled" if lacks("tiled", request, platform) is None else "dense"
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"attend: implementation must be None or one of {', '.join(IMPLEMENTATIONS)}, got "
            f"{name!r}."
        )
    reason = lacks(name, request, platform)
    if reason is not None:
        raise ValueError(f"attend: implementation {name!r} {reason}")
    return name


def lacks(name: str, request: Request, platform: str | None = None) -> str | None:
    """Say what an implementation cannot do of what is asked, or None if it can do all of it."""
    if name == "dense":
        return None
    request = mixed_choice.of_contexts(request) or request
    if not _knows_lengths(request) and name != "tiled":
        return (
            "needs the numbers of queries and keys, got [T, S] = "
            f"[{', '.join(map(str, request.pairs))}]; export for numbers, or use "
            "implementation='tiled'."
        )
    if name == "cudnn":
        return cudnn.lacks(request, platform or jax.default_backend())
    if request.return_weights:
        return "never holds the weights; use implementation='dense' to look at them."
    if name == "pallas" and request.mixes:
        return (
            "computes one head at a time, and mix_logits or mix_weights mixes heads; use "
            "implementation='tiled'."
        )
    if request.streaming is None:
        return (
            f"cannot stream {request.normalizer_name}, which needs a whole row of logits; use "
            "implementation='dense'."
        )
    if is_queried(function_of(request.normalizer)) and not isinstance(request.streaming, Ordered):
        return (
            f'gives no queries to {request.normalizer_name}, whose rule "streaming" is not an '
            "Ordered; use implementation='dense'."
        )
    is_one_pass = isinstance(request.streaming, LogSum | Elementwise)
    if not _knows_lengths(request) and (
        not is_one_pass or request.statistics is not None or request.mixes
    ):
        what = "mixed heads" if request.mixes else "statistics"
        what = what if is_one_pass else request.normalizer_name
        return (
            f"computes {what} from the numbers of queries and keys, got [T, S] = "
            f"[{', '.join(map(str, request.pairs))}]; export for numbers, or use "
            "implementation='dense'."
        )
    if request.mixes and not is_one_pass:
        return (
            f"cannot mix heads under {request.normalizer_name}, which needs more than one pass "
            "over the keys; use implementation='dense'."
        )
    if name == "pallas" and not is_one_pass:
        return (
            f"cannot compute {request.normalizer_name}, which needs more than one pass over the "
            "keys; use implementation='tiled'."
        )
    if request.statistics is not None and isinstance(request.streaming, Ordered):
        return (
            f"computes no statistics of {request.normalizer_name}, whose weights depend on the "
            "keys before them; use implementation='dense'."
        )
    if name == "pallas" and request.statistics is not None:
        return "computes no statistics of the weights; use implementation='tiled'."
    if name == "pallas" and request.dtype == np.float64:
        return (
            "computes in float32, got float64; give float32, bfloat16 or float16, or use "
            "implementation='tiled'."
        )
    return None


def kernels_lack(request: Request, platform: str | None = None) -> str | None:
    """Say why None does not stand for "pallas" on a platform, or None where it does."""
    platform = platform or jax.default_backend()
    if platform == "cpu":
        return "kernels run on TPU and GPU"
    reason = lacks("pallas", request, platform)
    if reason is not None:
        return reason
    return choosing.lacks(request, platform, choosing.kernel_tile(request, platform))


def _knows_lengths(request: Request) -> bool:
    """Tell whether both lengths are numbers; a program is exported for all those of a symbol."""
    return all(isinstance(length, int) for length in request.pairs)


def plan_for(request: Request, platform: str | None = None, name: str = "tiled") -> Plan:
    """Return the tiles to visit: of the size that is asked for, or for which they cost least.

    Those of kernels lie on a grid, and may stick out.
    """
    platform = platform or jax.default_backend()
    mask, is_static = known_mask(request.mask, request.sizes)
    pairs = max(request.sizes["T"], 1), max(request.sizes["S"], 1)
    if not _knows_lengths(request):
        return plan_of_any_length(pairs, request.tile_sizes or TILE_OF_ANY_LENGTH, platform)
    if name == "pallas":
        return make_plan(
            mask, pairs, choosing.kernel_tile(request, platform), is_static, on_grid=True
        )
    tile = tile_for(request, platform)
    assert tile is not None  # that of lengths which are known
    plan = remembered(
        _planned, mask, pairs, clipped(tile, pairs), is_static, platform, _together(request)
    )
    if request.mixes and any(halo != NO_HALO for halo in request.halos):
        # Where all pairs of a tile may attend, their neighbours may not.
        plan = dataclasses.replace(plan, states=np.minimum(plan.states, PARTIAL))
    return plan


def _planned(
    mask: Mask,
    pairs: tuple[int, int],
    tile: tuple[int, int],
    is_static: bool,
    platform: str,
    heads: int,
) -> Plan:
    plan = make_plan(mask, pairs, tile, is_static)
    return dataclasses.replace(plan, platform=platform, heads=heads)


def plan_of_kernels(request: Request, platform: str | None = None) -> Plan | LatePlan:
    """Return the tiles of kernels: later, where the mask says the same then."""
    platform = platform or jax.default_backend()
    if not is_constant(request.mask):
        return plan_for(request, platform, name="pallas")
    mask, is_static = known_mask(request.mask, request.sizes)
    pairs = max(request.sizes["T"], 1), max(request.sizes["S"], 1)
    return LatePlan(mask, pairs, choosing.kernel_tile(request, platform), is_static)


def tile_for(request: Request, platform: str) -> tuple[int, int] | None:
    """Return queries and keys of a tile of `tiled`; None where a length is a symbol."""
    if request.tile_sizes is not None or not _knows_lengths(request):
        return request.tile_sizes
    pairs = max(request.sizes["T"], 1), max(request.sizes["S"], 1)
    mask, is_static = known_mask(request.mask, request.sizes)
    return remembered(cheapest_tile, mask, pairs, is_static, platform, _together(request))


def _together(request: Request) -> int:
    """Return of how many heads a tile is."""
    return max(request.counts) if request.mixes else 1


def elsewhere(
    function: Callable[..., Any] | None,
    plan: Any,
    mask_axes: list[str],
    platform: str | None = None,
) -> Elsewhere:
    """Return how heads are mapped on a platform that is no CPU; None stands for any of them.

    Axes along which a mask known only at run time differs are looped over, so that a skipped tile
    is really skipped; of the others, as many heads are vectorised as fit.
    """
    platforms = [platform] if platform else ["gpu", "tpu"]
    pairs = plan.heads * plan.largest_visit * plan.tile[1]
    most = min(map(machine.pairs_at_once, platforms)) // pairs
    return Elsewhere(function, _differing(mask_axes), max(1, most))


def _differing(mask_axes: list[str]) -> str:
    return "".join(letter for letter in "BKG" if any(letter in axes for axes in mask_axes))


def known_mask(mask: Mask, sizes: dict[str, int]) -> tuple[Mask, bool]:
    """Return the mask as far as it is known while tracing and the same for all examples and heads.

    And whether that is the whole mask. Arrays of JAX count as known at run time.
    """
    return remembered(_known, mask, tuple(sizes.items()))


def _known(mask: Mask, sizes: tuple[tuple[str, int], ...]) -> tuple[Mask, bool]:
    mask, letters = batch_axes.of_mask("attend", mask, dict(sizes))
    shared, known = (_of_all(part, letters) for part in (mask, mask.static()))
    is_static = not any(letters) and isinstance(shared.tiles(1, 1, 1, 1), np.ndarray)
    return known, is_static


def _of_all(mask: Mask, letters: list[str]) -> Mask:
    """Return the mask without the arrays that differ between examples or heads."""
    leaves, structure = jax.tree.flatten(mask)
    return structure.unflatten(
        [Unknown() if axes else leaf for axes, leaf in zip(letters, leaves, strict=True)]
    )
