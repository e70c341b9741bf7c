"""The sums of linear attention: of one key head, and mapped over heads and examples.

No sum overflows and no later key changes an earlier context: the sums are kept at the largest
scale of the keys so far (`feature_maps.split_scale`), and each row of a chunk has its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.base.binding import Sliced, as_pytree
from attention_jax.base.finite import finite_rows
from attention_jax.base.sharded import aligned
from attention_jax.base.trees import varying_like
from attention_jax.base.typing import FeatureMap
from attention_jax.implementations.online import finite_or_zero
from attention_jax.linear.feature_maps import split_scale
from attention_jax.masks.intervals import indices

Array = jax.Array


class KeySums(NamedTuple):
    """Sums over keys: values [B, K, M, V + 1] times exp(log_scale [B, K]).

    The last column is the normalizer, the sum of features; the scale is -inf before any key.
    `poison` [B, K] is NaN after a key or value that held NaN or Inf, and joins every context.
    """

    values: Array
    log_scale: Array
    poison: Array


class _Tokens(NamedTuple):
    """Keys [S, H] and values [S, V + 1] of one head; which are there, and which hold NaN, [S]."""

    key: Array
    value: Array
    present: Array
    poison: Array


def read_out(
    query: Array, sums: KeySums, feature_map: FeatureMap | Sliced, normalize: bool
) -> Array:
    """Attend from queries [B, T, N, H] to all keys that were summed."""

    def of_head(feature_map: FeatureMap, query: Array, sums: KeySums) -> Array:
        features, query_scale, poison = _query_features(feature_map, query)
        found = features @ sums.values
        highest = jnp.broadcast_to(sums.log_scale, query.shape[1:2])
        return _context(found, query_scale, highest, poison + sums.poison, normalize)

    query = _grouped(query.astype(sums.values.dtype), sums.values.shape[1])
    return _ungrouped(_over_heads(of_head, feature_map, query, sums))


def extended(
    sums: KeySums, key: Array, value: Array, present: Array, feature_map: FeatureMap | Sliced
) -> KeySums:
    """Add the keys [B, S, K, H] and values [B, S, K, V] that are present [B, S]."""

    def of_head(feature_map: FeatureMap, tokens: _Tokens, sums: KeySums) -> KeySums:
        features, log_scale = split_scale(feature_map, tokens.key)
        log_scale = jnp.where(tokens.present, log_scale, -jnp.inf)
        return _absorb(sums, features, log_scale, tokens)

    tokens = _tokens(key, value, present, sums.values.dtype)
    return _over_heads(of_head, feature_map, tokens, sums)


def scanned(
    query: Array,
    key: Array,
    value: Array,
    present: Array,
    sums: KeySums,
    feature_map: FeatureMap | Sliced,
    normalize: bool,
    chunk_size: int,
) -> tuple[Array, KeySums]:
    """Attend causally where query i stands with key i; [B, T, N, V] and the next sums."""
    dtype, length = sums.values.dtype, query.shape[1]
    if not isinstance(length, int):
        raise ValueError(
            "linear_attention: a causal mask is computed chunk by chunk, and their number must be "
            f"known, got T = {length}; export for a number of queries."
        )
    chunk_size = max(min(chunk_size, length), 1)
    whole = length + -length % chunk_size
    query, key, value, present = (padded(x, 0, whole) for x in (query, key, value, present))
    of_head = functools.partial(_scan, normalize=normalize, chunk_size=chunk_size)
    context, sums = _over_heads(
        of_head,
        feature_map,
        _grouped(query.astype(dtype), key.shape[2]),
        _tokens(key, value, present, dtype),
        sums,
    )
    return _ungrouped(context)[:, :length], sums


def _scan(
    feature_map: FeatureMap,
    query: Array,
    tokens: _Tokens,
    sums: KeySums,
    *,
    normalize: bool,
    chunk_size: int,
) -> tuple[Array, KeySums]:
    """Scan one key head: queries [G, T, H] -> contexts [G, T, V], and the sums after T keys.

    The derivative keeps the sums before each chunk, T / C of M x V numbers, and recomputes the
    rest: it is linear in T, and JAX derives it again and maps it.
    """
    step = jax.checkpoint(functools.partial(_step, feature_map, normalize))

    def chunks(x: Array, axis: int = 0) -> Array:
        count = x.shape[axis] // chunk_size
        shape = (*x.shape[:axis], count, chunk_size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    parts = chunks(query, axis=1), jax.tree.map(chunks, tokens)
    sums, contexts = lax.scan(step, varying_like(sums, query, tokens), parts)
    return jnp.moveaxis(contexts, 0, 1).reshape(*query.shape[:2], contexts.shape[-1]), sums


def _step(
    feature_map: FeatureMap, normalize: bool, sums: KeySums, chunk: tuple[Array, _Tokens]
) -> tuple[KeySums, Array]:
    """Attend within one chunk of C keys and to the sums before it; queries [G, C, H]."""
    query, tokens = chunk
    query_features, query_scale, query_poison = _query_features(feature_map, query)
    features, log_scale = split_scale(feature_map, tokens.key)
    log_scale = jnp.where(tokens.present, log_scale, -jnp.inf)

    # The largest scale up to each row: a later key has no part in what an earlier row sums.
    highest = jnp.maximum(lax.cummax(log_scale), sums.log_scale)
    base = finite_or_zero(highest)
    i, j = indices(len(log_scale))[:, None], indices(len(log_scale))[None, :]
    decay = jnp.exp(jnp.where(i >= j, log_scale[None, :] - base[:, None], -jnp.inf))
    within = (query_features @ features.T) * decay[None]
    before = jnp.exp(sums.log_scale - base)[None, :, None]
    found = within @ tokens.value + before * (query_features @ sums.values)

    poison = query_poison + (sums.poison + jnp.cumsum(tokens.poison))[None, :]
    context = _context(found, query_scale, highest, poison, normalize)
    return _absorb(sums, features, log_scale, tokens), context


def _absorb(sums: KeySums, features: Array, log_scale: Array, tokens: _Tokens) -> KeySums:
    """Add keys to the sums of one head, which are kept at the largest scale so far."""
    highest = jnp.max(log_scale, initial=-jnp.inf)
    highest = jnp.maximum(highest, sums.log_scale)
    base = finite_or_zero(highest)
    added = (features * jnp.exp(log_scale - base)[:, None]).T @ tokens.value
    values = jnp.exp(sums.log_scale - base) * sums.values + added
    return KeySums(values, highest, sums.poison + jnp.sum(tokens.poison))


def _query_features(feature_map: FeatureMap, query: Array) -> tuple[Array, Array, Array]:
    """Return features [G, T, M] of queries [G, T, H], their scale and poison [G, T]."""
    query, poison = finite_rows(query)
    features, log_scale = jax.vmap(functools.partial(split_scale, feature_map))(query)
    return features, log_scale, poison


def _context(
    found: Array, query_scale: Array, highest: Array, poison: Array, normalize: bool
) -> Array:
    """Divide sums [G, T, V + 1] by their last column; zeros for queries without keys."""
    context, total = found[..., :-1], found[..., -1:]
    if normalize:
        some = total != 0  # zero without keys, or where the features of query and keys never meet
        context = context / jnp.where(some, total, 1.0)
    else:
        context = context * jnp.exp(query_scale + finite_or_zero(highest)[None, :])[..., None]
        some = (highest != -jnp.inf)[None, :, None]
    return jnp.where(some, context + poison[..., None], 0.0)


def _tokens(key: Array, value: Array, present: Array, dtype: Any) -> _Tokens:
    """Clean keys and values, add the column that sums up to the normalizer; [B, S, K, ...]."""
    there = present[:, :, None, None]
    key, key_poison = finite_rows(jnp.where(there, key, 0.0).astype(dtype))
    value, value_poison = finite_rows(jnp.where(there, value, 0.0).astype(dtype))
    with_one = jnp.pad(value, [(0, 0)] * 3 + [(0, 1)], constant_values=1)
    present = jnp.broadcast_to(present[:, :, None], key.shape[:3])
    tokens = _Tokens(key, with_one, present, key_poison + value_poison)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1), tokens)


def _grouped(query: Array, key_heads: int) -> Array:
    """[B, T, N, H] -> [B, K, G, T, H]."""
    batch, length, heads, depth = query.shape
    grouped = query.reshape(batch, length, key_heads, heads // key_heads, depth)
    return jnp.moveaxis(grouped, 1, 3)


def _ungrouped(context: Array) -> Array:
    """[B, K, G, T, V] -> [B, T, N, V]."""
    batch, key_heads, groups, length, depth = context.shape
    return jnp.moveaxis(context, 3, 1).reshape(batch, length, key_heads * groups, depth)


def _over_heads(
    function: Callable[..., Any], feature_map: FeatureMap | Sliced, *operands: Any
) -> Any:
    """Map a function of one key head over operands [B, K, ...]."""
    heads = isinstance(feature_map, Sliced)
    bound = as_pytree(feature_map.function if heads else feature_map)
    leaves, structure = jax.tree.flatten((operands, bound))
    shared = len(leaves) - len(jax.tree.leaves(operands))
    axes = ["BK"] * (len(leaves) - shared) + ["K" if heads else ""] * shared
    split, bound = structure.unflatten(aligned(leaves, axes, "BK"))
    others = (0,) * len(split)
    of_example = jax.vmap(function, in_axes=(0 if heads else None, *others))
    return jax.vmap(of_example, in_axes=(None, *others))(bound, *split)


def padded(x: Array, before: int, length: int) -> Array:
    """Put zeros before the rows x [B, T, ...] and behind them, to make `length`."""
    widths = [(0, 0)] * x.ndim
    widths[1] = (before, length - before - x.shape[1])
    return jnp.pad(x, widths)
