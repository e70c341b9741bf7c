"""Split a function of one tile by what it reads: what a kernel cannot do is done before it.

Kernels have no gather. But the ids of segments, or the column of a table, depend on the indices of
the queries alone or of the keys alone: they are looked up once for every tile of queries or keys,
outside of the kernel, which gets them as operands in blocks. The rest, the pairwise part, stays.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive
from jax.interpreters import ad

from attention_jax.implementations.pallas.tables import Known, look_up, table_of_pairs

Array = jax.Array

SHARED, OF_QUERY, OF_KEY, OF_PAIR = frozenset(), frozenset("q"), frozenset("k"), frozenset("qk")

IN_KERNEL = {
    *("abs", "add", "and", "broadcast_in_dim", "ceil", "clamp", "convert_element_type", "copy"),
    *("div", "eq", "exp", "exp2", "expand_dims", "floor", "ge", "gt", "integer_pow", "iota", "le"),
    *("log", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "rem", "reshape"),
    *("round", "select_n", "sign", "sqrt", "square", "squeeze", "stop_gradient", "sub", "tanh"),
    *("transpose", "xor"),
}
"""Cheap primitives, which stay in the kernel; indices are cheaper computed than read."""

RESHAPES = ("broadcast_in_dim", "expand_dims", "reshape", "squeeze")

CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
"""Primitives that only call a jaxpr, and the name of that parameter."""


class Looked(NamedTuple):
    """What a kernel is given of the leaves of a function: as whole arrays, or of each tile.

    `whole` are leaves, or computed from leaves alone; `of_query [tiles, ...]` and `of_key` are
    what each tile of queries or keys needs, computed from its indices; `of_pair [T, S]` has a
    number for each pair.
    """

    whole: list[Any]
    of_query: list[Any]
    of_key: list[Any]
    of_pair: list[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """A function of one tile, split by what its parts read.

    `shared(*leaves)`, `of_query(q_idx, *leaves)` and `of_key(kv_idx, *leaves)` are computed
    outside of the kernel, and `pairs(*data, q_idx, kv_idx, *leaves that it reads, *shared,
    *of_query, *of_key, *of_pair)` inside. The leaves that it reads have the numbers `reads`.
    `of_pair` returns tables, and rows and columns of them, as three such functions. `own` says for
    each result of `of_query` and of `of_key` which leaf it is, if it is the entry of a leaf at the
    index itself, else None.
    """

    shared: Callable[..., list[Array]]
    of_query: Callable[..., list[Array]]
    of_key: Callable[..., list[Array]]
    of_pair: tuple[Callable[..., list[Array]], ...]
    own: tuple[list[int | None], list[int | None]]
    pairs: Callable[..., list[Array]]
    reads: tuple[int, ...]
    constants: list[Any]
    result: Any

    def looked_up(self, leaves: Sequence[Any], first: tuple[Array, Array]) -> Looked:
        """Compute what the kernel is given, for tiles of indices [n, bt, 1] and [n, 1, bk]."""
        leaves = [jnp.asarray(leaf) for leaf in (*leaves, *self.constants)]
        whole = [*(leaves[n] for n in self.reads), *self.shared(*leaves)]
        of_query, of_key = (
            [
                computed if leaf is None else _in_tiles(leaves[leaf], computed.shape)
                for computed, leaf in zip(
                    jax.vmap(functools.partial(_with_leaves, part, leaves))(indices),
                    own,
                    strict=True,
                )
            ]
            for part, indices, own in zip(
                (self.of_query, self.of_key), first, self.own, strict=True
            )
        )
        tables, rows, columns = self.of_pair
        of_pair = [
            jnp.take(jnp.take(table, row.ravel(), axis=0), column.ravel(), axis=1)
            for table, row, column in zip(
                tables(*leaves),
                jax.vmap(functools.partial(_with_leaves, rows, leaves))(first[0]),
                jax.vmap(functools.partial(_with_leaves, columns, leaves))(first[1]),
                strict=True,
            )
        ]
        return Looked(whole, of_query, of_key, of_pair)

    def __call__(self, data: Sequence[Any], q_idx: Array, kv_idx: Array, looked: Looked) -> Any:
        """Compute a tile inside a kernel, from what was looked up for it."""
        given = itertools.chain(*looked)
        return jax.tree.unflatten(self.result, self.pairs(*data, q_idx, kv_idx, *given))


def split(
    function: Callable[..., Any],
    data: Sequence[Any],
    tile: tuple[int, int],
    leaves: Sequence[Any],
    pairs: int,
) -> Split:
    """Trace a function of (data, q_idx [bt, 1], kv_idx [1, bk], leaves) and split it.

    There are so many `pairs` in all.
    """
    rows, columns = tile
    indices = jax.ShapeDtypeStruct((rows, 1), "int32"), jax.ShapeDtypeStruct((1, columns), "int32")
    flat = functools.partial(_flat, function, len(data))
    closed, shape = jax.make_jaxpr(flat, return_shape=True)(*data, *indices, *leaves)
    inlined = functools.partial(_inlined, closed)
    closed = jax.make_jaxpr(inlined)(*data, *indices, *leaves)
    if any(equation.primitive.name == "gather" for equation in closed.jaxpr.eqns):
        looking_up = functools.partial(_looking_up, closed, len(data), pairs)
        closed = jax.make_jaxpr(looking_up)(*data, *indices, *leaves)
    jaxpr = closed.jaxpr
    leaves = [*jaxpr.invars[len(data) + 2 :], *jaxpr.constvars]
    return _split(jaxpr, len(data), leaves, closed.consts, jax.tree.structure(shape))


def _with_leaves(part: Callable[..., Any], leaves: list[Any], indices: Array) -> list[Array]:
    return part(indices, *leaves)


def _in_tiles(table: Array, shape: tuple[int, ...]) -> Array:
    """Return the entries of a table at 0, 1, 2, ... as an array of a shape, the last one repeated.

    A lookup would be computed entry by entry: compilers do not see what the indices are.
    """
    entries = table[: math.prod(shape)]
    missing = math.prod(shape) - len(entries)
    if missing:
        entries = jnp.concatenate([entries, jnp.broadcast_to(entries[-1:], (missing,))])
    return entries.reshape(shape)


def _flat(function: Callable[..., Any], number: int, *arguments: Any) -> Any:
    data, (q_idx, kv_idx, *leaves) = arguments[:number], arguments[number:]
    return function(data, q_idx, kv_idx, leaves)


def _inlined(closed: ClosedJaxpr, *arguments: Any) -> list[Any]:
    """Evaluate a jaxpr, calls within it as their own equations."""
    values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values |= zip(closed.jaxpr.invars, arguments, strict=True)
    read = functools.partial(value_of, values)
    for equation in closed.jaxpr.eqns:
        called = CALLS.get(equation.primitive.name)
        if called:
            results = _inlined(equation.params[called], *map(read, equation.invars))
            values |= zip(equation.outvars, results, strict=True)
        else:
            values |= evaluated(equation, read)
    return [read(atom) for atom in closed.jaxpr.outvars]


def _looking_up(closed: ClosedJaxpr, number: int, pairs: int, *arguments: Any) -> list[Any]:
    """Evaluate a jaxpr, gathers by query and key as kernels can, as far as they can."""
    jaxpr = closed.jaxpr
    sides = _sides(jaxpr, number, [*jaxpr.invars[number + 2 :], *jaxpr.constvars])
    made_by = {variable: equation for equation in jaxpr.eqns for variable in equation.outvars}
    known = Known(sides, made_by, pairs)
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= zip(jaxpr.invars, arguments, strict=True)
    read = functools.partial(value_of, values)
    for equation in jaxpr.eqns:
        found = None
        if equation.primitive.name == "gather" and sides[equation.outvars[0]] == OF_PAIR:
            found = look_up(known, equation, read)
        if found is None:
            values |= evaluated(equation, read)
        else:
            values[equation.outvars[0]] = found
    return [read(atom) for atom in jaxpr.outvars]


def _sides(jaxpr: Jaxpr, number: int, leaves: list[Any]) -> dict[Any, frozenset[str]]:
    """Return what each variable depends on, given the number of arrays of data."""
    q_idx, kv_idx = jaxpr.invars[number : number + 2]
    sides: dict[Any, frozenset[str]] = dict.fromkeys(leaves, SHARED)
    sides |= dict.fromkeys(jaxpr.invars[:number], OF_PAIR) | {q_idx: OF_QUERY, kv_idx: OF_KEY}
    for equation in jaxpr.eqns:
        side = SHARED.union(*(sides[atom] for atom in _variables(equation.invars)))
        sides |= dict.fromkeys(equation.outvars, side)
    return sides


def value_of(values: dict[Any, Any], atom: Any) -> Any:
    """Return the value of a variable or literal of a jaxpr."""
    return atom.val if isinstance(atom, Literal) else values[atom]


def evaluated(equation: Any, read: Callable[[Any], Any]) -> dict[Any, Any]:
    """Evaluate one equation, with its own derivative if it has one, and return its results."""
    primitive = equation.primitive
    given = primitive.get_bind_params(equation.params)
    results = primitive.bind(*map(read, equation.invars), **given)
    results = results if primitive.multiple_results else [results]
    return dict(zip(equation.outvars, results, strict=True))


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def _part(
    equations: Sequence[Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    in_kernel: bool = False,
) -> Callable[..., list[Any]]:
    """Return some equations as a function, without those that its results do not need."""
    needed = _needed(equations, outputs)
    if in_kernel:
        needed = list(map(_without_mesh, needed))
    return functools.partial(_computed, needed, inputs, outputs)


def _computed(
    equations: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], *arguments: Any
) -> list[Any]:
    values = dict(zip(inputs, arguments, strict=True))
    read = functools.partial(value_of, values)
    for equation in equations:
        values |= evaluated(equation, read)
    return list(map(read, outputs))


def _without_mesh(equation: Any) -> Any:
    """Let an equation know of no mesh: within a kernel, values vary over none of its axes.

    A loop or condition asks for values of the types that it was traced with.
    """
    if equation.primitive.name in ("pcast", "pvary"):
        return equation.replace(primitive=_same, params={})
    return equation.replace(
        params={name: _traced_anew(value) for name, value in equation.params.items()}
    )


def _traced_anew(value: Any) -> Any:
    if type(value) is tuple:  # one with names is no list of jaxprs
        return tuple(map(_traced_anew, value))
    if isinstance(value, ClosedJaxpr):
        return _local(value.jaxpr, value.consts)
    return _local(value, ()).jaxpr if isinstance(value, Jaxpr) else value


def _local(jaxpr: Jaxpr, constants: Sequence[Any]) -> ClosedJaxpr:
    types: list[Any] = [x.aval for x in jaxpr.invars]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type) for x in types]
    equations = list(map(_without_mesh, jaxpr.eqns))
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    computed = functools.partial(_computed, equations, inputs, jaxpr.outvars, *constants)
    return jax.make_jaxpr(computed)(*shapes)


def _split(
    jaxpr: Jaxpr, number: int, leaves: list[Any], constants: list[Any], result: Any
) -> Split:
    q_idx, kv_idx = jaxpr.invars[number : number + 2]
    sides = _sides(jaxpr, number, leaves)
    looked_up = [e for e in jaxpr.eqns if e.primitive is table_of_pairs]
    outside: set[Any] = {e.outvars[0] for e in looked_up}
    for equation in jaxpr.eqns:
        is_of_pair = any(sides[variable] == OF_PAIR for variable in equation.outvars)
        if not is_of_pair and _is_done_outside(equation, outside):
            outside |= set(equation.outvars)
    inside = [e for e in jaxpr.eqns if not outside & set(e.outvars)]
    inside = _needed(inside, jaxpr.outvars)
    read = dict.fromkeys(_variables([*(x for e in inside for x in e.invars), *jaxpr.outvars]))
    fronts = {
        side: [variable for variable in read if variable in outside and sides[variable] == side]
        for side in (SHARED, OF_QUERY, OF_KEY, OF_PAIR)
    }
    looked_up = {e.outvars[0]: e.invars for e in looked_up}
    tables, rows, columns = (
        zip(*(looked_up[variable] for variable in fronts[OF_PAIR]), strict=True)
        if fronts[OF_PAIR]
        else ((), (), ())
    )
    reads = tuple(n for n, leaf in enumerate(leaves) if leaf in read)
    made_by = {variable: equation for equation in jaxpr.eqns for variable in equation.outvars}
    inputs = [
        *jaxpr.invars[: number + 2],
        *(leaves[n] for n in reads),
        *itertools.chain(*fronts.values()),
    ]
    return Split(
        _part(jaxpr.eqns, leaves, fronts[SHARED]),
        _part(jaxpr.eqns, [q_idx, *leaves], fronts[OF_QUERY]),
        _part(jaxpr.eqns, [kv_idx, *leaves], fronts[OF_KEY]),
        (
            _part(jaxpr.eqns, leaves, tables),
            _part(jaxpr.eqns, [q_idx, *leaves], rows),
            _part(jaxpr.eqns, [kv_idx, *leaves], columns),
        ),
        (
            [_own_leaf(made_by, variable, q_idx, leaves) for variable in fronts[OF_QUERY]],
            [_own_leaf(made_by, variable, kv_idx, leaves) for variable in fronts[OF_KEY]],
        ),
        _part(inside, inputs, jaxpr.outvars, in_kernel=True),
        reads,
        constants,
        result,
    )


def _own_leaf(made_by: Any, variable: Any, index: Any, leaves: list[Any]) -> int | None:
    """Return the number of the leaf [n] whose entries at the index itself a variable holds."""
    gather = made_by.get(variable)
    if gather is None or gather.primitive.name != "gather":
        return None
    table, where = gather.invars
    while where in made_by and made_by[where].primitive.name in RESHAPES:
        (whole,) = made_by[where].invars
        if _size(whole) != _size(where):
            return None
        where = whole
    is_clipped = gather.params["mode"] == jax.lax.GatherScatterMode.CLIP
    is_own = where is index and table in leaves and table.aval.ndim == 1
    return leaves.index(table) if is_own and is_clipped else None


def _is_done_outside(equation: Any, outside: set[Any]) -> bool:
    """Tell whether an equation that reads one side only is no work for a kernel.

    What makes more of cheap numbers, as a broadcast to the pairs does, is: it would be read
    instead.
    """
    if equation.primitive.name not in IN_KERNEL:
        return True
    read = _variables(equation.invars)
    larger = max(map(_size, equation.outvars)) > max(map(_size, read), default=0)
    return not larger and any(atom in outside for atom in read)


def _size(atom: Any) -> int:
    return math.prod(atom.aval.shape)


def _needed(equations: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
    """Return the equations that results depend on."""
    wanted, kept = set(_variables(outputs)), []
    for equation in reversed(equations):
        if wanted & set(equation.outvars):
            kept.append(equation)
            wanted |= set(_variables(equation.invars))
    return kept[::-1]


_same = Primitive("same")
"""Takes the place of what changes only over which axes of a mesh an array varies."""
_same.def_impl(lambda x: x)
_same.def_abstract_eval(lambda x: x)
ad.deflinear(_same, lambda cotangent, _: [cotangent])
