"""Published sparse attention patterns, as compositions of smaller masks.

None of them is causal unless it says so; `& Causal()` makes it so.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.base.checks import at_least
from attention_jax.masks.algebra import Full, Mask, MaskLike, as_mask
from attention_jax.masks.common import Causal, Window
from attention_jax.masks.graphs import Edges
from attention_jax.masks.intervals import indices
from attention_jax.masks.patterns import Block, Chunked, Dilated, Fixed, GlobalTokens, Strided

__all__ = ["bigbird", "longformer", "random_blocks", "sparse_fixed", "sparse_strided"]

Array = jax.Array


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
