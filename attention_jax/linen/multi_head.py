"""Multi-head attention with any score, mask, bias, normalizer and position."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers as standard

from attention_jax import scores
from attention_jax.cache import KeyValueCache
from attention_jax.heads import HeadSizes, check_combine
from attention_jax.linen.bound import Bound
from attention_jax.multi_head import MultiHead, Projected
from attention_jax.normalizers import softmax
from attention_jax.parameters import Initializer

Array = jax.Array


class MultiHeadAttention(nn.Module):
    r"""Multi-head attention: y = combine_n(attend(x W_n^Q, m W_n^K, m W_n^V)) W^O.

    The twin of `attention_jax.nnx.MultiHeadAttention`, where its fields are described, with the
    same parameters; `qk_norm` is `nn.RMSNorm` or `nn.LayerNorm`, and a bias that is a module
    cannot be used (declare its parameters with `attention_jax.parameters.learned`). Sown weights
    are in the collection "intermediates".

    Vaswani et al. 2017, section 3.2.2; Ainslie et al. 2023 (grouped-query); Henry et al. 2020
    and Dehghani et al. 2023, section 2 (norm of query and key); Kitaev et al. 2020 (shared).

    >>> x = jnp.ones((2, 5, 16))
    >>> layer = MultiHeadAttention(4, 16, num_key_heads=2, score=scores.additive)
    >>> y, variables = layer.init_with_output(jax.random.key(0), x)
    >>> y.shape, variables["params"]["key"]["kernel"].shape
    ((2, 5, 16), (16, 2, 4))
    """

    num_heads: int
    in_features: int
    memory_features: int | None = None
    out_features: int | None = None
    num_key_heads: int | None = None
    query_depth: int | None = None
    key_depth: int | None = None
    value_depth: int | None = None
    score: Any = scores.scaled_dot
    attention_size: int | Sequence[int] | None = None
    share_score: bool = False
    initializers: Mapping[str, Initializer] | None = None
    bias: Any = None
    normalizer: Any = softmax
    position: Callable[[Array, Array], Array] | None = None
    qk_norm: Callable[..., Any] | None = None
    share_query_key: bool = False
    projections: bool = True
    combine: str = "concat"
    use_bias: bool = True
    dropout_rate: float = 0.0
    deterministic: bool = False
    implementation: str | None = None
    kernel_init: Initializer = standard.glorot_uniform()
    bias_init: Initializer = standard.zeros
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def layer(self) -> MultiHead:
        """Return the computation with this module's parameters: projections, score, join."""
        name = type(self).__name__
        check_combine(name, self.combine)
        memory_features = self.memory_features or self.in_features
        sizes = HeadSizes.of(
            name,
            self.in_features,
            memory_features,
            num_heads=self.num_heads,
            num_key_heads=self.num_key_heads,
            query_depth=self.query_depth,
            key_depth=self.key_depth,
            value_depth=self.value_depth,
            projections=self.projections,
            share_query_key=self.share_query_key,
        )
        numbers = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        linear = functools.partial(
            nn.DenseGeneral,
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            **numbers,
        )
        query = key = value = out = query_ln = key_ln = bias = None
        if self.projections:
            query = linear((self.num_heads, sizes.query_depth), name="query")
            key = query
            if not self.share_query_key:
                key = linear((sizes.num_key_heads, sizes.key_depth), name="key")
            value = linear((sizes.num_key_heads, sizes.value_depth), name="value")
            axis = (-2, -1) if self.combine == "concat" else -1
            out = linear(self.out_features or self.in_features, axis=axis, name="out")
        if self.qk_norm:
            query_ln = self.qk_norm(**numbers, name="query_ln")
            key_ln = self.qk_norm(**numbers, name="key_ln")

        each_head: dict[str, Any] = {"num_heads": self.num_heads, "param_dtype": self.param_dtype}
        score = Bound(
            self.score,
            sizes.query_depth,
            sizes.key_depth,
            self.attention_size,
            initializers=self.initializers,
            name="score",
            **{**each_head, "num_heads": None if self.share_score else self.num_heads},
        )
        if self.bias is not None:
            bias = Bound(self.bias, **each_head, name="bias")
        normalizer = Bound(self.normalizer, **each_head, name="normalizer")
        return MultiHead(
            name=name,
            in_features=self.in_features,
            memory_features=memory_features,
            sizes=sizes,
            query=query,
            key=key,
            value=value,
            out=out,
            query_ln=query_ln,
            key_ln=key_ln,
            score=score,
            bias=bias,
            normalizer=normalizer,
            position=self.position,
            combine=self.combine,
            implementation=self.implementation,
        )

    def __call__(
        self,
        query: Array,
        memory: Array | Projected | None = None,
        value: Array | None = None,
        *,
        mask: Any = None,
        bias: Any = None,
        positions: Array | None = None,
        memory_positions: Array | None = None,
        deterministic: bool | None = None,
        return_weights: bool = False,
        sow_weights: bool = False,
    ) -> Any:
        """Attend from the query to the memory, or to itself, as the twin does."""
        output, weights = self.layer()(
            query,
            memory,
            value,
            mask=mask,
            bias=bias,
            positions=positions,
            memory_positions=memory_positions,
            dropout=self._dropout(deterministic),
            return_weights=return_weights or sow_weights,
        )
        if sow_weights:
            self.sow("intermediates", "attention_weights", weights)
        return (output, weights) if return_weights else output

    def keys(self, memory: Array, positions: Array | None = None) -> Projected:
        """Project a memory [B, S, memory_features] once, for all the calls that attend to it."""
        return self.layer().project_memory(memory, None, positions)

    def init_cache(
        self,
        batch: int,
        capacity: int,
        *,
        window: int | None = None,
        ragged: bool = False,
        dtype: Any = jnp.float32,
    ) -> KeyValueCache:
        """Return an empty cache for `decode`; see `attention_jax.cache.init`."""
        options = {"window": window, "ragged": ragged, "dtype": dtype}
        return self.layer().empty_cache(batch, capacity, **options)

    def decode(
        self,
        query: Array,
        cache: KeyValueCache,
        *,
        mask: Any = None,
        bias: Any = None,
        count: Any = None,
        return_weights: bool = False,
    ) -> Any:
        """Attend from the next tokens of a sequence to all tokens so far, as the twin does."""
        return self.layer().decode(
            query, cache, mask=mask, bias=bias, count=count, return_weights=return_weights
        )

    def decode_memory(
        self,
        query: Array,
        memory: Array | Projected,
        cache: KeyValueCache,
        *,
        mask: Any = None,
        bias: Any = None,
        return_weights: bool = False,
    ) -> Any:
        """Attend from the next tokens of a sequence to a memory, as the twin does."""
        output, *weights = self.layer().decode_memory(
            query, memory, cache, mask=mask, bias=bias, return_weights=return_weights
        )
        return (output, *weights) if return_weights else output

    def _dropout(self, deterministic: bool | None) -> dict[str, Any]:
        deterministic = self.deterministic if deterministic is None else deterministic
        if deterministic or not self.dropout_rate:
            return {}
        return {"dropout_rate": self.dropout_rate, "dropout_key": self.make_rng("dropout")}
