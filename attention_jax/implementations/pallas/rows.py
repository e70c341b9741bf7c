"""The maps of rows of a score, which are done before its kernels."""

from __future__ import annotations

from typing import Any

import jax

from attention_jax.base.finite import finite, poison
from attention_jax.base.layout import laid_out_like
from attention_jax.base.matmul import Products
from attention_jax.base.typing import at_least_float32
from attention_jax.implementations.head import Head
from attention_jax.scores.composition import identity

Array = jax.Array


def with_rows_mapped(head: Head, products: Products) -> Head:
    """Return a head with the rows that its score maps, and a score without maps.

    A row that holds NaN or Inf is mapped to NaN, so that kernels find it. Where the score is a
    product of rows that is rounded, and so is its derivative, the rows are rounded as they are
    written: it is the same, and less to write and read.
    """
    score, operands = head.score, products.operands
    is_rounded = score.is_product and products.of_derivatives.operands == operands
    query, key = (
        x if of_row.func is identity.func else _mapped(of_row, x, operands if is_rounded else None)
        for of_row, x in ((score.query_map, head.query), (score.key_map, head.key))
    )
    score = score._replace(query_map=identity, key_map=identity)
    return head._replace(query=query, key=key, score=score)


def _mapped(of_row: Any, x: Array, dtype: Any) -> Array:
    """Return mapped rows, laid out as they were given."""
    wide = at_least_float32(x.dtype)
    rows = of_row(laid_out_like(finite(x), x).astype(wide)).astype(dtype or wide)
    return laid_out_like(rows + poison(x)[:, None].astype(rows.dtype), x)
