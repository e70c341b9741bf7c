"""Read a value into a recipe: what it refers to by value, and its arrays apart.

What a function does is given by its code and all that the code refers to: what it closes over, its
defaults, the globals that it names. What can change in place has no recipe, but for lists, dicts
and NumPy arrays, which are read as they are now.
"""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import inspect
import sys
import types
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from attention_jax.implementations import recipes
from attention_jax.implementations.constants import Constant
from attention_jax.implementations.recipes import ChangeableError
from attention_jax.masks import Mask

LARGEST_CONSTANT = 2**20
"""A NumPy array of more bytes is not compared at each call if a function closes over it."""

LARGEST_CONTAINER = 1000
"""A list or dict of more entries is not read at each call."""

_TRUSTED = {"attention_jax", "jax", "jaxlib", "numpy"} | sys.stdlib_module_names - {"__main__"}
"""Packages whose functions, classes and modules are taken to stay as they are."""

_EQUAL = (type(None), bool, int, str, bytes, range, np.dtype, enum.Enum, type(...))
_NUMBERS = (float, complex, np.generic)
_CUSTOM: tuple[Any, ...] = (jax.custom_jvp, jax.custom_vjp)
_METADATA = {*functools.WRAPPER_ASSIGNMENTS, "__wrapped__", "_fun", "_jit_info"}
"""Attributes of a function of `jax.jit` that are not marks of the user."""


_OF_PYTHON = ("__builtins__", "__name__", "__package__", "__spec__")
"""Names of a module that Python looks up there by itself."""

_ANY_NAME = {"globals", "eval", "exec"}
"""Functions that look up names which are not in the code."""


