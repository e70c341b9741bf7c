"""Attention with global tokens that have projections of their own."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from attention_jax import scores
from attention_jax.layers.longformer import LongformerLayer
from attention_jax.layers.multi_head import MultiHead
from attention_jax.masks import MaskLike
from attention_jax.nnx.bound import held
from attention_jax.nnx.heads import MultiHeadLayer, dropout_options
from attention_jax.normalizers import softmax

Array = jax.Array


class LongformerAttention(MultiHeadLayer):
    r"""Multi-head attention whose global tokens have projections of their own.

    y = combine_n(attend(x W_n^Q, x W_n^K, x W_n^V)) W^O, and in the rows of global tokens
    combine_n(attend(x W'_n^Q, x W'_n^K, x W'_n^V)) W^O.

    Args:
      num_heads: N.
      in_features: D of the input.
      score: any score without parameters.
      dropout_rate: of the weights.
      deterministic: True leaves dropout out; `model.train()` and `model.eval()` set it.
      implementation: of `attend`.
      rngs: the stream `params` draws the parameters, the stream `dropout` what is dropped.
      **options: of `attention_jax.layers.HeadOptions`, such as `num_key_heads` or `use_bias`.

    Beltagy, Peters and Cohan 2020, section 3.1 ("linear projections for global attention").

    >>> from attention_jax import masks
    >>> import jax.numpy as jnp
    >>> layer, x = LongformerAttention(4, 16, rngs=nnx.Rngs(0)), jnp.ones((2, 9, 16))
    >>> layer(x, mask=masks.longformer(4, tokens=1), global_tokens=jnp.array([0])).shape
    (2, 9, 16)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        score: Any = scores.scaled_dot,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        implementation: str | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        self.dropout_rate = dropout_rate
        self.deterministic = deterministic
        self.implementation = implementation
        self.rngs = rngs.dropout.fork() if dropout_rate else None
        super().__init__(num_heads, in_features, rngs=rngs, **options)
        self.score = held(score)
        wide = MultiHeadLayer(num_heads, in_features, rngs=rngs, **options)
        self.query_global, self.key_global, self.value_global = wide.query, wide.key, wide.value

    def __call__(
        self,
        query: Array,
        *,
        global_tokens: Array | None = None,
        mask: MaskLike = None,
        positions: Array | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> Array:
        """Attend from every token to those that the mask allows.

        Args:
          query: [B, T, in_features].
          global_tokens: where the global tokens are, [G] or [B, G]; -1 stands for none. The mask
            says what they see and who sees them: `masks.longformer`, `masks.GlobalTokens`.
          mask: as in `attend`. True = may attend.
          positions: of the tokens, [T] or [B, T]; 0, 1, ... unless given.
          deterministic: instead of the module's own.
          rngs: for dropout, instead of the module's own.

        Returns:
          [B, T, out_features].

        Raises:
          ShapeError: inputs that do not fit each other or the module.
        """
        dropout = dropout_options(self, deterministic, rngs)
        options = {"mask": mask, "positions": positions, "dropout": dropout}
        return self._layer()(query, global_tokens, **options)

    def _layer(self) -> LongformerLayer:
        """Return the computation with this module's parameters."""
        local = MultiHead(
            self._projections(), lambda: self.score, None, lambda: softmax, self.implementation
        )
        own = {"query": self.query_global, "value": self.value_global}
        key = self.query_global if self.share_query_key else self.key_global
        wide = local.projections._replace(**own, key=key)
        return LongformerLayer(local, local._replace(projections=wide))
