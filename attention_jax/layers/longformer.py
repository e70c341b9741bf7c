"""Attention with global tokens that have projections of their own, in either Flax API."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.base import checks
from attention_jax.layers.multi_head import MultiHead
from attention_jax.masks import Lookup, Mask, MaskLike, as_mask
from attention_jax.masks.intervals import judge

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class RowsOf(Mask):
    """Some rows of a mask: query i is the one at positions[i]."""

    mask: Mask
    positions: Any
    example_rank: ClassVar[dict[str, int]] = {"positions": 1}

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        return judge(self.mask, Lookup(self.positions)[q_idx], kv_idx)


class LongformerLayer(NamedTuple):
    """Two layers with one output: of all tokens, and of the global ones."""

    local: MultiHead
    wide: MultiHead

    def __call__(
        self,
        query: Array,
        global_tokens: Array | None,
        *,
        mask: MaskLike,
        positions: Array | None,
        dropout: dict[str, Any],
    ) -> Array:
        """Return the output [B, T, out_features]: that of `wide` at the global tokens."""
        options: dict[str, Any] = {
            "functions": (None, None),
            "memory_positions": positions,
            "return_weights": False,
        }
        output, _ = self.local(
            query, None, None, mask=mask, positions=positions, options=dropout, **options
        )
        if global_tokens is None:
            return output
        name, (batch, length) = self.local.projections.name, query.shape[:2]
        tokens = jnp.asarray(global_tokens)
        tokens = jnp.broadcast_to(tokens, (batch, tokens.shape[-1])) if tokens.ndim < 2 else tokens
        checks.axes(name, query=(query, "BTD"), global_tokens=(tokens, "BG"))
        present = (tokens >= 0) & (tokens < length)
        at = jnp.where(present, tokens, 0)
        rows = jnp.take_along_axis(query, at[..., None], axis=1)
        if positions is not None:
            positions = jnp.broadcast_to(positions, (batch, length))
            positions = jnp.take_along_axis(positions, at, axis=1)
        else:
            positions = at
        if dropout:
            dropout = {**dropout, "dropout_key": jax.random.fold_in(dropout["dropout_key"], 1)}
        own, _ = self.wide(
            rows,
            query,
            None,
            mask=RowsOf(as_mask(mask), at),
            positions=positions,
            options=dropout,
            **options,
        )
        return jax.vmap(_with_rows)(output, jnp.where(present, at, length), own)


def _with_rows(output: Array, at: Array, rows: Array) -> Array:
    """Put rows in their places, but for those beyond the last."""
    return output.at[at].set(rows, mode="drop")
