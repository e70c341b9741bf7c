"""Sparse attention patterns: the small masks that the published ones are composed of.

Each is a mask like those of `attention_jax.masks`: one predicate over indices that composes with
`& | ~`, draws itself and knows its tiles. None of them is causal by itself; `& Causal()` makes
it so.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.core
import numpy as np

from attention_jax.base.checks import at_least
from attention_jax.masks.algebra import Mask, as_mask
from attention_jax.masks.common import make_signed
from attention_jax.masks.intervals import Interval, Lookup, Unknown, judge

__all__ = [
    "Block",
    "Chunked",
    "Dilated",
    "Fixed",
    "GlobalTokens",
    "Heads",
    "Strided",
]

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Strided(Mask):
    """Every `stride`-th key, counted from the query: (q_idx - kv_idx) mod stride = 0.

    Child et al. 2019, section 4.2 (the second head of "strided attention").

    >>> from attention_jax.masks import draw
    >>> print(draw(Strided(3), 5))
    █··█·
    ·█··█
    ··█··
    █··█·
    ·█··█
    """

    stride: int

    def __post_init__(self) -> None:
        at_least("Strided", 1, stride=self.stride)
        make_signed(self, "stride")

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx - kv_idx) % self.stride == 0


@dataclasses.dataclass(frozen=True)
class Fixed(Mask):
    """The last `columns` keys of each block of `stride`: kv_idx mod stride >= stride - columns.

    Child et al. 2019, section 4.2 (the second head of "fixed attention", c = columns).

    >>> from attention_jax.masks import draw
    >>> print(draw(Fixed(3, 1), 2, 6))
    ··█··█
    ··█··█
    """

    stride: int
    columns: int = 1

    def __post_init__(self) -> None:
        at_least("Fixed", 1, stride=self.stride, columns=self.columns)
        if self.columns > self.stride:
            raise ValueError(
                f"Fixed: columns must be at most stride = {self.stride}, got {self.columns}."
            )
        make_signed(self, "stride", "columns")

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx % self.stride >= self.stride - self.columns


@dataclasses.dataclass(frozen=True)
class Dilated(Mask):
    """A window with gaps: kv_idx - q_idx = n dilation for n = -left ... right.

    `dilation` may be an array [1, N], one number a head. Dilation alone never mixes positions
    that differ modulo it: give some heads dilation 1.

    Beltagy, Peters and Cohan 2020, section 3.1 ("dilated sliding window").

    >>> from attention_jax.masks import draw
    >>> print(draw(Dilated(1, 1, dilation=2), 5))
    █·█··
    ·█·█·
    █·█·█
    ·█·█·
    ··█·█
    """

    left: int
    right: int
    dilation: Any

    def __post_init__(self) -> None:
        at_least("Dilated", 0, left=self.left, right=self.right)
        at_least("Dilated", 1, dilation=self.dilation)
        make_signed(self, "left", "right", "dilation")

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        distance = kv_idx - q_idx
        reached = (distance >= -self.left * self.dilation) & (
            distance <= self.right * self.dilation
        )
        return reached & (distance % self.dilation == 0)


@dataclasses.dataclass(frozen=True)
class Chunked(Mask):
    """Keys of the query's own chunk of `size`, and of the `before` and `after` chunks next to it.

    >>> from attention_jax.masks import draw
    >>> print(draw(Chunked(2, before=1), 6))
    ██····
    ██····
    ████··
    ████··
    ··████
    ··████
    """

    size: int
    before: int = 0
    after: int = 0

    def __post_init__(self) -> None:
        at_least("Chunked", 1, size=self.size)
        at_least("Chunked", 0, before=self.before, after=self.after)
        make_signed(self, "size", "before", "after")

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        distance = kv_idx // self.size - q_idx // self.size
        return (distance >= -self.before) & (distance <= self.after)


@dataclasses.dataclass(frozen=True)
class Block(Mask):
    """A mask over blocks of `size` positions: mask(q_idx // size, kv_idx // size).

    >>> from attention_jax.masks import Causal, draw
    >>> print(draw(Block(Causal(), 2), 6))
    ██····
    ██····
    ████··
    ████··
    ██████
    ██████
    """

    mask: Mask
    size: int
    coarseness: ClassVar[str] = "size"

    def __post_init__(self) -> None:
        at_least("Block", 1, size=self.size)
        make_signed(self, "size")

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        return self.mask(q_idx // self.size, kv_idx // self.size)


@dataclasses.dataclass(frozen=True)
class GlobalTokens(Mask):
    """Tokens that attend to all and are attended by all: the row and the column of each.

    `tokens` is a number (the first ones), or marks them: a boolean array [S], or [B, S].

    Beltagy, Peters and Cohan 2020, section 3.1 ("global attention"); Zaheer et al. 2020.

    >>> from attention_jax.masks import draw
    >>> print(draw(GlobalTokens(1), 4))
    ████
    █···
    █···
    █···
    >>> print(draw(GlobalTokens([False, True, False, False]), 4))
    ·█··
    ████
    ·█··
    ·█··
    """

    tokens: Any
    example_rank: ClassVar[dict[str, int]] = {"tokens": 1}

    def __post_init__(self) -> None:
        if _is_whole_number(self.tokens):
            at_least("GlobalTokens", 0, tokens=self.tokens)
            object.__setattr__(self, "tokens", int(self.tokens))
        else:
            marks = self.tokens if isinstance(self.tokens, Array) else np.asarray(self.tokens)
            if marks.ndim == 0:
                raise ValueError(
                    "GlobalTokens: tokens must be an int (the first ones) or a boolean array "
                    f"[S], got a {marks.dtype} scalar."
                )
            object.__setattr__(self, "tokens", marks.astype(np.int32))

    def entries(self, field: str, query_length: int, key_length: int) -> dict[str, int]:
        return {"max(T, S)": max(query_length, key_length)}

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        return self._is_global(q_idx) | self._is_global(kv_idx)

    def _is_global(self, index: Any) -> Any:
        if isinstance(self.tokens, int):
            return index < self.tokens
        return Lookup(self.tokens)[index] == 1


def _is_whole_number(tokens: Any) -> bool:
    """Tell whether it is one integer of any type that is known while tracing."""
    kind = getattr(tokens, "dtype", type(tokens))
    is_whole = np.ndim(tokens) == 0 and (kind is bool or np.issubdtype(kind, np.integer))
    return is_whole and not isinstance(tokens, jax.core.Tracer)


@dataclasses.dataclass(frozen=True)
class Heads(Mask):
    """A mask for each head: masks[n] for query head n.

    Composes like any mask, `Heads(...) & Causal()`; `mask.of(head=n)` returns that of one head.

    >>> from attention_jax.masks import Window, draw
    >>> mask = Heads([Window(1, 1), Dilated(1, 1, dilation=2)])
    >>> print(draw(mask.of(head=1), 4))
    █·█·
    ·█·█
    █·█·
    ·█·█
    """

    masks: Sequence[Mask]
    head: Any = dataclasses.field(init=False)
    example_rank: ClassVar[dict[str, int]] = {"head": 0}
    coarseness: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not self.masks:
            raise ValueError("Heads: give one mask for each head, got none.")
        object.__setattr__(self, "masks", tuple(as_mask(mask) for mask in self.masks))
        object.__setattr__(self, "head", np.arange(len(self.masks), dtype=np.int32)[None])

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        head = self.head
        if isinstance(q_idx, Interval) and not isinstance(head, Unknown):
            head = Interval(head, head)
        masks = enumerate(self.masks)
        chosen = [(head == number) & judge(mask, q_idx, kv_idx) for number, mask in masks]
        return functools.reduce(operator.or_, chosen)
