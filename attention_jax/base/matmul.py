"""Matrix products of a tile whose derivatives run as fast as the products themselves.

The derivative of a product contracts the long axis of a tile: G^T A. XLA's CPU compiler runs a
product with a transposed left side at less than half the speed of the others, and folds an
explicit transposition back into it. So the three products A B, A B^T and A^T B are primitives
here, closed under transposition, and A^T B is compiled from a copy of the smaller side.

Matrix units multiply half-precision numbers several times faster than float32 and add up in
float32. So the operands of a product may be rounded to the dtype that queries, keys and values were
given in, on the platforms where that is faster: a CPU multiplies float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from attention_jax.base import placement
from attention_jax.base.trees import varying_like

Array = jax.Array

SMALL_BATCHED = 2**18
"""XLA's CPU compiler joins a batched product to its explicit transposition, and aborts where such a
product is small. So a batch of products of at most so many multiplications is not transposed."""

_CONTRACTED = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Products:
    """How the products of a tile are computed, which is known while tracing.

    A rule of a custom derivative may be traced where another precision is in force than where
    attention was called, so it is carried.

    Attributes:
      precision: as `jax.default_matmul_precision` has it; None leaves it to JAX.
      operands: bfloat16 or float16, which accelerators round the operands to; None leaves them.
    """

    precision: str | None = None
    operands: Any = None

    @classmethod
    def of(cls, dtype: Any, precision: str | None) -> Products:
        """Return how to multiply what was given in `dtype`.

        A precision above the default one asks for products of unrounded numbers.

        >>> Products.of(jnp.bfloat16, None).operands
        dtype(bfloat16)
        >>> Products.of(jnp.bfloat16, "highest").operands is None
        True
        """
        dtype = jnp.dtype(dtype)
        is_half = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 2
        is_default = precision in (None, "default", "bfloat16")
        return cls(precision, dtype if is_half and is_default else None)

    @property
    def of_derivatives(self) -> Products:
        """The same for derivatives, which may leave the range of float16."""
        return dataclasses.replace(self, operands=_derivative(self.operands))


PLAIN = Products()
"""Products of operands as they are."""


def precision_in_force() -> str | None:
    """Return what `jax.default_matmul_precision` says where this is called."""
    return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]


def times(a: Array, b: Array, products: Products | None = None) -> Array:
    """Return A B for A [m, k] and B [k, n]; None multiplies in the precision that is in force."""
    return _multiply(a, b, "nn", products)


def times_transpose(a: Array, b: Array, products: Products | None = None) -> Array:
    """Return A B^T for A [m, k] and B [n, k]; None as for `times`."""
    return _multiply(a, b, "nt", products)


def transpose_times(a: Array, b: Array, products: Products | None = None) -> Array:
    """Return A^T B for A [k, m] and B [k, n]; None as for `times`."""
    return _multiply(a, b, "tn", products)


def computed_once(factor: Array, sums: Array, products: Products) -> tuple[Array, Array]:
    """Return both as they are, where an accelerator's compiler would compute the factor twice.

    The factor of a product and its sums are two kernels there, and each would compute what the
    factor is made of, such as exponentials, again. On a CPU the factor is written to memory anyway.
    """
    together = functools.partial(_together, dtype=products.operands or factor.dtype)
    return placement.on_cpu_or_not(_apart, together, factor, sums)


def _apart(factor: Array, sums: Array) -> tuple[Array, Array]:
    return factor, sums


def _together(factor: Array, sums: Array, dtype: Any) -> tuple[Array, Array]:
    rounded, sums = lax.optimization_barrier((factor.astype(dtype), sums))
    return rounded.astype(factor.dtype), sums


def _multiply(a: Array, b: Array, kind: str, products: Products | None) -> Array:
    """Bind the primitive; under `shard_map` both sides must vary over the same mesh axes.

    The precision is the one in force where the product is called, not where it is compiled.
    """
    how = dataclasses.asdict(products or Products(precision_in_force()))
    return _product.bind(varying_like(a, b), varying_like(b, a), kind=kind, **how)


def _plain(a: Array, b: Array, *, kind: str, precision: Any, operands: Any) -> Array:
    """Multiply the last two axes; those before them are vectorised."""
    del operands
    return _general(a, b, kind, precision)


def _rounded(a: Array, b: Array, *, kind: str, precision: Any, operands: Any) -> Array:
    """Multiply on an accelerator: rounded operands, added up in the dtype that they came in."""
    if operands is None or jnp.result_type(a, b) != jnp.float32:
        return _general(a, b, kind, precision)
    return _general(a.astype(operands), b.astype(operands), kind, None, jnp.float32)


def _general(a: Array, b: Array, kind: str, precision: Any, dtype: Any = None) -> Array:
    leading = tuple(range(a.ndim - 2))
    left, right = (axis + a.ndim - 2 for axis in _CONTRACTED[kind])
    numbers = ((left,), (right,)), (leading, leading)
    return lax.dot_general(a, b, numbers, precision, preferred_element_type=dtype)


def _copied(a: Array, b: Array, *, kind: str, precision: Any, operands: Any) -> Array:
    del operands
    sizes = (*a.shape[-2:], b.shape[-1])
    is_known = all(isinstance(size, int) for size in sizes)
    is_small = is_known and (math.prod(sizes) <= SMALL_BATCHED or 1 in sizes)
    if kind != "tn" or (a.ndim > 2 and is_small):
        return _general(a, b, kind, precision)
    columns = [size if isinstance(size, int) else math.inf for size in (a.shape[-1], b.shape[-1])]
    if columns[0] < columns[1]:  # a size that is a symbol (`jax.export`) counts as large
        return _kept_apart(a.mT, b, precision)
    return lax.optimization_barrier(_kept_apart(b.mT, a, precision)).mT


def _kept_apart(a: Array, b: Array, precision: Any) -> Array:
    """Return A B where A is a transposition that the compiler must not fold away."""
    return _general(lax.optimization_barrier(a), b, "nn", precision)


def _abstract(a: Any, b: Any, **how: Any) -> Any:
    return jax.make_jaxpr(functools.partial(_plain, **how))(a, b).out_avals[0]


def _batched(sides: Any, axes: Any, **how: Any) -> Any:
    """Vectorise; where one side is shared it is a larger product."""
    if None in axes:
        return _shared(sides, axes, **how), 0
    a, b = (jnp.moveaxis(x, axis, 0) for x, axis in zip(sides, axes, strict=True))
    return _product.bind(a, b, **how), 0


def _shared(sides: Any, axes: Any, **how: Any) -> Array:
    """Multiply where one side is shared: one product of more rows, if the rows are on the left."""
    a, b = sides
    is_split = any(part is not None for part in jax.typeof(a).sharding.spec)
    if axes[1] is not None or how["kind"] == "tn" or b.ndim > 2 or is_split:
        return jax.vmap(functools.partial(_plain, **how), axes)(a, b)
    a = jnp.moveaxis(a, axes[0], 0)
    rows = a.reshape(math.prod(a.shape[:-1]), a.shape[-1])
    product = _product.bind(rows, b, **how)
    return product.reshape(*a.shape[:-1], product.shape[-1])


def _derivative(operands: Any) -> Any:
    """Return what to round to in a derivative, which may leave the range of float16."""
    return None if operands is None or jnp.finfo(operands).maxexp < 127 else operands


def _toward_left(
    cotangent: Any, _: Any, b: Array, *, kind: str, operands: Any, **how: Any
) -> Array:
    how["operands"] = _derivative(operands)
    if kind == "tn":
        return _product.bind(b, cotangent, kind="nt", **how)
    return _product.bind(cotangent, b, kind="nt" if kind == "nn" else "nn", **how)


def _toward_right(
    cotangent: Any, a: Array, _: Any, *, kind: str, operands: Any, **how: Any
) -> Array:
    how["operands"] = _derivative(operands)
    if kind == "nt":
        return _product.bind(cotangent, a, kind="tn", **how)
    return _product.bind(a, cotangent, kind="tn" if kind == "nn" else "nn", **how)


_product = Primitive("tile_product")
_product.def_impl(_plain)
_product.def_abstract_eval(_abstract)
mlir.register_lowering(_product, mlir.lower_fun(_rounded, multiple_results=False))
mlir.register_lowering(_product, mlir.lower_fun(_copied, multiple_results=False), platform="cpu")
ad.defbilinear(_product, _toward_left, _toward_right)
batching.primitive_batchers[_product] = _batched
