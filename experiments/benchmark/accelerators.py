"""Kernels for TPU and GPU beside those of JAX: what their compilers say, and times where one is."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from attention_jax import attend, bind, masks, scores
from experiments.benchmark import compilers, peers
from experiments.benchmark.compilers import Cost
from experiments.benchmark.patterns import allowed_share

Array = jax.Array

TILES = {"tpu": (512, 512), "cuda": (64, 64)}
HEADS, DEPTH, FEATURES = 8, 128, 64
COMPILED_FOR = ("v5e", "H100")
REFUSALS = ValueError, RuntimeError  # of which those of JAX and NotImplementedError are some
"""What says that a program does not run on a platform, or not in its memory."""

PEERS = ("cudnn", "tokamax")
"""Libraries for a GPU whose programs are functions of JAX."""


class Row(NamedTuple):
    """One program on one target: its cost, or in one sentence why there is none.

    On a device that is there, also its `milliseconds`, and TFLOP/s of the products that the mask
    asks for.
    """

    target: str
    program: str
    mask: str
    is_gradient: bool
    cost: Cost | None = None
    refused: str | None = None
    milliseconds: float | None = None
    teraflops: float | None = None


def measure(scale: int, targets: tuple[str, ...] = COMPILED_FOR) -> Iterator[Row]:
    """Compile every program for every target that this machine has a compiler for."""
    length = 4096 // scale
    for target in targets:
        missing = compilers.lacks(target)
        if missing:
            yield Row(target, "all", "", False, refused=missing)
            continue
        platform = compilers.TARGETS[target].platform
        shapes = operands(platform, length)
        for (program, mask), function in programs(platform, length).items():
            for is_gradient in (False, True):
                measured = gradient(function) if is_gradient else function
                row = Row(target, program, mask, is_gradient)
                try:
                    yield row._replace(cost=compilers.cost(measured, shapes, target))
                except REFUSALS as error:
                    yield row._replace(refused=_refusal(program, error))
        if platform == "cuda":
            yield from _not_tried(target)


def _not_tried(target: str) -> Iterator[Row]:
    """Yield a row for each library that is missing, or has no GPU to run on."""
    for name in ("tokamax", "FlexAttention"):
        reason = peers.lacks(name)
        if reason is not None:
            yield Row(target, name, "", False, refused=reason)


def _refusal(program: str, error: Exception) -> str:
    return peers.why(program, error) if program in PEERS else in_one_line(error)


def timed(scale: int, repeats: int) -> Iterator[Row]:
    """Run every program on the device of this machine; nothing where that is a CPU."""
    platform = {"tpu": "tpu", "gpu": "cuda"}.get(jax.default_backend())
    if platform is None:
        return
    length, target = 4096 // scale, jax.devices()[0].device_kind
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [
        jax.random.normal(key, shape.shape, shape.dtype)
        for key, shape in zip(keys, operands(platform, length), strict=True)
    ]
    share = {
        name: allowed_share(mask, length) if mask else 1.0
        for name, mask in _patterns(length).items()
    }
    for (program, mask), function in programs(platform, length).items():
        for is_gradient in (False, True):
            row = Row(target, program, mask, is_gradient)
            try:
                seconds = duration(gradient(function) if is_gradient else function, arrays, repeats)
            except REFUSALS as error:
                yield row._replace(refused=_refusal(program, error))
                continue
            yield _with_time(row, seconds, length, share[mask])
    if platform == "cuda" and peers.lacks("FlexAttention") is None:
        for mask, is_gradient in itertools.product(("none", "causal"), (False, True)):
            seconds = peers.flex_seconds(
                operands(platform, length)[0].shape,
                is_causal=mask == "causal",
                is_gradient=is_gradient,
                repeats=repeats,
            )
            row = Row(target, "FlexAttention", mask, is_gradient)
            yield _with_time(row, seconds, length, share[mask])


def _with_time(row: Row, seconds: float, length: int, share: float) -> Row:
    """Add milliseconds, and TFLOP/s of the products of the pairs that the mask allows."""
    products = 7 if row.is_gradient else 2  # the backward pass has five
    operations = products * 2 * HEADS * length**2 * DEPTH * share
    return row._replace(milliseconds=1e3 * seconds, teraflops=operations / seconds / 1e12)


def duration(function: Callable[..., Any], arrays: list[Array], repeats: int) -> float:
    """Return the median of the seconds that a compiled function takes."""
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(*arrays))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def in_one_line(error: Exception) -> str:
    """Say what went wrong, without the lines that follow the first."""
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def table(rows: Sequence[Row]) -> str:
    """Write what programs cost, as Markdown; without times if nothing was run.

    >>> cost = Cost(seconds=4.0, operands=3000, results=1000, temporaries=2**20, traffic=5000)
    >>> print(table([Row("v5e", "flash", "causal", False, cost)]))
    | target | program | mask | pass | compiled, s | temporaries, MiB | traffic, times operands |
    |---|---|---|---|---|---|---|
    | v5e | flash | causal | forward | 4.0 | 1.00 | 1.25 |
    """
    head = ["target", "program", "mask", "pass"]
    head += ["compiled, s", "temporaries, MiB", "traffic, times operands"]
    has_times = any(row.milliseconds is not None for row in rows)
    head += ["ms", "TFLOP/s"] * has_times
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [row.target, row.program, row.mask, "gradients" if row.is_gradient else "forward"]
        if row.refused:
            lines.append([*cells, row.refused, *[""] * (len(head) - len(cells) - 1)])
            continue
        cells += _of_cost(row.cost)
        times = row.milliseconds, row.teraflops
        cells += ["" if x is None else f"{x:.3g}" for x in times] if has_times else []
        lines.append(cells)
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return text.replace("|---|", "|---|").replace("| --- ", "|---").replace("--- |", "---|")


def _of_cost(cost: Cost | None) -> list[str]:
    if cost is None:
        return [""] * 3
    moved = "in loops"
    if cost.traffic is not None:
        moved = f"{cost.traffic / (cost.operands + cost.results):.2f}"
    return [f"{cost.seconds:.1f}", f"{cost.temporaries / 2**20:.2f}", moved]


def report(rows: Sequence[Row], scale: int, machine: str, schedules: str) -> str:
    """Write the table, what its columns mean, and the schedules of a TPU, as Markdown."""
    return f"""\
