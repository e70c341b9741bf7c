"""A function that is traced when a program is lowered, for the platform that it is lowered for.

What a program does on another platform may be a branch that is left out. To trace it costs as much
as to trace the branch that is kept, unless only its shapes are asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from attention_jax.base.transposition import late_shapes


def later(function: Callable[..., Sequence[Any]], shapes: Any, *arrays: Any) -> list[Any]:
    """Return function(*arrays), a sequence of arrays of these shapes, without tracing it now.

    It has no derivative: give it one by `jax.custom_jvp`.

    Args:
      function: closes over nothing that is traced.
      shapes: of its results, as `jax.ShapeDtypeStruct`.
      *arrays: its arguments.

    >>> import jax.numpy as jnp
    >>> later(lambda x: [2 * x], [jax.ShapeDtypeStruct((3,), "float32")], jnp.ones(3))
    [Array([2., 2., 2.], dtype=float32)]
    """
    return _later.bind(*arrays, function=function, shapes=tuple(late_shapes(shapes, *arrays)))


def _evaluated(*arrays: Any, function: Callable[..., Sequence[Any]], shapes: Any) -> list[Any]:
    del shapes
    return list(function(*arrays))


def _abstract(*arrays: Any, function: Callable[..., Sequence[Any]], shapes: Any) -> list[Any]:
    del arrays, function
    return list(shapes)


def _batched(arrays: Any, axes: Any, *, function: Any, shapes: Any) -> Any:
    (size,) = {x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None}
    mapped = functools.partial(_mapped, function, tuple(axes))
    shapes = [jax.ShapeDtypeStruct((size, *one.shape), one.dtype) for one in shapes]
    return later(mapped, shapes, *arrays), [0] * len(shapes)


def _mapped(function: Callable[..., Sequence[Any]], axes: Any, *arrays: Any) -> Sequence[Any]:
    return jax.vmap(function, axes)(*arrays)


_later = Primitive("later")
_later.multiple_results = True
_later.def_impl(_evaluated)
_later.def_abstract_eval(_abstract)
batching.primitive_batchers[_later] = _batched
mlir.register_lowering(_later, mlir.lower_fun(_evaluated, multiple_results=True))
