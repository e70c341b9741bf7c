"""Relative positions: biases and score terms that depend on the distance of query and key.

They are functions of indices, so a tile computes what it needs and nothing of size T x S is stored.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from attention_jax.base import checks
from attention_jax.base.binding import Sliced, bind, per_head, rule
from attention_jax.base.integers import as_int32
from attention_jax.base.parameters import (
    Learned,
    Parameter,
    initializer,
    learned,
    one_size,
    require_depths,
)
from attention_jax.scores.composition import positional

Array = jax.Array


def alibi(q_idx: Array, kv_idx: Array, slope: Array) -> Array:
    r"""Linear bias: b_ij = -slope |i - j|.

    Args:
      q_idx: [T, 1].
      kv_idx: [1, S].
      slope: of this head, [].

    Returns:
      [T, S].

    Press, Smith and Lewis 2022, section 3 (there with a causal mask, where |i - j| = i - j).

    >>> alibi(jnp.array([[2]]), jnp.array([[0, 1, 2]]), jnp.array(0.5)) + 0.0
    Array([[-1. , -0.5,  0. ]], dtype=float32)
    """
    slope = jnp.asarray(slope)
    return -slope * jnp.abs(_distance(q_idx, kv_idx)).astype(slope.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
    r"""One slope a head: 2^(-8 n / N) for n = 1 ... N, where N is a power of two.

    Else those of the power below, and then every other one of the power above, as in the
    paper's code. In float64; `attend` computes in the dtype of the query.

    Raises:
      ValueError: fewer than one head.

    Press, Smith and Lewis 2022, section 3.

    >>> alibi_slopes(4)
    array([0.25 , 0.0625 , 0.015625 , 0.00390625])
    """
    if num_heads < 1:
        raise ValueError(f"alibi_slopes: num_heads must be 1 or more, got {num_heads}.")
    num_heads = int(num_heads)
    below = 2 ** (num_heads.bit_length() - 1)

    def geometric(heads: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, heads + 1) / heads)

    between = geometric(2 * below)[0::2][: num_heads - below]
    return np.concatenate([geometric(below), between])


def alibi_bias(num_heads: int) -> Sliced:
    """`alibi` with the slopes of N heads, for `bias=`.

    >>> from attention_jax import attend
    >>> x = jnp.ones((1, 3, 4, 2))
    >>> attend(x, x, x, bias=alibi_bias(4)).shape
    (1, 3, 4, 2)
    """
    return per_head(bind(alibi, slope=alibi_slopes(num_heads)))


def t5_bucket(
    distance: Array,
    num_buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = True,
) -> Array:
    r"""The bucket of a distance j - i: exact when near, logarithmic when far, shared beyond.

    With E = half of the buckets of a direction exact, |d| >= E falls into
    E + floor(log(|d| / E) / log(max_distance / E) (buckets - E)); the bounds are integers,
    compared exactly.

    Args:
      distance: j - i, key index less query index, any shape.
      num_buckets: in all, over both directions.
      max_distance: at and beyond which the last bucket is used.
      bidirectional: half of the buckets for keys after the query; else those share bucket 0.

    Returns:
      int32 in [0, num_buckets), of the same shape.

    Raises:
      ValueError: too few buckets, or a max_distance within the exact ones.

    Raffel et al. 2020 (T5), section 2.1, and its code.

    >>> t5_bucket(jnp.array([0, -1, 1, -7, -8, -12, -1000, 1000]))
    Array([ 0,  1, 17,  7,  8,  9, 15, 31], dtype=int32)
    """
    directions = 2 if bidirectional else 1
    buckets = num_buckets // directions
    exact = buckets // 2
    if num_buckets % directions or exact < 1 or max_distance <= exact:
        raise ValueError(
            f"t5_bucket: needs at least {2 * directions} buckets, a multiple of {directions}, and "
            f"a max_distance beyond the {exact} exact ones, got {num_buckets} and {max_distance}."
        )
    buckets, exact, max_distance = int(buckets), int(exact), int(max_distance)
    steps = buckets - exact
    bounds = [*range(1, exact + 1)] + [
        next(
            n
            for n in itertools.count(exact)
            if n**steps * exact**step >= max_distance**step * exact**steps
        )
        for step in range(1, steps)
    ]
    distance = as_int32("t5_bucket: distance", distance)
    size = jnp.abs(distance) if bidirectional else jnp.maximum(-distance, 0)
    # Every whole number up to `exact` is a bound; a sum of comparisons runs in kernels, too.
    bucket = jnp.minimum(size, exact)
    for bound in bounds[exact:]:
        bucket = bucket + (size >= bound).astype(jnp.int32)
    return bucket + jnp.where(distance > 0, buckets, 0) if bidirectional else bucket


def t5_bias(q_idx: Array, kv_idx: Array, table: Array, **buckets: Any) -> Array:
    r"""Learned bias by bucket of distance: b_ij = table[bucket(j - i)].

    Args:
      q_idx: [T, 1].
      kv_idx: [1, S].
      table: of this head, [num_buckets].
      **buckets: max_distance and bidirectional of `t5_bucket`.

    Returns:
      [T, S].

    Raffel et al. 2020 (T5), section 2.1.

    >>> t5_bias(jnp.array([[1]]), jnp.array([[0, 1]]), jnp.array([0.5, 0.25, 0.0, 1.0]))
    Array([[0.25, 0.5 ]], dtype=float32)
    """
    return table[t5_bucket(_distance(q_idx, kv_idx), table.shape[0], **buckets)]


def learned_buckets(
    num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> Learned:
    """`t5_bias` with a table for each head, for `bias=` of a module.

    >>> learned_buckets().parameters["table"].shape
    (32,)
    """
    t5_bucket(jnp.array(0), num_buckets, max_distance, bidirectional)  # checks the numbers
    function = functools.partial(t5_bias, max_distance=max_distance, bidirectional=bidirectional)
    return learned(
        function, table=Parameter((num_buckets,), initializer(initializers.normal, 0.02))
    )


def grid_bias(q_idx: Array, kv_idx: Array, table: Array, width: int) -> Array:
    r"""Learned bias by offset on a 2-D grid: b_ij = table[row_j - row_i, column_j - column_i].

    Tokens are numbered row by row; offsets beyond the table share its edge. Under a window mask
    of M x M tokens a table [2M - 1, 2M - 1] holds all offsets.

    Args:
      q_idx: [T, 1].
      kv_idx: [1, S].
      table: of this head, [2 M_rows - 1, 2 M_columns - 1], the centre is offset zero.
      width: columns of the grid.

    Returns:
      [T, S].

    Raises:
      ValueError: a table of even size.

    Liu et al. 2021 (Swin), equation 4.

    >>> table = jnp.arange(9.0).reshape(3, 3)
    >>> grid_bias(jnp.array([[0]]), jnp.array([[0, 1, 2, 3]]), table, width=2)
    Array([[4., 5., 7., 8.]], dtype=float32)
    """
    if not all(size % 2 for size in table.shape):
        raise ValueError(f"grid_bias: the axes of table must be odd, got {table.shape}.")
    rows, columns = (size // 2 for size in table.shape)
    q_idx, kv_idx = as_int32("grid_bias: q_idx", q_idx), as_int32("grid_bias: kv_idx", kv_idx)
    width = as_int32("grid_bias: width", width)
    row = jnp.clip(kv_idx // width - q_idx // width, -rows, rows)
    column = jnp.clip(kv_idx % width - q_idx % width, -columns, columns)
    return table[row + rows, column + columns]


def learned_grid(window: tuple[int, int], width: int) -> Learned:
    """`grid_bias` for windows of M_rows x M_columns, a table for each head, for `bias=`.

    Raises:
      ValueError: a window or width below 1.

    >>> learned_grid((4, 4), width=8).parameters["table"].shape
    (7, 7)
    """
    if min(*window, width) < 1:
        raise ValueError(
            f"learned_grid: window and width must be 1 or more, got {window} and {width}."
        )
    shape = (2 * window[0] - 1, 2 * window[1] - 1)
    function = functools.partial(grid_bias, width=width)
    return learned(
        function, table=Parameter(shape, initializer(initializers.truncated_normal, 0.02))
    )


@positional
def relative_key(query: Array, key: Array, table: Array, *, q_idx: Array, kv_idx: Array) -> Array:
    r"""Relative keys: e_ij = q_i . (k_j + a_clip(j - i)) / sqrt(H), distances clipped to +-k.

    Args:
      query: [T, H].
      key: [S, H].
      table: a, [2k + 1, H]; row k is distance zero.
      q_idx: positions of the queries, [T].
      kv_idx: positions of the keys, [S].

    Returns:
      Logits [T, S]; the largest other array is [T, 2k + 1].

    Raises:
      ShapeError: depths that differ, or a table of another depth.

    Shaw, Uszkoreit and Vaswani 2018, equations 2, 4 and 5.

    >>> one = jnp.ones((1, 1))
    >>> score = bind(relative_key, table=jnp.array([[-1.0], [0.0], [1.0]]))
    >>> score(one, one, q_idx=jnp.array([5]), kv_idx=jnp.array([9]))
    Array([[2.]], dtype=float32)
    """
    sizes = checks.axes("relative_key", query=(query, "TH"), key=(key, "SH"), table=(table, "RH"))
    by_distance = query @ table.T
    term = jnp.take_along_axis(by_distance, _clipped(q_idx, kv_idx, table), axis=1)
    return (query @ key.T + term) / jnp.asarray(max(sizes["H"], 1) ** 0.5, query.dtype)


def relative_values(weights: Array, q_idx: Array, kv_idx: Array, table: Array) -> Array:
    r"""Relative values, a term of the context: sum_j w_ij a_clip(j - i), distances clipped to +-k.

    Args:
      weights: [T, S].
      q_idx: positions of the queries, [T].
      kv_idx: positions of the keys, [S].
      table: a, [2k + 1, V]; row k is distance zero.

    Returns:
      [T, V], by way of the weight at each distance, [T, 2k + 1].

    Raises:
      ShapeError: weights or table with other axes.

    Shaw, Uszkoreit and Vaswani 2018, equation 3.

    >>> table = jnp.array([[-1.0], [0.0], [1.0]])
    >>> relative_values(jnp.array([[0.25, 0.75]]), jnp.array([0]), jnp.array([0, 1]), table)
    Array([[0.75]], dtype=float32)
    """
    checks.axes("relative_values", weights=(weights, "TS"), table=(table, "RV"))
    rows = jnp.arange(weights.shape[0])[:, None]
    at_distance = jnp.zeros((weights.shape[0], table.shape[0]), weights.dtype)
    at_distance = at_distance.at[rows, _clipped(q_idx, kv_idx, table)].add(weights)
    return at_distance @ table


@rule(relative_key, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Parameter]:
    """Clip distances at `attention_size`, 16 unless given (Shaw et al. 2018, section 4.1)."""
    require_depths("relative_key", query_depth=query_depth)
    furthest = one_size("relative_key", attention_size, default=16, smallest=0)
    return {
        "table": Parameter(
            (2 * furthest + 1, query_depth), initializer(initializers.glorot_uniform)
        )
    }


def _clipped(q_idx: Array, kv_idx: Array, table: Array) -> Array:
    furthest = table.shape[0] // 2
    distance = _distance(q_idx[:, None], kv_idx[None, :])
    return jnp.clip(distance, -furthest, furthest) + furthest


def _distance(q_idx: Any, kv_idx: Any) -> Any:
    """Return j - i with a sign, whatever integers the indices are."""
    return as_int32("positions: kv_idx", kv_idx) - as_int32("positions: q_idx", q_idx)
