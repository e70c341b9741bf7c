"""Evaluate a jaxpr inside a kernel, by primitives that Pallas lowers for TPU and GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr

from attention_jax.implementations.pallas import loops
from attention_jax.implementations.pallas.loops import Replayed
from attention_jax.implementations.pallas.splitting import evaluated, value_of

Array = jax.Array


def in_kernel(function: Callable[..., Any], *arguments: Any, scan: Any = loops.scan) -> Any:
    """Call a function inside a kernel: trace it, and replay what was traced.

    Its derivatives must have been taken before: rules of derivatives are gone afterwards. `scan`
    is how loops over features are computed.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    results = _replayed(scan, closed, *jax.tree.leaves(arguments))
    return jax.tree.unflatten(jax.tree.structure(shape), results)


def _replayed(scan: Any, closed: ClosedJaxpr | Jaxpr, *arguments: Any) -> list[Any]:
    jaxpr, constants = (
        (closed.jaxpr, closed.consts) if isinstance(closed, ClosedJaxpr) else (closed, ())
    )
    values = dict(zip(jaxpr.constvars, constants, strict=True))
    values |= zip(jaxpr.invars, arguments, strict=True)
    read = functools.partial(value_of, values)
    inner = functools.partial(_replayed, scan)
    nested = {**NESTED, "scan": scan}
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        rule = functools.partial(nested[name], inner) if name in nested else RULES.get(name)
        if rule is None:
            values |= evaluated(equation, read)
        else:
            results = rule(equation.params, *map(read, equation.invars))
            values |= zip(equation.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _call(name: str, replayed: Replayed, params: dict[str, Any], *arguments: Any) -> list[Any]:
    return replayed(params[name], *arguments)


def _product(params: dict[str, Any], a: Array, b: Array) -> list[Any]:
    """Multiply as `base.matmul` does, with sums in float32."""
    left, right = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}[params["kind"]]
    contracted = ((left,), (right,)), ((), ())
    if params["operands"] is None:
        return [lax.dot_general(a, b, contracted, params["precision"])]
    a, b = a.astype(params["operands"]), b.astype(params["operands"])
    return [lax.dot_general(a, b, contracted, preferred_element_type=jnp.float32)]


def _cond(replayed: Replayed, params: dict[str, Any], which: Array, *arguments: Any) -> list[Any]:
    if isinstance(which, np.generic):
        return replayed(params["branches"][int(which)], *arguments)
    branches = [
        functools.partial(_branch, replayed, branch, which) for branch in params["branches"]
    ]
    return lax.switch(which, branches, *arguments)


def _branch(replayed: Replayed, branch: ClosedJaxpr, which: Array, *arguments: Any) -> list[Any]:
    """Compute numbers that a branch returns as constants, which Triton cannot return."""
    nothing = which.astype(jnp.int32) * 0
    return [
        x if isinstance(x, Tracer) else x + nothing.astype(jnp.result_type(x))
        for x in replayed(branch, *arguments)
    ]


def _all(params: dict[str, Any], x: Array) -> list[Any]:
    return [jnp.min(jnp.where(x, 1.0, 0.0), axis=params["axes"]) > 0.0]


def _any(params: dict[str, Any], x: Array) -> list[Any]:
    return [jnp.max(jnp.where(x, 1.0, 0.0), axis=params["axes"]) > 0.0]


def _is_finite(params: dict[str, Any], x: Array) -> list[Any]:
    return [jnp.abs(x) <= jnp.finfo(x.dtype).max]


def _sign(params: dict[str, Any], x: Array) -> list[Any]:
    """Return the sign, whose own lowering asks which TPU is there; that of NaN and 0 is itself."""
    if not isinstance(x, Tracer):
        return [np.sign(np.asarray(x))]
    one = jnp.full(x.shape, 1, x.dtype)
    return [jnp.where(x > 0, one, jnp.where(x < 0, -one, x))]


def _placement(params: dict[str, Any], near: Any) -> list[Any]:
    """Answer as on a TPU, and that nothing is spread: on a GPU that is right, too."""
    del near
    return [np.bool_(bool(params["tpu"]))]


def _not(params: dict[str, Any], x: Any) -> list[Any]:
    """Negate; what is known while tracing stays known, so that `_cond` leaves out a branch."""
    return [~x if _is_known(x) else lax.bitwise_not(x)]


def _and(params: dict[str, Any], x: Any, y: Any) -> list[Any]:
    for one, other in ((x, y), (y, x)):
        if _is_known(one) and one.dtype == np.bool_:
            return [other if one else one]
    return [lax.bitwise_and(x, y)]


def _converted(params: dict[str, Any], x: Any) -> list[Any]:
    if _is_known(x):
        return [x.astype(params["new_dtype"])]
    return [lax.convert_element_type(x, params["new_dtype"])]


def _is_known(x: Any) -> bool:
    return isinstance(x, np.generic)


def _platform(params: dict[str, Any]) -> list[Any]:
    """Return which of the platforms is meant, that of a TPU or what serves any."""
    fits = (n for n, names in enumerate(params["platforms"]) if names is None or "tpu" in names)
    return [np.int32(next(fits))]


def _empty(params: dict[str, Any]) -> list[Any]:
    return [jnp.zeros(params.get("shape", ()), params["dtype"])]


def _same(params: dict[str, Any], *arguments: Any) -> list[Any]:
    return list(arguments)


NESTED: dict[str, Callable[..., list[Any]]] = {
    **dict.fromkeys(
        ("jit", "pjit", "checkpoint", "remat", "remat2"), functools.partial(_call, "jaxpr")
    ),
    **dict.fromkeys(
        ("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"),
        functools.partial(_call, "call_jaxpr"),
    ),
    "custom_vmap_call": functools.partial(_call, "call"),
    "cond": _cond,
}
"""How to evaluate what holds a jaxpr: given first what evaluates that."""

RULES: dict[str, Callable[..., list[Any]]] = {
    **dict.fromkeys(("copy", "optimization_barrier", "reduce_precision", "same"), _same),
    "tile_product": _product,
    "not": _not,
    "and": _and,
    "convert_element_type": _converted,
    "reduce_and": _all,
    "reduce_or": _any,
    "is_finite": _is_finite,
    "sign": _sign,
    "constant_of_placement": _placement,
    "platform_index": _platform,
    "empty": _empty,
    "empty2": _empty,
}
"""How to evaluate what Pallas does not know, or lowers for one platform only."""
