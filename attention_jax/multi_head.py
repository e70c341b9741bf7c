"""The computation of multi-head attention, whichever of the two Flax APIs holds its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from attention_jax import checks
from attention_jax.attention import attend
from attention_jax.cache import (
    KeyValueCache,
    View,
    attend_cached,
    extend,
    init,
    next_positions,
    view_of,
)
from attention_jax.heads import HeadSizes, concat_heads, place, split_heads, sum_heads

Array = jax.Array


class Projected(NamedTuple):
    """A memory that has been projected: keys [B, S, K, Hk] and values [B, S, K, V]."""

    key: Array
    value: Array


class MultiHead(NamedTuple):
    """A layer y = combine_n(attend(x W_n^Q, m W_n^K, m W_n^V)) W^O from the parts that it has.

    `query`, `key`, `value`, `out`, `query_ln` and `key_ln` map arrays, or are None; `score`,
    `bias` and `normalizer` return the bound function when called.
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
    score: Callable[[], Any]
    bias: Callable[[], Any] | None
    normalizer: Callable[[], Any]
    position: Callable[[Array, Array], Array] | None
    combine: str
    implementation: str | None

    def __call__(
        self,
        query: Array,
        memory: Array | Projected | None,
        value: Array | None,
        *,
        mask: Any,
        bias: Any,
        positions: Array | None,
        memory_positions: Array | None,
        dropout: dict[str, Any],
        return_weights: bool,
    ) -> tuple[Array, Array | None]:
        """Return the output [B, T, out_features] and, where asked for, the weights."""
        if memory is None and memory_positions is None:
            memory_positions = positions
        heads = self.project_query(query, positions)
        if not isinstance(memory, Projected):
            memory = query if memory is None else memory
            memory = self.project_memory(memory, value, memory_positions)
        result = attend(
            heads,
            *memory,
            **self.functions(bias),
            mask=mask,
            **dropout,
            implementation=self.implementation,
            return_weights=return_weights,
        )
        context, weights = result if return_weights else (result, None)
        return self.join(context), weights

    def decode(
        self,
        query: Array,
        cache: KeyValueCache,
        *,
        mask: Any,
        bias: Any,
        count: Any,
        return_weights: bool,
    ) -> tuple[Any, ...]:
        """Return the output [B, T, out_features], the next cache and, if asked for, the weights."""
        positions = next_positions(cache, query.shape[1])
        heads = self.project_query(query, positions)
        cache, view = extend(cache, *self.project_memory(query, None, positions), count)
        output, *weights = self._attend_view(heads, view, bias, mask, return_weights)
        return output, cache, *weights

    def decode_memory(
        self,
        query: Array,
        memory: Array | Projected,
        cache: KeyValueCache,
        *,
        mask: Any,
        bias: Any,
        return_weights: bool,
    ) -> tuple[Any, ...]:
        """Return the output for tokens that come after those in the cache, and the weights."""
        heads = self.project_query(query, next_positions(cache, query.shape[1]))
        if not isinstance(memory, Projected):
            memory = self.project_memory(memory)
        view = view_of(memory, cache, query.shape[1])
        return self._attend_view(heads, view, bias, mask, return_weights)

    def empty_cache(self, batch: int, capacity: int, **options: Any) -> KeyValueCache:
        """Return an empty cache for `decode`."""
        sizes = (self.sizes.num_key_heads, self.sizes.key_depth, self.sizes.value_depth)
        return init(batch, capacity, *sizes, **options)

    def project_query(self, query: Array, positions: Array | None = None) -> Array:
        """Return the queries [B, T, N, Hq]."""
        checks.axes(self.name, query=(query, "BTD"))
        checks.features(self.name, "query", query, self.in_features)
        heads = _apply(self.query, query, self.sizes.num_heads)
        heads = heads if self.query_ln is None else self.query_ln(heads)
        return place(self.position, heads, positions)

    def project_memory(
        self, memory: Array, value: Array | None = None, positions: Array | None = None
    ) -> Projected:
        """Return the keys [B, S, K, Hk] and the values [B, S, K, V]."""
        value = memory if value is None else value
        checks.axes(self.name, memory=(memory, "BSD"), value=(value, "BSD"))
        checks.features(self.name, "memory", memory, self.memory_features)
        heads = _apply(self.key, memory, self.sizes.num_key_heads)
        heads = heads if self.key_ln is None else self.key_ln(heads)
        values = _apply(self.value, value, self.sizes.num_key_heads)
        return Projected(place(self.position, heads, positions), values)

    def functions(self, bias: Any = None) -> dict[str, Any]:
        """Return score, bias and normalizer with their parameters bound, as `attend` takes them."""
        if bias is None and self.bias is not None:
            bias = self.bias()
        return {"score": self.score(), "bias": bias, "normalizer": self.normalizer()}

    def join(self, context: Array) -> Array:
        """Join the heads of a context [B, T, N, V] and project: [B, T, out_features]."""
        if self.combine == "sum":
            context = sum_heads(context)
        elif self.out is None:
            context = concat_heads(context)
        return context if self.out is None else self.out(context)

    def _attend_view(
        self, heads: Array, view: View, bias: Any, mask: Any, return_weights: bool
    ) -> tuple[Any, ...]:
        result = attend_cached(
            heads,
            view,
            mask=mask,
            **self.functions(bias),
            implementation=self.implementation,
            return_weights=return_weights,
        )
        context, *weights = result if return_weights else (result,)
        return self.join(context), *weights


def _apply(projection: Any, x: Array, num_heads: int) -> Array:
    return split_heads(x, num_heads) if projection is None else projection(x)
