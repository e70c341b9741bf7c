"""A kernel as an operation of JAX: for the platform that a program is lowered for, and batched."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from attention_jax.base.trees import varying_like
from attention_jax.implementations.pallas import mosaic, triton
from attention_jax.implementations.pallas.blocks import Kernel, Level, Part, sizes_of

Array = jax.Array

_INTERPRETED = contextvars.ContextVar[str | None]("interpreted", default=None)
_RUN = {"tpu": mosaic.run, "gpu": triton.run}


@contextlib.contextmanager
def interpreted(platform: str = "tpu") -> Iterator[None]:
    """Let kernels run in Pallas' interpreter on a CPU: to test a score or mask of your own, slowly.

    What is compiled within the context is interpreted, and stays so.

    Args:
      platform: "tpu" or "gpu", whose kernel is interpreted.

    Raises:
      ValueError: another platform.

    >>> from attention_jax import attend
    >>> x = jnp.ones((1, 16, 1, 8))
    >>> with interpreted():
    ...     attend(x, x, x, implementation="pallas").shape
    (1, 16, 1, 8)
    """
    if platform not in _RUN:
        raise ValueError(f'interpreted: platform must be "tpu" or "gpu", got {platform!r}.')
    token = _INTERPRETED.set(platform)
    try:
        yield
    finally:
        _INTERPRETED.reset(token)


def call(kernel: Kernel, *arrays: Array) -> list[Array]:
    """Run a kernel over whole arrays, whatever the platform; the last ones may be of its parts."""
    return _kernel.bind(*arrays, kernel=kernel, levels=())


def _on(
    platform: str | None,
    *arrays: Array,
    kernel: Kernel,
    levels: tuple[Level, ...],
    interpret: bool = False,
) -> list[Array]:
    """Run a kernel as on a platform; None is a CPU that interprets none."""
    if 0 in sizes_of(levels, arrays):  # no grid can be that small
        return _zeros(kernel.shapes(levels, *arrays), *arrays)
    if kernel.only_on not in (None, platform):
        return _never(kernel, levels, *arrays)
    if platform is None:
        raise ValueError(
            "attend: implementation 'pallas' runs on TPU and GPU, and this program is compiled for "
            "a CPU; use implementation='tiled', or to test a kernel, run within "
            "implementations.interpreted()."
        )
    parts = kernel.apart if platform != "tpu" else ()
    parts = parts or [Part(kernel, range(len(kernel.blocks)), range(len(kernel.results)))]
    found = {}
    for part, operands, results in parts:
        of_part = [
            Level(
                tuple(level.operands[n] for n in operands),
                tuple(level.results[n] for n in results),
            )
            for level in levels
        ]
        given = [arrays[n] for n in operands]
        found |= zip(results, _RUN[platform](part, interpret, of_part, *given), strict=True)
    return [found[n] for n in range(len(kernel.results))]


def _on_cpu(*arrays: Array, kernel: Kernel, levels: tuple[Level, ...]) -> list[Array]:
    return _on(_INTERPRETED.get(), *arrays, kernel=kernel, levels=levels, interpret=True)


def _never(kernel: Kernel, levels: tuple[Level, ...], *arrays: Array) -> list[Array]:
    """Return NaN in a branch that is not taken: all are lowered in a program for many platforms."""
    return [jnp.full(one.shape, jnp.nan, one.dtype) for one in kernel.shapes(levels, *arrays)]


def _abstract(*arrays: Any, kernel: Kernel, levels: tuple[Level, ...]) -> list[Any]:
    make = functools.partial(_zeros, kernel.shapes(levels, *arrays))
    return jax.make_jaxpr(make)(*arrays).out_avals


def _zeros(shapes: Any, *arrays: Array) -> list[Array]:
    """Return results of the given shapes that vary over a mesh as the arrays do."""
    return [varying_like(jnp.zeros(one.shape, one.dtype), *arrays) for one in shapes]


def _batch(operands: Any, dims: Any, *, kernel: Kernel, levels: tuple[Level, ...]) -> Any:
    """Vectorise; a result has the new axis where an operand that is cut alike has it.

    So heads stay where they are: they are read and written in the layout that is given.
    """
    places = [
        next(
            (
                axis
                for of_operand, axis in zip(kernel.blocks, dims, strict=False)
                if of_operand.places == block.places and axis is not None
            ),
            0,
        )
        for block, _ in kernel.results
    ]
    level = Level(tuple(dims), tuple(places))
    return _kernel.bind(*operands, kernel=kernel, levels=(*levels, level)), places


def _on_one_device(rule: Any, context: Any, *arguments: Any, **parameters: Any) -> Any:
    """Lower a kernel without what its operands vary over: within a kernel there is no mesh."""
    types = [ShapedArray(x.shape, x.dtype) for x in context.avals_in]
    return rule(context.replace(avals_in=types), *arguments, **parameters)


def _lowered(platform: str, rule: Any, *arguments: Any, **parameters: Any) -> Any:
    """Lower a kernel for a platform, and say in one sentence what it does not do there."""
    try:
        return _on_one_device(rule, *arguments, **parameters)
    except Exception as error:  # every lowering has its own
        raise ValueError(
            f"attend: implementation 'pallas' makes no kernel for {platform.upper()} of this: "
            f"{_reason(error)}; use implementation='tiled'."
        ) from error


def _reason(error: Exception) -> str:
    """Return what a lowering says, in a few words; where a primitive is unknown, its name."""
    text = " ".join(str(error).split())
    unknown = re.search(r"Unimplemented primitive in Pallas .*?: ([\w-]+)", text)
    if unknown:
        return f"the score, mask, bias or normalizer uses the primitive {unknown[1]}"
    first = re.sub(r"^\w+Error: ", "", text).partition(". ")[0]
    return first[:1].lower() + first[1:].rstrip(".")


_kernel = Primitive("attention_kernel")
_kernel.multiple_results = True
_kernel.def_impl(jax.jit(_on_cpu, static_argnames=("kernel", "levels")))
_kernel.def_abstract_eval(_abstract)
batching.primitive_batchers[_kernel] = _batch
_rule = mlir.lower_fun(_on_cpu, multiple_results=True)
mlir.register_lowering(_kernel, functools.partial(_on_one_device, _rule), platform="cpu")
for _platform, _kind in (("tpu", "tpu"), ("cuda", "gpu"), ("rocm", "gpu")):
    _rule = mlir.lower_fun(functools.partial(_on, _kind), multiple_results=True)
    mlir.register_lowering(_kernel, functools.partial(_lowered, _kind, _rule), platform=_platform)
