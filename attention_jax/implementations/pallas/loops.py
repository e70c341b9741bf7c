"""A scan inside a kernel: a loop over what it splits and stacks, which is no primitive there."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, Literal, jaxprs_in_params

Array = jax.Array

Replayed = Callable[..., list[Any]]
"""Evaluates a jaxpr inside a kernel: (jaxpr, *arguments) -> results."""


def scan(replayed: Replayed, params: dict[str, Any], *arguments: Any) -> list[Any]:
    """Loop over what a scan splits and stacks: neither is a primitive of kernels."""
    constants, carry = counts(params)
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
    step = functools.partial(_step, replayed, params, (given, split))
    body = functools.partial(_steps, step, together)
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


def _steps(step: Callable[..., Any], together: int, turn: Any, state: Any) -> Any:
    for n in range(together):
        state = step(turn * together + n, state)
    return state


def counts(params: dict[str, Any]) -> tuple[int, int]:
    """Return how many arguments of a scan are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].unpack()  # since JAX 0.12
    return len(constants), len(carry)


def _step(replayed: Replayed, params: dict[str, Any], fixed: Any, n: Any, state: Any) -> Any:
    (given, split), (sums, stacked) = fixed, state
    n = params["length"] - 1 - n if params["reverse"] else n
    n = jnp.asarray(n, jnp.int32)
    results = replayed(params["jaxpr"], *given, *sums, *(_taken(x, n) for x in split))
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