class Reading:
    """Reads recipes of values that refer to each other; collects their arrays, if into a list.

    Attributes:
      arrays: those met so far; None: arrays are told apart by identity.
      builds: whether the recipes will build; if not, a list would be the one of the user.
      classes: those of the objects met, but for trusted ones.
      names: of whatever may be an attribute of one of these.
    """

    def __init__(self, arrays: list[Any] | None, builds: bool = True) -> None:
        self.arrays = arrays
        self.builds = builds
        self.classes: dict[type, None] = {}
        self.names = {"__call__"}
        self._met: dict[int, int] = {}
        self._containers: set[int] = set()

    def of(self, value: Any) -> Any:
        """Return the recipe of a value.

        Raises:
          ChangeableError: it can change in place.
        """
        if isinstance(value, _EQUAL):
            return recipes.Equal(type(value), value)
        if isinstance(value, _NUMBERS):
            return recipes.Number(type(value), repr(value), value)
        if isinstance(value, jax.Array):
            return self._of_array(value)
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            return self._of_numpy(value)
        if _stays(value):
            return recipes.Same(value)
        if id(value) in self._met:
            return recipes.Again(self._met[id(value)])
        if isinstance(value, types.FunctionType):
            return self._of_function(value)
        if isinstance(value, recipes.JITTED):
            return self._of_jitted(value)
        if isinstance(value, tuple):
            self.classes[type(value)] = None
            return self._together(recipes.as_tuple, type(value), value)
        if isinstance(value, types.MethodType):
            return self._together(recipes.as_method, None, (value.__func__, value.__self__))
        if isinstance(value, functools.partial):
            given, how = value.keywords, (type(value), tuple(value.keywords))
            parts = (unwrapped(value.func), *value.args, *given.values())
            return self._together(recipes.as_partial, how, parts)
        if type(value) in (list, dict):
            return self._of_container(value)
        if isinstance(value, (Mask, *_CUSTOM)) or _is_frozen(value):
            return self._of_object(value)
        wrapped = getattr(value, "__wrapped__", None)
        if is_trusted(type(value)) and wrapped is not None:  # of lru_cache, say
            return recipes.Same(value, self._aside().of(wrapped))
        raise ChangeableError(type(value).__name__)

    def of_classes(self) -> tuple[Any, ...]:
        """Return the recipes of those attributes of the classes met that code met may ask for.

        A class is not built again, so that arrays are told apart by identity.
        """
        aside, done, found = self._aside(), set(), []
        while asked := sorted(
            (number, name)
            for number, cls in enumerate(self.classes)
            for name in self.names
            if (cls, name) not in done
        ):
            classes = list(self.classes)
            for number, name in asked:
                done.add((classes[number], name))
                parts = map(aside.of, _attributes_of_class(classes[number], name))
                found += [(number, name, part) for part in parts]
        return tuple(found)

    def _aside(self) -> Reading:
        """Return one for what is not built again."""
        aside = Reading(None, builds=False)
        aside.classes, aside.names = self.classes, self.names
        return aside

    def _of_array(self, array: Any) -> Any:
        if self.arrays is None:
            if isinstance(array, jax.core.Tracer):
                raise ChangeableError("a traced array")
            return recipes.Same(array)
        if not isinstance(array, jax.core.Tracer) and array.is_deleted():
            raise ChangeableError("a deleted array")
        self.arrays.append(array)  # also if met before: two functions may share it now and not then
        return recipes.Operand(len(self.arrays) - 1)

    def _together(self, make: Any, how: Hashable, parts: Iterable[Any]) -> Any:
        return recipes.Together(make, how, tuple(map(self.of, parts)))

    def _of_container(self, value: Any) -> Any:
        if not self.builds or len(value) > LARGEST_CONTAINER or id(value) in self._containers:
            raise ChangeableError(type(value).__name__)
        self._containers.add(id(value))
        names = tuple(map(self.of, value)) if isinstance(value, dict) else None
        parts = tuple(map(self.of, value.values() if isinstance(value, dict) else value))
        self._containers.remove(id(value))
        return recipes.Container(names, parts)

    def _of_numpy(self, value: np.ndarray) -> Any:
        if value.nbytes > LARGEST_CONSTANT:
            raise ChangeableError("a large NumPy array")
        return recipes.Static(Constant.of(value))

    def _of_jitted(self, value: Any) -> Any:
        """Return the recipe of what a program within a program computes, without it."""
        function = value.__wrapped__
        inner = getattr(function, "__dict__", {})
        names = tuple(sorted(vars(value).keys() - inner.keys() - _METADATA))
        if names and (_stays(function) or not isinstance(function, types.FunctionType)):
            raise ChangeableError("a function with marks")
        marks = (vars(value)[name] for name in names)
        return self._together(recipes.as_marked, names, (function, *marks))

    def _number(self, value: Any) -> int:
        """Number what may be referred to again, from within itself too."""
        return self._met.setdefault(id(value), len(self._met))

    def _of_object(self, value: Any) -> Any:
        cls = type(value)
        if cls.__new__ is not object.__new__:
            raise ChangeableError(cls.__name__)
        self.classes[cls] = None
        number = self._number(value)
        attributes = self._named((name, getattr(value, name)) for name in _attributes(value))
        return recipes.Instance(number, cls, attributes)

    def _of_function(self, function: types.FunctionType) -> Any:
        code, module, outer = function.__code__, function.__globals__, None
        self.names |= _names(code)
        number = self._number(function)
        if not is_trusted(function):
            read, writes = _globals(code)
            if writes or read & _ANY_NAME:
                raise ChangeableError(function.__name__)
            outer = self._named((name, module[name]) for name in sorted(read & module.keys()))
            module = {name: module[name] for name in _OF_PYTHON if name in module}
        return recipes.Function(
            number,
            code,
            module,
            (function.__name__, function.__qualname__),
            tuple(map(self._of_cell, function.__closure__ or ())),
            outer,
            self.of(function.__defaults__),
            self._named(sorted((function.__kwdefaults__ or {}).items())),
            self._named((name, vars(function)[name]) for name in _attributes(function)),
        )

    def _of_cell(self, cell: types.CellType) -> Any:
        try:
            value = cell.cell_contents
        except ValueError:
            return recipes.Empty()
        return self.of(value)

    def _named(self, pairs: Iterable[tuple[str, Any]]) -> tuple[tuple[str, Any], ...]:
        return tuple((name, self.of(value)) for name, value in pairs)


