"""Matrix products of a tile whose derivatives run as fast as the products themselves.

The derivative of a product contracts the long axis of a tile: G^T A. XLA's CPU compiler runs a
product with a transposed left side at less than half the speed of the others, and folds an
explicit transposition back into it. So the three products A B, A B^T and A^T B are primitives
here, closed under transposition, and A^T B is compiled from a copy of the smaller side.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from attention_jax.base.trees import varying_like

Array = jax.Array

_CONTRACTED = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}


def times(a: Array, b: Array) -> Array:
    """Return A B for A [m, k] and B [k, n]."""
    return _multiply(a, b, "nn")


def times_transpose(a: Array, b: Array) -> Array:
    """Return A B^T for A [m, k] and B [n, k]."""
    return _multiply(a, b, "nt")


def _multiply(a: Array, b: Array, kind: str) -> Array:
    """Bind the primitive; under `shard_map` both sides must vary over the same mesh axes.

    The precision is the one in force where the product is called, not where it is compiled.
    """
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return _product.bind(varying_like(a, b), varying_like(b, a), kind=kind, precision=precision)


def _plain(a: Array, b: Array, *, kind: str, precision: Any) -> Array:
    """Multiply the last two axes; those before them are vectorised."""
    leading = tuple(range(a.ndim - 2))
    left, right = (axis + a.ndim - 2 for axis in _CONTRACTED[kind])
    return lax.dot_general(a, b, (((left,), (right,)), (leading, leading)), precision)


def _copied(a: Array, b: Array, *, kind: str, precision: Any) -> Array:
    if kind != "tn":
        return _plain(a, b, kind=kind, precision=precision)
    if a.shape[-1] < b.shape[-1]:
        return _kept_apart(a.mT, b, precision)
    return lax.optimization_barrier(_kept_apart(b.mT, a, precision)).mT


def _kept_apart(a: Array, b: Array, precision: Any) -> Array:
    """Return A B where A is a transposition that the compiler must not fold away."""
    return _plain(lax.optimization_barrier(a), b, kind="nn", precision=precision)


def _abstract(a: Any, b: Any, **how: Any) -> Any:
    return jax.make_jaxpr(functools.partial(_plain, **how))(a, b).out_avals[0]


def _batched(operands: Any, axes: Any, **how: Any) -> Any:
    """Vectorise as the plain product where one side is shared: it is a larger product then."""
    if None in axes:
        return jax.vmap(functools.partial(_plain, **how), axes)(*operands), 0
    a, b = (jnp.moveaxis(x, axis, 0) for x, axis in zip(operands, axes, strict=True))
    return _product.bind(a, b, **how), 0


def _toward_left(cotangent: Any, _: Any, b: Array, *, kind: str, precision: Any) -> Array:
    if kind == "tn":
        return _product.bind(b, cotangent, kind="nt", precision=precision)
    kind = "nt" if kind == "nn" else "nn"
    return _product.bind(cotangent, b, kind=kind, precision=precision)


def _toward_right(cotangent: Any, a: Array, _: Any, *, kind: str, precision: Any) -> Array:
    if kind == "nt":
        return _product.bind(cotangent, a, kind="tn", precision=precision)
    kind = "tn" if kind == "nn" else "nn"
    return _product.bind(a, cotangent, kind=kind, precision=precision)


_product = Primitive("tile_product")
_product.def_impl(_plain)
_product.def_abstract_eval(_abstract)
mlir.register_lowering(_product, mlir.lower_fun(_plain, multiple_results=False))
mlir.register_lowering(_product, mlir.lower_fun(_copied, multiple_results=False), platform="cpu")
ad.defbilinear(_product, _toward_left, _toward_right)
batching.primitive_batchers[_product] = _batched
