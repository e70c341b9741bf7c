"""A step of a scan over the features of a tile, for some of the rows of the tile.

Which axes of its arrays run along the rows is found from the equations that a step was traced to.
Where no row depends on another, a step for fewer rows is the same equations with other shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal

from attention_jax.implementations.pallas import loops
from attention_jax.implementations.pallas.loops import Replayed
from attention_jax.implementations.pallas.splitting import IN_KERNEL, evaluated, value_of

Array = jax.Array

TILE, COLUMN, ROW, SHARED = "tile", "column", "row", "shared"
"""What a step is given: [bt, bk], [bt], [bk] or [], and the same for all rows."""


class Step(NamedTuple):
    """A step of a scan for a strip: equations of a jaxpr, whose shapes have `rows` rows.

    `given` says what its arguments are: as many `constants` are first, then what is carried, and
    from `fixed` on what the scan splits.
    """

    jaxpr: Jaxpr
    equations: Sequence[Any]
    values: Sequence[Any]
    given: list[str]
    constants: int
    fixed: int
    tile: tuple[int, int]
    rows: int

    @classmethod
    def of(
        cls,
        replayed: Replayed,
        params: dict[str, Any],
        few: Callable[[tuple[int, int]], int],
    ) -> Step | None:
        """Return that of a scan; None if it stacks, rows depend on each other, or all are few."""
        types: list[Any] = params["jaxpr"].in_avals
        constants, carry = loops.counts(params)
        fixed = constants + carry
        tile = next((x.shape for x in types[constants:fixed]), ())
        if len(tile) != 2 or any(x.dtype != jnp.float32 for x in types):
            return None
        rows = few(tile)
        if rows == tile[0] or len(params["jaxpr"].out_avals) > carry:
            return None
        flat = jax.make_jaxpr(functools.partial(replayed, params["jaxpr"]))(*types)
        jaxpr = flat.jaxpr
        try:
            along = _along_rows(jaxpr, [(x, 0) for x in jaxpr.invars[constants:fixed]])
            given = [_kind(x, along, n >= fixed) for n, x in enumerate(jaxpr.invars)]
            carried = {_kind(x, along, False) for x in jaxpr.outvars}
        except _DependentRowsError:
            return None
        if {*given[constants:fixed], *carried} != {TILE}:
            return None
        equations = [_cut(equation, along, rows) for equation in jaxpr.eqns]
        return cls(jaxpr, equations, flat.consts, given, constants, fixed, tile, rows)

    @property
    def parts(self) -> list[tuple[int, ...]]:
        """The shapes of the parts that the scan splits arrays into, those of columns of a tile."""
        types: list[Any] = self.jaxpr.in_avals[self.fixed :]
        return [x.shape for x in types]

    def __call__(self, *arguments: Array) -> list[Any]:
        """Return what is carried."""
        values = dict(zip(self.jaxpr.constvars, self.values, strict=True))
        values |= zip(self.jaxpr.invars, arguments, strict=True)
        read = functools.partial(value_of, values)
        for equation in self.equations:
            values |= evaluated(equation, read)
        return list(map(read, self.jaxpr.outvars))


class _DependentRowsError(Exception):
    """A step is no function of one row of a tile, or not known to be one."""


Axis = tuple[Any, int]
"""A variable, and the number of one of its axes."""


def _along_rows(jaxpr: Jaxpr, seeds: Sequence[Axis]) -> set[Axis]:
    """Return the axes of all variables that run along the rows of a tile, given some."""
    neighbours: dict[Axis, list[Axis]] = {}
    for equation in jaxpr.eqns:
        for one, other in _same_axes(equation):
            neighbours.setdefault(one, []).append(other)
            neighbours.setdefault(other, []).append(one)
    found, new = set(seeds), list(seeds)
    while new:
        new = [x for axis in new for x in neighbours.get(axis, ()) if x not in found]
        found |= set(new)
    if any((x, 1 - axis) in found for x, axis in found):
        raise _DependentRowsError
    return found


def _same_axes(equation: Any) -> Iterator[tuple[Axis, Axis]]:
    """Yield which axes of operands are axes of the result of an equation."""
    name, result = equation.primitive.name, equation.outvars[0]
    if name not in ELEMENTWISE and name not in SHAPES:
        raise _DependentRowsError
    for x in equation.invars:
        if isinstance(x, Literal) or not x.aval.ndim:
            continue
        places = dict(enumerate(range(x.aval.ndim)))
        if name == "broadcast_in_dim":
            places = dict(enumerate(equation.params["broadcast_dimensions"]))
        elif name in SHAPES:
            if [*_long(x).values()] != [*_long(result).values()]:
                raise _DependentRowsError
            places = dict(zip(_long(x), _long(result), strict=True))
        for axis, place in places.items():
            if x.aval.shape[axis] == result.aval.shape[place]:
                yield (x, axis), (result, place)


def _long(x: Any) -> dict[int, int]:
    """Return the axes that have more than one entry, and how many."""
    return {axis: size for axis, size in enumerate(x.aval.shape) if size > 1}


SHAPES = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims"}
"""Primitives that only add or leave out axes."""


ELEMENTWISE = {
    *IN_KERNEL.difference(("iota", "transpose", *SHAPES)),
    *("add_any", "cbrt", "cos", "erf", "expm1", "log1p", "logistic", "rsqrt", "sin", "tan"),
}
"""Primitives whose results have the axes of their operands."""


def _kind(x: Any, along: set[Axis], is_split: bool) -> str:
    """Return what an argument or result is."""
    if isinstance(x, Literal) or x.aval.ndim > (1 if is_split else 2):
        raise _DependentRowsError
    if (x, 0) in along:
        if is_split or x.aval.ndim == 2:
            return COLUMN if is_split else TILE
        raise _DependentRowsError
    if (x, 1) in along:
        raise _DependentRowsError
    return ROW if is_split else SHARED


def _cut(equation: Any, along: set[Axis], rows: int) -> Any:
    """Return an equation of a tile as one of so many rows of it."""
    (result,) = equation.outvars
    shape = tuple(
        rows if (result, axis) in along else size for axis, size in enumerate(result.aval.shape)
    )
    names = {"broadcast_in_dim": "shape", "reshape": "new_sizes"}
    name = names.get(equation.primitive.name)
    return equation.replace(params={**equation.params, name: shape}) if name else equation
