"""Multi-head attention with any score, mask, bias, normalizer and position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from attention_jax import scores
from attention_jax.base.binding import BiasLike, Sliced
from attention_jax.base.parameters import Initializer, across_heads
from attention_jax.base.typing import AnyScore
from attention_jax.layers.heads import Learnable, ProjectedMemory
from attention_jax.layers.multi_head import Extras, MultiHead, MultiHeadMethods
from attention_jax.linen.bound import Bound
from attention_jax.linen.heads import MultiHeadLayer, dropout_options
from attention_jax.masks import MaskLike
from attention_jax.normalizers import softmax
from attention_jax.statistics import Statistics

Array = jax.Array


class MultiHeadAttention(MultiHeadMethods, MultiHeadLayer, kw_only=True):
    r"""Multi-head attention: y = combine_n(attend(x W_n^Q, m W_n^K, m W_n^V)) W^O.

    The twin of `attention_jax.nnx.MultiHeadAttention`, where its fields are described, with the
    same parameters; `qk_norm` is `nn.RMSNorm` or `nn.LayerNorm`, and a bias that is a module
    cannot be used (declare its parameters with `attention_jax.learned`). What is
    sown is in the collection "intermediates".

    Vaswani et al. 2017, section 3.2.2; Ainslie et al. 2023 (grouped-query); Henry et al. 2020
    and Dehghani et al. 2023, section 2 (norm of query and key); Kitaev et al. 2020 (shared).

    >>> import jax.numpy as jnp
    >>> x = jnp.ones((2, 5, 16))
    >>> layer = MultiHeadAttention(4, 16, num_key_heads=2, score=scores.additive)
    >>> y, variables = layer.init_with_output(jax.random.key(0), x)
    >>> y.shape, variables["params"]["key"]["kernel"].shape
    ((2, 5, 16), (16, 2, 4))
    """

    score: Learnable = scores.scaled_dot
    attention_size: int | Sequence[int] | None = None
    share_score: bool = False
    initializers: Mapping[str, Initializer] | None = None
    bias: Learnable | None = None
    normalizer: Learnable = softmax
    mix_logits: Learnable | None = None
    mix_weights: Learnable | None = None
    dropout_rate: float = 0.0
    deterministic: bool = False
    implementation: str | None = None
    sequence_axis: str | None = None

    @nn.compact
    def _layer(self) -> MultiHead:
        """Return the computation with this module's parameters: projections, score, join."""
        projections = self._projections()
        each_head: dict[str, Any] = {"num_heads": self.num_heads, "param_dtype": self.param_dtype}
        score = Bound(
            self.score,
            query_depth=projections.sizes.query_depth,
            key_depth=projections.sizes.key_depth,
            attention_size=self.attention_size,
            num_heads=None if self.share_score else self.num_heads,
            initializers=self.initializers,
            param_dtype=self.param_dtype,
            name="score",
        )
        bias = None if self.bias is None else Bound(self.bias, **each_head, name="bias")
        normalizer = Bound(
            self.normalizer,
            query_depth=projections.sizes.query_depth,
            key_depth=projections.sizes.key_depth,
            **each_head,
            name="normalizer",
        )
        maps = {"mix_logits": self.mix_logits, "mix_weights": self.mix_weights}
        sizes = self.num_heads, projections.sizes.query_depth
        together = {
            name: Bound(across_heads(head_map, *sizes), param_dtype=self.param_dtype, name=name)
            for name, head_map in maps.items()
            if head_map is not None
        }
        return MultiHead(
            projections,
            score.resolve,
            None if bias is None else bias.resolve,
            normalizer.resolve,
            self.implementation,
            self.sequence_axis,
            **{name: head_map.resolve for name, head_map in together.items()},
        )

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
        return_weights: bool = False,
        sow_weights: bool = False,
        statistics: Statistics | None = None,
        sow_statistics: bool = False,
        tile_sizes: tuple[int, int] | None = None,
    ) -> Any:
        """Attend from the query to the memory, or to itself, as the twin does."""
        extras = Extras(return_weights, sow_weights, statistics, sow_statistics)
        layer = self._layer()
        if self.is_initializing():  # the parameters are the same with a score or bias of the call
            layer.functions()
        output, found = layer(
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
                **dropout_options(self, deterministic),
            },
            return_weights=return_weights or sow_weights,
        )
        if found is not None and sow_weights:
            self.sow("intermediates", "attention_weights", found.weights)
        if found is not None and sow_statistics:
            self.sow("intermediates", "attention_statistics", found.statistics)
        return extras.returned(output, found)
