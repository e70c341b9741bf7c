"""Find which arrays of a mask or bias differ between examples and heads, and which are shared."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.base import checks
from attention_jax.masks.algebra import Mask, Table, owners

Array = jax.Array
Sizes = dict[str, int]


def of_array(label: str, array: Any, sizes: Sizes) -> tuple[Any, str]:
    """Drop the axes B and N of size 1 from an array that broadcasts to [B, N, T, S].

    Returns:
      The array, of rank 2 to 4, and the letters of the leading axes that it kept.

    Raises:
      ShapeError: it does not broadcast, or a mask may be read in two ways.

    >>> array, letters = of_array("attend: bias", jnp.ones((3, 1, 5)), dict(B=2, N=3, T=4, S=5))
    >>> array.shape, letters
    ((3, 1, 5), 'N')
    """
    shape = tuple(sizes[letter] for letter in "BNTS")
    if "bias" not in label:
        _check_what_is_meant(label, array.shape, sizes)
    padded = (1,) * (4 - array.ndim) + array.shape
    if array.ndim > 4 or any(got not in (1, full) for got, full in zip(padded, shape, strict=True)):
        is_padding = array.shape == (sizes["B"], sizes["S"]) and "bias" not in label
        advice = "; padding [B, S] is mask[:, None, None, :], or give masks.Lengths" * is_padding
        raise checks.ShapeError(
            f"{label} must broadcast to [B, N, T, S] = {shape}, got {array.shape}{advice}."
        )
    return _without_ones(array.reshape(padded), "BN")


def _check_what_is_meant(label: str, shape: tuple[int, ...], sizes: Sizes) -> None:
    """Refuse a mask [B, S] that could be [T, S], and [B, T, S], which could be [N, T, S]."""
    batch, queries, keys = (sizes[letter] for letter in "BTS")
    if len(shape) == 3 and shape[0] > 1:
        raise checks.ShapeError(
            f"{label} of three axes, {shape}, may differ between examples or between heads; write "
            "mask[:, None] for [B, 1, T, S], or mask[None] for [1, N, T, S]."
        )
    if shape == (batch, keys) and batch == queries > 1:
        raise checks.ShapeError(
            f"{label} of shape {shape} may be padding [B, S] or pairs [T, S], since B = T = "
            f"{batch}; write mask[:, None, None, :] for padding, or mask[None, None] for pairs."
        )


def of_mask(operation: str, mask: Mask, sizes: Sizes) -> tuple[Any, list[str]]:
    """Find the leading axes of every array in a mask.

    Returns:
      The mask with axes B and N of size 1 dropped, and for each of its leaves the letters of the
      leading axes that it kept.

    Raises:
      ShapeError: an array that does not fit the batch, the heads or the sequences.

    >>> from attention_jax.masks import Causal, Lengths
    >>> _, letters = of_mask("f", Causal() & Lengths(jnp.ones(2)), dict(B=2, N=3, T=4, S=5))
    >>> letters
    ['B']
    """
    if isinstance(mask, Table):
        allowed, letters = of_array(f"{operation}: mask", mask.allowed, sizes)
        return Table(allowed), [letters]
    fitted = [_of_field(operation, *owned, sizes) for owned in owners(mask)]
    structure = jax.tree.structure(mask)
    return structure.unflatten([array for array, _ in fitted]), [letters for _, letters in fitted]


def _of_field(
    operation: str, mask: Mask, name: str, coarse: int | None, array: Any, sizes: Sizes
) -> tuple[Any, str]:
    label = f"{operation}: {type(mask).__name__}.{name}"
    if coarse is not None:
        sizes = sizes | {axis: -(-sizes[axis] // coarse) for axis in "TS"}
        if isinstance(mask, Table):
            return of_array(label, array, sizes)
    rank = mask.example_rank.get(name, 0)
    extra = jnp.ndim(array) - rank
    letters = "BN"[: max(extra, 0)]
    expected = tuple(sizes[letter] for letter in letters)
    leading = jnp.shape(array)[:extra]
    if not 0 <= extra <= 2 or any(
        got not in (1, full) for got, full in zip(leading, expected, strict=True)
    ):
        raise checks.ShapeError(
            f"{label} may have the leading axes [B, N] = {(sizes['B'], sizes['N'])} beyond its "
            f"{rank} for one example, got shape {jnp.shape(array)}."
        )
    needed = {} if coarse is None else mask.entries(name, sizes["T"], sizes["S"])
    for number, length in needed.items():
        if jnp.shape(array)[extra] != length:
            places = "positions" if coarse == 1 else f"blocks of {coarse} positions"
            raise checks.ShapeError(
                f"{label} must hold an entry for each of the {number} = {length} {places}, got "
                f"shape {jnp.shape(array)}; build the mask for this length."
            )
    return _without_ones(array, letters)


def _without_ones(array: Any, letters: str) -> tuple[Any, str]:
    """Drop the leading axes `letters` that have size 1, which stands for all."""
    shape = jnp.shape(array)
    kept = [axis for axis in range(len(letters)) if shape[axis] != 1]
    if len(kept) == len(letters):
        return array, letters
    left = tuple(shape[axis] for axis in kept) + shape[len(letters) :]
    return array.reshape(left), "".join(letters[axis] for axis in kept)
