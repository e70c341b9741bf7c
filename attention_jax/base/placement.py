"""Where a program runs, which may be known only when it is lowered: on a CPU, and on many devices.

On an explicit or manual mesh axis each device sees its own part, and loops over examples and heads
are as right as on one device. Along an automatic axis the compiler decides what each device holds,
and a loop with dynamic slices makes it gather all: there everything has to be vectorised. Which of
both it is follows from a mesh, if there is one while tracing, and else from where the program is
lowered. A program may be lowered for another platform than the one of the process that traces it,
or for several at once.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray, Tracer
from jax.dtypes import float0
from jax.extend.backend import backends
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

Array = jax.Array


PLATFORMS = ("cpu", "gpu", "tpu")

_PLATFORMS = {"cuda": "gpu", "rocm": "gpu"}

_possible: contextvars.ContextVar[tuple[str, ...]]
_possible = contextvars.ContextVar("_possible", default=PLATFORMS)


class Where(NamedTuple):
    """Where a program runs, as far as that is known while tracing; None for what is not.

    `spread` tells whether automatic axes of a mesh spread it over devices, `platform` is "cpu",
    "tpu" or "gpu".
    """

    spread: bool | None = None
    platform: str | None = None

    @classmethod
    def of_call(cls, *arrays: Any) -> Where:
        """Return where a program runs that is called with these arrays now.

        >>> Where.of_call(jnp.ones(3)).spread
        False
        """
        whole = [x for x in arrays if isinstance(x, Array) and not isinstance(x, Tracer)]
        platforms = {device.platform for array in whole for device in array.devices()}
        platforms = platforms or {_PLATFORMS.get(name, name) for name in backends()}
        return cls(bool(known(*arrays)), platforms.pop() if len(platforms) == 1 else None)


def known(*arrays: Any) -> bool | None:
    """Tell whether automatic axes of a mesh spread the program; None if no mesh is known yet.

    Within `shard_map`, and wherever a mesh is set, that one counts; else the meshes on which
    arrays are.

    >>> known(jnp.ones(3)) is None
    True
    """
    meshes = [jax.sharding.get_abstract_mesh()]
    if meshes[0].empty:
        meshes = [jax.typeof(array).sharding.mesh for array in arrays]
    spread = [_devices(mesh.shape, _automatic(mesh)) > 1 for mesh in meshes if not mesh.empty]
    return any(spread) if spread else None


def possible() -> tuple[str, ...]:
    """Return for which of PLATFORMS what is traced now may be lowered."""
    return _possible.get()


@contextlib.contextmanager
def lowered_for(platforms: tuple[str, ...]) -> Iterator[None]:
    """Say that what is traced within is lowered for these platforms alone, if at all.

    It is not part of what JAX keeps traced functions by; so a function that is traced in two such
    places has to be two functions.

    >>> with lowered_for(("gpu", "tpu")):
    ...     print(is_on_cpu(jnp.ones(3)))
    False
    """
    token = _possible.set(platforms)
    try:
        yield
    finally:
        _possible.reset(token)


def on_cpu_or_not(cpu: Callable[..., Any], default: Callable[..., Any], *arguments: Any) -> Any:
    """Call one function where a program is lowered for a CPU, and another one elsewhere.

    Both are traced only where either may be.
    """
    if possible() == ("cpu",):
        return cpu(*arguments)
    if "cpu" not in possible():
        return default(*arguments)
    return lax.platform_dependent(*arguments, cpu=cpu, default=default)


def is_spread(near: Array) -> Array:
    """Return whether automatic axes spread the program: a constant, once it is lowered.

    A condition on it leaves one branch in the compiled program, because XLA removes the other
    before it decides what each device holds. `near` is an array of the computation that the
    condition is about, whose numbers do not matter: JAX takes what depends on nothing out of a
    loop, and the loop would carry the condition instead of the constant.
    """
    spread = known(near)
    return _answer(near, None) if spread is None else jnp.bool_(spread)


def is_on_cpu(near: Array) -> Array:
    """Return whether the program is lowered for a CPU; see `is_spread`."""
    return _answer(near, False, cpu=True)


def is_on_tpu(near: Array) -> Array:
    """Return whether the program is lowered for a TPU; see `is_spread`."""
    return _answer(near, False, tpu=True)


def is_spread_or_accelerated(near: Array, spread: bool | None) -> Array:
    """Return whether it is spread, as far as that is known, or not lowered for a CPU."""
    return _answer(near, True, cpu=spread)


def _answer(near: Array, other: bool | None, **platforms: bool | None) -> Array:
    """Return the answer of the platform that the program is lowered for; None asks `is_spread`."""
    answers = {"cpu": other, "tpu": other, "other": other} | platforms
    found = {answers.get(platform, other) for platform in possible()}
    if len(found) == 1 and None not in found:
        return jnp.bool_(found.pop())
    return _constant.bind(near, **answers)


def _automatic(mesh: Any) -> list[Any]:
    return [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    ]


def _devices(shape: Any, names: Any) -> int:
    return math.prod(shape[name] for name in names)


def _lowered(answer: str, context: Any, near: Any, **answers: bool | None) -> list[Any]:
    """Lower an answer; None asks whether the program is spread."""
    del near
    found = answers[answer]
    if found is None:
        found = spreads(context.module_context.axis_context)
    return [mlir.ir_constant(np.bool_(found))]


def spreads(context: Any) -> bool:
    """Read the context of a module that is lowered, which JAX does not document.

    A context of another kind counts as spread: to vectorise is right everywhere.
    """
    if hasattr(context, "num_devices"):
        return context.num_devices > 1
    if hasattr(context, "mesh") and hasattr(context, "manual_axes"):
        names = set(context.mesh.axis_names) - set(context.manual_axes)
        return _devices(context.mesh.shape, names) > 1
    return True


def _now(near: Any, **answers: bool | None) -> Array:
    """Answer outside `jit`, where an operation runs on one device, that of its operand."""
    (device,) = jnp.asarray(near).devices()
    return jnp.bool_(bool(answers.get(device.platform, answers["other"])))


def _tangent(primals: Any, tangents: Any, **answers: bool | None) -> Any:
    del tangents
    return _constant.bind(*primals, **answers), ad.Zero(ShapedArray((), float0))


def _batched(operands: Any, axes: Any, **answers: bool | None) -> Any:
    return _constant.bind(*operands, **answers), None


_constant = Primitive("constant_of_placement")
_constant.def_impl(_now)
_constant.def_abstract_eval(lambda near, **answers: ShapedArray((), np.bool_))
ad.primitive_jvps[_constant] = _tangent
batching.primitive_batchers[_constant] = _batched
mlir.register_lowering(_constant, functools.partial(_lowered, "other"))
for _platform in ("cpu", "tpu"):
    _rule = functools.partial(_lowered, _platform)
    mlir.register_lowering(_constant, _rule, platform=_platform)
