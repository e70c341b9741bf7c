"""Sparse attention patterns: small masks, and the published ones as compositions of them.

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
import jax.numpy as jnp
import numpy as np

from attention_jax.base.checks import at_least
from attention_jax.masks.algebra import Full, Mask, MaskLike, as_mask
from attention_jax.masks.common import Causal, Window, make_signed
from attention_jax.masks.graphs import Edges
from attention_jax.masks.intervals import Interval, Lookup, Unknown, indices, judge

__all__ = [
    "Block",
    "Chunked",
    "Dilated",
    "Fixed",
    "GlobalTokens",
    "Heads",
    "Strided",
    "bigbird",
    "longformer",
    "random_blocks",
    "sparse_fixed",
    "sparse_strided",
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

    >>> from attention_jax.masks import draw
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


def random_blocks(
    rng: Array,
    length: int,
    size: int,
    num_blocks: int,
    avoiding: MaskLike = None,
    num_heads: int | None = None,
) -> Block:
    """Let each block of queries attend to `num_blocks` blocks of keys, drawn without replacement.

    Args:
      rng: a `jax.random` key; the blocks depend on it and on nothing else.
      length: of the sequence; it may end within a block.
      size: tokens a block.
      num_blocks: drawn for each block of queries; fewer where fewer are left.
      avoiding: a mask over blocks; what it allows is not drawn again.
      num_heads: N, to draw anew for each head; None draws once for all.

    Raises:
      ValueError: a length or size below 1, or a negative count.

    Zaheer et al. 2020, section 2 ("random attention").

    >>> mask = random_blocks(jax.random.key(0), 8, size=2, num_blocks=1, avoiding=Causal())
    >>> mask.to_dense(8).sum(axis=1)  # the last block has no other left
    Array([2, 2, 2, 2, 2, 2, 0, 0], dtype=int32)
    """
    at_least("random_blocks", 1, length=length, size=size)
    at_least("random_blocks", 0, num_blocks=num_blocks)
    length, size, num_blocks = int(length), int(size), int(num_blocks)
    total = -(-length // size)
    taken = ~Full() if avoiding is None else as_mask(avoiding)
    draw = functools.partial(_draw_blocks, taken=taken, total=total, count=min(num_blocks, total))
    if num_heads is None:
        return Block(Edges(draw(rng)), size)
    return Block(Edges(jax.vmap(draw)(jax.random.split(rng, num_heads))[None]), size)


def _draw_blocks(rng: Array, taken: Mask, total: int, count: int) -> Array:
    """Draw blocks of keys for each block of queries, [total, count]; -1 where fewer are left."""
    of_row = functools.partial(_draw_row, taken=taken, total=total, count=count)
    return jax.lax.map(of_row, (jax.random.split(rng, total), indices(total)))


def _draw_row(row: tuple[Array, Array], taken: Mask, total: int, count: int) -> Array:
    rng, block = row
    noise = jax.random.uniform(rng, (total,))
    noise = jnp.where(taken(block[None, None], indices(total)[None, :])[0], -1.0, noise)
    largest, drawn = jax.lax.top_k(noise, count)
    return jnp.where(largest < 0, -1, drawn)


@dataclasses.dataclass(frozen=True)
class Heads(Mask):
    """A mask for each head: masks[n] for query head n.

    Composes like any mask, `Heads(...) & Causal()`; `mask.of(head=n)` returns that of one head.

    >>> from attention_jax.masks import draw
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


def sparse_strided(stride: int) -> Mask:
    """The `stride` keys before the query, itself, and every `stride`-th key: both heads in one.

    Child et al. 2019, section 4.2 ("strided attention"), for data with a period, as images.

    >>> from attention_jax.masks import draw
    >>> print(draw(sparse_strided(3), 7))
    █······
    ██·····
    ███····
    ████···
    ·████··
    ··████·
    █··████
    """
    return Causal() & (Window(stride, 0) | Strided(stride))


def sparse_fixed(stride: int, columns: int = 1) -> Mask:
    """The query's own block of `stride`, and the last `columns` keys of every block before.

    Child et al. 2019, section 4.2 ("fixed attention"), for data without a period, as text.

    >>> from attention_jax.masks import draw
    >>> print(draw(sparse_fixed(3), 7))
    █······
    ██·····
    ███····
    ··██···
    ··███··
    ··████·
    ··█··██
    """
    return Causal() & (Chunked(stride) | Fixed(stride, columns))


def longformer(window: int, tokens: Any = 0, dilation: int | Sequence[int] = 1) -> Mask:
    """A sliding window of `window` keys, half of them on each side, and global tokens.

    Args:
      window: even; the query's own key is added to it.
      tokens: as in `GlobalTokens`.
      dilation: 1, or one number for each head.

    Raises:
      ValueError: a window that is odd or smaller than 2, a dilation below 1.

    Beltagy, Peters and Cohan 2020, section 3.1 and figure 2d.

    >>> from attention_jax.masks import draw
    >>> print(draw(longformer(2, tokens=1), 6))
    ██████
    ███···
    ████··
    █·███·
    █··███
    █···██
    """
    if window < 2 or window % 2:
        raise ValueError(f"longformer: window must be even and 2 or more, got {window}.")
    reach = window // 2
    dilations = np.asarray(dilation, np.int32)
    widest = reach * int(dilations.max())
    near: Mask = Window(widest, widest)
    if dilations.ndim:
        near = near & Dilated(reach, reach, dilations[None, :])
    elif dilations > 1:
        near = Dilated(reach, reach, int(dilations))
    return near | GlobalTokens(tokens)


def bigbird(
    rng: Array,
    length: int,
    size: int = 64,
    window: int = 3,
    num_global: int = 2,
    num_random: int = 3,
    num_heads: int | None = None,
    num_last: int = 0,
) -> Mask:
    """Blocks: `window` around the query's own, the first `num_global`, and `num_random` others.

    No random block is one of the window or a global one, so no key counts twice, and random ones
    come from anywhere in the sequence. Of short sequences with few blocks, all are attended.

    Args:
      rng: a `jax.random` key for the random blocks.
      length: of the sequence.
      size: tokens a block.
      window: odd; blocks of the window, the query's own included.
      num_global: blocks that attend to all and are attended by all.
      num_random: random blocks for each block of queries.
      num_heads: N, to draw the random blocks anew for each head; None draws once for all.
      num_last: of the last blocks, how many are global too; their code has the first and the last,
        num_global=1 and num_last=1.

    Raises:
      ValueError: an even window, a size below 1, or a negative number of blocks.

    Zaheer et al. 2020, section 2 (the internal construction, "BigBird-ITC").

    >>> mask = bigbird(jax.random.key(0), 8, size=1, num_global=1, num_random=1)
    >>> mask.to_dense(8).sum(axis=1)  # window 3, global 1, random 1; the first is global
    Array([8, 4, 5, 5, 5, 5, 5, 4], dtype=int32)
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"bigbird: window must be odd and 1 or more blocks, got {window}.")
    at_least("bigbird", 0, num_last=num_last)
    at_least("Block", 1, size=size)
    near = Window(window // 2, window // 2) | GlobalTokens(num_global)
    if num_last:
        number = np.arange(-(-int(length) // int(size)))
        near = near | GlobalTokens(number >= len(number) - num_last)
    return Block(near, size) | random_blocks(rng, length, size, num_random, near, num_heads)
