"""Compare the links of attention weights with a gold alignment."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.base import checks

__all__ = ["AlignmentQuality", "alignment_quality", "links", "quality_of_counts"]

Array = jax.Array


class AlignmentQuality(NamedTuple):
    """Error rate, precision and recall of alignments, in 0..1; NaN where nothing is defined."""

    error_rate: Any
    precision: Any
    recall: Any


def links(weights: Array) -> Array:
    """Link each query to the key of its largest weight, the first of equal ones.

    Args:
      weights: [..., T, S].

    Returns:
      [..., T, S] boolean, one link in each row; none in a row of zeros.

    Raises:
      ShapeError: weights that are not floating point.

    >>> links(jnp.array([[0.1, 0.9], [0.5, 0.5], [0.0, 0.0]])).astype(int)
    Array([[0, 1],
           [1, 0],
           [0, 0]], dtype=int32)
    """
    checks.floating("links", weights=weights)
    best = jax.nn.one_hot(jnp.argmax(weights, axis=-1), weights.shape[-1], dtype=bool)
    return best & (weights > 0)


def alignment_quality(found: Array, sure: Array, possible: Array) -> AlignmentQuality:
    r"""Alignment error rate of found links A: AER = 1 - (|A and S| + |A and P|) / (|A| + |S|).

    Args:
      found: A, [..., T, S] boolean, as `links` makes them; without links of padding.
      sure: S, the sure links of the gold alignment, [..., T, S] boolean.
      possible: P, its possible links, which contain the sure ones, [..., T, S] boolean.

    Returns:
      Error rate, precision |A and P| / |A| and recall |A and S| / |S| over all that is given.

    Raises:
      ShapeError: shapes that differ.

    Och and Ney 2003, section 3.1.

    >>> gold = jnp.eye(2, dtype=bool)
    >>> quality = alignment_quality(jnp.array([[True, False], [True, False]]), gold, gold)
    >>> quality.error_rate, quality.recall
    (Array(0.5, dtype=float32), Array(0.5, dtype=float32))
    """
    if not found.shape == sure.shape == possible.shape:
        raise checks.ShapeError(
            "alignment_quality: found, sure and possible must have one shape [..., T, S], got "
            f"{found.shape}, {sure.shape} and {possible.shape}."
        )
    return quality_of_counts(
        *(jnp.sum(which) for which in (found, sure, found & sure, found & possible))
    )


def quality_of_counts(found: Any, sure: Any, in_sure: Any, in_possible: Any) -> AlignmentQuality:
    """Return the quality of alignments from |A|, |S|, |A and S| and |A and P|.

    >>> quality_of_counts(found=4, sure=3, in_sure=2, in_possible=3).precision
    Array(0.75, dtype=float32)
    """
    found, sure, in_sure, in_possible = (
        jnp.asarray(count, float) for count in (found, sure, in_sure, in_possible)
    )
    return AlignmentQuality(
        1.0 - _ratio(in_sure + in_possible, found + sure),
        _ratio(in_possible, found),
        _ratio(in_sure, sure),
    )


def _ratio(part: Array, whole: Array) -> Array:
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1.0), jnp.nan)