# Kernels for TPU and GPU

Made by `python -m experiments.benchmark --suites=accelerators`: bfloat16, one example,
S={4096 // scale}, {HEADS} heads of depth {DEPTH}, {FEATURES} features of additive attention, tiles
of {TILES["tpu"][0]} x {TILES["tpu"][1]} for TPUs and {TILES["cuda"][0]} x {TILES["cuda"][1]} for
GPUs, on {machine}.

{RAN if any(row.milliseconds for row in rows) else COMPILED_ONLY} Seconds are processor time to
trace, lower and compile; temporaries are those that the compiler reports; traffic is what kernels
read and write in device memory, every array once a kernel, divided by operands and results of the
whole program. `flash`, `splash` and `mha` are the kernels of `jax.experimental.pallas.ops`, `cudnn`
is that of `jax.nn`.

{table(rows)}

## Static schedule

{schedules}
"""


RAN = "Compiled, and run where a row has a time."
COMPILED_ONLY = "Compiled for devices that were not there, and run on none."


def operands(platform: str, length: int) -> list[jax.ShapeDtypeStruct]:
    """Return query, key and value, laid out as kernels of JAX take them on this platform."""
    shape = (1, HEADS, length, DEPTH) if platform == "tpu" else (1, length, HEADS, DEPTH)
    return [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3


def gradient(function: Callable[..., Array]) -> Callable[..., Any]:
    """Return the gradients of the sum of a result, with the result."""
    return jax.grad(functools.partial(_total, function), (0, 1, 2))


def _total(function: Callable[..., Array], *arrays: Array) -> Array:
    return jnp.sum(function(*arrays).astype(jnp.float32))


def programs(platform: str, length: int) -> dict[tuple[str, str], Callable[..., Array]]:
    """Return functions of query, key and value as `operands` lays them out, by name and mask.

    For a TPU that is [B, N, S, H], and ours is given a transposed view.
    """
    tile = TILES[platform]
    patterns = _patterns(length)
    found: dict[tuple[str, str], Callable[..., Array]] = {}
    for name, score in _scores().items():
        for mask, pattern in patterns.items():
            found[f"attend, {name}", mask] = functools.partial(
                _transposed if platform == "tpu" else attend,
                score=score,
                mask=pattern,
                tile_sizes=tile,
                implementation="pallas",
            )
    for mask, is_causal in (("none", False), ("causal", True)):
        if platform == "tpu":
            found["flash", mask] = functools.partial(_flash, is_causal, tile[0])
            found["splash", mask] = functools.partial(_splash, is_causal, tile[0])
        else:
            found["mha", mask] = functools.partial(_mha, is_causal)
            for name in PEERS:
                if peers.lacks(name) is None:
                    found[name, mask] = functools.partial(peers.compiled, name, is_causal=is_causal)
    return found


def _patterns(length: int) -> dict[str, masks.Mask | None]:
    return {"none": None, "causal": masks.Causal(), "window": masks.Window(length // 8, 0)}


def _scores() -> dict[str, Any]:
    weights = jnp.full((DEPTH, FEATURES), 1.0 / DEPTH)
    additive = bind(
        scores.additive,
        query_weight=weights,
        key_weight=2 * weights,  # equal ones would be one product
        value=jnp.ones(FEATURES),
        bias=jnp.zeros(FEATURES),
    )
    return {"scaled dot": scores.scaled_dot, "additive": additive, "log1p of a square": log_square}


def log_square(query: Array, key: Array) -> Array:
    """log(1 + (q k)^2 / H), a score that no library has."""
    return jnp.log1p((query @ key.T) ** 2 / query.shape[-1])


def _transposed(query: Array, key: Array, value: Array, **options: Any) -> Array:
    arrays = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    return jnp.swapaxes(attend(*arrays, **options), 1, 2)


def _flash(is_causal: bool, block: int, query: Array, key: Array, value: Array) -> Array:
    names = flash_attention.BlockSizes.__dataclass_fields__
    sizes = {name: 1 if name == "block_b" else block for name in names}
    return flash_attention.flash_attention(
        query,
        key,
        value,
        causal=is_causal,
        sm_scale=query.shape[-1] ** -0.5,
        block_sizes=flash_attention.BlockSizes(**sizes),
    )


def _splash(is_causal: bool, block: int, query: Array, key: Array, value: Array) -> Any:
    shape = query.shape[2], key.shape[2]
    of_head = splash_attention_mask.CausalMask if is_causal else splash_attention_mask.FullMask
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([of_head(shape)] * query.shape[1]),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
    )
    return jax.vmap(kernel)(query * query.shape[-1] ** -0.5, key, value)


def _mha(is_causal: bool, query: Array, key: Array, value: Array) -> Any:
    # Deprecated from jax 0.11 on, it is imported only to be measured.
    from jax.experimental.pallas.ops.gpu import attention as gpu_attention

    scale = query.shape[-1] ** -0.5
    return gpu_attention.mha(query, key, value, None, sm_scale=scale, causal=is_causal)