def _attributes_of_class(cls: type, name: str) -> Iterator[Any]:
    """Yield an attribute of a class, if any: a function where it is one, whatever it is behind."""
    bases = (base for base in cls.__mro__ if name in vars(base))
    base = next(bases, object)
    if base is object or is_trusted(base):
        return
    value = vars(base)[name]
    if isinstance(value, property):
        yield value.fget
    elif isinstance(value, staticmethod | classmethod):
        yield value.__func__
    elif isinstance(value, functools.cached_property):
        yield value.func
    elif not (inspect.isdatadescriptor(value) and is_trusted(type(value))):  # of a field or slot
        yield value


def _attributes(value: Any) -> list[str]:
    """Return the names of what a function or an object holds, but not of what it computed."""
    names = {*getattr(value, "__dict__", ())} - _METADATA
    if isinstance(value, types.FunctionType):
        return sorted(names | vars(value).keys() & {"__wrapped__"})
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    names |= {field.name for field in fields if hasattr(value, field.name)}
    computed = functools.cached_property
    return sorted(x for x in names if not isinstance(getattr(type(value), x, None), computed))


@functools.lru_cache(1024)
def _names(code: types.CodeType) -> frozenset[str]:
    """Return the names that a function asks for, of attributes too."""
    return frozenset(name for part in _parts(code) for name in part.co_names)


@functools.lru_cache(1024)
def _globals(code: types.CodeType) -> tuple[frozenset[str], bool]:
    """Return the globals that a function reads, and whether it assigns to a variable outside."""
    steps = [step for part in _parts(code) for step in dis.get_instructions(part)]
    read = {step.argval for step in steps if step.opname in _READ}
    is_written = any(
        step.opname in _WRITTEN or (step.opname in _BOUND and step.argval in code.co_freevars)
        for step in steps
    )
    return frozenset(read), is_written


_READ = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
_WRITTEN = ("STORE_GLOBAL", "DELETE_GLOBAL")
_BOUND = ("STORE_DEREF", "DELETE_DEREF")


def _parts(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield the code of a function and of the functions within."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _parts(inner)


def unwrapped(function: Any) -> Any:
    """Return a partial application that a pytree holds in a wrapper."""
    return getattr(function, "fun", function) if type(function) is recipes.SHIM else function


def _stays(value: Any) -> bool:
    """Tell whether a value is known by its identity for as long as it lives."""
    if isinstance(value, types.BuiltinFunctionType):  # not a method of a list, say
        return value.__self__ is None or isinstance(value.__self__, types.ModuleType)
    if isinstance(value, (types.FunctionType, recipes.JITTED, *_CUSTOM)):
        is_new = getattr(value, "__closure__", None) or "<locals>" in _place(value)
        return not is_new and is_trusted(value)
    if isinstance(value, types.ModuleType | type):
        return is_trusted(value)
    return type(value) is object or isinstance(value, (np.ufunc, jnp.ufunc))


def _place(value: Any) -> str:
    """Return the name by which it is found in its module, if it is."""
    return str(getattr(value, "__qualname__", ""))


def is_trusted(thing: Any) -> bool:
    """Tell whether a module, or what is defined in it, is taken to stay as it is."""
    if isinstance(thing, types.FunctionType):  # its `__module__` may be copied from another
        return _is_trusted_name(thing.__globals__.get("__name__"))
    is_module = isinstance(thing, types.ModuleType)
    return _is_trusted_name(thing.__name__ if is_module else thing.__module__)


def _is_trusted_name(module: Any) -> bool:
    return str(module).partition(".")[0] in _TRUSTED


def _is_frozen(value: Any) -> bool:
    parameters = getattr(type(value), "__dataclass_params__", None)
    return parameters is not None and parameters.frozen
