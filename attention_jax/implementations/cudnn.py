"""NVIDIA's fused kernel, reached through `jax.nn`, for what it supports: plain dot products."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.masks import Causal, Full, Mask, Window
from attention_jax.masks.algebra import And
from attention_jax.normalizers import softmax
from attention_jax.scores import dot, scaled_dot

Array = jax.Array


def lacks(
    sizes: dict[str, int],
    dtype: Any,
    score: Any,
    mask: Mask,
    bias: Any,
    normalizer: Any,
    dropout_rate: float,
    more_than_context: bool,
) -> str | None:
    """Say what cuDNN cannot do of what is asked, or None if it can do all of it."""
    reasons = {
        "needs an NVIDIA GPU; this process runs on " + jax.default_backend() + ".": (
            jax.default_backend() not in ("gpu", "cuda")
        ),
        f"needs bfloat16 or float16, got {dtype}.": dtype not in (jnp.bfloat16, jnp.float16),
        "knows the scores dot and scaled_dot only.": score not in (dot, scaled_dot),
        "knows the masks Full, Causal() and Causal() & Window(left, 0) with T = S only.": (
            _band(mask) is None or (_band(mask) != (None, None) and sizes["T"] != sizes["S"])
        ),
        "knows the softmax normalizer only.": normalizer is not softmax,
        "takes no bias here.": bias is not None,
        "draws other dropout masks than the rest; use implementation='tiled'.": dropout_rate > 0,
        "returns the context only.": more_than_context,
        f"needs head depths that are multiples of 8 up to 128, got {sizes['Q']}, {sizes['V']}.": (
            any(sizes[depth] % 8 or sizes[depth] > 128 for depth in "QHV")
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def attend(query: Array, key: Array, value: Array, score: Any, mask: Mask) -> Array:
    """Attend with cuDNN; `lacks` has said that it can."""
    causal, left = _band(mask) or (None, None)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=1.0 if score is dot else None,
        is_causal=causal is not None,
        local_window_size=None if left is None else (left, 0),
        implementation="cudnn",
    )


def _band(mask: Mask) -> tuple[bool | None, int | None] | None:
    """Read a mask as (causal, window to the left); None where it is neither."""
    if isinstance(mask, Full):
        return None, None
    if isinstance(mask, Causal) and isinstance(mask.offset, int) and mask.offset == 0:
        return True, None
    if isinstance(mask, And):
        for causal, window in ((mask.first, mask.second), (mask.second, mask.first)):
            if (
                isinstance(window, Window)
                and window.right in (0, None)
                and (_band(causal) == (True, None))
            ):
                return True, window.left
    return None
