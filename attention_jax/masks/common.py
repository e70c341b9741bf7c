"""Masks: predicates over indices that compose, draw themselves and know their tiles.

A mask says with one predicate which query may attend to which key, True = may attend:

    causal(q_idx, kv_idx) = q_idx >= kv_idx

Masks close under `&`, `|` and `~`. The same predicate, read over intervals of indices
(`attention_jax.intervals`), tells for every tile whether it is EMPTY, FULL or PARTIAL.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.core
import numpy as np

from attention_jax.base.integers import as_int32
from attention_jax.masks.algebra import Mask
from attention_jax.masks.intervals import Lookup

__all__ = [
    "Causal",
    "Lengths",
    "Prefix",
    "Segment",
    "Window",
]


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """No query attends to the future: q_idx + offset >= kv_idx.

    With T != S the alignment is a choice, and `offset` says it: 0 lines up the first query
    with the first key, S - T the last with the last (decoding after a cache).

    >>> from attention_jax.masks import draw
    >>> print(draw(Causal(offset=1), 3, 4))
    ██··
    ███·
    ████
    """

    offset: Any = 0

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        return q_idx + self.offset >= kv_idx


@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """A band around the diagonal: q_idx - left <= kv_idx <= q_idx + right; None = unbounded.

    The left + right + 1 keys around each query, itself included (Beltagy et al. 2020,
    section 3.1, "sliding window", has left = right = w / 2).

    >>> from attention_jax.masks import draw
    >>> print(draw(Window(1, 0), 4))
    █···
    ██··
    ·██·
    ··██
    """

    left: int | None
    right: int | None

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            object.__setattr__(self, name, _number_of_keys(name, getattr(self, name)))

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        distance = kv_idx - q_idx
        allowed = distance == distance if self.left is None else distance >= -self.left
        return allowed if self.right is None else allowed & (distance <= self.right)


def _number_of_keys(name: str, size: Any) -> Any:
    """Return one bound of a Window, as an int unless it is an array."""
    is_whole = size is None or np.issubdtype(getattr(size, "dtype", type(size)), np.integer)
    is_traced = isinstance(size, jax.core.Tracer)
    if not is_whole or (size is not None and not is_traced and np.any(np.asarray(size) < 0)):
        raise ValueError(
            f"Window: {name} must be a whole number of keys, 0 or more (or None for no bound), "
            f"got {size}."
        )
    return None if size is None else _signed(f"Window.{name}", size)


def make_signed(mask: Mask, *names: str) -> None:
    """Convert sizes to signed integers, so that differences of indices may be negative."""
    for name in names:
        label = f"{type(mask).__name__}.{name}"
        object.__setattr__(mask, name, _signed(label, getattr(mask, name)))


def _signed(label: str, size: Any) -> Any:
    """Return a whole number that can be negated, whatever its type: an int unless an array."""
    size = np.asarray(size) if isinstance(size, list | tuple) else size
    is_array = isinstance(size, np.ndarray | jax.Array)
    return as_int32(label, size) if is_array else int(size)


@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """Every query may attend to the first `length` keys; `Prefix(n) | Causal()` is a prefix-LM.

    `length` may be a number or an array [B], one per example (Raffel et al. 2020, figure 4).

    >>> from attention_jax.masks import draw
    >>> print(draw(Prefix(2) | Causal(), 4))
    ██··
    ██··
    ███·
    ████
    """

    length: Any
    example_rank: ClassVar[dict[str, int]] = {"length": 0}

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx < self.length


@dataclasses.dataclass(frozen=True)
class Lengths(Mask):
    """Padding: only the first `key_length` keys are tokens, and the first `query_length` queries.

    Both may be numbers or arrays [B]; a padded query attends to nothing and gets zeros.
    """

    key_length: Any
    query_length: Any = None
    example_rank: ClassVar[dict[str, int]] = {"key_length": 0, "query_length": 0}

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        allowed = kv_idx < self.key_length
        return allowed if self.query_length is None else allowed & (q_idx < self.query_length)


@dataclasses.dataclass(frozen=True)
class Segment(Mask):
    """A query attends to keys of its own segment: query_ids[q_idx] == key_ids[kv_idx].

    For documents packed into one sequence. The ids are [T] and [S], or [B, T] and [B, S];
    `key_ids` is `query_ids` unless given. Known only inside `jit`, they still skip tiles.
    """

    query_ids: Any
    key_ids: Any = None
    example_rank: ClassVar[dict[str, int]] = {"query_ids": 1, "key_ids": 1}

    def entries(self, field: str, query_length: int, key_length: int) -> dict[str, int]:
        keys = {"S": key_length} if field == "key_ids" or self.key_ids is None else {}
        return keys if field == "key_ids" else {"T": query_length} | keys

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        key_ids = self.query_ids if self.key_ids is None else self.key_ids
        return Lookup(self.query_ids)[q_idx] == Lookup(key_ids)[kv_idx]
