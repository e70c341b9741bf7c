"""The memory that attention needs beside its operands and results, as compilers allocate it."""

from __future__ import annotations

import math

from attention_jax.base.binding import function_of
from attention_jax.implementations import machine, mixed_choice
from attention_jax.implementations.tiles import Plan
from attention_jax.normalizers import Searched
from attention_jax.request import Request
from attention_jax.scores import separate

RESERVED = 2**20
"""What the compiler for TPUs reserves for a loop over features that needs no device memory.

Read from programs for a v5e: 0.95 MiB for lengths of 4096, with 4 heads as with 8, and 1.14 MiB
for a length of 2048.
"""


def expected(name: str, request: Request, plan: Plan, at_once: int, platform: str) -> int:
    """Return the bytes of temporaries, forward; on accelerators as compilers for them allocate."""
    sizes, computed = request.sizes, request.dtype.itemsize
    heads, length = sizes["B"] * sizes["N"], sizes["T"]
    if name == "dense":
        return 2 * heads * math.prod(request.pairs) * computed
    if name == "pallas":
        return heads * length * computed
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
    # What poisons rows of query, key and value; maxima and totals between loops.
    rows = heads * length * computed * (3 + 2 * (len(plan.visits) > 1))
    arrays = request.query, request.key, request.value
    copies = sum(x.size * x.dtype.itemsize for x in arrays) if at_once < heads else 0
    fits = platform == "tpu" and tiles + sums <= machine.vector_memory()
    least = RESERVED if fits and separate(function_of(request.score)).adds_features else 0
    return max(rows + copies + (0 if fits else tiles + sums), least)
