"""Attention of other libraries for a GPU: cuDNN through JAX, tokamax, and FlexAttention of PyTorch.

Each may be missing, or want the device of the process; what it lacks is said in one sentence.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

NO_GPU = "not run: no GPU"


def compiled(name: str, query: Any, key: Any, value: Any, *, is_causal: bool) -> Any:
    """Attend by a peer of JAX, `cudnn` or `tokamax`."""
    if name == "cudnn":
        attended = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    else:
        import tokamax  # pyright: ignore[reportMissingImports]

        attended = tokamax.dot_product_attention
    return attended(query, key, value, is_causal=is_causal)


def lacks(name: str) -> str | None:
    """Say in one sentence why this machine cannot try a peer, or None if it can."""
    needed = {"tokamax": "tokamax", "FlexAttention": "torch"}.get(name)
    if needed is not None and importlib.util.find_spec(needed) is None:
        return f"not installed: pip install {needed}"
    if name == "FlexAttention":
        import torch  # pyright: ignore[reportMissingImports]

        return None if torch.cuda.is_available() else NO_GPU
    return None


def why(name: str, error: Exception) -> str:
    """Say in one sentence why a peer was not compiled.

    >>> why("cudnn", RuntimeError("cuDNN not found."))
    'not compiled: cudnn needs the library of cuDNN and says "cuDNN not found."'
    """
    needs = {"cudnn": "the library of cuDNN", "tokamax": "the device in this process"}[name]
    said = (str(error).splitlines() or [""])[0]
    return f'not compiled: {name} needs {needs} and says "{said}"'


def flex_seconds(
    shape: tuple[int, ...], *, is_causal: bool, is_gradient: bool, repeats: int
) -> Any:
    """Return the median of the seconds of FlexAttention in bfloat16, for [B, S, N, H] on a GPU."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention import flex_attention  # pyright: ignore[reportMissingImports]

    examples, length, heads, depth = shape
    arrays = [
        torch.randn(
            (examples, heads, length, depth),
            dtype=torch.bfloat16,
            device="cuda",
            requires_grad=is_gradient,
        )
        for _ in range(3)
    ]
    live = None
    if is_causal:
        live = flex_attention.create_block_mask(_is_causal, None, None, length, length)
    attended = torch.compile(functools.partial(flex_attention.flex_attention, block_mask=live))

    return _median_seconds(functools.partial(_run, attended, arrays, is_gradient), repeats)


def _run(attended: Callable[..., Any], arrays: list[Any], is_gradient: bool) -> None:
    """Attend, and compute the gradients if asked for; return when the GPU is done."""
    import torch  # pyright: ignore[reportMissingImports]

    result = attended(*arrays)
    if is_gradient:
        torch.autograd.grad(result.float().sum(), arrays)
    torch.cuda.synchronize()


def _is_causal(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return key <= query


def _median_seconds(run: Callable[[], None], repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
