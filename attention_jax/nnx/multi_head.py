"""Multi-head attention with any score, mask, bias, normalizer and position."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax import scores
from attention_jax.base.binding import BiasLike, Sliced
from attention_jax.base.parameters import Initializer, across_heads
from attention_jax.base.typing import AnyScore
from attention_jax.layers.heads import Learnable, ProjectedMemory
from attention_jax.layers.multi_head import Extras, MultiHead, MultiHeadMethods
from attention_jax.masks import MaskLike
from attention_jax.nnx.bound import Bound
from attention_jax.nnx.heads import MultiHeadLayer, dropout_options
from attention_jax.normalizers import softmax
from attention_jax.statistics import Statistics

Array = jax.Array


class MultiHeadAttention(MultiHeadMethods, MultiHeadLayer):
    r"""Multi-head attention: y = combine_n(attend(x W_n^Q, m W_n^K, m W_n^V)) W^O.

    With the default arguments the parameters have the names and shapes of
    `flax.nnx.MultiHeadAttention`, and the result is the same.

    Args:
      num_heads: N.
      in_features: D of the queries' input.
      score: any score; the parameters that it declares are created here, for each head.
      attention_size: A, where the score has a size to choose.
      share_score: let all heads share the score's parameters.
      initializers: of the score's parameters, by name, instead of its paper's.
      bias: added to the logits, a function (q_idx, kv_idx) -> numbers of one head; what it
        declares is created here for each head.
      normalizer: from logits to weights; what it declares is created here for each head.
      mix_logits: a map across heads before it (`attention_jax.head_maps`); what it declares is
        created here for all heads together.
      mix_weights: likewise after it; `num_value_heads` and `num_context_heads` say the number of
        heads where it changes it.
      dropout_rate: of the weights.
      deterministic: True leaves dropout out; `model.train()` and `model.eval()` set it.
      implementation: of `attend`; the method of `parallel.attend` with `sequence_axis`.
      sequence_axis: the axis of the mesh (`jax.set_mesh`) that splits the sequence, or None.
      param_dtype: of the parameters.
      rngs: the stream `params` draws the parameters, the stream `dropout` what is dropped.
      **options: of `attention_jax.layers.HeadOptions`: memory_features, out_features,
        num_key_heads, num_value_heads, num_context_heads, query_depth, key_depth, value_depth,
        position, qk_norm, joint_qk_norm, context_norm, context_scale, share_query_key, projections,
        combine, use_bias, kernel_init, bias_init and dtype.

    Raises:
      ValueError: heads that do not divide, a size below 1, or options that exclude each other.

    Vaswani et al. 2017, section 3.2.2; Ainslie et al. 2023 (grouped-query); Henry et al. 2020
    and Dehghani et al. 2023, section 2 (norm of query and key); Kitaev et al. 2020 (shared).

    >>> x = jnp.ones((2, 5, 16))
    >>> layer = MultiHeadAttention(4, 16, num_key_heads=2, score=scores.additive, rngs=nnx.Rngs(0))
    >>> y = nnx.jit(lambda layer, x: layer(x))(layer, x)
    >>> y.shape, layer.key.kernel.shape, layer.score.key_weight.shape
    ((2, 5, 16), (16, 2, 4), (4, 4, 4))
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        score: Learnable = scores.scaled_dot,
        attention_size: int | Sequence[int] | None = None,
        share_score: bool = False,
        initializers: Mapping[str, Initializer] | None = None,
        bias: Learnable | None = None,
        normalizer: Learnable = softmax,
        mix_logits: Learnable | None = None,
        mix_weights: Learnable | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        implementation: str | None = None,
        sequence_axis: str | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        self.dropout_rate = dropout_rate
        self.deterministic = deterministic
        self.implementation = implementation
        self.sequence_axis = sequence_axis
        self.rngs = rngs.dropout.fork() if dropout_rate else None
        super().__init__(num_heads, in_features, param_dtype=param_dtype, rngs=rngs, **options)
        drawn: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.score = Bound(
            score,
            query_depth=self.sizes.query_depth,
            key_depth=self.sizes.key_depth,
            attention_size=attention_size,
            num_heads=None if share_score else num_heads,
            initializers=initializers,
            **drawn,
        )
        self.bias = nnx.data(None)
        if bias is not None:
            self.bias = Bound(bias, num_heads=num_heads, **drawn)
        self.normalizer = Bound(
            normalizer,
            query_depth=self.sizes.query_depth,
            key_depth=self.sizes.key_depth,
            num_heads=num_heads,
            **drawn,
        )
        self.mix_logits = self.mix_weights = nnx.data(None)
        for name, head_map in {"mix_logits": mix_logits, "mix_weights": mix_weights}.items():
            if head_map is not None:
                declared = across_heads(head_map, num_heads, self.sizes.query_depth)
                setattr(self, name, Bound(declared, **drawn))

    def __call__(
        self,
        query: Array,
        memory: Array | ProjectedMemory | None = None,
        value: Array | None = None,
        *,
        mask: MaskLike = None,
        bias: BiasLike = None,
        score: AnyScore | Sliced | None = None,
        positions: Array | None = None,
        memory_positions: Array | None = None,
        order: Any = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        return_weights: bool = False,
        sow_weights: bool = False,
        statistics: Statistics | None = None,
        sow_statistics: bool = False,
        tile_sizes: tuple[int, int] | None = None,
    ) -> Any:
        """Attend from the query to the memory, or to itself.

        Args:
          query: [B, T, in_features].
          memory: [B, S, memory_features] for keys and values, or what `keys` made of it; the query
            unless given.
          value: [B, S, memory_features], for values; the memory unless given.
          mask: as in `attend`. True = may attend.
          bias: as in `attend`, instead of the module's own.
          score: likewise.
          positions: of the queries, [T] or [B, T]; 0, 1, ... or `order` unless given.
          memory_positions: of the keys; as `positions` for self-attention.
          order: with `sequence_axis`, [T]: row i of the query is position order[i] of the sequence,
            as `parallel.deal` deals them; a pair with that of the memory, if it has one.
          deterministic: instead of the module's own.
          rngs: for dropout, instead of the module's own.
          return_weights: also return the weights [B, N, T, S], after dropout.
          sow_weights: leave them as `nnx.Intermediate` "attention_weights".
          statistics: also return these, as in `attend`, which need no weights to be held.
          sow_statistics: leave them as `nnx.Intermediate` "attention_statistics" instead.
          tile_sizes: as in `attend`.

        Returns:
          [B, T, out_features]; with it weights and statistics, in this order, where asked for.

        Raises:
          ShapeError: inputs that do not fit each other or the module.
          ValueError: an argument out of range, or something the implementation cannot do.
        """
        extras = Extras(return_weights, sow_weights, statistics, sow_statistics)
        output, found = self._layer()(
            query,
            memory,
            value,
            mask=mask,
            functions=(score, bias),
            positions=positions,
            memory_positions=memory_positions,
            order=order,
            options={
                "tile_sizes": tile_sizes,
                **extras.options,
                **dropout_options(self, deterministic, rngs),
            },
            return_weights=return_weights or sow_weights,
        )
        if found is not None and sow_weights:
            self.sow(nnx.Intermediate, "attention_weights", found.weights)
        if found is not None and sow_statistics:
            self.sow(nnx.Intermediate, "attention_statistics", found.statistics)
        return extras.returned(output, found)

    def _layer(self) -> MultiHead:
        """Return the computation with this module's parameters: projections, score, join."""
        score, bias, normalizer = self.score, self.bias, self.normalizer
        maps = self.mix_logits, self.mix_weights
        return MultiHead(
            self._projections(),
            lambda: score.resolved,
            None if bias is None else lambda: bias.resolved,
            lambda: normalizer.resolved,
            self.implementation,
            self.sequence_axis,
            *(None if bound is None else functools.partial(_resolved, bound) for bound in maps),
        )


def _resolved(bound: Bound) -> Any:
    return bound.resolved
