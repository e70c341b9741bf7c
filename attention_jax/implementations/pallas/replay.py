"""Evaluate a jaxpr inside a kernel, by primitives that Pallas lowers for TPU and GPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxprs_in_params

from attention_jax.implementations.pallas.splitting import evaluated, value_of

Array = jax.Array


def in_kernel(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function inside a kernel: trace it, and replay what was traced.

    Its derivatives must have been taken before: rules of derivatives are gone afterwards.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    results = _replayed(closed, *jax.tree.leaves(arguments))
    return jax.tree.unflatten(jax.tree.structure(shape), results)


def _replayed(closed: ClosedJaxpr | Jaxpr, *arguments: Any) -> list[Any]:
    jaxpr, constants = (
        (closed.jaxpr, closed.consts) if isinstance(closed, ClosedJaxpr) else (closed, ())
    )
    values = dict(zip(jaxpr.constvars, constants, strict=True))
    values |= zip(jaxpr.invars, arguments, strict=True)
    read = functools.partial(value_of, values)
    for equation in jaxpr.eqns:
        rule = RULES.get(equation.primitive.name)
        if rule is None:
            values |= evaluated(equation, read)
        else:
            results = rule(equation.params, *map(read, equation.invars))
            values |= zip(equation.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _call(name: str, params: dict[str, Any], *arguments: Any) -> list[Any]:
    return _replayed(params[name], *arguments)


def _product(params: dict[str, Any], a: Array, b: Array) -> list[Any]:
    """Multiply as `base.matmul` does, with sums in float32."""
    left, right = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}[params["kind"]]
    contracted = ((left,), (right,)), ((), ())
    if params["operands"] is None:
        return [lax.dot_general(a, b, contracted, params["precision"])]
    a, b = a.astype(params["operands"]), b.astype(params["operands"])
    return [lax.dot_general(a, b, contracted, preferred_element_type=jnp.float32)]


def _cond(params: dict[str, Any], which: Array, *arguments: Any) -> list[Any]:
    if isinstance(which, np.generic):
        return _replayed(params["branches"][int(which)], *arguments)
    branches = [functools.partial(_branch, branch, which) for branch in params["branches"]]
    return lax.switch(which, branches, *arguments)


def _branch(branch: ClosedJaxpr, which: Array, *arguments: Any) -> list[Any]:
    """Compute numbers that a branch returns as constants, which Triton cannot return."""
    nothing = which.astype(jnp.int32) * 0
    return [
        x if isinstance(x, Tracer) else x + nothing.astype(jnp.result_type(x))
        for x in _replayed(branch, *arguments)
    ]


def _scan(params: dict[str, Any], *arguments: Any) -> list[Any]:
    """Loop over what a scan splits and stacks: neither is a primitive of kernels."""
    constants, carry = _counts(params)
    given, sums, split = (
        arguments[:constants],
        arguments[constants : constants + carry],
        arguments[constants + carry :],
    )
    length, closed = params["length"], params["jaxpr"]
    parts = zip(closed.jaxpr.outvars[carry:], closed.out_avals[carry:], strict=True)
    stacked = [
        _Columns(jnp.zeros((*part.shape, length), part.dtype))
        if part.ndim == 1 and _is_sum_of_rows(closed.jaxpr, variable)
        else jnp.zeros((length, *part.shape), part.dtype)
        for variable, part in parts
    ]
    together = math.gcd(length, params["unroll"], TOGETHER)
    body = functools.partial(_steps, params, (given, split), together)
    sums, stacked = lax.fori_loop(0, length // together, body, (list(sums), stacked))
    return [*sums, *(x.columns.T if isinstance(x, _Columns) else x for x in stacked)]


class _Columns(NamedTuple):
    """Vectors that a loop stacks as columns [n, length]: a number for each row is written in it."""

    columns: Array


def _is_sum_of_rows(jaxpr: Jaxpr, variable: Any) -> bool:
    """Tell whether a vector is a sum along the rows of a tile, or computed of such a vector."""
    made_by = next((e for e in jaxpr.eqns if variable in e.outvars), None)
    if made_by is None or variable.aval.ndim > 2:
        return False
    inner = list(jaxprs_in_params(made_by.params))
    if len(inner) == 1:
        place = list(made_by.outvars).index(variable)
        return _is_sum_of_rows(inner[0], inner[0].outvars[place])
    if made_by.primitive.name == "reduce_sum":
        return made_by.params["axes"] == (1,)
    read = (x for x in made_by.invars if not isinstance(x, Literal))
    return any(_is_sum_of_rows(jaxpr, x) for x in read)


TOGETHER = 2
"""At most so many steps of a loop that asks for more are computed without storing sums between."""


def _steps(params: dict[str, Any], fixed: Any, together: int, turn: Any, state: Any) -> Any:
    for n in range(together):
        state = _step(params, fixed, turn * together + n, state)
    return state


def _counts(params: dict[str, Any]) -> tuple[int, int]:
    """Return how many arguments of a scan are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].unpack()  # since JAX 0.12
    return len(constants), len(carry)


def _step(params: dict[str, Any], fixed: Any, n: Any, state: Any) -> Any:
    (given, split), (sums, stacked) = fixed, state
    n = params["length"] - 1 - n if params["reverse"] else n
    n = jnp.asarray(n, jnp.int32)
    results = _replayed(params["jaxpr"], *given, *sums, *(_taken(x, n) for x in split))
    stacked = [_put(x, n, y) for x, y in zip(stacked, results[len(sums) :], strict=True)]
    return results[: len(sums)], stacked


def _taken(x: Array, n: Array) -> Array:
    """Return x[n], as a sum that leaves the others out."""
    chosen = _chosen(x, n)
    if x.dtype == jnp.bool_:
        return jnp.any(x & chosen, axis=0)
    return jnp.sum(jnp.where(chosen, x, jnp.zeros_like(x)), axis=0, dtype=x.dtype)


def _put(x: Array | _Columns, n: Array, part: Array) -> Array | _Columns:
    if isinstance(x, _Columns):
        is_column = lax.broadcasted_iota(jnp.int32, x.columns.shape, 1) == n
        return _Columns(jnp.where(is_column, part[:, None], x.columns))
    return jnp.where(_chosen(x, n), part[None], x)


def _chosen(x: Array, n: Array) -> Array:
    return lax.broadcasted_iota(jnp.int32, x.shape, 0) == n


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


RULES: dict[str, Callable[..., list[Any]]] = {
    **dict.fromkeys(
        ("jit", "pjit", "checkpoint", "remat", "remat2"), functools.partial(_call, "jaxpr")
    ),
    **dict.fromkeys(
        ("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"),
        functools.partial(_call, "call_jaxpr"),
    ),
    **dict.fromkeys(("copy", "optimization_barrier", "reduce_precision", "same"), _same),
    "custom_vmap_call": functools.partial(_call, "call"),
    "tile_product": _product,
    "not": _not,
    "and": _and,
    "convert_element_type": _converted,
    "cond": _cond,
    "scan": _scan,
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
