"""Tables that are read by an index of query and key at once, as far as kernels can read them.

Kernels have no gather. A table whose row depends on the query and whose column on the key, and that
holds at least a number for each pair, is cut in blocks. One of fewer numbers, or of another index,
is read entry by entry: a tile asks only for those between the smallest and the largest index that
occurs in it, which are few where the index is a bucket of a distance.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal, Primitive
from jax.lax import GatherScatterMode

Array = jax.Array

MOST_ENTRIES = 1024
"""Of more entries a table is not read one by one."""


class TooManyEntriesError(ValueError):
    """A table is read by query and key at once that is too large for kernels."""

    def __init__(self, entries: int) -> None:
        self.reason = (
            f"a table of {entries:,} entries is read by query and key at once, and kernels read "
            f"at most {MOST_ENTRIES:,}, or one for each pair"
        )
        super().__init__(
            f"attend: implementation 'pallas' makes no kernel of this: {self.reason}; use "
            "implementation='tiled'."
        )


def _require_few(entries: int) -> None:
    if entries > MOST_ENTRIES:
        raise TooManyEntriesError(entries)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def entry(axis: int, table: Array, index: Array) -> Array:
    """Return the entries of a table at indices within it, as a kernel can.

    Args:
      axis: of the table that is indexed; the other has size 1, or that of the tile.
      table: [n, 1 or bk] or [1 or bt, n].
      index: [1 or bt, 1 or bk], int32.
    """
    wide = _wide(table)
    shape = jnp.broadcast_shapes(index.shape, _without(axis, wide).shape)
    body = functools.partial(_put_entry, axis, (wide, index))
    found = lax.fori_loop(*_range(index), body, jnp.zeros(shape, wide.dtype))
    return found != 0 if table.dtype == jnp.bool_ else found.astype(table.dtype)


def _entry_forward(axis: int, table: Array, index: Array) -> tuple[Array, Any]:
    return entry(axis, table, index), (table, index)


def _entry_backward(axis: int, given: Any, change: Array) -> tuple[Array, None]:
    """Add up the changes of each entry."""
    table, index = given
    body = functools.partial(_put_sum, axis, (index, change.astype(jnp.float32)))
    zeros = jnp.zeros(table.shape, jnp.float32)
    return lax.fori_loop(*_range(index), body, zeros).astype(table.dtype), None


entry.defvjp(_entry_forward, _entry_backward)


def _wide(table: Array) -> Array:
    floating = jnp.issubdtype(table.dtype, jnp.floating)
    return table.astype(jnp.float32 if floating else jnp.int32)


def _range(index: Array) -> tuple[Array, Array]:
    """Return the smallest index and the one after the largest, exact in float32."""
    numbers = index.astype(jnp.float32)
    return jnp.min(numbers).astype(jnp.int32), jnp.max(numbers).astype(jnp.int32) + 1


def _without(axis: int, table: Array) -> Array:
    return jnp.sum(table, axis=axis, keepdims=True, dtype=table.dtype)


def _put_entry(axis: int, given: Any, number: Array, found: Array) -> Array:
    table, index = given
    is_this = lax.broadcasted_iota(jnp.int32, table.shape, axis) == number
    one = _without(axis, jnp.where(is_this, table, jnp.zeros_like(table)))
    return jnp.where(index == number, one, found)


def _put_sum(axis: int, given: Any, number: Array, sums: Array) -> Array:
    index, change = given
    added = jnp.where(index == number, change, 0.0)
    kept = tuple(n for n in range(2) if sums.shape[n] == 1 or n == axis)
    added = jnp.sum(added, axis=kept, keepdims=True)
    is_this = lax.broadcasted_iota(jnp.int32, sums.shape, axis) == number
    return jnp.where(is_this, added, sums)


table_of_pairs = Primitive("table_of_pairs")
"""A table [R, C] at rows [bt, 1] and columns [1, bk]: looked up outside of the kernel."""


@table_of_pairs.def_abstract_eval
def _(table: Any, row: Any, column: Any) -> Any:
    return table.update(shape=(row.shape[0], column.shape[1]))


class Known(NamedTuple):
    """What is known of the variables of a jaxpr: the side that each reads, and what makes it."""

    sides: Mapping[Any, frozenset[str]]
    made_by: Mapping[Any, Any]
    pairs: int


def look_up(known: Known, equation: Any, read: Callable[[Any], Any]) -> Any:
    """Evaluate a gather by query and key as a kernel can, or return None if it cannot.

    Raises:
      TooManyEntriesError: it could, but for the size of the table.
    """
    table, index = equation.invars
    numbers, parameters = equation.params["dimension_numbers"], equation.params
    columns = _columns(known, index, read)
    if columns is None or any(size != 1 for size in parameters["slice_sizes"]):
        return None
    sides = [side for side, _ in columns]
    values = read(table)
    lengths = [values.shape[axis] for axis in numbers.start_index_map]
    inside = [(x >= 0) & (x < n) for (_, x), n in zip(columns, lengths, strict=True)]
    where = [jnp.clip(x, 0, n - 1) for (_, x), n in zip(columns, lengths, strict=True)]
    if numbers.operand_batching_dims:
        wide = functools.partial(_product_with_more_columns, known, table, read)
        found = _of_rows(numbers, values, wide, where)
    elif _side(known, table):
        return None
    elif all(len(side) < 2 for side in sides):
        found = _separate(known.pairs, values, numbers.start_index_map, sides, where)
    else:
        found = _flat(values, numbers.start_index_map, where)
    if found is None:
        return None
    shape = equation.outvars[0].aval.shape
    if parameters["mode"] == GatherScatterMode.FILL_OR_DROP:
        may = functools.reduce(jnp.logical_and, inside)
        found = jnp.where(may, found, _fill(parameters["fill_value"], found.dtype))
    tile = jnp.broadcast_shapes(found.shape, shape[:2])
    return jnp.broadcast_to(found, tile).reshape(shape)


def _fill(value: Any, dtype: Any) -> Array:
    if value is None:
        if jnp.issubdtype(dtype, jnp.inexact):
            value = np.nan
        elif dtype == jnp.bool_:
            value = True
        else:
            limits = jnp.iinfo(dtype)
            value = limits.min if limits.min < 0 else limits.max
    return jnp.asarray(value, dtype)


def _side(known: Known, atom: Any) -> frozenset[str]:
    return frozenset() if isinstance(atom, Literal) else known.sides[atom]


def _columns(known: Known, index: Any, read: Callable[[Any], Any]) -> list[Any] | None:
    """Return side and number, [bt or 1, bk or 1], of each axis that an index [bt, bk, n] tells."""
    if isinstance(index, Literal) or len(index.aval.shape) != 3:
        return None
    made = known.made_by.get(index)
    if made is None:
        return None
    name = made.primitive.name
    if name == "concatenate" and made.params["dimension"] == 2:
        parts = [_columns(known, atom, read) for atom in made.invars]
        return None if None in parts else [one for part in parts if part for one in part]
    if index.aval.shape[2] != 1:
        return None
    if name == "reshape" and made.invars[0].aval.shape == index.aval.shape[:2]:
        return [_narrow(known, made.invars[0], read)]
    if name == "broadcast_in_dim" and 2 not in made.params["broadcast_dimensions"]:
        atom, axes = made.invars[0], made.params["broadcast_dimensions"]
        if tuple(axes) == (0, 1):
            return [_narrow(known, atom, read)]
        if len(axes) <= 1:
            side, value = _side(known, atom), jnp.asarray(read(atom), jnp.int32)
            shape = [value.shape[0] if n in axes else 1 for n in range(2)]
            return [(side, value.reshape(shape))]
    return None


def _narrow(known: Known, atom: Any, read: Callable[[Any], Any]) -> tuple[Any, Array]:
    """Return side and value of what is broadcast to a tile."""
    made = None if isinstance(atom, Literal) else known.made_by.get(atom)
    while made is not None and made.primitive.name == "broadcast_in_dim":
        inner, axes = made.invars[0], tuple(made.params["broadcast_dimensions"])
        if axes not in ((0, 1), ()):
            break
        atom = inner
        made = None if isinstance(atom, Literal) else known.made_by.get(atom)
    value = jnp.asarray(read(atom)).astype(jnp.int32)
    return _side(known, atom), value.reshape((1, 1)) if value.ndim == 0 else value


def _of_rows(
    numbers: Any, table: Array, wide: Callable[[], Array], where: list[Array]
) -> Array | None:
    """Return entries of a table that has its own numbers for each query, or each key."""
    batches, of_tiles = numbers.operand_batching_dims, numbers.start_indices_batching_dims
    if table.ndim != 2 or len(batches) != 1 or len(where) != 1:
        return None
    (batch,), (of_tile,) = batches, of_tiles
    _require_few(table.shape[1 - batch])
    table = wide() if batch == 0 else table
    table = table if batch == of_tile else table.T
    return entry(1 - of_tile, table, where[0])


def _product_with_more_columns(known: Known, table: Any, read: Callable[[Any], Any]) -> Array:
    """Return a table as it is, or a product with columns of zeros that a GPU's kernel asks for.

    What is multiplied by must be known before the kernel, where it can be of any size.
    """
    made = known.made_by.get(table)
    if made is None or made.primitive.name != "dot_general":
        return read(table)
    left, right = made.invars
    if _side(known, right) or made.params["dimension_numbers"] != (((1,), (0,)), ((), ())):
        return read(table)
    return made.primitive.bind(read(left), _padded(read(right), LEAST_COLUMNS), **made.params)


def _separate(
    pairs: int, table: Array, axes: Sequence[int], sides: Sequence[Any], where: list[Array]
) -> Array | None:
    """Return the entries where each axis is told by the query alone or by the key alone."""
    if len(axes) != table.ndim:
        return None
    of_key = [n for n, side in enumerate(sides) if side == {"k"}]
    of_query = [n for n in range(len(sides)) if n not in of_key]
    shapes = [[table.shape[axes[n]] for n in those] for those in (of_query, of_key)]
    row, column = (
        _combined([where[n] for n in those], shape)
        for those, shape in zip((of_query, of_key), shapes, strict=True)
    )
    table = table.transpose([axes[n] for n in (*of_query, *of_key)])
    table = table.reshape(*map(math.prod, shapes))
    if table.size >= pairs:
        return table_of_pairs.bind(table, row, column)
    _require_few(table.shape[1])
    return entry(1, jnp.take(_padded(table), row[:, 0], axis=0, mode="clip"), column)


def _combined(where: Sequence[Array], shape: Sequence[int]) -> Array:
    """Return the number of an entry from its indices along the axes of a shape."""
    strides = [math.prod(shape[n + 1 :]) for n in range(len(shape))]
    return functools.reduce(jnp.add, (x * n for x, n in zip(where, strides, strict=True)))


def _flat(table: Array, axes: Sequence[int], where: list[Array]) -> Array | None:
    """Return entries of a table that is read by any index."""
    if len(axes) != table.ndim:
        return None
    _require_few(table.size)
    table = table.transpose(axes)
    index = _combined(where, [table.shape[axis] for axis in axes])
    return entry(1, _padded(table.reshape(1, -1)), index)


LEAST_COLUMNS = 16
"""Of fewer a GPU's kernel makes no product."""


def _padded(table: Array, least: int = 1) -> Array:
    """Return a table with as many columns as a GPU's kernel can read, a power of two."""
    size = table.shape[1]
    more = max(least, 1 << (size - 1).bit_length()) - size
    return lax.pad(table, jnp.zeros((), table.dtype), [(0, 0, 0), (0, more, 0)])
