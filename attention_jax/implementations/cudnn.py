"""NVIDIA's fused kernel, reached through `jax.nn`, for what it supports: plain dot products."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.base.binding import taken_apart
from attention_jax.masks import Causal, Full, Mask, Window
from attention_jax.masks.algebra import And
from attention_jax.normalizers import softmax
from attention_jax.request import Request
from attention_jax.scores import dot, scaled_dot

Array = jax.Array


def lacks(request: Request, platform: str) -> str | None:
    """Say what cuDNN cannot do of what is asked, or None if it can do all of it."""
    sizes, dtype = request.sizes, request.query.dtype
    if platform != "gpu":
        return f"needs an NVIDIA GPU; this program runs on {platform}."
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, got {dtype}."
    if not (_is_plain(request.score, dot) or _is_plain(request.score, scaled_dot)):
        return "knows the scores dot and scaled_dot only."
    band = _band(request.mask)
    if band is None or (band != (None, None) and sizes["T"] != sizes["S"]):
        return (
            "knows the masks Full, Causal() and Causal() & Window(left, 0) with T = S, all of "
            "whose fields are numbers and no arrays, only."
        )
    if not _is_plain(request.normalizer, softmax):
        return "knows the softmax normalizer only."
    if request.mixes:
        return "mixes no heads; use implementation='tiled'."
    if request.bias is not None:
        return "takes no bias here."
    if request.dropout_rate > 0:
        return "draws other dropout masks than the rest; use implementation='tiled'."
    if request.statistics is not None:
        return "computes no statistics of the weights; use implementation='tiled'."
    if request.return_weights or request.return_logsumexp:
        return "returns the context only."
    if any(sizes[depth] % 8 or sizes[depth] > 128 for depth in "QHV"):
        return (
            f"needs head depths that are multiples of 8 up to 128, got {sizes['Q']}, {sizes['V']}."
        )
    return None


def attend(request: Request) -> Array:
    """Attend with cuDNN; `lacks` has said that it can."""
    causal, left = _band(request.mask) or (None, None)
    return jax.nn.dot_product_attention(
        request.query,
        request.key,
        request.value,
        scale=1.0 if _is_plain(request.score, dot) else None,
        is_causal=causal is not None,
        local_window_size=None if left is None else (left, 0),
        implementation="cudnn",
    )


def _is_plain(function: Any, wanted: Any) -> bool:
    """Tell whether it is the wanted function with nothing bound to it."""
    return taken_apart(function) == (wanted, (), {})


def _band(mask: Mask) -> tuple[bool | None, int | None] | None:
    """Read a mask as (causal, window to the left); None where it is neither.

    What is an array may be known at run time only, and cuDNN takes numbers.
    """
    if isinstance(mask, Full):
        return None, None
    if isinstance(mask, Causal) and isinstance(mask.offset, int) and mask.offset == 0:
        return True, None
    if isinstance(mask, And):
        for causal, window in ((mask.first, mask.second), (mask.second, mask.first)):
            if (
                isinstance(window, Window)
                and _is_number(window.right)
                and _is_number(window.left)
                and window.right in (0, None)
                and _band(causal) == (True, None)
            ):
                return True, window.left
    return None


def _is_number(size: Any) -> bool:
    return size is None or isinstance(size, int)
