"""Attention with global tokens that have projections of their own."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from attention_jax import scores
from attention_jax.layers.heads import head_sizes, linear_shapes
from attention_jax.layers.longformer import LongformerLayer
from attention_jax.layers.multi_head import MultiHead
from attention_jax.linen.heads import MultiHeadLayer, dropout_options
from attention_jax.masks import MaskLike
from attention_jax.normalizers import softmax

Array = jax.Array


class LongformerAttention(MultiHeadLayer, kw_only=True):
    r"""Multi-head attention whose global tokens have projections of their own.

    y = combine_n(attend(x W_n^Q, x W_n^K, x W_n^V)) W^O, and in the rows of global tokens
    combine_n(attend(x W'_n^Q, x W'_n^K, x W'_n^V)) W^O.

    The twin of `attention_jax.nnx.LongformerAttention`, where its fields are described.

    Beltagy, Peters and Cohan 2020, section 3.1 ("linear projections for global attention").

    >>> import jax.numpy as jnp
    >>> from attention_jax import masks
    >>> layer, x = LongformerAttention(4, 16), jnp.ones((2, 9, 16))
    >>> call = {"mask": masks.longformer(4, tokens=1), "global_tokens": jnp.array([0])}
    >>> layer.init_with_output(jax.random.key(0), x, **call)[0].shape
    (2, 9, 16)
    """

    score: Any = scores.scaled_dot
    dropout_rate: float = 0.0
    deterministic: bool = False
    implementation: str | None = None

    def __call__(
        self,
        query: Array,
        *,
        global_tokens: Array | None = None,
        mask: MaskLike = None,
        positions: Array | None = None,
        deterministic: bool | None = None,
    ) -> Array:
        """Attend from every token to those that the mask allows, as the twin does."""
        dropout = dropout_options(self, deterministic)
        options = {"mask": mask, "positions": positions, "dropout": dropout}
        layer = self._layer()
        if self.is_initializing():  # the parameters are the same without global tokens
            layer.wide.projections.heads(query, positions=positions)
        return layer(query, global_tokens, **options)

    @nn.compact
    def _layer(self) -> LongformerLayer:
        """Return the computation with this module's parameters."""
        score = self.score
        local = MultiHead(
            self._projections(), lambda: score, None, lambda: softmax, self.implementation
        )
        shapes = linear_shapes(self, head_sizes(type(self).__name__, self))
        own = {
            name: self.linear(shape, f"{name}_global")
            for name, shape in shapes.items()
            if name != "out"
        }
        if self.share_query_key:
            own["key"] = own["query"]
        wide = local.projections._replace(**own)
        return LongformerLayer(local, local._replace(projections=wide))
