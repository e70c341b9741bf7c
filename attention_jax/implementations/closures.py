"""Functions as pytrees: the arrays that they close over are leaves, and all else is static.

A function that is written where it is used is new at each call, and so may be the arrays that it
closes over. It is taken apart into these arrays, which are operands of a program, and a recipe, by
which the program builds the function again around its operands. Functions of equal recipes share a
program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any

import jax
from jax.tree_util import Partial

from attention_jax.implementations.reading import Reading, is_trusted, unwrapped
from attention_jax.implementations.recipes import Building
from attention_jax.masks import Mask
from attention_jax.statistics import Statistic


def opened(tree: Any, as_operands: bool = True) -> Any:
    """Return a pytree in which functions and masks are taken apart; see `closed`.

    Args:
      tree: arguments of `attend`.
      as_operands: whether the arrays that functions refer to become leaves. Else they are part of
        what is static, by identity, for functions that need their numbers while they are traced.

    Raises:
      ChangeableError: a function refers to what can change in place.
    """
    open_one = functools.partial(_opened, as_operands)
    return jax.tree.map(open_one, tree, is_leaf=_is_opened)


def closed(tree: Any, building: list[Building]) -> Any:
    """Return what was `opened`, and append to a list what watches its lists and dicts."""
    return jax.tree.map(
        lambda part: part.closed(building) if isinstance(part, _Open) else part,
        tree,
        is_leaf=lambda part: isinstance(part, _Open),
    )


def _is_opened(part: Any) -> bool:
    return isinstance(part, Mask | Statistic) or _is_function(part)


def _is_function(part: Any) -> bool:
    """Tell whether it is a function; a score made of several is opened part by part."""
    return callable(part) and not (isinstance(part, tuple) and is_trusted(type(part)))


def _opened(as_operands: bool, part: Any) -> Any:
    if isinstance(part, Mask):
        return _opened_mask(as_operands, part)
    if isinstance(part, Statistic):
        children, structure = _children(part)
        return OpenedNode(opened(children, as_operands), {}, (structure, ()))
    if isinstance(part, Partial):
        held = Opened.of(unwrapped(part.func), as_operands)
        given = opened((part.args, dict(part.keywords)), as_operands)
        return Applied(held, type(part)(_nothing, *given[0], **given[1]))
    return Opened.of(part, as_operands) if _is_function(part) else part


def _children(node: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(node, is_leaf=lambda part: part is not node)


def _nothing() -> None:
    """Stand for a function that is kept apart from its parameters."""


def _opened_mask(as_operands: bool, mask: Mask) -> Any:
    bare, functions = object.__new__(type(mask)), {}
    for field in dataclasses.fields(mask):  # type: ignore[arg-type]
        value = getattr(mask, field.name)
        if callable(value) and not isinstance(value, Mask):
            functions[field.name], value = Opened.of(value, as_operands), None
        object.__setattr__(bare, field.name, value)
    children, structure = _children(bare)
    reading = Reading(None)
    reading.classes[type(mask)] = None
    return OpenedNode(opened(children, as_operands), functions, (structure, reading.of_classes()))


class _Open:
    """What was taken apart."""

    def closed(self, building: list[Building]) -> Any:
        """Return what it was made of."""
        raise NotImplementedError


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["static"])
@dataclasses.dataclass(frozen=True)
class Opened(_Open):
    """A function: its arrays, and its recipe with what the classes in it refer to."""

    arrays: list[Any]
    static: tuple[Any, Hashable]

    @classmethod
    def of(cls, function: Any, as_operands: bool) -> Opened:
        """Take a function apart."""
        arrays: list[Any] = []
        reading = Reading(arrays if as_operands else None)
        recipe = reading.of(function)
        return cls(arrays, (recipe, reading.of_classes()))

    def closed(self, building: list[Building]) -> Any:
        """Return the function, around its arrays."""
        building.append(Building(self.arrays))
        return self.static[0].build(building[-1])


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["function", "bound"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Applied(_Open):
    """A bound function: `bound` is the same of nothing, a pytree of the parameters."""

    function: Opened
    bound: Partial

    def closed(self, building: list[Building]) -> Any:
        """Return the bound function."""
        args, keywords = closed((self.bound.args, self.bound.keywords), building)
        return type(self.bound)(self.function.closed(building), *args, **keywords)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["children", "functions"], meta_fields=["static"]
)
@dataclasses.dataclass(frozen=True)
class OpenedNode(_Open):
    """A node of a pytree, its functions if it hides any, and the rest with what its class names."""

    children: list[Any]
    functions: dict[str, Opened]
    static: tuple[Any, Hashable]

    def closed(self, building: list[Building]) -> Any:
        """Return the node."""
        node = self.static[0].unflatten(closed(self.children, building))
        for name, function in self.functions.items():
            object.__setattr__(node, name, function.closed(building))
        return node
