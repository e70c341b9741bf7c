"""The memory that attention needs beside its operands and results, as compilers allocate it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.base.binding import function_of
from attention_jax.implementations import machine, mixed_choice
from attention_jax.implementations.pallas.choosing import of_one_head
from attention_jax.implementations.pallas.rows import rounded_to
from attention_jax.implementations.tiles import Plan
from attention_jax.normalizers import Elementwise, LogSum, Searched
from attention_jax.operands import Operand, operands
from attention_jax.request import Request
from attention_jax.scores import separate
from attention_jax.scores.composition import identity

RESERVED = 2**20
"""What the compiler for TPUs reserves for a loop that needs no device memory: over features, or
over tiles with a branch on what each is.

Read from programs for a v5e: 0.95 MiB for lengths of 4096, with 4 heads as with 8, and 1.14 MiB
for a length of 2048.
"""

FEATURES_AT_ONCE = 8
"""A compiler for GPUs writes the products of so many features of a tile before it adds them up."""


def expected(name: str, request: Request, plan: Plan, at_once: int, platform: str) -> int:
    """Return the bytes of temporaries, forward; on accelerators as compilers for them allocate."""
    sizes, computed = request.sizes, request.dtype.itemsize
    heads, length = sizes["B"] * sizes["N"], sizes["T"]
    if name == "dense":
        return 2 * heads * math.prod(request.pairs) * computed
    if name == "pallas":
        log_sums, mapped = heads * length * computed, _Rows.of(request, name).mapped(request)
        return log_sums + (0 if _fits(platform, mapped) else mapped)
    pairs = at_once * plan.largest_visit * plan.tile[1]
    if isinstance(request.streaming, Searched):  # holds the logits of a row of tiles
        pairs += at_once * plan.tile[0] * plan.covered
    if request.mixes:
        pairs = at_once // sizes["N"] * plan.largest_visit * plan.tile[1]
        rows = sizes["B"] * length * max(request.counts) * (sizes["V"] + 2)
        return (mixed_choice.tile_arrays(request) * pairs + rows) * computed
    if platform == "cpu":
        return (2 * pairs + heads * length * (sizes["V"] + 1)) * computed
    # Logits, and weights as the operand of a product; sums before and after a visit.
    tiles = pairs * (computed + request.value.dtype.itemsize)
    sums = 2 * at_once * length * sizes["V"] * computed
    # What poisons rows of query, key and value; maxima and totals between loops and branches.
    rows = heads * length * computed * (3 + 2 * (len(plan.visits) > 1) + 4 * plan.looks_up)
    fits = _fits(platform, tiles + sums)
    read = _Rows.of(request, name)
    # Some heads at a time are sliced out of copies in which heads come first.
    copies = 0 if fits and at_once == heads else read.read(request)
    copies += 0 if fits else _of_branches(request, plan, at_once, read)
    if at_once == heads:  # the context is written where the sums or a copy were
        sums -= heads * length * sizes["V"] * (computed + request.value.dtype.itemsize)
    adds_features = separate(function_of(request.score)).adds_features
    if fits and plan.looks_up:  # a loop within a branch writes its result to device memory
        return rows + copies + RESERVED + pairs * computed * adds_features
    least = RESERVED if fits and adds_features else 0
    return max(rows + copies + (0 if fits else tiles + sums), least)


def of_gradients(
    name: str, request: Request, plan: Plan, at_once: int, platform: str
) -> int | None:
    """Return the same of the gradients of query, key and value; None where it is not known.

    The program returns them alone, and computes the cotangent of the context in the dtype of the
    values. Gradients are written where other arrays were before.
    """
    is_one_pass = isinstance(request.streaming, LogSum | Elementwise)
    is_plain = is_one_pass and not request.mixes and request.statistics is None
    if name not in ("pallas", "tiled") or platform == "cpu" or not is_plain:
        return None
    sizes, computed = request.sizes, request.dtype.itemsize
    rows, log_sums = _Rows.of(request, name), sizes["B"] * sizes["N"] * sizes["T"] * computed
    context, value = log_sums * sizes["V"], request.value.dtype.itemsize
    if name == "pallas":
        kept = rows.mapped(request) + context * value // computed
        if request.groups > 1:  # gradients of keys and values of each query head
            kept += request.groups * sum(rows.sums(request)[1:])
        return 2 * log_sums + (0 if _fits(platform, kept) else kept)
    pairs = at_once * plan.largest_visit * plan.tile[1]
    groups, sums = max(1, len(plan.visits)), rows.sums(request)
    held, log_sums = rows.read(request) + context, (3 + 2 * (groups > 1)) * log_sums
    adds_features = separate(function_of(request.score)).adds_features
    if platform == "gpu":
        # Logits and the cotangents of weights, and both as operands of products.
        of_pair = 2 * (computed + value)
        of_pair = (2 + FEATURES_AT_ONCE) * computed if adds_features else of_pair
        held += groups * sum(sums) + pairs * of_pair + _of_branches(request, plan, at_once, rows)
        return log_sums + held - _bytes(request)
    least = RESERVED if adds_features else log_sums
    if adds_features and plan.looks_up:  # beside a loop within a branch nothing stays
        return least + max(0, rows.read(request) + sum(sums) - _bytes(request))
    of_pair = 2 * computed if adds_features else computed + value
    lacking = held + groups * sum(sums) + pairs * of_pair - machine.vector_memory()
    if groups == 1:
        return least + _moved_out(sums, lacking)
    # What one loop adds up makes room while another one runs, and has a place of its own.
    return least + (max(lacking, groups * sum(sums)) if lacking > 0 else 0)


def _of_branches(request: Request, plan: Plan, at_once: int, rows: _Rows) -> int:
    """Return the bytes of rows that are copied for a branch on what a tile is."""
    if not plan.looks_up:
        return 0
    query, key, value = rows.bytes_of_row()
    of_sums = request.sizes["V"] * request.dtype.itemsize
    return at_once * (plan.tile[0] * (query + of_sums) + plan.tile[1] * (key + value))


def _moved_out(arrays: Sequence[int], lacking: int) -> int:
    """Return the bytes of whole arrays that are moved out of vector memory that lacks so many.

    At least one is, and the smallest first. A rest that is less than one is found elsewhere:
    arguments are in device memory anyway.
    """
    if lacking >= sum(arrays):
        return lacking
    moved = 0
    for size in sorted(arrays):
        moved += size if lacking > 0 and (not moved or moved + size <= lacking) else 0
    return moved


def _fits(platform: str, size: int) -> bool:
    """Tell whether the compiler of a platform keeps so much in vector memory."""
    return platform == "tpu" and size <= machine.vector_memory()


def _bytes(request: Request) -> int:
    arrays = request.query, request.key, request.value
    return sum(x.size * x.dtype.itemsize for x in arrays)


class _Rows(NamedTuple):
    """The rows of queries and of keys, as a score maps them, and of values.

    `are_mapped` tells whether it does, and `depths` and `itemsizes` are those of what is read.
    """

    are_mapped: Sequence[bool]
    depths: Sequence[int]
    itemsizes: Sequence[int]

    @classmethod
    def of(cls, request: Request, name: str) -> _Rows:
        score = separate(function_of(request.score))
        given = [request.query, request.key]
        are_mapped = [x.func is not identity.func for x in (score.query_map, score.key_map)]
        rows = [jax.ShapeDtypeStruct((1, x.shape[-1]), request.dtype) for x in given]
        part = operands(request, as_given=True)["score"]
        leaves = [of_one_head(*pair) for pair in zip(part.leaves, part.axes, strict=True)]
        mapped = jax.eval_shape(functools.partial(_mapped, part), rows, leaves)
        rounded = rounded_to(score, request.products) if name == "pallas" else None
        dtypes = [
            (rounded or row.dtype) if is_mapped else x.dtype
            for is_mapped, row, x in zip(are_mapped, mapped, given, strict=True)
        ]
        return cls(
            [*are_mapped, False],
            [*(x.shape[-1] for x in mapped), request.sizes["V"]],
            [jnp.dtype(x).itemsize for x in (*dtypes, request.value.dtype)],
        )

    def read(self, request: Request) -> int:
        """Return the bytes of all of them."""
        return sum(self._arrays(request, self.itemsizes))

    def mapped(self, request: Request) -> int:
        """Return the bytes of those that the score maps."""
        pairs = zip(self.itemsizes, self.are_mapped, strict=True)
        return sum(self._arrays(request, [size * is_mapped for size, is_mapped in pairs]))

    def sums(self, request: Request) -> list[int]:
        """Return the bytes of the gradients of each while these are added up."""
        return self._arrays(request, [request.dtype.itemsize] * 3)

    def bytes_of_row(self) -> list[int]:
        """Return the bytes of one row of each."""
        pairs = zip(self.depths, self.itemsizes, strict=True)
        return [depth * size for depth, size in pairs]

    def _arrays(self, request: Request, itemsizes: Sequence[int]) -> list[int]:
        sizes = request.sizes
        of_query, of_key = sizes["N"] * sizes["T"], sizes["K"] * sizes["S"]
        numbers = zip((of_query, of_key, of_key), self.depths, itemsizes, strict=True)
        return [sizes["B"] * math.prod(each) for each in numbers]


def _mapped(part: Operand, rows: list[Any], leaves: list[Any]) -> list[Any]:
    score = part.build(leaves)
    return [of_row(x) for of_row, x in zip((score.query_map, score.key_map), rows, strict=True)]
