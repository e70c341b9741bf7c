"""Whether a program is spread over devices, which may be known only when it is lowered.

On an explicit or manual mesh axis each device sees its own part, and loops over examples and heads
are as right as on one device. Along an automatic axis the compiler decides what each device holds,
and a loop with dynamic slices makes it gather all: there everything has to be vectorised. Which of
both it is follows from a mesh, if there is one while tracing, and else from where the program is
lowered.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.dtypes import float0
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

Array = jax.Array


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


def is_spread(near: Array) -> Array:
    """Return whether automatic axes spread the program: a constant, once it is lowered.

    A condition on it leaves one branch in the compiled program, because XLA removes the other
    before it decides what each device holds. `near` is an array of the computation that the
    condition is about, whose numbers do not matter: JAX takes what depends on nothing out of a
    loop, and the loop would carry the condition instead of the constant.
    """
    spread = known(near)
    return _spread.bind(near) if spread is None else jnp.bool_(spread)


def _automatic(mesh: Any) -> list[Any]:
    return [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    ]


def _devices(shape: Any, names: Any) -> int:
    return math.prod(shape[name] for name in names)


def _lowered(context: Any, near: Any) -> list[Any]:
    del near
    return [mlir.ir_constant(np.bool_(_is_spread(context.module_context.axis_context)))]


def _is_spread(context: Any) -> bool:
    """Read the context of a module that is lowered, which JAX does not document.

    A context of another kind counts as spread: to vectorise is right everywhere.
    """
    if hasattr(context, "num_devices"):
        return context.num_devices > 1
    if hasattr(context, "mesh") and hasattr(context, "manual_axes"):
        names = set(context.mesh.axis_names) - set(context.manual_axes)
        return _devices(context.mesh.shape, names) > 1
    return True


def _tangent(primals: Any, tangents: Any) -> Any:
    del tangents
    return _spread.bind(*primals), ad.Zero(ShapedArray((), float0))


def _batched(operands: Any, axes: Any) -> Any:
    return _spread.bind(*operands), None


_spread = Primitive("is_spread")
_spread.def_impl(lambda near: jnp.bool_(False))
_spread.def_abstract_eval(lambda near: ShapedArray((), np.bool_))
ad.primitive_jvps[_spread] = _tangent
batching.primitive_batchers[_spread] = _batched
mlir.register_lowering(_spread, _lowered)
