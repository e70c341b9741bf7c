"""The computation of multi-head attention, whichever of the two Flax APIs holds its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

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
from attention_jax.layers.heads import Projected, Projections

Array = jax.Array


class MultiHead(NamedTuple):
    """A layer y = combine_n(attend(x W_n^Q, m W_n^K, m W_n^V)) W^O from the parts that it has.

    `score`, `bias` and `normalizer` return the bound function when called.
    """

    projections: Projections
    score: Callable[[], Any]
    bias: Callable[[], Any] | None
    normalizer: Callable[[], Any]
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
        heads = self.projections.heads(query, memory, value, positions, memory_positions)
        result = attend(
            *heads,
            **self.functions(bias),
            mask=mask,
            **dropout,
            implementation=self.implementation,
            return_weights=return_weights,
        )
        context, weights = result[:2] if return_weights else (result, None)
        return self.projections.join(context), weights

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
        heads, key, value = self.projections.heads(query, positions=positions)
        cache, view = extend(cache, key, value, count)
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
        positions = next_positions(cache, query.shape[1])
        heads, key, value = self.projections.heads(query, memory, positions=positions)
        view = view_of((key, value), cache, query.shape[1])
        return self._attend_view(heads, view, bias, mask, return_weights)

    def empty_cache(
        self, batch: int, capacity: int, *, dtype: Any, **options: Any
    ) -> KeyValueCache:
        """Return an empty cache for `decode`."""
        sizes = self.projections.sizes
        depths = (sizes.num_key_heads, sizes.key_depth, sizes.value_depth)
        dtype = self.projections.dtype if dtype is None else dtype
        return init(batch, capacity, *depths, dtype=dtype, **options)

    def functions(self, bias: Any = None) -> dict[str, Any]:
        """Return score, bias and normalizer with their parameters bound, as `attend` takes them."""
        if bias is None and self.bias is not None:
            bias = self.bias()
        return {"score": self.score(), "bias": bias, "normalizer": self.normalizer()}

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
        context, *weights = result[:2] if return_weights else (result,)
        return self.projections.join(context), *weights
