"""Attention outside `jit`: one program for every call whose static arguments and shapes are equal.

Called outside `jit`, the loops over heads and tiles would be compiled at each call, because JAX
caches them by the functions they are made of, and these are new. So a request is split into arrays
and what is static: that is the key of a program that takes the arrays.

A function is part of the key by its code and all that the code refers to: what it closes over, its
defaults, and the globals it names. So a lambda that is written in a loop is the same at each turn.
Where something it refers to can change in place (a list, an object with attributes) or is an array
under differentiation, there is no key, and the call is traced anew. It is one program too, and its
derivative another, which both end with it: what a loop outside `jit` was compiled to JAX would
keep, although no call will ask for it again. What has no loop runs an operation at a time, which
compiles nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.core
import numpy as np
from jax import lax
from jax.extend.core import jaxprs_in_params
from jax.extend.core.primitives import custom_jvp_call_p, custom_vjp_call_p, jit_p, remat_p

from attention_jax.base import placement
from attention_jax.base.binding import Sliced
from attention_jax.base.placement import Where
from attention_jax.masks import Mask, Predicate, Table, algebra
from attention_jax.request import Request
from attention_jax.scores import Separated
from attention_jax.statistics import Statistic

MOST_PROGRAMS = 64
"""How many keys are kept; the one that was used longest ago is forgotten first."""

LARGEST_CONSTANT = 2**20
"""A NumPy array of more bytes is not compared at each call if a function closes over it."""

_TRUSTED = {"attention_jax", "jax", "jaxlib", "numpy"} | sys.stdlib_module_names - {"__main__"}
"""Packages whose functions, classes and modules are taken to stay as they are."""

_BY_OPERATION = {custom_jvp_call_p, custom_vjp_call_p, jit_p, remat_p}
"""Primitives of which JAX keeps nothing for good that is as new as what they compute."""

_BY_IDENTITY = (types.BuiltinFunctionType, np.ufunc)
_BY_VALUE = (type(None), bool, int, float, complex, str, bytes, np.generic, np.dtype)


class ChangeableError(TypeError):
    """A function refers to something that can change in place."""


def call(function: Callable[[Request, Where], Any], request: Request) -> Any:
    """Call a function of a request: by itself within `jit`, else as a program that is kept.

    The function is also told where the program runs; within `jit` that may be known later.
    """
    if is_staged():
        return function(request, Where(placement.known(*jax.tree.leaves(request))))
    where = Where.of_call(*jax.tree.leaves(request))
    maps = {"mix_logits": request.mix_logits, "mix_weights": request.mix_weights}
    functions = request.score, request.bias, request.normalizer, request.mask
    try:
        parts = tuple(_of_tree((*functions, request.statistics, maps), set()))
        score, bias, normalizer, mask = map(_interned, functions)
        same = dataclasses.replace(
            request,
            score=score,
            bias=bias,
            normalizer=normalizer,
            mask=with_constants(mask),
            statistics=_interned(request.statistics),
            **_interned(maps),
        )
        leaves, structure = jax.tree.flatten(same)
        program = _program(function, (structure, where, jax.default_backend(), parts))
    except TypeError:  # it can change in place, or has no hash
        return _once(function, request, where)
    return program([_on_device(leaf) for leaf in leaves])


def _once(function: Callable[[Request, Where], Any], request: Request, where: Where) -> Any:
    """Call a function as a program that ends with the call, or an operation at a time."""
    same = dataclasses.replace(request, mask=with_constants(request.mask))
    leaves, structure = jax.tree.flatten(same)
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


def _interned(tree: Any) -> Any:
    """Replace functions of the user by the first ones that were equal to them."""
    if isinstance(tree, Sliced):
        return Sliced(_interned(tree.function), tree.axes)
    if isinstance(tree, jax.tree_util.Partial) and isinstance(tree.func, types.FunctionType):
        keywords = {name: _interned(value) for name, value in tree.keywords.items()}
        return type(tree)(_interned(tree.func), *tree.args, **keywords)
    if isinstance(tree, dict):
        return {name: _interned(value) for name, value in tree.items()}
    if isinstance(tree, Statistic):
        return dataclasses.replace(tree, **_interned(vars(tree)))
    if isinstance(tree, Mask):
        return jax.tree.map(_interned_predicate, tree, is_leaf=_is_predicate)
    if isinstance(tree, Separated):
        return Separated(*map(_interned, tree))
    if isinstance(tree, types.FunctionType):
        return _first_equal(_Keyed(tree, tuple(_of_value(tree, set()))))
    return tree


def _interned_predicate(part: Any) -> Any:
    return Predicate(_interned(part.function)) if _is_predicate(part) else part


def _is_predicate(part: Any) -> bool:
    return isinstance(part, Predicate)


@dataclasses.dataclass(frozen=True)
class _Keyed:
    """A function, compared by its parts."""

    function: Callable[..., Any] = dataclasses.field(compare=False)
    parts: tuple[Hashable, ...]


@functools.lru_cache(4 * MOST_PROGRAMS)
def _first_equal(keyed: _Keyed) -> Callable[..., Any]:
    return keyed.function


def is_staged() -> bool:
    """Tell whether operations are recorded for a program now, as within `jit` or `scan`.

    An operation without operands moves nothing to a device, which `jax.transfer_guard` may forbid.
    """
    return isinstance(lax.iota(np.int32, 0), jax.core.Tracer)


@functools.lru_cache(MOST_PROGRAMS)
def _program(function: Callable[..., Any], key: tuple[Any, ...]) -> Callable[..., Any]:
    return jax.jit(functools.partial(_of_leaves, function, *key[:2]))


def _of_leaves(
    function: Callable[..., Any], structure: Any, where: Where, leaves: list[Any]
) -> Any:
    request = jax.tree.unflatten(structure, leaves)
    return function(dataclasses.replace(request, mask=without_constants(request.mask)), where)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Constant:
    """A NumPy array that is static, by its value."""

    dtype: np.dtype
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: Any) -> Constant:
        """Copy an array."""
        return cls(array.dtype, array.shape, array.tobytes())

    @property
    def array(self) -> np.ndarray:
        """The array; it cannot be written to."""
        return np.frombuffer(self.data, self.dtype).reshape(self.shape)


def with_constants(mask: Mask) -> Mask:
    """Return the mask with those NumPy arrays static from which tiles are planned while tracing.

    Tables and arrays with an axis for examples or heads are not; nor are arrays of JAX, which may
    be new at each call, as the positions of a decoder are.
    """
    leaves = [
        Constant.of(leaf) if _plans_tiles(owner, name, leaf) else leaf
        for owner, name, _, leaf in algebra.owners(mask)
    ]
    return jax.tree.structure(mask).unflatten(leaves)


def without_constants(mask: Mask) -> Mask:
    """Return the mask with NumPy arrays again."""
    return jax.tree.map(
        lambda leaf: leaf.array if isinstance(leaf, Constant) else leaf,
        mask,
        is_leaf=lambda part: isinstance(part, Constant),
    )


def _plans_tiles(owner: Mask, name: str, leaf: Any) -> bool:
    if not isinstance(leaf, np.ndarray | np.generic) or isinstance(owner, Table):
        return False
    return np.ndim(leaf) <= owner.example_rank.get(name, 0)


def _of_tree(tree: Any, seen: set[int]) -> Iterator[Hashable]:
    """Yield what the functions in a pytree refer to; its leaves are arguments of the program."""
    if isinstance(tree, Sliced):
        yield from _of_tree(tree.function, seen)
    elif isinstance(tree, jax.tree_util.Partial):
        yield from _of_value(tree.func, seen)
        yield from _of_tree((tree.args, tree.keywords), seen)
    elif isinstance(tree, Mask):
        yield from _of_class(type(tree), seen)
        for field in dataclasses.fields(tree):  # type: ignore[arg-type]
            yield from _of_tree(getattr(tree, field.name), seen)
    elif isinstance(tree, Statistic):
        yield from _of_tree(vars(tree), seen)
    elif isinstance(tree, tuple | list):
        for part in tree:
            yield from _of_tree(part, seen)
    elif isinstance(tree, dict):
        yield from _of_tree(list(tree.values()), seen)
    elif callable(tree):
        yield from _of_value(tree, seen)


def _of_value(value: Any, seen: set[int]) -> Iterator[Hashable]:
    """Yield what says which value this is, for as long as it lives.

    Raises:
      ChangeableError: nothing does.
    """
    if isinstance(value, _BY_VALUE):
        yield type(value), value
    elif isinstance(value, _BY_IDENTITY) or (
        isinstance(value, types.ModuleType | type) and _is_trusted(value)
    ):
        yield value
    elif isinstance(value, types.FunctionType):
        if id(value) not in seen:
            yield from _of_function(value, seen | {id(value)})
    elif isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer):
        yield _Same(value)
    elif isinstance(value, np.ndarray) and value.nbytes <= LARGEST_CONSTANT:
        yield Constant.of(value)
    elif isinstance(value, tuple):
        yield type(value), len(value)
        for part in value:
            yield from _of_value(part, seen)
    elif isinstance(value, functools.partial):
        yield from _of_value((value.func, *value.args, *value.keywords.items()), seen)
    elif isinstance(value, types.MethodType):
        yield from _of_value((value.__self__, value.__func__), seen)
    elif isinstance(value, Mask) or _is_frozen(value):
        yield from _of_class(type(value), seen)
        for field in dataclasses.fields(value):  # type: ignore[arg-type]
            yield from _of_value(getattr(value, field.name), seen)
    elif _is_trusted(type(value)) and hasattr(value, "__wrapped__"):  # of jit, custom_jvp
        yield _Same(value)
        rule = getattr(value, "jvp", None)
        yield from _of_value((getattr(value, "__wrapped__", None), rule), seen)
    else:
        raise ChangeableError(type(value).__name__)


def _of_function(function: types.FunctionType, seen: set[int]) -> Iterator[Hashable]:
    if _is_trusted(function) and not function.__closure__:
        yield function
        return
    yield function.__code__
    for cell in function.__closure__ or ():
        yield from _of_value(cell.cell_contents, seen)
    yield from _of_value(function.__defaults__, seen)
    for name in sorted(_names(function.__code__) & function.__globals__.keys()):
        yield from _of_value(function.__globals__[name], seen)
    for attributes in (function.__kwdefaults__ or {}, function.__dict__):
        for name in sorted(attributes):
            yield from _of_value((name, attributes[name]), seen)


def _of_class(cls: type, seen: set[int]) -> Iterator[Hashable]:
    """Yield what the calls of an instance refer to; its fields are yielded apart."""
    yield cls
    if not _is_trusted(cls):
        yield from _of_value(cls.__call__, seen)


def _names(code: types.CodeType) -> set[str]:
    """Return the names that a function may look up among globals."""
    inner = (part for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _is_trusted(thing: Any) -> bool:
    name = thing.__name__ if isinstance(thing, types.ModuleType) else thing.__module__
    return str(name).partition(".")[0] in _TRUSTED


def _is_frozen(value: Any) -> bool:
    parameters = getattr(type(value), "__dataclass_params__", None)
    return parameters is not None and parameters.frozen


@dataclasses.dataclass(frozen=True, eq=False)
class _Same:
    """What cannot change, by identity; it is held, so that nothing else gets its place."""

    thing: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)
