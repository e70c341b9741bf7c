"""A linear function with a transposition of its own, and every other derivative of its definition.

`jax.custom_vjp` would end forward mode, and `jax.linear_call` knows neither `vmap` nor derivatives
of what the function is linear with. Here

    linear(how, given, change) = how.definition(given, change),

which JAX differentiates and vectorises as it stands; only its transposition, which is reverse
mode, is `how.transposed(given, cotangents)`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from attention_jax.implementations.pallas.primitive import batched, mapped_sizes, shaped_like

Array = jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """A function that is linear in its last arguments.

    Attributes:
      definition: (*given, *change) -> results.
      transposed: (*given, *cotangents of the results) -> cotangents of the change.
      shapes: of the results.
      given: the number of arguments that it need not be linear in.
    """

    definition: Callable[..., Sequence[Array]]
    transposed: Callable[..., Sequence[Array]]
    shapes: Sequence[jax.ShapeDtypeStruct]
    given: int

    def __call__(self, *arguments: Array) -> list[Array]:
        """Apply it."""
        return _linear.bind(*arguments, how=self, axes=())


def _evaluated(*arguments: Array, how: Linear, axes: tuple[Any, ...]) -> list[Array]:
    return list(batched(how.definition, axes)(*arguments))


def _abstract(*arguments: Any, how: Linear, axes: tuple[Any, ...]) -> list[Any]:
    front = mapped_sizes(arguments, axes)
    shapes = [jax.ShapeDtypeStruct((*front, *one.shape), one.dtype) for one in how.shapes]
    return shaped_like(shapes, *arguments)


def _batch(operands: Any, dims: Any, *, how: Linear, axes: tuple[Any, ...]) -> Any:
    """Vectorise; the change is given to all, so that cotangents of what all share are added."""
    size = next(x.shape[dim] for x, dim in zip(operands, dims, strict=True) if dim is not None)
    given = operands[: how.given]
    change = [
        jnp.broadcast_to(x, (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
        for x, dim in zip(operands[how.given :], dims[how.given :], strict=True)
    ]
    dims = (*dims[: how.given], *(0 for _ in change))
    results = _linear.bind(*given, *change, how=how, axes=(*axes, dims))
    return results, (0,) * len(results)


def _jvp(primals: Any, tangents: Any, *, how: Linear, axes: tuple[Any, ...]) -> Any:
    """Add what changes by the change, which stays linear, and what changes by the rest."""
    bind = functools.partial(_linear.bind, how=how, axes=axes)
    results = bind(*primals)
    found = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in results]
    change = tangents[how.given :]
    if not all(map(_is_zero, change)):
        found = bind(*primals[: how.given], *map(_instantiated, change))
    moves = [not _is_zero(x) for x in tangents[: how.given]]
    if any(moves):
        function = functools.partial(_of_moving, (how, axes), moves, primals)
        moving = [x for x, move in zip(primals, moves, strict=False) if move]
        along = [x for x, move in zip(tangents, moves, strict=False) if move]
        more = jax.jvp(function, moving, along)[1]
        found = list(map(ad.add_tangents, found, more))
    return results, found


def _of_moving(static: Any, moves: list[bool], primals: Any, *moving: Array) -> list[Array]:
    how, axes = static
    those = iter(moving)
    given = [next(those) if move else x for x, move in zip(primals, moves, strict=False)]
    return _evaluated(*given, *primals[how.given :], how=how, axes=axes)


def _transpose(cotangents: Any, *arguments: Any, how: Linear, axes: tuple[Any, ...]) -> Any:
    cotangents = [_instantiated(x) for x in cotangents]
    axes = tuple((*each[: how.given], *(0 for _ in cotangents)) for each in axes)
    found = batched(how.transposed, axes)(*arguments[: how.given], *cotangents)
    return [None] * how.given + list(found)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, ad.Zero) or jnp.result_type(tangent) == jax.dtypes.float0


def _instantiated(tangent: Any) -> Array:
    return ad.instantiate_zeros(tangent)


_linear = Primitive("attention_tangent")
_linear.multiple_results = True
_linear.def_impl(jax.jit(_evaluated, static_argnames=("how", "axes")))
_linear.def_abstract_eval(_abstract)
mlir.register_lowering(_linear, mlir.lower_fun(_evaluated, multiple_results=True))
ad.primitive_jvps[_linear] = _jvp
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _batch
