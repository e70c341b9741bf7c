"""Chex checks whose messages name the operation, the tensor and the axis.

They cost nothing at run time (shapes are known while tracing) and `chex.disable_asserts()`
turns them off together with the caller's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.core
import jax.numpy as jnp
import numpy as np


class ShapeError(ValueError):
    """A tensor whose shape or dtype does not fit; the message says which and what to do."""


def axes(operation: str, /, **tensors: tuple[Any, str]) -> dict[str, int]:
    """Match each tensor against its axis letters and return the size behind every letter.

    Args:
      operation: name that the message begins with.
      **tensors: `name=(array, letters)`; equal letters must have equal sizes.

    Returns:
      The size of every letter.

    Raises:
      ShapeError: a list or tuple, a wrong number of axes, or two sizes for one letter.

    >>> axes("dot", query=(jnp.zeros((2, 3)), "TH"), key=(jnp.zeros((5, 3)), "SH"))
    {'T': 2, 'H': 3, 'S': 5}
    """
    sizes: dict[str, int] = {}
    origin: dict[str, str] = {}
    for name, (array, letters) in tensors.items():
        layout = f"[{', '.join(letters)}]"
        if isinstance(array, list | tuple):
            raise ShapeError(
                f"{operation}: {name} must be an array {layout}, got a {type(array).__name__}; "
                "convert it with jnp.asarray."
            )
        _raise_if_refused(
            lambda array=array, letters=letters: chex.assert_rank(array, len(letters)),
            f"{operation}: {name} must have the {len(letters)} axes {layout}, got shape "
            f"{jnp.shape(array)}; reshape it, or lift the function with jax.vmap.",
        )
        for axis, letter in enumerate(letters):
            size = jnp.shape(array)[axis]
            expected = sizes.setdefault(letter, size)
            origin.setdefault(letter, name)
            _raise_if_refused(
                lambda array=array, axis=axis, expected=expected: chex.assert_axis_dimension(
                    array, axis, expected
                ),
                f"{operation}: axis {letter} (number {axis}) of {name} {layout} must be "
                f"{expected} as in {origin[letter]}, got {size}; give both the same {letter}.",
            )
    return sizes


def features(operation: str, name: str, array: Any, expected: int) -> None:
    """Require the last axis of an input to be as large as a module was built for.

    Raises:
      ShapeError: it is not.

    >>> features("MultiHeadAttention", "query", jnp.zeros((2, 3, 8)), expected=8)
    """
    shape = jnp.shape(array)
    if not shape or shape[-1] != expected:
        raise ShapeError(
            f"{operation}: the last axis of {name} must be {expected}, as the module was built "
            f"for, got shape {shape}."
        )


def floating(operation: str, /, **tensors: Any) -> None:
    """Require floating-point tensors of one dtype.

    Raises:
      ShapeError: an integer tensor, or two dtypes.
      TypeError: an argument that is not an array.
    """
    first = None
    for name, array in tensors.items():
        if not hasattr(array, "dtype"):
            raise TypeError(
                f"{operation}: {name} must be an array, got {type(array).__name__}; convert it "
                f"with jnp.asarray({name})."
            )
        dtype = jnp.result_type(array)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise ShapeError(
                f"{operation}: {name} must be real, got {dtype}; attend to real and imaginary "
                f"parts as features, jnp.concatenate([{name}.real, {name}.imag], axis=-1)."
            )
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ShapeError(
                f"{operation}: {name} must be floating point, got {dtype}; "
                f"convert it with {name}.astype(jnp.float32)."
            )
        first = first or (name, dtype)
        if dtype != first[1]:
            raise ShapeError(
                f"{operation}: {name} must have the dtype of {first[0]}, {first[1]}, "
                f"got {dtype}; cast one of them."
            )


def multiple(operation: str, name: str, value: int, of_name: str, of: int) -> int:
    """Return value / of, which must be a whole number.

    Raises:
      ShapeError: value is not a multiple of `of`.
    """
    if of == 0 or value % of:
        raise ShapeError(
            f"{operation}: {name} must be a multiple of {of_name}, got {name} = {value} and "
            f"{of_name} = {of}."
        )
    return value // of


def at_least(operation: str, smallest: int, /, **arguments: Any) -> None:
    """Require whole numbers of a smallest size; traced ones are not compared.

    Raises:
      ValueError: a smaller number, or one that is not whole.
    """
    for name, value in arguments.items():
        dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
        if not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(f"{operation}: {name} must be a whole number, got {value}.")
        if not isinstance(value, jax.core.Tracer) and np.any(np.asarray(value) < smallest):
            raise ValueError(f"{operation}: {name} must be {smallest} or more, got {value}.")


def sizes(operation: str, /, **given: int | None) -> None:
    """Require sizes to be 1 or more; None is a size that is not given.

    Raises:
      ValueError: a size below 1, or one that is not whole.
    """
    at_least(operation, 1, **{name: size for name, size in given.items() if size is not None})


def size_or(default: int, operation: str, /, **size: int | None) -> int:
    """Return a size where it is given, else the default; neither may be 0.

    Raises:
      ValueError: a size below 1, or one that is not whole.

    >>> size_or(8, "additive", attention_size=None), size_or(8, "additive", attention_size=4)
    (8, 4)
    """
    ((name, given),) = size.items()
    chosen = default if given is None else given
    at_least(operation, 1, **{name: chosen})
    return chosen


def tokens(operation: str, count: Any, length: int, examples: tuple[int, ...]) -> jax.Array:
    """Return how many of `length` rows are tokens, one number or one for each example.

    Raises:
      ShapeError: another shape, or numbers that are not integers.
      ValueError: a negative count or one above `length`, where known outside `jit`.

    >>> tokens("extend", 3, length=5, examples=(2,))
    Array([3, 3], dtype=int32)
    """
    count = length if count is None else count
    count = np.asarray(count) if isinstance(count, list | tuple) else count
    dtype, shape = jnp.result_type(count), np.shape(count)
    fits = shape in ((), examples) or (shape == (1,) and examples)
    if not fits or not jnp.issubdtype(dtype, jnp.integer):
        each = (
            f", or one for each of the {examples[0]} examples"
            if examples
            else " for all examples, as they have one length; init with ragged=True for one each"
        )
        raise ShapeError(
            f"{operation}: count must be one integer{each}; got {dtype} of shape {shape}."
        )
    if not isinstance(count, jax.core.Tracer):
        known = np.asarray(count)
        if np.any((known < 0) | (known > length)):
            raise ValueError(
                f"{operation}: count must be from 0 to the {length} tokens given, got {count}."
            )
    return jnp.broadcast_to(jnp.asarray(count, jnp.int32), examples)


def _raise_if_refused(assertion: Callable[[], None], message: str) -> None:
    """Raise ShapeError with this message if a chex assertion fails."""
    try:
        assertion()
    except AssertionError:
        raise ShapeError(message) from None
