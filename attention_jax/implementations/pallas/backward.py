"""The backward kernels: cotangents of the queries with parameters, and of keys with values.

The sums of a row are those of `tile_passes.Tangent`: of w'_ij over j, and of w'_ij v_j + w_ij v'_j.
With cotangents a_i and b_i of these, the cotangent of w_ij is a_i + b_i . v_j, and JAX takes the
rest from the derivative of the score on a tile.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.base.matmul import times_transpose, transpose_times
from attention_jax.implementations import online
from attention_jax.implementations.pallas.blocks import Block, Kernel, Live, Part, Sum
from attention_jax.implementations.pallas.forward import add_states
from attention_jax.implementations.pallas.parts import Head, Pairs, Reader, bias_block
from attention_jax.implementations.pallas.primitive import call
from attention_jax.implementations.pallas.slots import Inputs
from attention_jax.implementations.pallas.splitting import Looked
from attention_jax.implementations.tiles import Plan
from attention_jax.normalizers import Elementwise, Exponential

Array = jax.Array


class Rows(NamedTuple):
    """What the backward pass knows of each query: its log-sum-exp, and the cotangents of its sums.

    Whole arrays, or the numbers of the operands of a kernel that hold them.

    Attributes:
      base: [T], log-sum-exp, 0 where there is none; without sum, the poison.
      total: a, [T].
      context: b, [T, V].
    """

    base: Any
    total: Any
    context: Any


class Target(NamedTuple):
    """The cotangent of one part of `Moving`: where it is added up, and where it goes.

    `by` is the side whose rows of tiles add it up; `block` is cut from the result, of one tile
    alone where `is_of_pairs`. The result is reshaped to `shape`; where `is_partial` it holds a
    sum for each row, and these are added. `dtype` is that of the result; sums are float32.
    """

    by: str
    block: Block
    shape: tuple[int, ...]
    is_of_pairs: bool = False
    is_partial: bool = False
    dtype: Any = jnp.float32

    @property
    def is_of_side(self) -> bool:
        """Whether it has rows of its own for the tiles of its side."""
        return not (self.is_of_pairs or self.is_partial)

    def seen_by(self, by: str) -> Target:
        """Return the same where the rows of tiles are those of another side."""
        if not self.is_partial:
            return self
        return self._replace(by=by, block=Block(self.block.shape, by + self.block.places[1:]))


def pull_back(head: Head, plan: Plan, rows: Rows, moves: list[bool]) -> list[Array | None]:
    """Return the cotangent of each leaf of `head.moving` that moves, None of the others.

    Those of queries and of keys are two kernels. Where vector memory may hold the sums of all
    queries, one kernel computes both, and the weights of each tile once.
    """
    targets = _targets(head)
    found: list[Array | None] = [None] * len(targets)
    moving = [n for n, is_moving in enumerate(moves) if is_moving]
    of_queries, of_keys = ([n for n in moving if targets[n].by == by] for by in "qk")
    maker = _Maker.of(head, plan, rows, targets)
    if of_queries and of_keys and maker.kept_bytes(of_queries) <= MOST_KEPT:
        calls = [maker.at_once(of_queries, of_keys)]
    else:
        sides = zip((of_queries, of_keys), "qk", strict=True)
        calls = [maker.kernel(wanted, by) for wanted, by in sides if wanted]
    for wanted, kernel, arrays in calls:
        for n, result in zip(wanted, call(kernel, *arrays), strict=True):
            found[n] = _whole(head, plan, targets[n], result)
    return found


MOST_KEPT = 2**22
"""Bytes of vector memory that the sums of all queries of a head, and their results, may take."""


class _Made(NamedTuple):
    """A kernel, the numbers of the leaves whose cotangents it returns, and its operands."""

    wanted: list[int]
    kernel: Kernel
    arrays: list[Array]


@dataclasses.dataclass(frozen=True, eq=False)
class _Maker:
    """Makes kernels of one head, which all have `inputs` for their first operands."""

    head: Head
    plan: Plan
    targets: list[Target]
    inputs: Inputs
    reader: Reader
    rows: Rows

    @classmethod
    def of(cls, head: Head, plan: Plan, rows: Rows, targets: list[Target]) -> _Maker:
        inputs = Inputs()
        reader = Reader.of(inputs, head)
        length, depth = head.tile[0], head.operands.value.shape[1]
        of_rows = Rows(
            inputs.add(rows.base[None, :], Block((1, length), ".q")),
            inputs.add(rows.total[None, :], Block((1, length), ".q")),
            inputs.add(rows.context, Block((length, depth), "q.")),
        )
        return cls(head, plan, targets, inputs, reader, of_rows)

    def kept_bytes(self, wanted: list[int]) -> int:
        """Return what is kept for columns: sums, and results, of which a copy is on its way out."""
        kept = [self.targets[n] for n in wanted if self.targets[n].is_of_side]
        return sum(math.prod(x.shape) * (4 + 2 * jnp.dtype(x.dtype).itemsize) for x in kept)

    def kernel(self, wanted: list[int], by: str) -> _Made:
        """Return a kernel whose rows are those of queries, or those of keys."""
        head, targets = self.head, {n: self.targets[n].seen_by(by) for n in wanted}
        kept = [n for n in wanted if targets[n].is_of_side and targets[n].by != by]
        pairs = [n for n in wanted if targets[n].is_of_pairs]
        own = [n for n in wanted if n not in (*kept, *pairs)]
        backward = Backward(self.reader, self.rows, targets)
        inputs, live = self.inputs.copy(), Live.of(self.plan, head.counts, by, bool(kept))
        kernel = Kernel(
            by=by,
            live=live,
            blocks=inputs.blocks,
            results=[(targets[n].block, targets[n].dtype) for n in (*own, *kept, *pairs)],
            counts=head.counts,
            tile=head.tile,
            sums=[Sum(_at_least_2d(targets[n].block.shape), 0.0) for n in (*own, *kept)],
            step=functools.partial(backward.step, [*own, *kept], pairs),
            finish=functools.partial(backward.finish, own),
            states=add_states(inputs, live, head),
            only_on=head.only_on,
            of_columns=len(kept),
            finish_column=functools.partial(backward.finish, kept),
        )
        return _Made([*own, *kept, *pairs], kernel, inputs.arrays)

    def at_once(self, of_queries: list[int], of_keys: list[int]) -> _Made:
        """Return one kernel whose rows are those of keys, made of two where none can be kept."""
        wanted, kernel, arrays = self.kernel([*of_keys, *of_queries], "k")
        parts, common = [], len(self.inputs.arrays)
        for of_part, part, operands in (self.kernel(of_queries, "q"), self.kernel(of_keys, "k")):
            of_its_own = operands[common:]
            numbers = [*range(common), *range(len(arrays), len(arrays) + len(of_its_own))]
            parts.append(Part(part, numbers, [wanted.index(n) for n in of_part]))
            arrays = [*arrays, *of_its_own]
        return _Made(wanted, dataclasses.replace(kernel, apart=parts), arrays)


def _whole(head: Head, plan: Plan, target: Target, result: Array) -> Array:
    """Return a cotangent as a whole array."""
    if target.is_partial:
        return jnp.sum(result, axis=0).reshape(target.shape)
    if not target.is_of_pairs:
        return result.reshape(target.shape)
    visited = np.zeros(head.counts, bool)
    visited[tuple((plan.starts // plan.tile).T)] = True
    if visited.all():
        return result
    (rows, columns), (down, across) = head.tile, head.counts
    tiles = result.reshape(down, rows, across, columns)
    return jnp.where(visited[:, None, :, None], tiles, 0.0).reshape(result.shape)


def _targets(head: Head) -> list[Target]:
    """Return where the cotangent of each leaf of `head.moving` goes.

    Those of rows are rounded to the dtype of the rows as they are written; of keys that several
    heads share they are not, because they are added up first.
    """
    (rows, columns), moving = head.tile, head.moving
    query, key, value = (
        Target(by, Block((size, x.shape[1]), f"{by}."), x.shape, dtype=x.dtype)
        for x, size, by in (
            (moving.query, rows, "q"),
            (moving.key, columns, "k"),
            (moving.value, columns, "k"),
        )
    )
    if head.shares_keys:
        key, value = (target._replace(dtype=jnp.float32) for target in (key, value))
    bias = [_of_bias(array, head.tile) for array in moving.bias]
    return [
        query,
        key,
        value,
        *bias,
        *(x for looked in moving[4:] for x in _of_looked(looked, head.tile)),
    ]


def _of_bias(array: Array, tile: tuple[int, int]) -> Target:
    block = bias_block(array, tile)
    if block.places == "..":
        return Target("q", Block((1, 1, 1), "q.."), array.shape, is_partial=True)
    by = "k" if block.places == ".k" else "q"
    return Target(by, block, array.shape, is_of_pairs=block.places == "qk")


def _of_looked(looked: Looked, tile: tuple[int, int]) -> list[Target]:
    whole = [_for_each("q", array.shape, array.shape, True) for array in looked.whole]
    of_query = [_for_each("q", array.shape[1:], array.shape) for array in looked.of_query]
    of_key = [_for_each("k", array.shape[1:], array.shape) for array in looked.of_key]
    of_pair = [
        Target("q", Block(tile, "qk"), array.shape, is_of_pairs=True) for array in looked.of_pair
    ]
    return [*whole, *of_query, *of_key, *of_pair]


def _for_each(
    by: str, part: tuple[int, ...], shape: tuple[int, ...], is_partial: bool = False
) -> Target:
    stored = (1, *_at_least_2d(part))
    return Target(by, Block(stored, by + "." * (len(stored) - 1)), shape, is_partial=is_partial)


def _at_least_2d(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * (2 - len(shape)) + shape


@dataclasses.dataclass(frozen=True, eq=False)
class Backward:
    """The cotangents that one kernel adds up: of leaves of `Moving`, by their numbers."""

    reader: Reader
    rows: Rows
    targets: dict[int, Target]

    def step(
        self,
        added: list[int],
        of_pairs: list[int],
        masked: bool,
        poisoned: bool,
        sums: list[Array],
        values: Sequence[Array],
        i: Array,
        j: Array,
    ) -> tuple[list[Array], list[Array]]:
        del poisoned  # what the forward pass returned of the rows is
        pairs = Pairs.at(i, j, self.reader.head.tile)
        base, total = (values[n].reshape(-1, 1) for n in self.rows[:2])
        context = values[self.rows.context].astype(jnp.float32)
        products = self.reader.head.products.of_derivatives
        here = self.reader.read(values)
        leaves, structure = jax.tree.flatten(here)
        moving = [n for n in self.targets if n != VALUE]
        allowed = self.reader.may(masked, values, pairs)
        weigh = functools.partial(self.weigh, (leaves, structure), moving, (pairs, allowed, base))
        weights, pull = jax.vjp(weigh, [leaves[n] for n in moving])
        keep = self.reader.kept(values, pairs)
        change = times_transpose(context, here.value, products)
        total = online.magnitude_change(self.reader.head.how, weights, total)
        change = total + (change if keep is None else change * keep)
        found = dict(zip(moving, *pull(change), strict=True))
        if VALUE in self.targets:
            used = weights if keep is None else weights * keep
            found[VALUE] = transpose_times(used, context, products)
        sums = [x + found[n].reshape(x.shape) for x, n in zip(sums, added, strict=True)]
        return sums, [found[n] for n in of_pairs]

    def weigh(self, here: Any, moving: list[int], given: Any, chosen: list[Array]) -> Array:
        """Return the weights of a tile, as a function of the leaves that move."""
        leaves, structure = here
        pairs, allowed, base = given
        leaves = list(leaves)
        for n, leaf in zip(moving, chosen, strict=True):
            leaves[n] = leaf
        tile = jax.tree.unflatten(structure, leaves)
        logits, how = self.reader.logits_of(tile, pairs), self.reader.head.how
        if isinstance(how, Exponential) and allowed is not None:
            # One choice serves the weights and their derivative, whatever the logits were.
            return jnp.exp(jnp.where(allowed, logits - base, -jnp.inf))
        if isinstance(how, Elementwise):  # where base is the poison of the row
            logits = logits + base
        if allowed is not None:
            logits = jnp.where(allowed, logits, 0.0)
        weights = self.reader.weights_of(logits, base, tile, pairs)
        return weights if allowed is None else jnp.where(allowed, weights, 0.0)

    def finish(self, wanted: list[int], sums: list[Array], values: Sequence[Array]) -> list[Array]:
        return [
            self.of_finite(n, x, values).reshape(self.targets[n].block.shape)
            for n, x in zip(wanted, sums, strict=True)
        ]

    def of_finite(self, n: int, cotangent: Array, values: Sequence[Array]) -> Array:
        """Return the cotangent of rows, zero for the NaN and Inf among them."""
        if n >= ROWS:
            return cotangent
        rows = values[self.reader.data[n]].astype(jnp.float32)
        return jnp.where(jnp.isfinite(rows), cotangent, 0.0)


ROWS = 3
"""Query, key and value are the first leaves of `Moving`."""

VALUE = 2
"""The number of the values among them."""
