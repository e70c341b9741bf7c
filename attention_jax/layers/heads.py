"""How a layer of D features becomes heads and comes back: what the Flax modules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.base import checks
from attention_jax.base.typing import at_least_float32
from attention_jax.masks.intervals import indices

Array = jax.Array


class HeadSizes(NamedTuple):
    """N query heads and K key heads of a layer, and their depths Hq, Hk and V."""

    num_heads: int
    num_key_heads: int
    query_depth: int
    key_depth: int
    value_depth: int

    @classmethod
    def of(
        cls,
        operation: str,
        in_features: int,
        memory_features: int,
        *,
        num_heads: int,
        num_key_heads: int | None = None,
        query_depth: int | None = None,
        key_depth: int | None = None,
        value_depth: int | None = None,
        projections: bool = True,
        share_query_key: bool = False,
    ) -> HeadSizes:
        """Complete what is not given, and refuse what does not fit.

        Raises:
          ValueError: heads that do not divide, or options that exclude each other.
        """
        num_key_heads = num_heads if num_key_heads is None else num_key_heads
        checks.multiple(operation, "num_heads", num_heads, "num_key_heads", num_key_heads)
        given = (query_depth, key_depth, value_depth)
        if not projections:
            if given != (None, None, None) or share_query_key:
                raise ValueError(
                    f"{operation}: without projections the depths follow from the inputs and "
                    "nothing is shared; leave out query_depth, key_depth, value_depth and "
                    "share_query_key."
                )
            depth = checks.multiple(operation, "in_features", in_features, "num_heads", num_heads)
            memory_depth = checks.multiple(
                operation, "memory_features", memory_features, "num_key_heads", num_key_heads
            )
            return cls(num_heads, num_key_heads, depth, memory_depth, memory_depth)
        if query_depth is None:
            query_depth = checks.multiple(
                operation, "in_features", in_features, "num_heads", num_heads
            )
        key_depth = query_depth if key_depth is None else key_depth
        value_depth = query_depth if value_depth is None else value_depth
        if share_query_key:
            query = (in_features, num_heads, query_depth)
            key = (memory_features, num_key_heads, key_depth)
            if query != key:
                raise ValueError(
                    f"{operation}: share_query_key needs one shape for query and key, got "
                    f"(features, heads, depth) = {query} and {key}."
                )
        return cls(num_heads, num_key_heads, query_depth, key_depth, value_depth)


class Projected(NamedTuple):
    """A memory that has been projected: keys [B, S, K, Hk] and values [B, S, K, V]."""

    key: Array
    value: Array


class Projections(NamedTuple):
    """The way from x to heads x W_n^Q, m W_n^K and m W_n^V, and from their contexts back by W^O.

    `query`, `key`, `value`, `out`, `query_ln` and `key_ln` map arrays, or are None. `dtype` is
    what a cache keeps keys and values in, unless told otherwise.
    """

    name: str
    in_features: int
    memory_features: int
    sizes: HeadSizes
    query: Any
    key: Any
    value: Any
    out: Any
    query_ln: Any
    key_ln: Any
    position: Callable[[Array, Array], Array] | None
    combine: str
    dtype: Any

    def heads(
        self,
        query: Array,
        memory: Array | Projected | None = None,
        value: Array | None = None,
        positions: Array | None = None,
        memory_positions: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """Return queries [B, T, N, Hq], keys [B, S, K, Hk] and values [B, S, K, V].

        Raises:
          ValueError: a value or positions of a memory that has been projected without them.
        """
        if isinstance(memory, Projected):
            _refuse_too_late(self.name, value=value, memory_positions=memory_positions)
        if memory is None:
            memory = query
            memory_positions = positions if memory_positions is None else memory_positions
        queries = self.queries(query, positions)
        if not isinstance(memory, Projected):
            memory = self.memory(memory, value, memory_positions)
        return queries, memory.key, memory.value

    def queries(self, x: Array, positions: Array | None = None) -> Array:
        """Return the queries [B, T, N, Hq] of x [B, T, D]."""
        checks.axes(self.name, query=(x, "BTD"))
        checks.features(self.name, "query", x, self.in_features)
        heads = _apply(self.query, x, self.sizes.num_heads)
        heads = heads if self.query_ln is None else self.query_ln(heads)
        return place(self.position, heads, positions)

    def memory(
        self, memory: Array, value: Array | None = None, positions: Array | None = None
    ) -> Projected:
        """Return the keys [B, S, K, Hk] of a memory [B, S, D], and the values [B, S, K, V]."""
        value = memory if value is None else value
        checks.axes(self.name, memory=(memory, "BSD"), value=(value, "BSD"))
        checks.features(self.name, "memory", memory, self.memory_features)
        heads = _apply(self.key, memory, self.sizes.num_key_heads)
        heads = heads if self.key_ln is None else self.key_ln(heads)
        values = _apply(self.value, value, self.sizes.num_key_heads)
        return Projected(place(self.position, heads, positions), values)

    def join(self, context: Array) -> Array:
        """Join the heads of a context [B, T, N, V] and project: [B, T, out_features]."""
        if self.combine == "sum":
            context = sum_heads(context)
        elif self.out is None:
            context = concat_heads(context)
        return context if self.out is None else self.out(context)


def kept_dtype(dtype: Any, param_dtype: Any) -> Any:
    """Return what keys and values are kept in: the dtype of a layer's computation.

    Where it is not given, that of the parameters, or float32 if that is better: the input may be.

    >>> kept_dtype(None, jnp.bfloat16), kept_dtype(jnp.bfloat16, jnp.float32)
    (dtype('float32'), dtype(bfloat16))
    """
    return at_least_float32(param_dtype) if dtype is None else jnp.dtype(dtype)


def split_heads(x: Array, num_heads: int) -> Array:
    """Cut features into heads without a projection: [B, T, D] -> [B, T, N, D / N]."""
    return x.reshape(*x.shape[:-1], num_heads, -1)


def concat_heads(context: Array) -> Array:
    """Put heads side by side: [B, T, N, V] -> [B, T, N V] (Vaswani et al. 2017, section 3.2.2)."""
    return context.reshape(*context.shape[:-2], -1)


def sum_heads(context: Array) -> Array:
    """Add heads up: [B, T, N, V] -> [B, T, V]; concatenation whose W^O repeats one block."""
    return jnp.sum(context, axis=-2)


def place(
    position: Callable[[Array, Array], Array] | None, x: Array, positions: Array | None
) -> Array:
    """Apply `position(x [T, H], positions [T])`, such as a rotation, to every head.

    Args:
      position: the function of one head; None leaves x as it is.
      x: [B, T, N, H].
      positions: [T], or [B, T] where examples stand at different places; None is 0, 1, ...
    """
    if position is None:
        return x
    positions = indices(x.shape[1]) if positions is None else jnp.asarray(positions)
    by_head = jax.vmap(position, in_axes=(1, None), out_axes=1)
    return jax.vmap(by_head, in_axes=(0, 0 if positions.ndim == 2 else None))(x, positions)


def check_combine(operation: str, combine: str) -> str:
    """Return the way heads are joined.

    Raises:
      ValueError: neither "concat" nor "sum".
    """
    if combine not in ("concat", "sum"):
        raise ValueError(f"{operation}: combine must be 'concat' or 'sum', got {combine!r}.")
    return combine


def _refuse_too_late(operation: str, **options: Any) -> None:
    given = [name for name, option in options.items() if option is not None]
    if given:
        raise ValueError(
            f"{operation}: {' and '.join(given)} cannot be honoured, because the memory has been "
            "projected already; give the memory itself, or its positions to keys."
        )


def _apply(projection: Any, x: Array, num_heads: int) -> Array:
    return split_heads(x, num_heads) if projection is None else projection(x)
