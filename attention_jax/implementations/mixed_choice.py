"""What it costs to mix heads, and how a map of weights is applied: to weights, or to contexts."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.base.binding import Sliced, function_of
from attention_jax.head_maps import NO_HALO, Halo, group_of
from attention_jax.request import Request, cast

PROBE = 64
"""Queries and keys of the tile on which the operations of a map are counted."""


def mixes_contexts(request: Request) -> bool:
    """Tell whether the map of weights is applied to contexts instead.

    That is the same where it is linear, pairs stand alone, all heads of a group attend to the same
    values, and no weight is dropped after it nor looked at; and it is cheaper unless it maps many
    heads to few.
    """
    group = group_of(request.mix_weights)
    if request.mix_weights is None or group is None or request.dropout_rate or request.statistics:
        return False
    sizes, (heads, between, after) = request.sizes, request.counts
    if between % sizes["L"] or between // sizes["L"] % group or request.halos[1] != NO_HALO:
        return False
    once = between * sizes["V"]
    again = heads * sizes["Q"] + after * (sizes["V"] + group)
    return once <= again


def of_contexts(request: Request) -> Request | None:
    """Return attention of heads that stand alone, whose contexts are mixed; None if none is.

    Keys and values are repeated to the same number of heads.
    """
    if request.mix_logits is not None or not mixes_contexts(request):
        return None
    sizes = request.sizes
    heads = math.lcm(sizes["K"], sizes["L"])
    key, value = (
        x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)
        for x in (request.key, request.value)
    )
    return dataclasses.replace(request, key=key, value=value, mix_weights=None)


def mixed_contexts(head_map: Any, context: jax.Array) -> jax.Array:
    """Apply a map of weights to contexts [B, T, M, V] instead, which are [B, T, N, V] then."""
    is_own = isinstance(head_map, Sliced)
    head_map = function_of(head_map)
    head_map = jax.tree.map(functools.partial(cast, dtype=context.dtype), head_map)
    mixed = jax.vmap(_called, in_axes=(0 if is_own else None, 0))
    return jnp.moveaxis(mixed(head_map, jnp.moveaxis(context, 2, 1)), 1, 2)


def passes(request: Request) -> str:
    """Say how the tiles are passed over, in words."""
    if request.statistics:
        return "two passes over tiles of all heads: the sums of rows, then weights and statistics"
    if request.mix_weights is None:
        return "one pass over tiles of all heads"
    if mixes_contexts(request):
        return "one pass over tiles of all heads, whose contexts are then mixed"
    return "two passes over tiles of all heads: the sums of rows, then the mixed weights"


def operations(request: Request, name: str, tile: tuple[int, int]) -> tuple[int, int]:
    """Return the operations of a pair forward, of all heads of an example, and those of maps."""
    heads, between, after = request.counts
    depth, sizes = request.sizes["V"], request.sizes
    of_logits, of_weights = request.halos
    by_context = name == "tiled" and mixes_contexts(request)
    has_weights = request.mix_weights is not None or bool(request.statistics)
    is_twice = name == "tiled" and has_weights and not by_context
    visits = 1 + is_twice
    larger = _larger(of_logits + of_weights, tile)
    logits = visits * _of_map(request, request.mix_logits, heads, of_logits)
    logits *= _larger(of_weights, tile)
    weights = 0 if by_context else _of_map(request, request.mix_weights, between, of_weights)
    products = visits * larger * heads * sizes["Q"] + (between if by_context else after) * depth
    return round(2 * products + logits + weights), round(logits + weights)


def tile_arrays(request: Request) -> int:
    """Return how many numbers a pair of a tile takes: before and after each map, and weights."""
    heads, between, after = request.counts
    maps = sum(x is not None for x in (request.mix_logits, request.mix_weights))
    return heads + between + maps * max(between, after)


def _larger(halo: Halo, tile: tuple[int, int]) -> float:
    """Return how much larger a tile is with its neighbours."""
    pairs = zip(tile, halo, strict=True)
    return math.prod((size + sum(more)) / max(size, 1) for size, more in pairs)


def _of_map(request: Request, head_map: Any, heads: int, halo: Halo) -> float:
    """Return the operations of a map at a pair, as XLA counts them."""
    if head_map is None:
        return 0
    if isinstance(head_map, Sliced):
        head_map = head_map.of_first
    high, wide = (PROBE + sum(more) for more in halo)
    pairs = jax.ShapeDtypeStruct((heads, high, wide), request.dtype)
    like = jax.tree.map(_shape, head_map)
    cost = jax.jit(_called).lower(like, pairs).cost_analysis()
    return (cost or {}).get("flops", 0.0) / PROBE**2


def _shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def _called(head_map: Any, pairs: Any) -> Any:
    return head_map(pairs)
