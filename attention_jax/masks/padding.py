"""Padding and causality: the masks of mechanisms without pairwise weights.

A sum over keys that all queries share can leave out a key, and set the result of a query to zero;
with a scan over time it can also leave out later keys. Any other mask depends on pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from attention_jax.masks import algebra, batch_axes
from attention_jax.masks.algebra import And, Full, Mask, MaskLike, Shift, Table
from attention_jax.masks.common import Causal, Lengths
from attention_jax.masks.intervals import indices

Array = jax.Array


class Padding(NamedTuple):
    """Which queries [B, T] and keys [B, S] are tokens; query i attends to keys up to i + causal.

    `causal` is None where every query attends to all keys.
    """

    query: Array
    key: Array
    causal: int | None


def from_mask(
    operation: str,
    mask: MaskLike,
    sizes: dict[str, int],
    *,
    causal: bool,
    reason: str,
    starts: tuple[Any, Any] | None = None,
) -> Padding:
    """Read a mask that is made of padding, and of `Causal` where that is possible.

    Args:
      operation: name that messages begin with.
      mask: `Lengths`, an array over keys alone or over queries alone, `Causal`, joined by `&`.
      sizes: of B, T and S, at least.
      causal: whether the mechanism can leave out later keys.
      reason: why other masks are refused, for the message.
      starts: where the first query and the first key stand in the sequence that the mask is of,
        [B] or a number each, if these are not the whole sequence; equal where causal.

    Raises:
      ValueError: a mask of another kind.
      ShapeError: lengths or an array that do not fit.

    >>> found = from_mask("f", Lengths(2), dict(B=1, N=1, T=1, S=3), causal=False, reason="")
    >>> found.key, found.causal
    (Array([[ True,  True, False]], dtype=bool), None)
    """
    refused = functools.partial(_refused, operation, reason, causal)
    query_at, key_at = (
        jnp.reshape(start, (-1, 1)) + indices(sizes[axis])[None, :]
        for axis, start in zip("TS", starts or (0, 0), strict=True)
    )
    everyone = (jnp.ones((sizes["B"], sizes[axis]), bool) for axis in "TS")
    padding = Padding(*everyone, causal=None)
    for part in _parts(algebra.with_int32(algebra.as_mask(mask))):
        if isinstance(part, Causal) and causal:
            offset = _number(part.offset)
            if offset is None:
                raise refused("a Causal mask whose offset is not one number known while tracing")
            known = offset if padding.causal is None else min(offset, padding.causal)
            padding = padding._replace(causal=known)
            continue
        if not isinstance(part, Lengths | Table | Full):
            raise refused(f"the mask {type(part).__name__}")
        fitted, letters = batch_axes.of_mask(operation, Shift(part) if starts else part, sizes)
        part = fitted.mask if starts else fitted
        if any("N" in axes for axes in letters):
            raise refused("padding that differs between heads")
        if isinstance(part, Table) and 1 not in part.allowed.shape[-2:]:
            raise refused("an array of pairs")
        query, key = _rows(part, query_at, key_at)
        padding = padding._replace(query=padding.query & query, key=padding.key & key)
    return padding


def _refused(operation: str, reason: str, causal: bool, what: str) -> ValueError:
    allowed = "masks.Lengths, arrays over the keys alone" + ", masks.Causal" * causal
    return ValueError(
        f"{operation}: {what} cannot be honoured, because {reason}; it takes {allowed} and "
        "these joined by &, and attend takes any mask."
    )


def refuse(operation: str, options: dict[str, Any], *known: str) -> None:
    """Refuse options that depend on pairs, such as a bias or the return of weights.

    Raises:
      ValueError: an option that is not known.

    >>> refuse("linformer_attention", {"normalizer": None}, "normalizer")
    """
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"{operation}: {', '.join(unknown)} cannot be honoured, because there are no pairs of "
            f"a query and a key; it takes {', '.join(known)}."
        )


def _parts(mask: Mask) -> Iterator[Mask]:
    if isinstance(mask, And):
        yield from _parts(mask.first)
        yield from _parts(mask.second)
    else:
        yield mask


def _rows(part: Any, query_at: Array, key_at: Array) -> tuple[Any, Any]:
    """Return which queries [B or 1, T or 1] and keys [B or 1, S or 1] are tokens."""
    everyone = jnp.ones((1, 1), bool)
    if isinstance(part, Lengths):
        key = key_at < jnp.reshape(part.key_length, (-1, 1))
        queries = part.query_length
        return everyone if queries is None else query_at < jnp.reshape(queries, (-1, 1)), key
    if isinstance(part, Table):
        table = jnp.asarray(part.allowed).reshape(-1, *part.allowed.shape[-2:])
        if table.shape[1] == 1:
            return everyone, _looked_up(table[:, 0, :], key_at)
        return _looked_up(table[:, :, 0], query_at), everyone
    return everyone, everyone


def _looked_up(table: Array, at: Array) -> Array:
    """Return table[b, at[b, i]], where an axis of size 1 stands for all."""
    if table.shape[1] == 1:
        return table
    batch = max(len(table), len(at))
    rows = (jnp.broadcast_to(x, (batch, x.shape[1])) for x in (table, at))
    return jnp.take_along_axis(*rows, axis=1, mode="clip")


def _number(offset: Any) -> int | None:
    is_known = not isinstance(offset, jax.core.Tracer) and jnp.ndim(offset) == 0
    return int(offset) if is_known else None
