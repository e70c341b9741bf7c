"""How to build a value again from the arrays that it refers to: all of it but these, by value.

A recipe is hashable, and equal for two values that differ in nothing but their arrays. What it
builds has cells, globals, attributes and containers of its own, so that it stays as it was when the
recipe was taken.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np

JITTED = type(jax.jit(lambda: None))
"""What `jax.jit` returns."""

SHIM = type(jax.tree_util.Partial(functools.partial(abs)).func)
"""What a `jax.tree_util.Partial` holds a `functools.partial` in, as its attribute `fun`."""


class ChangeableError(TypeError):
    """A function refers to something that can change in place."""


class Building:
    """Values that are built from recipes, with the arrays that are given for theirs."""

    def __init__(self, arrays: list[Any]) -> None:
        self.arrays = arrays
        self.met: dict[int, Any] = {}
        self._containers: list[tuple[Any, Any]] = []

    def watch(self, container: Any) -> Any:
        """Remember what a list, dict or NumPy array holds."""
        self._containers.append((container, container.copy()))
        return container

    def require_unchanged(self) -> None:
        """Require that no list, dict or NumPy array that was built has been written to.

        Raises:
          ChangeableError: one has, in place of one of the user's.
        """
        for container, before in self._containers:
            if _contents(container) != _contents(before):
                raise ChangeableError(type(container).__name__)


def _contents(container: Any) -> Any:
    if isinstance(container, np.ndarray):
        return container.tobytes()
    parts = container.items() if isinstance(container, dict) else enumerate(container)
    return [(name, id(part)) for name, part in parts]


@dataclasses.dataclass(frozen=True)
class Number:
    """A number, by its type and all of its digits: 0.0 is not -0.0, and nan is nan."""

    kind: type
    digits: str
    number: Any = dataclasses.field(compare=False)

    def build(self, building: Building) -> Any:
        """Return the number."""
        return self.number


@dataclasses.dataclass(frozen=True)
class Equal:
    """What cannot change and is compared with `==`."""

    kind: type
    thing: Hashable

    def build(self, building: Building) -> Any:
        """Return the thing."""
        return self.thing


@dataclasses.dataclass(frozen=True, eq=False)
class Same:
    """What cannot change but in `parts`, by identity; while it is held, it has its place."""

    thing: Any
    parts: Any = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Same):
            return False
        return self.thing is other.thing and self.parts == other.parts

    def __hash__(self) -> int:
        return hash((id(self.thing), self.parts))

    def build(self, building: Building) -> Any:
        """Return the thing."""
        return self.thing


@dataclasses.dataclass(frozen=True)
class Static:
    """A NumPy array, by its value."""

    constant: Any

    def build(self, building: Building) -> Any:
        """Return a copy, which is watched."""
        return building.watch(self.constant.array.copy())


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array of JAX."""

    index: int

    def build(self, building: Building) -> Any:
        """Return the array that is given for it."""
        return building.arrays[self.index]


@dataclasses.dataclass(frozen=True)
class Again:
    """A function or an object that was met before, by its number."""

    number: int

    def build(self, building: Building) -> Any:
        """Return what was built for it."""
        return building.met[self.number]


@dataclasses.dataclass(frozen=True)
class Empty:
    """A variable that has no value yet."""


@dataclasses.dataclass(frozen=True)
class Together:
    """Values from which `make(how, parts)` makes one: a tuple, a partial application, a method."""

    make: Callable[[Any, list[Any]], Any]
    how: Hashable
    parts: tuple[Any, ...]

    def build(self, building: Building) -> Any:
        """Make it of its parts."""
        return self.make(self.how, [part.build(building) for part in self.parts])


def as_tuple(cls: Any, parts: list[Any]) -> Any:
    """Return a tuple of a class, which may be a named one."""
    return tuple.__new__(cls, parts)


def as_method(_: None, parts: list[Any]) -> Any:
    """Return a method bound to an object."""
    return types.MethodType(*parts)


def as_marked(names: tuple[str, ...], parts: list[Any]) -> Any:
    """Return a function with further attributes."""
    function, *marks = parts
    vars(function).update(zip(names, marks, strict=True))
    return function


def as_partial(how: tuple[type, tuple[str, ...]], parts: list[Any]) -> Any:
    """Return a partial application of a class, with the last parts under these names."""
    cls, names = how
    first = len(parts) - len(names)
    return cls(*parts[:first], **dict(zip(names, parts[first:], strict=True)))


@dataclasses.dataclass(frozen=True)
class Container:
    """A list, or a dict, of which `names` are the keys."""

    names: tuple[Any, ...] | None
    parts: tuple[Any, ...]

    def build(self, building: Building) -> Any:
        """Return one of its own, which is watched."""
        parts = [part.build(building) for part in self.parts]
        if self.names is None:
            return building.watch(parts)
        names = [name.build(building) for name in self.names]
        return building.watch(dict(zip(names, parts, strict=True)))


@dataclasses.dataclass(frozen=True)
class Instance:
    """An object of a class, by its attributes."""

    number: int
    cls: type
    attributes: tuple[tuple[str, Any], ...]

    def build(self, building: Building) -> Any:
        """Return another one, which was not initialized but has the same attributes."""
        made = building.met[self.number] = object.__new__(self.cls)
        for name, part in self.attributes:
            object.__setattr__(made, name, part.build(building))
        if self.cls in (jax.custom_jvp, jax.custom_vjp):
            functools.update_wrapper(made, made.fun, updated=())
        return made


@dataclasses.dataclass(frozen=True)
class Function:
    """A function: its code, and the values of all names that the code refers to.

    `outer` are those of the module around it, and `module` what Python itself needs of it, so that
    nothing else of it is held; or, without `outer`, one that stays as it is.
    """

    number: int
    code: types.CodeType
    module: dict[str, Any] = dataclasses.field(compare=False, repr=False)
    names: tuple[str, str]
    cells: tuple[Any, ...]
    outer: tuple[tuple[str, Any], ...] | None
    defaults: Any
    keywords: Any
    attributes: tuple[tuple[str, Any], ...]

    def build(self, building: Building) -> Any:
        """Return another one, of which nobody else has the cells."""
        module = self.module if self.outer is None else dict(self.module)
        cells = tuple(types.CellType() for _ in self.cells)
        made = types.FunctionType(self.code, module, self.names[0], None, cells)
        made.__qualname__ = self.names[1]
        building.met[self.number] = made  # before its parts, which may refer to it
        for cell, part in zip(cells, self.cells, strict=True):
            if not isinstance(part, Empty):
                cell.cell_contents = part.build(building)
        for name, part in self.outer or ():
            module[name] = part.build(building)
        made.__defaults__ = self.defaults.build(building)
        made.__kwdefaults__ = dict(_built(self.keywords, building)) or None
        vars(made).update(_built(self.attributes, building))
        return made


def _built(named: Any, building: Building) -> list[tuple[str, Any]]:
    return [(name, part.build(building)) for name, part in named]
