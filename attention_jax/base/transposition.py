"""A linear function whose transposition is written by hand.

JAX transposes a loop by keeping what each of its turns reads. Where that can be had again for less,
as the keys of other devices that are sent once more, the transposition is a loop of its own. Unlike
`jax.custom_derivatives.linear_call`, this one has all derivatives, and can be vectorised.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from attention_jax.base.trees import varying_like


def linear_call(
    function: Callable[[Any, Any], Any],
    transposed: Callable[[Any, Any], Any],
    fixed: Any,
    moving: Any,
    shape: Any = None,
) -> Any:
    """Return function(fixed, moving), linear in `moving`, whose transposition is `transposed`.

    With y = function(fixed, x), transposed(fixed, z) is the f'(z) of <z, y> = <f'(z), x>. The
    derivatives with respect to `fixed`, and all further ones, follow from both functions.

    Args:
      function: of two pytrees; closes over nothing that is traced, as `transposed` does.
      transposed: of `fixed` and a pytree as `function` returns; returns one like `moving`.
      fixed: a pytree of arrays of any type.
      moving: a pytree of floating-point arrays.
      shape: what the function returns, as `jax.ShapeDtypeStruct`, where that is known. Then neither
        function is traced before a program with it is lowered, or differentiated further.

    >>> double = functools.partial(linear_call, lambda a, x: a * x, lambda a, z: 2 * a * z)
    >>> jax.grad(double, 1)(3.0, 5.0)  # the transposition is taken as it is given
    Array(6., dtype=float32, weak_type=True)
    """
    leaves, structure = jax.tree.flatten((fixed, moving))
    number = len(jax.tree.leaves(fixed))
    jaxpr, is_late = None, shape is not None
    if not is_late:
        jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(fixed, moving)
    pair = _Pair(
        functools.partial(_flat, function, structure),
        functools.partial(_flat, transposed, jax.tree.structure((fixed, shape))),
        number,
        is_late,
    )
    found = _bound(pair, leaves, jax.tree.leaves(shape), jaxpr)
    return jax.tree.unflatten(jax.tree.structure(shape), found)


class _Pair(NamedTuple):
    """A function of leaves and its transposition, of which the first `number` are fixed.

    What `is_late` is traced when it is lowered.
    """

    function: Callable[..., list[Any]]
    transposed: Callable[..., list[Any]]
    number: int
    is_late: bool


def _flat(function: Callable[[Any, Any], Any], structure: Any, *leaves: Any) -> list[Any]:
    return jax.tree.leaves(function(*jax.tree.unflatten(structure, leaves)))


def _bound(
    pair: _Pair, arguments: Sequence[Any], shapes: Any, jaxpr: ClosedJaxpr | None = None
) -> list[Any]:
    """Bind the function of a pair, which returns arrays of these shapes."""
    if pair.is_late:
        shapes = late_shapes(shapes, *arguments)
    else:
        jaxpr = jaxpr or jax.make_jaxpr(pair.function)(*arguments)
        shapes = jaxpr.out_avals
    return _linear.bind(*arguments, jaxpr=jaxpr, shapes=tuple(shapes), pair=pair)


def late_shapes(shapes: Any, *arguments: Any) -> list[Any]:
    """Return the types of results of these shapes, which vary over a mesh as the arguments do."""
    return jax.make_jaxpr(functools.partial(_zeros, shapes))(*arguments).out_avals


def _zeros(shapes: Any, *arguments: Any) -> list[Any]:
    return [varying_like(jnp.zeros(one.shape, one.dtype), *arguments) for one in shapes]


def _function_of(jaxpr: ClosedJaxpr | None, pair: _Pair) -> Callable[..., list[Any]]:
    return pair.function if jaxpr is None else jaxpr_as_fun(jaxpr)


def _evaluated(*arguments: Any, jaxpr: ClosedJaxpr | None, shapes: Any, pair: _Pair) -> list[Any]:
    del shapes
    return _function_of(jaxpr, pair)(*arguments)


def _tangent(
    primals: Any, tangents: Any, *, jaxpr: ClosedJaxpr | None, shapes: Any, pair: _Pair
) -> Any:
    fixed, of_moving = primals[: pair.number], tangents[pair.number :]
    parts = []
    if any(type(change) is not ad.Zero for change in of_moving):
        parts.append(_bound(pair, [*fixed, *map(ad.instantiate_zeros, of_moving)], shapes))
    which = [n for n in range(pair.number) if type(tangents[n]) is not ad.Zero]
    if which:
        of_those = functools.partial(_of_those, _function_of(jaxpr, pair), primals, which)
        moving, along = ([x[n] for n in which] for x in (primals, tangents))
        parts.append(jax.jvp(of_those, moving, along)[1])
    change = [functools.reduce(ad.add_tangents, each) for each in zip(*parts, strict=True)]
    return _linear.bind(*primals, jaxpr=jaxpr, shapes=shapes, pair=pair), change


def _of_those(
    function: Callable[..., list[Any]], arguments: Any, which: list[int], *those: Any
) -> list[Any]:
    """Evaluate a function with some of its arguments replaced."""
    replaced = dict(zip(which, those, strict=True))
    return function(*(replaced.get(n, x) for n, x in enumerate(arguments)))


def _transposed(
    cotangents: Any, *arguments: Any, jaxpr: ClosedJaxpr | None, shapes: Any, pair: _Pair
) -> list[Any]:
    del jaxpr, shapes
    fixed, moving = arguments[: pair.number], arguments[pair.number :]
    swapped = _Pair(pair.transposed, pair.function, pair.number, pair.is_late)
    shapes = [x.aval if ad.is_undefined_primal(x) else jax.typeof(x) for x in moving]
    found = _bound(swapped, [*fixed, *map(ad.instantiate_zeros, cotangents)], shapes)
    of_moving = (
        x if ad.is_undefined_primal(argument) else None
        for x, argument in zip(found, moving, strict=True)
    )
    return [None] * pair.number + list(of_moving)


def _batched(
    arguments: Any, axes: Any, *, jaxpr: ClosedJaxpr | None, shapes: Any, pair: _Pair
) -> Any:
    del jaxpr
    (size,) = {x.shape[axis] for x, axis in zip(arguments, axes, strict=True) if axis is not None}
    front = [
        batching.bdim_at_front(x, axis, size)
        for x, axis in zip(arguments[pair.number :], axes[pair.number :], strict=True)
    ]
    of_fixed = axes[: pair.number]
    function, transposed = (_mapped(one, of_fixed) for one in pair[:2])
    pair = _Pair(function, transposed, pair.number, pair.is_late)
    shapes = [jax.ShapeDtypeStruct((size, *one.shape), one.dtype) for one in shapes]
    found = _bound(pair, [*arguments[: pair.number], *front], shapes)
    return found, [0] * len(found)


def _mapped(function: Callable[..., list[Any]], of_fixed: Any) -> Callable[..., list[Any]]:
    return functools.partial(_over_batch, function, tuple(of_fixed))


def _over_batch(function: Callable[..., list[Any]], of_fixed: Any, *arguments: Any) -> list[Any]:
    axes = of_fixed + (0,) * (len(arguments) - len(of_fixed))
    return jax.vmap(function, axes)(*arguments)


def _abstract(*arguments: Any, jaxpr: ClosedJaxpr | None, shapes: Any, pair: _Pair) -> list[Any]:
    del arguments, jaxpr, pair
    return list(shapes)


_linear = Primitive("linear_call")
_linear.multiple_results = True
_linear.def_impl(_evaluated)
_linear.def_abstract_eval(_abstract)
ad.primitive_jvps[_linear] = _tangent
ad.primitive_transposes[_linear] = _transposed
batching.primitive_batchers[_linear] = _batched
mlir.register_lowering(_linear, mlir.lower_fun(_evaluated, multiple_results=True))
