"""Equality and hash by value for what is made of functions, numbers and arrays.

A mask or a bound function as a static argument of `jax.jit` is looked up by its hash and compared
with `==`: equal ones must not trace again. Arrays are compared by dtype, shape and contents; the
hash leaves the contents out, so that hashing never waits for a device. A value that is known only
inside `jit` equals itself alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


class ByValue:
    """A dataclass, or a partial application, that equals another of equal parts."""

    def __eq__(self, other: object) -> bool:
        if self is other or type(self) is not type(other):
            return self is other
        return same(self, other)

    def __hash__(self) -> int:
        return hash(_outline(self, []))


def same(first: Any, second: Any) -> bool:
    """Tell whether two values have equal structures and arrays of equal contents.

    >>> same({"weight": np.zeros(3)}, {"weight": np.zeros(3)}), same(np.zeros(3), np.ones(3))
    (True, False)
    """
    arrays: tuple[list[Any], list[Any]] = ([], [])
    if _outline(first, arrays[0]) != _outline(second, arrays[1]):
        return False
    return all(a is b or _contents(a) == _contents(b) for a, b in zip(*arrays, strict=True))


def _outline(value: Any, arrays: list[Any]) -> Hashable:
    """Return a value without the contents of its arrays, and append these to `arrays`."""
    if isinstance(value, np.ndarray | np.generic) or _is_concrete(value):
        arrays.append(value)
        return "array", value.dtype, value.shape, getattr(value, "weak_type", False)
    if isinstance(value, tuple | list):
        return type(value), *(_outline(part, arrays) for part in value)
    if isinstance(value, dict):
        return dict, *((name, _outline(value[name], arrays)) for name in sorted(value, key=repr))
    if hasattr(value, "func") and hasattr(value, "keywords"):
        parts = value.func, value.args, value.keywords
        return type(value), *(_outline(part, arrays) for part in parts)
    if isinstance(value, ByValue) and dataclasses.is_dataclass(value):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return type(value), *(_outline(field, arrays) for field in fields)
    is_hashable = not isinstance(value, ByValue) and _is_hashable(value)
    return (type(value), value) if is_hashable else ("only itself", id(value))


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _is_concrete(value: Any) -> bool:
    """Tell whether it is an array whose contents this process can read."""
    is_array = isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer)
    return is_array and value.is_fully_addressable and not value.is_deleted()


def _contents(array: Any) -> bytes:
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(array) if is_key else array).tobytes()
