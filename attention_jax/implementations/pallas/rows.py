"""The maps of rows of a score, which are done before its kernels."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from attention_jax.base.finite import finite, poison
from attention_jax.base.layout import laid_out_like
from attention_jax.base.matmul import Products
from attention_jax.base.typing import at_least_float32
from attention_jax.implementations.head import Head
from attention_jax.scores.composition import Separated, identity, project_rows

Array = jax.Array


def with_rows_mapped(head: Head, products: Products) -> Head:
    """Return a head with the rows that its score maps, and a score without maps.

    A row that holds NaN or Inf is mapped to NaN, so that kernels find it.
    """
    score, dtype = head.score, rounded_to(head.score, products)
    mapped = functools.partial(_mapped, dtype=dtype, precision=products.precision)
    query, key = (
        x if of_row.func is identity.func else mapped(of_row, x)
        for of_row, x in ((score.query_map, head.query), (score.key_map, head.key))
    )
    score = score._replace(query_map=identity, key_map=identity)
    return head._replace(query=query, key=key, score=score)


def rounded_to(score: Separated, products: Products) -> Any:
    """Return the dtype that mapped rows are rounded to as they are written, None if to none.

    Where the score is a product of rows that is rounded, and so is its derivative, it is the same,
    and less to write and read.
    """
    operands = products.operands
    is_rounded = score.is_product and products.of_derivatives.operands == operands
    return operands if is_rounded else None


def _mapped(of_row: Any, x: Array, dtype: Any, precision: str | None) -> Array:
    """Return mapped rows, laid out as they were given."""
    wide = at_least_float32(x.dtype)
    if of_row.func is project_rows:
        product = functools.partial(_product, precision=precision)
        rows = project_rows(x.astype(wide), *of_row.args, **of_row.keywords, multiply=product)
        return laid_out_like(rows.astype(dtype or wide), x)
    rows = of_row(laid_out_like(finite(x), x).astype(wide)).astype(dtype or wide)
    return laid_out_like(rows + poison(x)[:, None].astype(rows.dtype), x)


@functools.partial(jax.custom_jvp, nondiff_argnames=("precision",))
def _product(x: Array, weight: Array, precision: str | None) -> Array:
    """Return X W, in which a row of NaN or Inf has no finite number, nor any part in a derivative.

    So nothing needs to look for NaN in X, nor to write X without it: a product alone is written.
    """
    return jnp.matmul(x, weight, precision=precision)


@functools.partial(_product.defjvp, symbolic_zeros=True)
def _product_jvp(precision: str | None, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, weight), (of_x, of_weight) = primals, tangents
    multiply = functools.partial(jnp.matmul, precision=precision)
    product = _product(x, weight, precision)
    change = jnp.zeros_like(product)
    if not isinstance(of_x, SymbolicZero):
        change = change + multiply(of_x, weight)
    if not isinstance(of_weight, SymbolicZero):
        change = change + multiply(finite(x), of_weight)
    return product, change
