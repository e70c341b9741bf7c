"""Map a function of one head over examples and heads: which axes of each operand, and how."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from attention_jax.base import placement

Array = jax.Array


def lift(
    function: Callable[..., Any],
    axes: Sequence[str],
    result_axes: Any,
    order: str = "BKG",
    sequential: str = "",
    saved: Sequence[str] = (),
    spread: bool | None = None,
) -> Callable[..., Any]:
    """Map a function of one head over batch, key/value heads and query heads in a group.

    Args:
      function: takes as many arrays as there are entries in `axes`.
      axes: for each argument the letters of its axes, of which those in `order` are mapped, in
        this order; the others, and axes after the last letter, are left to the function. An
        argument that lacks a letter is shared along that axis.
      result_axes: the same for each result, with every letter of `order`; a pytree as returned.
      order: the letters that are mapped, outermost first.
      sequential: letters that are looped over instead of vectorised, where no mesh shards their
        axes. One head at a time keeps its tiles in cache, and a condition that differs between
        examples then really skips work.
      saved: names (`jax.ad_checkpoint.checkpoint_name`) of what a loop keeps of each head for the
        backward pass; the rest is computed again from the arguments, which are there anyway.
      spread: whether automatic axes of a mesh spread the program over devices, where nothing is
        looped over; None leaves that to the meshes that are known, and to the lowering.

    Returns:
      A function of whole arguments that returns whole results.

    >>> outer = lift(lambda x, y: x * y, axes=["A", "B"], result_axes="BA", order="AB")
    >>> outer(jnp.arange(2), jnp.arange(3))
    Array([[0, 0],
           [0, 1],
           [0, 2]], dtype=int32)
    """
    return _Lifted(function, axes, result_axes, order, sequential, saved, spread)


@dataclasses.dataclass(frozen=True, eq=False)
class _Lifted:
    """See `lift`."""

    function: Callable[..., Any]
    axes: Sequence[str]
    result_axes: Any
    order: str
    sequential: str
    saved: Sequence[str]
    spread: bool | None

    def __call__(self, *arguments: Any) -> Any:
        given = [self.is_array(*pair) for pair in zip(arguments, self.axes, strict=True)]
        if not all(given):
            function = functools.partial(_with_constants, self.function, arguments, given)
            axes = [letters for letters, is_given in zip(self.axes, given, strict=True) if is_given]
            rest = (x for x, is_given in zip(arguments, given, strict=True) if is_given)
            return dataclasses.replace(self, function=function, axes=axes)(*rest)
        sizes = {
            letter: size
            for letters, argument in zip(self.axes, arguments, strict=True)
            for letter, size in zip(letters, jnp.shape(argument), strict=False)
        }
        spread = placement.known(*arguments) if self.spread is None else self.spread
        is_empty = any(sizes[letter] == 0 for letter in self.order)  # no loop could be traced
        counts = {
            letter: sizes[letter]
            for letter in self.order
            if letter in self.sequential and not _is_sharded(letter, self.axes, arguments)
        }
        alike = aligned(arguments, self.axes, self.order)
        if spread or is_empty or not counts:
            return self.vectorised(self.function, ())(*alike)
        if spread is False or math.prod(counts.values()) == 1:
            return self.looped(self.function, counts, *alike)
        function = jax.jit(self.function, inline=True)  # traced once for both
        near = next(
            x for x, letters in zip(alike, self.axes, strict=True) if set(letters) & set(counts)
        )
        either = functools.partial(
            _either, self.vectorised(function, ()), functools.partial(self.looped, function, counts)
        )
        # Computed again for the derivative, the condition is a constant there too.
        return jax.checkpoint(either, policy=self.policy, prevent_cse=False)(near, *alike)

    @property
    def policy(self) -> Any:
        """What is kept for the backward pass."""
        return jax.checkpoint_policies.save_only_these_names(*self.saved)

    def is_array(self, argument: Any, letters: str) -> bool:
        """Tell whether an argument has to be traced.

        Numbers and arrays of NumPy are left known, unless a part of them is taken.
        """
        return isinstance(argument, Array) or any(letter in self.order for letter in letters)

    def vectorised(self, function: Callable[..., Any], looped: Collection[str]) -> Any:
        """Map a function by `vmap` over the axes that are not looped over."""
        vectorised = [letter for letter in self.order if letter not in looped]
        for n, letter in reversed(list(enumerate(vectorised))):
            position = functools.partial(_position, letter, gone={*looped, *vectorised[:n]})
            mapped = [position(letters) for letters in self.axes]
            function = jax.vmap(function, mapped, jax.tree.map(position, self.result_axes))
        return function

    def looped(self, function: Callable[..., Any], counts: dict[str, int], *arguments: Any) -> Any:
        """Loop over the axes in `counts`, reading and writing each head in place.

        To have the loop split and stack its operands would move the heads outermost, and so copy
        all of them first: for a sparse mask that costs as much as attention itself.
        """
        one = self.vectorised(function, counts)
        at = functools.partial(_at, one, [*zip(arguments, self.axes, strict=True)])
        # Traced once, although it is also asked for the shapes it returns.
        at = jax.jit(jax.checkpoint(at, policy=self.policy, prevent_cse=False))
        heads = dict(zip(counts, np.indices(tuple(counts.values()), np.int32), strict=True))
        heads = jax.tree.map(np.ravel, heads)
        shapes = jax.eval_shape(at, jax.tree.map(lambda index: index[0], heads))
        letters = jax.tree.broadcast(self.result_axes, shapes)
        results = jax.tree.map(functools.partial(_zeros, sizes=counts), shapes, letters)
        return lax.scan(functools.partial(_step, at, letters), results, heads)[0]


def _with_constants(
    function: Callable[..., Any], arguments: Sequence[Any], given: Sequence[bool], *rest: Any
) -> Any:
    """Call a function of all arguments, those that are given from `rest`."""
    those = iter(rest)
    pairs = zip(arguments, given, strict=True)
    return function(*(next(those) if is_given else argument for argument, is_given in pairs))


def _either(
    vectorised: Callable[..., Any], looped: Callable[..., Any], near: Array, *arguments: Any
) -> Any:
    return lax.cond(placement.is_spread(near), vectorised, looped, *arguments)


def _at(
    function: Callable[..., Any], arguments: list[tuple[Any, str]], where: dict[str, Any]
) -> Any:
    """Apply a function to the parts of its arguments at one place."""
    return function(*(_read(argument, letters, where) for argument, letters in arguments))


def _step(
    at: Callable[..., Any], letters: Any, results: Any, where: dict[str, Any]
) -> tuple[Any, None]:
    write = functools.partial(_write, where=where)
    return jax.tree.map(write, results, at(where), letters), None


def aligned(arguments: Sequence[Any], axes: Sequence[str], order: str) -> list[Any]:
    """Reshard arguments along the axes in `order` to match the sharded ones, as `vmap` requires.

    Only an explicit mesh shards; without one the arguments are returned as they are.
    """
    split: dict[str, Any] = {}
    for letters, argument in zip(axes, arguments, strict=True):
        for letter, part in zip(letters, _parts(argument), strict=False):
            if letter in order and part is not None:
                split.setdefault(letter, part)
    return [_resharded(*pair, split) for pair in zip(arguments, axes, strict=True)]


def _resharded(argument: Any, letters: str, split: dict[str, Any]) -> Any:
    parts = _parts(argument)
    wanted = [
        part if part is not None else split.get(letter)
        for letter, part in zip(letters.ljust(len(parts)), parts, strict=False)
    ]
    return jax.reshard(argument, PartitionSpec(*wanted)) if wanted != parts else argument


def _is_sharded(letter: str, axes: Sequence[str], arguments: Sequence[Any]) -> bool:
    """Tell whether an explicit mesh axis splits this one: then no part of it can be taken out."""
    return any(
        letter in letters and _parts(argument)[letters.index(letter)] is not None
        for letters, argument in zip(axes, arguments, strict=True)
    )


def _parts(argument: Any) -> list[Any]:
    """Return for each axis the axes of an explicit mesh that split it, or None."""
    return list(jax.typeof(argument).sharding.spec)


def _position(letter: str, letters: str, gone: set[str]) -> int | None:
    left = [one for one in letters if one not in gone]
    return left.index(letter) if letter in left else None


def _read(whole: Any, letters: str, where: dict[str, Any]) -> Any:
    mapped = [axis for axis, letter in enumerate(letters) if letter in where]
    if not mapped:
        return whole
    starts = [where.get(letter, np.int32(0)) for letter in letters.ljust(whole.ndim)]
    sizes = [1 if axis in mapped else size for axis, size in enumerate(whole.shape)]
    part = lax.dynamic_slice(whole, starts, sizes, allow_negative_indices=False)
    return lax.squeeze(part, mapped)


def _write(whole: Array, part: Array, letters: str, where: dict[str, Any]) -> Array:
    mapped = [axis for axis, letter in enumerate(letters) if letter in where]
    starts = [where.get(letter, np.int32(0)) for letter in letters.ljust(whole.ndim)]
    part = lax.expand_dims(part, mapped)
    return lax.dynamic_update_slice(whole, part, starts, allow_negative_indices=False)


def _zeros(part: Any, letters: str, sizes: dict[str, int]) -> Array:
    """Return zeros for all heads, which vary over a mesh and are sharded as the parts are."""
    rest = iter(part.shape)
    front = [sizes[letter] if letter in sizes else next(rest) for letter in letters]
    zeros = jnp.zeros_like(part, shape=(*front, *rest))
    split = [] if part.sharding is None else list(part.sharding.spec)
    if not any(split):
        return zeros
    for place in [axis for axis, letter in enumerate(letters) if letter in sizes]:
        split.insert(place, None)
    return jax.reshard(zeros, PartitionSpec(*split))
