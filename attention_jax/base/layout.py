"""Keep the axes that a function is vectorised over where another array has them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Array = jax.Array


def laid_out_like(x: Array, other: Array) -> Array:
    """Return x; vectorised, it has each axis where the other, of as many axes, has it.

    Most operations move such an axis to the front. Where a kernel reads the result, that is a
    layout of its own, from and to which heads are copied.

    >>> x = jnp.ones((5, 2, 3))
    >>> program = jax.make_jaxpr(jax.vmap(lambda x: laid_out_like(x.sum(0)[None], x), 1, 1))
    >>> program(x).jaxpr.eqns[-1].outvars[0].aval.shape
    (1, 2, 3)
    """
    return _like.bind(x, other)


def _same(x: Array, other: Array) -> Array:
    del other
    return x


def _batched(arrays: Any, axes: Any) -> Any:
    (x, other), (axis, goal) = arrays, axes
    if axis is None:
        x, axis = jnp.broadcast_to(x, (other.shape[goal], *x.shape)), 0
    if goal is None:
        other, goal = jnp.broadcast_to(other, (x.shape[axis], *other.shape)), axis
        other = jnp.moveaxis(other, 0, goal)
    return _like.bind(jnp.moveaxis(x, axis, goal), other), goal


def _toward_x(cotangent: Any, x: Any, other: Array) -> Any:
    del x
    return _like.bind(cotangent, other), None


_like = Primitive("laid_out_like")
_like.def_impl(_same)
_like.def_abstract_eval(_same)
mlir.register_lowering(_like, mlir.lower_fun(_same, multiple_results=False))
batching.primitive_batchers[_like] = _batched
ad.defjvp(_like, lambda tangent, x, other: _like.bind(tangent, other), None)
ad.primitive_transposes[_like] = _toward_x
