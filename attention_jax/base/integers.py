"""Whole numbers of any dtype as int32, the dtype of an index.

Indices are int32 whatever the default integer is. A length of uint8 or of uint32 has no common
dtype with them under strict promotion, and the difference of two unsigned ones wraps around.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

_RANGE = np.iinfo(np.int32)


def as_int32(label: str, value: Any, *, is_name: bool = False) -> Any:
    """Return an array of integers as int32, one of NumPy as one of NumPy; all else as it is.

    Numbers that do not fit are known in NumPy. In an array of JAX the nearest that fits stands for
    them; or, where the number is a name that is only compared with others (`is_name`, as the id of
    a segment), the one of equal lowest 32 bits, so that names of 32 bits stay distinct.

    Raises:
      ValueError: a NumPy array holds a number that does not fit.

    >>> as_int32("Prefix.length", np.uint8(3)), as_int32("Prefix.length", 2.5)
    (np.int32(3), 2.5)
    """
    if not isinstance(value, np.ndarray | np.generic | jax.Array):
        return value
    dtype: Any = value.dtype
    if dtype == jnp.int32 or not jnp.issubdtype(dtype, jnp.integer):
        return value
    is_small = dtype.itemsize < 4
    if isinstance(value, jax.Array):
        if not (is_small or is_name):
            value = jnp.minimum(value, jnp.asarray(_RANGE.max, dtype))
            if jnp.issubdtype(dtype, jnp.signedinteger):
                value = jnp.maximum(value, jnp.asarray(_RANGE.min, dtype))
        return value.astype(jnp.int32)
    numbers: Any = np.ravel(value)
    wrong = numbers[(numbers < _RANGE.min) | (numbers > _RANGE.max)]
    if wrong.size:
        raise ValueError(f"{label} must hold numbers that fit int32, got {wrong[0]}.")
    return value.astype(np.int32)
