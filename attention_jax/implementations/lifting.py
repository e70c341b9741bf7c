"""Map a function of one head over examples and heads: which axes of each operand, and how."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.base import placement, sharded
from attention_jax.base.placement import Where
from attention_jax.implementations import places

Array = jax.Array


class Elsewhere(NamedTuple):
    """What differs where the program is not lowered for a CPU.

    Attributes:
      function: of one head, with the same arguments and results; None if it is the same.
      sequential: letters that are looped over.
      most: at most so many heads are vectorised; as many as divide an axis, the last one first.
      spread: of one head, where automatic axes spread the program; None if it is the same.
    """

    function: Callable[..., Any] | None
    sequential: str
    most: int
    spread: Callable[..., Any] | None = None

    def at_once(self, sizes: dict[str, int], order: str, free: Collection[str]) -> dict[str, int]:
        """Return how many parts of each axis are vectorised, for those that are not whole.

        >>> Elsewhere(None, "", most=12).at_once({"B": 4, "K": 8, "G": 2}, "BKG", "BKG")
        {'K': 4, 'B': 1}
        """
        left, found = self.most, {}
        for letter in reversed(order):
            together = sizes[letter]
            if not isinstance(together, int):  # a symbol of `jax.export`: as large as it likes
                found |= {letter: 1} if letter in free else {}
                continue
            if letter in free:
                most = 1 if letter in self.sequential else max(1, left)
                together = max(n for n in range(1, most + 1) if sizes[letter] % n == 0)
            left //= together
            if together < sizes[letter]:
                found[letter] = together
        return found


ANYWHERE = Where()


def lift(
    function: Callable[..., Any],
    axes: Sequence[str],
    result_axes: Any,
    order: str = "BKG",
    sequential: str = "",
    saved: Sequence[str] = (),
    where: Where = ANYWHERE,
    elsewhere: Elsewhere | None = None,
    replaced: int = 0,
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
      where: where the program runs. Where automatic axes of a mesh spread it over devices, nothing
        is looped over; what is not known is left to the meshes that are, and to the lowering.
      elsewhere: what differs on other platforms than CPUs.
      replaced: so many of the last arguments are what the results replace, which are like them: a
        loop writes a result where it has read the argument.

    Returns:
      A function of whole arguments that returns whole results.

    >>> outer = lift(lambda x, y: x * y, axes=["A", "B"], result_axes="BA", order="AB")
    >>> outer(jnp.arange(2), jnp.arange(3))
    Array([[0, 0],
           [0, 1],
           [0, 2]], dtype=int32)
    """
    return _Lifted(
        function, axes, result_axes, order, sequential, saved, where, elsewhere, replaced
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Lifted:
    """See `lift`."""

    function: Callable[..., Any]
    axes: Sequence[str]
    result_axes: Any
    order: str
    sequential: str
    saved: Sequence[str]
    where: Where
    elsewhere: Elsewhere | None
    replaced: int

    def __call__(self, *arguments: Any) -> Any:
        given = [self.is_array(*pair) for pair in zip(arguments, self.axes, strict=True)]
        if not all(given):
            rest = (x for x, is_given in zip(arguments, given, strict=True) if is_given)
            return self.without_constants(arguments, given)(*rest)
        sizes = self.sizes(arguments)
        spread = placement.known(*arguments) if self.where.spread is None else self.where.spread
        # Of NumPy's arrays `vmap` would make constants that `custom_jvp` does not take.
        alike = sharded.aligned([*map(jnp.asarray, arguments)], self.axes, self.order)
        if spread or any(sizes[letter] == 0 for letter in self.order):  # no loop could be traced
            return self.way(self.when_spread, {})(*alike)
        free = [x for x in self.order if not sharded.is_sharded(x, self.axes, arguments)]
        on_cpu = {letter: 1 for letter in free if letter in self.sequential}
        is_one = math.prod(sizes[letter] for letter in on_cpu) == 1
        if self.elsewhere is None:
            return self.by_spread(spread, on_cpu, is_one)(*alike)
        groups = self.elsewhere.at_once(sizes, self.order, free)
        if self.elsewhere.function is None and not groups and is_one:
            return self.way(self.function, on_cpu)(*alike)
        return self.by_platform(spread, on_cpu, groups)(*alike)

    def without_constants(self, arguments: Sequence[Any], given: Sequence[bool]) -> _Lifted:
        """Return the same for the arguments that are `given`; the others are constants."""
        known = functools.partial(functools.partial, _with_constants)
        axes = [letters for letters, is_given in zip(self.axes, given, strict=True) if is_given]
        elsewhere = self.elsewhere
        if elsewhere is not None:
            function, spread = (
                one and known(one, arguments, given)
                for one in (elsewhere.function, elsewhere.spread)
            )
            elsewhere = elsewhere._replace(function=function, spread=spread)
        function = known(self.function, arguments, given)
        return dataclasses.replace(self, function=function, axes=axes, elsewhere=elsewhere)

    @property
    def when_spread(self) -> Callable[..., Any]:
        """The function of one head where automatic axes spread the program."""
        if self.elsewhere is None:
            return self.function
        return self.elsewhere.spread or self.elsewhere.function or self.function

    def sizes(self, arguments: Sequence[Any]) -> dict[str, int]:
        """Return the size behind each letter."""
        return {
            letter: size
            for letters, argument in zip(self.axes, arguments, strict=True)
            for letter, size in zip(letters, jnp.shape(argument), strict=False)
        }

    def by_spread(
        self, spread: bool | None, at_once: dict[str, int], is_one: bool
    ) -> Callable[..., Any]:
        """Loop on every platform, unless the program is spread over devices."""
        if spread is False or is_one:
            return self.way(self.function, at_once)
        function = jax.jit(self.function, inline=True)  # traced once for both
        return self.either(placement.is_spread, self.way(function, {}), self.way(function, at_once))

    def by_platform(
        self, spread: bool | None, on_cpu: dict[str, int], groups: dict[str, int]
    ) -> Callable[..., Any]:
        """Loop as suits a CPU, or in groups elsewhere; not at all where the program is spread."""
        assert self.elsewhere is not None
        other = self.elsewhere.function
        if spread is False and self.where.platform is not None:
            on_this = functools.partial(_traced_for, (self.where.platform,))
            if self.where.platform == "cpu":
                return functools.partial(on_this, self.way(self.function, on_cpu))
            return functools.partial(on_this, self.way(other or self.function, groups))
        # Traced once for all ways that it is the function of.
        function = jax.jit(self.function, inline=True)
        there = function if other is None else jax.jit(other, inline=True)
        here = self.way(function, on_cpu)
        apart = self.elsewhere.spread
        whole, grouped = self.way(apart or there, {}), self.way(there, groups)
        if other is not None:
            here = functools.partial(_traced_for, ("cpu",), here)
        if not groups and apart is None:
            condition = functools.partial(placement.is_spread_or_accelerated, spread=spread)
            return self.either(condition, whole, here) if on_cpu or other else whole
        either = self.either(placement.is_on_cpu, here, grouped)
        return either if spread is False else self.either(placement.is_spread, whole, either)

    def way(self, function: Callable[..., Any], at_once: dict[str, int]) -> Callable[..., Any]:
        """Return the function of all heads, so many vectorised at once; {} for all of them."""
        return functools.partial(self.in_groups if at_once else self.whole, function, at_once)

    def whole(self, function: Callable[..., Any], _: Any, *arguments: Any) -> Any:
        """Vectorise over all heads."""
        return self.vectorised(function, (), self.sizes(arguments))(*arguments)

    def either(
        self, condition: Callable[[Array], Array], first: Any, second: Any
    ) -> Callable[..., Any]:
        """Return what computes the first where the condition holds, else the second."""
        chosen = functools.partial(_either, self.axes, self.order, (condition, first, second))
        # Computed again for the derivative, the condition is a constant there too.
        return jax.checkpoint(chosen, policy=self.policy, prevent_cse=False)

    @property
    def policy(self) -> Any:
        """What is kept for the backward pass."""
        return jax.checkpoint_policies.save_only_these_names(*self.saved)

    def is_array(self, argument: Any, letters: str) -> bool:
        """Tell whether an argument has to be traced.

        Numbers and arrays of NumPy are left known, unless a part of them is taken.
        """
        return isinstance(argument, Array) or any(letter in self.order for letter in letters)

    def vectorised(
        self, function: Callable[..., Any], looped: Collection[str], sizes: dict[str, int]
    ) -> Any:
        """Map a function by `vmap` over the axes that are not looped over.

        An axis of one entry is taken away instead: XLA fuses less where there is one.
        """
        single = [x for x in self.order if x not in looped and sizes[x] == 1]
        vectorised = [x for x in self.order if x not in looped and x not in single]
        gone = {*looped, *single}
        for n, letter in reversed(list(enumerate(vectorised))):
            position = functools.partial(_position, letter, gone={*gone, *vectorised[:n]})
            mapped = [position(letters) for letters in self.axes]
            function = jax.vmap(function, mapped, jax.tree.map(position, self.result_axes))
        if not single:
            return function
        lost = functools.partial(_lost, single, looped)
        arguments = [lost(letters) for letters in self.axes]
        return functools.partial(_without_single, function, arguments, lost, self.result_axes)

    def in_groups(
        self, function: Callable[..., Any], at_once: dict[str, int], *arguments: Any
    ) -> Any:
        """Loop over groups of heads, and vectorise within each."""
        sizes = self.sizes(arguments)
        counts = {letter: sizes[letter] // together for letter, together in at_once.items()}
        inner = {letter: together for letter, together in at_once.items() if together > 1}
        if not inner:
            return self.looped(function, counts, *arguments)
        split = functools.partial(_with_inner, inner)
        halves = dataclasses.replace(
            self,
            axes=[split(letters) for letters in self.axes],
            result_axes=jax.tree.map(split, self.result_axes),
            order=split(self.order),
        )
        parts = [_split(x, letters, inner) for x, letters in zip(arguments, self.axes, strict=True)]
        results = halves.looped(function, counts, *parts)
        letters = jax.tree.broadcast(self.result_axes, results)
        return jax.tree.map(functools.partial(_joined, inner), results, letters)

    def looped(self, function: Callable[..., Any], counts: dict[str, int], *arguments: Any) -> Any:
        """Loop over the axes in `counts`, reading and writing each head in place.

        To have the loop split and stack its operands would move the heads outermost, and so copy
        all of them first: for a sparse mask that costs as much as attention itself.
        """
        one = self.vectorised(function, counts, self.sizes(arguments))
        pairs = [*zip(arguments, self.axes, strict=True)]
        number = len(pairs) - self.replaced
        at = functools.partial(_at, one, pairs[:number], self.axes[number:])
        # Traced once, although it is also asked for the shapes it returns.
        at = jax.jit(jax.checkpoint(at, policy=self.policy, prevent_cse=False))
        heads = places.each_place(counts)
        replaced = [*arguments[number:]]
        shapes = jax.eval_shape(at, jax.tree.map(lambda index: index[0], heads), replaced)
        letters = jax.tree.broadcast(self.result_axes, shapes)
        if replaced:
            results = jax.tree.unflatten(jax.tree.structure(shapes), replaced)
        else:
            results = jax.tree.map(functools.partial(places.zeros, sizes=counts), shapes, letters)
        return lax.scan(functools.partial(_step, at, letters, self.replaced), results, heads)[0]


def _with_constants(
    function: Callable[..., Any], arguments: Sequence[Any], given: Sequence[bool], *rest: Any
) -> Any:
    """Call a function of all arguments, those that are given from `rest`."""
    those = iter(rest)
    pairs = zip(arguments, given, strict=True)
    return function(*(next(those) if is_given else argument for argument, is_given in pairs))


def _traced_for(platforms: tuple[str, ...], way: Callable[..., Any], *arguments: Any) -> Any:
    """Call what is lowered for these platforms alone."""
    with placement.lowered_for(platforms):
        return way(*arguments)


def _either(axes: Sequence[str], order: str, ways: Any, *arguments: Any) -> Any:
    condition, first, second = ways
    pairs = zip(arguments, axes, strict=True)
    near = next(argument for argument, letters in pairs if set(letters) & set(order))
    return lax.cond(condition(near), first, second, *arguments)


def _with_inner(inner: Collection[str], letters: str) -> str:
    """Put a small letter, for the heads of a group, behind each letter that is split."""
    return "".join(letter + letter.lower() * (letter in inner) for letter in letters)


def _split(whole: Any, letters: str, inner: dict[str, int]) -> Any:
    """Split axes into groups and the heads of a group."""
    shape = []
    for size, letter in zip(jnp.shape(whole), letters.ljust(jnp.ndim(whole)), strict=True):
        shape += [size // inner[letter], inner[letter]] if letter in inner else [size]
    return jnp.reshape(whole, shape)


def _joined(inner: Collection[str], parts: Array, letters: str) -> Array:
    """Join what `_split` has split."""
    sizes, shape = iter(parts.shape), []
    for letter in letters.ljust(parts.ndim - sum(letter in inner for letter in letters)):
        shape.append(next(sizes) * (next(sizes) if letter in inner else 1))
    return parts.reshape(shape)


def _at(
    function: Callable[..., Any],
    arguments: list[tuple[Any, str]],
    axes: Sequence[str],
    where: dict[str, Any],
    replaced: Sequence[Any],
) -> Any:
    """Apply a function to the parts of its arguments at one place; the last are replaced."""
    pairs = [*arguments, *zip(replaced, axes, strict=True)]
    return function(*(places.read(argument, letters, where) for argument, letters in pairs))


def _step(
    at: Callable[..., Any], letters: Any, number: int, results: Any, where: dict[str, Any]
) -> tuple[Any, None]:
    computed = at(where, jax.tree.leaves(results) if number else [])
    write = functools.partial(places.write, where=where)
    return jax.tree.map(write, results, computed, letters), None


def _lost(single: Collection[str], looped: Collection[str], letters: str) -> list[int]:
    left = [one for one in letters if one not in looped]
    return [place for place, letter in enumerate(left) if letter in single]


def _without_single(
    function: Callable[..., Any], lost: Any, of: Any, result_axes: Any, *arguments: Any
) -> Any:
    """Call a function of arguments without the axes of one entry at `lost`, and put them back."""
    pairs = zip(arguments, lost, strict=True)
    results = function(*(lax.squeeze(x, where) if where else x for x, where in pairs))
    letters = jax.tree.broadcast(result_axes, results)
    return jax.tree.map(lambda x, axes: lax.expand_dims(x, of(axes)), results, letters)


def _position(letter: str, letters: str, gone: set[str]) -> int | None:
    left = [one for one in letters if one not in gone]
    return left.index(letter) if letter in left else None
