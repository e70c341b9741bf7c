"""From one head to [B, N]: which axes of each operand are mapped, and how."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

Array = jax.Array


def lift(
    function: Callable[..., Any],
    axes: Sequence[str],
    result_axes: Any,
    order: str = "BKG",
    sequential: str = "",
    saved: Sequence[str] = (),
) -> Callable[..., Any]:
    """Map a function of one head over batch, key/value heads and query heads in a group.

    Args:
      function: takes as many arrays as there are entries in `axes`.
      axes: for each argument the letters of its axes, of which those in `order` are mapped, in
        this order; the others, and axes after the last letter, are left to the function. An
        argument that lacks a letter is shared along that axis.
      result_axes: the same for each result, with every letter of `order`; a pytree as returned.
      order: the letters that are mapped, outermost first.
      sequential: letters that are looped over instead of vectorised, where their axes are not
        sharded over an explicit mesh. One head at a time keeps its tiles in cache, and a condition
        that differs between examples then really skips work.
      saved: names (`jax.ad_checkpoint.checkpoint_name`) of what a loop keeps of each head for the
        backward pass; the rest is computed again from the arguments, which are there anyway.

    Returns:
      A function of whole arguments that returns whole results.

    >>> outer = lift(lambda x, y: x * y, axes=["A", "B"], result_axes="BA", order="AB")
    >>> outer(jnp.arange(2), jnp.arange(3))
    Array([[0, 0],
           [0, 1],
           [0, 2]], dtype=int32)
    """

    def lifted(*arguments: Any) -> Any:
        sizes = {
            letter: size
            for letters, argument in zip(axes, arguments, strict=True)
            for letter, size in zip(letters, jnp.shape(argument), strict=False)
        }
        is_empty = any(sizes[letter] == 0 for letter in order)  # a loop could not even be traced
        alone = sequential if not is_empty else ""
        looped = [x for x in order if x in alone and not _is_sharded(x, axes, arguments)]
        vectorised = [letter for letter in order if letter not in looped]
        one = function
        for n, letter in reversed(list(enumerate(vectorised))):
            position = functools.partial(_position, letter, gone={*looped, *vectorised[:n]})
            one = jax.vmap(one, [position(x) for x in axes], jax.tree.map(position, result_axes))
        alike = aligned(arguments, axes, order)
        if not looped:
            return one(*alike)
        return _looped(one, alike, axes, result_axes, {x: sizes[x] for x in looped}, saved)

    return lifted


def aligned(arguments: Sequence[Any], axes: Sequence[str], order: str) -> list[Any]:
    """Split what is whole as others are split along the axes in `order`; `vmap` wants them alike.

    Only an explicit mesh says what is split; without one the arguments are returned as they are.
    """
    split: dict[str, Any] = {}
    for letters, argument in zip(axes, arguments, strict=True):
        for letter, part in zip(letters, _parts(argument), strict=False):
            if letter in order and part is not None:
                split.setdefault(letter, part)

    def as_others(argument: Any, letters: str) -> Any:
        parts = _parts(argument)
        wanted = [
            part if part is not None else split.get(letter)
            for letter, part in zip(letters.ljust(len(parts)), parts, strict=False)
        ]
        return jax.reshard(argument, PartitionSpec(*wanted)) if wanted != parts else argument

    return [as_others(*pair) for pair in zip(arguments, axes, strict=True)]


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


def _looped(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    axes: Sequence[str],
    result_axes: Any,
    sizes: dict[str, int],
    saved: Sequence[str],
) -> Any:
    """Loop over the axes in `sizes`, reading and writing each head where it stands.

    To have the loop split and stack its operands would move the heads outermost, and so copy all
    of them first: for a sparse mask that costs as much as attention itself.
    """
    policy = jax.checkpoint_policies.save_only_these_names(*saved)

    @jax.jit  # so that it is traced once, although it is also asked for the shapes it returns
    @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def at(where: dict[str, Any]) -> Any:
        return function(*(_read(*pair, where) for pair in zip(arguments, axes, strict=True)))

    def step(results: Any, where: dict[str, Any]) -> tuple[Any, None]:
        write = functools.partial(_write, where=where)
        return jax.tree.map(write, results, at(where), letters), None

    heads = dict(zip(sizes, np.indices(tuple(sizes.values()), np.int32), strict=True))
    heads = jax.tree.map(np.ravel, heads)
    one = jax.eval_shape(at, jax.tree.map(lambda index: index[0], heads))
    letters = jax.tree.broadcast(result_axes, one)
    results = jax.tree.map(functools.partial(_zeros, sizes=sizes), one, letters)
    return lax.scan(step, results, heads)[0]


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
    """Return zeros for all heads; over a mesh they vary and are sharded as the parts are."""
    rest = iter(part.shape)
    front = [sizes[letter] if letter in sizes else next(rest) for letter in letters]
    zeros = jnp.zeros_like(part, shape=(*front, *rest))
    split = [] if part.sharding is None else list(part.sharding.spec)
    if not any(split):
        return zeros
    for place in [axis for axis, letter in enumerate(letters) if letter in sizes]:
        split.insert(place, None)
    return jax.reshard(zeros, PartitionSpec(*split))
