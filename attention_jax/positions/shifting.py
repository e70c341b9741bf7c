"""Shift scores and biases to the positions of their rows, as decoding with a cache needs it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.base.binding import BiasLike, Sliced, bind, function_of
from attention_jax.base.typing import AnyScore, Bias, PositionalScore
from attention_jax.masks.intervals import indices
from attention_jax.scores import separate
from attention_jax.scores.composition import is_positional, positional

Array = jax.Array


class Rows(NamedTuple):
    """The position of the first query, and those of the keys [S]; None where key j is at j."""

    start: Array
    keys: Array | None = None


def shifted_score(score: AnyScore | Sliced, rows: Rows) -> AnyScore | Sliced:
    """Return a score that evaluates its rows at their positions.

    A score that is not `positional` is returned as it is.

    >>> from attention_jax.positions import relative_key
    >>> score = bind(relative_key, table=jnp.arange(5.0)[:, None])
    >>> shifted = shifted_score(score, Rows(jnp.array(2)))
    >>> shifted(jnp.ones((1, 1)), jnp.ones((3, 1)))  # the query is at position 2
    Array([[1., 2., 3.]], dtype=float32)
    """
    parts = separate(function_of(score))
    if not is_positional(parts.pairs):
        return score
    pairs = bind(_shifted_pairs, pairs=parts.pairs, **_sliced(score, rows))
    return _like(score, parts._replace(pairs=pairs))


def shifted_bias(bias: BiasLike, rows: Rows, num_queries: int) -> BiasLike:
    """Return a bias, a function or an array of the whole sequence, at the positions of the rows."""
    if bias is None:
        return None
    if not isinstance(bias, Sliced) and not callable(bias):
        return shifted_array(bias, rows, num_queries)
    shifted = bind(_shifted_bias, bias=function_of(bias), **_sliced(bias, rows))
    return _like(bias, shifted)


def shifted_array(array: Array, rows: Rows, num_queries: int = 1) -> Array:
    """Take the rows of an array [..., T, S] of the whole sequence; an axis of size 1 stays.

    >>> shifted_array(jnp.arange(6.0).reshape(3, 2), Rows(jnp.array(1)), num_queries=2)
    Array([[2., 3.],
           [4., 5.]], dtype=float32)
    """
    for axis, positions in ((-2, rows.start + indices(num_queries)), (-1, rows.keys)):
        if positions is not None and array.ndim >= -axis and array.shape[axis] > 1:
            array = jnp.take(array, positions, axis=axis, mode="clip")
    return array


def _like(part: Any, function: Any) -> Any:
    return Sliced(function, part.axes) if _slices(part) else function


def _slices(part: Any) -> tuple[int, ...]:
    """Return the sizes of the leading axes of which each head has a slice; () where all share."""
    leaves = jax.tree.leaves(part)
    return leaves[0].shape[: len(part.axes)] if isinstance(part, Sliced) and leaves else ()


def _sliced(part: Any, rows: Rows) -> dict[str, Any]:
    """Return the positions, with the leading axes of the function's own parameters."""
    sizes = _slices(part)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*sizes, *x.shape)), rows)._asdict()


def _stand(rows_of_keys: Array | None, kv_idx: Array) -> Array:
    return kv_idx if rows_of_keys is None else rows_of_keys.at[kv_idx].get(mode="clip")


@positional
def _shifted_pairs(
    query: Array,
    key: Array,
    *,
    q_idx: Array,
    kv_idx: Array,
    pairs: PositionalScore,
    start: Array,
    keys: Array | None,
) -> Array:
    return pairs(query, key, q_idx=q_idx + start, kv_idx=_stand(keys, kv_idx))


def _shifted_bias(
    q_idx: Array, kv_idx: Array, bias: Bias, start: Array, keys: Array | None
) -> Array:
    return bias(q_idx + start, _stand(keys, kv_idx))
