"""Attention outside `jit`: one program for every call whose static arguments and shapes are equal.

Called outside `jit`, the loops over heads and tiles would be compiled at each call, because JAX
caches them by the functions they are made of, and these are new. So a request is split into arrays
and what is static: that is the key of a program that takes the arrays. Arrays that functions close
over are among them, so that a lambda which is written in a loop, over new weights at each turn, is
the same at each; see `closures`. A function that needs the numbers of these arrays while it is
traced, as `float(weight)` does, or a `jax.custom_jvp` that closes over them, has a program for each
of them.

Where something that a function refers to can change in place (an object with attributes), there is
no key, and the call is traced anew. It is one program too, and its derivative another, which both
end with it: what a loop outside `jit` was compiled to JAX would keep, although no call will ask for
it again. What has no loop runs an operation at a time, which compiles nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import numpy as np
from jax import lax
from jax.extend.core import jaxprs_in_params
from jax.extend.core.primitives import custom_jvp_call_p, custom_vjp_call_p, jit_p, remat_p

from attention_jax.base import placement
from attention_jax.base.placement import Where
from attention_jax.base.remembering import one_call
from attention_jax.implementations.closures import closed, opened
from attention_jax.implementations.constants import with_constants, without_constants
from attention_jax.implementations.recipes import ChangeableError
from attention_jax.request import Request

MOST_PROGRAMS = 64
"""How many keys are kept; the one that was used longest ago is forgotten first."""

MOST_OF_NUMBERS = 4
"""How many of those are kept that hold the numbers of arrays which may not come again."""

_BY_OPERATION = {custom_jvp_call_p, custom_vjp_call_p, jit_p, remat_p}
"""Primitives of which JAX keeps nothing for good that is as new as what they compute."""

_NUMBERS_NEEDED = (TypeError, jax.errors.NonConcreteBooleanIndexError)
"""Errors of JAX where a function needs numbers, and others: most of these are a TypeError."""


def call(function: Callable[[Request, Where], Any], request: Request) -> Any:
    """Call a function of a request: by itself within `jit`, else as a program that is kept.

    The function is also told where the program runs; within `jit` that may be known later.
    """
    if is_staged():
        return function(request, Where(placement.known(*jax.tree.leaves(request))))
    same = dataclasses.replace(request, mask=with_constants(request.mask))
    try:
        program, operands = _program_for(_program, function, opened(same))
        if not program.needs_numbers:
            try:
                return program.run(operands)
            except _NUMBERS_NEEDED as error:
                if isinstance(error, ChangeableError):
                    raise
        other, operands = _program_for(_program_of_numbers, function, opened(same, False))
        found = other.run(operands)  # raises what is an error of the user
    except ChangeableError:
        return _once(function, same)
    program.needs_numbers = True
    return found


class _Program:
    """A function of the leaves of a request, compiled for each of their shapes."""

    def __init__(self, function: Callable[..., Any], structure: Any, where: Where) -> None:
        self.run = jax.jit(functools.partial(_of_leaves, function, structure, where))
        self.needs_numbers = False


def _program_for(
    programs: Callable[..., _Program], function: Callable[..., Any], request: Any
) -> tuple[_Program, list[Any]]:
    """Return the program for an opened request, and its operands."""
    leaves, structure = jax.tree.flatten(request)
    where = Where.of_call(*leaves)
    try:
        program = programs(function, structure, where, jax.default_backend())
    except TypeError as error:
        raise ChangeableError("no hash") from error
    return program, [_on_device(leaf) for leaf in leaves]


def _once(function: Callable[[Request, Where], Any], request: Request) -> Any:
    """Call a function as a program that ends with the call, or an operation at a time."""
    leaves, structure = jax.tree.flatten(request)
    where = Where.of_call(*leaves)
    leaves = [_on_device(leaf) for leaf in leaves]
    program = jax.jit(functools.partial(_of_leaves, function, structure, where))
    if _has_loop(program.trace(leaves).jaxpr.jaxpr):
        return program(leaves)
    request = jax.tree.unflatten(structure, leaves)
    # What is moved to the device now are constants, which a program would hold.
    with jax.transfer_guard_host_to_device("allow"):
        return function(dataclasses.replace(request, mask=without_constants(request.mask)), where)


def _has_loop(jaxpr: Any) -> bool:
    """Tell whether there is a loop or a branch, which is compiled as a whole outside `jit` too."""
    for equation in jaxpr.eqns:
        inner = list(jaxprs_in_params(equation.params))
        if (inner and equation.primitive not in _BY_OPERATION) or any(map(_has_loop, inner)):
            return True
    return False


def _on_device(leaf: Any) -> Any:
    """Move numbers of the host in the open, since `jax.transfer_guard` may forbid it otherwise."""
    return leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf)


def is_staged() -> bool:
    """Tell whether operations are recorded for a program now, as within `jit` or `scan`.

    An operation without operands moves nothing to a device, which `jax.transfer_guard` may forbid.
    """
    return isinstance(lax.iota(np.int32, 0), jax.core.Tracer)


def _made(function: Callable[..., Any], structure: Any, where: Where, _: str) -> _Program:
    return _Program(function, structure, where)


_program = functools.lru_cache(MOST_PROGRAMS)(_made)
_program_of_numbers = functools.lru_cache(MOST_OF_NUMBERS)(_made)


def _of_leaves(
    function: Callable[..., Any], structure: Any, where: Where, leaves: list[Any]
) -> Any:
    building: list[Any] = []
    request = closed(jax.tree.unflatten(structure, leaves), building)
    request = dataclasses.replace(request, mask=without_constants(request.mask))
    with one_call():
        found = function(request, where)
    for built in building:
        built.require_unchanged()
    return found
