"""Masks over images: the tokens of a grid [height, width] in row-major order."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from attention_jax.base.checks import at_least
from attention_jax.masks.algebra import Mask
from attention_jax.masks.common import Segment, make_signed

__all__ = ["GridWindow", "swin", "window_order"]


@dataclasses.dataclass(frozen=True)
class GridWindow(Mask):
    """A token attends to its own `window` x `window` square of a grid [height, width].

    The squares tile the grid, moved right and down by `shift`; those at the border are cut off.
    That is the cyclic shift of shifted windows together with its mask: a square that wraps
    around holds up to four pieces that may not attend to each other, and here they are squares
    of their own.

    Liu et al. 2021, section 3.2 ("shifted window partitioning", "cyclic shift").

    >>> print(draw_grid(GridWindow(4, 4, window=2, shift=1), 4, 4, query=5))
    ····
    ·██·
    ·██·
    ····
    """

    height: int
    width: int
    window: int
    shift: int = 0

    def __post_init__(self) -> None:
        at_least("GridWindow", 1, height=self.height, width=self.width, window=self.window)
        if not 0 <= self.shift < self.window:
            raise ValueError(
                f"GridWindow: shift must be in [0, window) = [0, {self.window}), got {self.shift}."
            )
        make_signed(self, "height", "width", "window", "shift")

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        behind = self.window - self.shift
        same_row = (q_idx // self.width + behind) // self.window == (
            kv_idx // self.width + behind
        ) // self.window
        same_column = (q_idx % self.width + behind) // self.window == (
            kv_idx % self.width + behind
        ) // self.window
        return same_row & same_column


def swin(height: int, width: int, window: int, shifted: bool = False) -> GridWindow:
    """Windows of a Swin layer: plain in even layers, shifted by window // 2 in odd ones.

    Liu et al. 2021, section 3.2, equation 3.

    >>> swin(8, 8, window=4, shifted=True)
    GridWindow(height=8, width=8, window=4, shift=2)
    """
    return GridWindow(height, width, window, window // 2 if shifted else 0)


def window_order(mask: GridWindow) -> tuple[np.ndarray, Segment]:
    """Return the order that puts each window's tokens side by side, and the mask in that order.

    In row-major order a window touches every row it spans; in this order windows are segments,
    and the tiles that are worked on are as few as the windows need. With x [B, H W, N, D]:
    `attend(x[:, order], ..., mask=segments)`, and the result put back by `[:, order.argsort()]`.

    >>> order, segments = window_order(GridWindow(2, 4, window=2))
    >>> order
    array([0, 1, 4, 5, 2, 3, 6, 7], dtype=int32)
    >>> segments.query_ids
    array([0, 0, 0, 0, 1, 1, 1, 1], dtype=int32)
    """
    row, column = np.divmod(np.arange(mask.height * mask.width), mask.width)
    behind = mask.window - mask.shift
    columns = (mask.width - 1 + behind) // mask.window + 1
    window = (row + behind) // mask.window * columns + (column + behind) // mask.window
    order = np.argsort(window, kind="stable").astype(np.int32)
    _, ids = np.unique(window[order], return_inverse=True)
    return order, Segment(ids.astype(np.int32))


def draw_grid(mask: Mask, height: int, width: int, query: int) -> str:
    """Draw on the grid what one query may attend to: █ may, · may not."""
    kv_idx = np.arange(height * width, dtype=np.int32)[None, :]
    allowed = np.asarray(mask(np.full((1, 1), query, np.int32), kv_idx))
    rows = np.broadcast_to(allowed, kv_idx.shape).reshape(height, width)
    return "\n".join("".join("█" if may else "·" for may in row) for row in rows)
