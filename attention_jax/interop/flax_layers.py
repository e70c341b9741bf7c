"""Any score, mask, bias and normalizer inside Flax's own multi-head attention layers.

Linen passes a keyword only where the signature names it, NNX passes all it has: so every keyword
of either is named here, and is honoured or refused, never dropped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from attention_jax import masks
from attention_jax.attention import attend
from attention_jax.base.binding import BiasLike, Sliced, function_of
from attention_jax.base.typing import AnyNormalizer, AnyScore, at_least_float32
from attention_jax.interop.dropout import same_in_every_head
from attention_jax.interop.layout import Layout, is_array, last_allowed
from attention_jax.masks import MaskLike
from attention_jax.normalizers import softmax
from attention_jax.positions.shifting import Rows, shifted_array, shifted_bias, shifted_score
from attention_jax.scores import scaled_dot, separate
from attention_jax.scores.composition import is_positional

Array = jax.Array


def attention_fn(
    *,
    score: AnyScore | Sliced = scaled_dot,
    mask: MaskLike = None,
    bias: BiasLike = None,
    normalizer: AnyNormalizer | Sliced = softmax,
    implementation: str | None = None,
    decode: bool | None = None,
) -> Callable[..., Array]:
    r"""Return an `attention_fn` for Linen's `MultiHeadDotProductAttention` or NNX's layer.

    context_i = sum_j normalizer(score(q_i, k_j) + bias_ij)_j v_j, over the keys j that this mask,
    the layer's mask and its `is_causal` all allow. A query that may attend to nothing gets zeros,
    where Flax averages all values. `FlaxAttention.__call__` documents each keyword of the layers.

    Args:
      score: as in `attend`.
      mask: as in `attend`. A boolean array broadcasts to [*batch, N, T, S]; for the arrays that
        a mask holds, all the layer's batch axes are joined into one.
      bias: as in `attend`. An array broadcasts to [*batch, N, T, S].
      normalizer: as in `attend`.
      implementation: as in `attend`.
      decode: the position of a single query (T = 1 < S), where this mask, this bias, a
        `positional` score or `is_causal` depends on it. True: the layer decodes; the query is at
        the last key that the layer's mask allows, which is the one just written to the cache.
        False: at position 0, as the first of several queries. None refuses to guess.

    Returns:
      A function of query [*batch, T, N, Hq], key [*batch, S, K, Hk], value [*batch, S, K, V] and
      Flax's keywords; it returns the context [*batch, T, N, V].

    Raises:
      TypeError: a Flax module, whose parameters the layer would not find.

    Vaswani et al. 2017, section 3.2.2, for a general score.

    >>> causal = attention_fn(mask=masks.Causal())
    >>> layer = linen.MultiHeadDotProductAttention(num_heads=2, attention_fn=causal)
    >>> x = jnp.ones((3, 5, 8))
    >>> variables = jax.jit(layer.init)(jax.random.key(0), x)
    >>> jax.jit(layer.apply)(variables, x).shape
    (3, 5, 8)
    """
    _refuse_modules(score=score, mask=mask, bias=bias, normalizer=normalizer)
    bound_mask = mask if mask is None or is_array(mask) else masks.as_mask(mask)
    return FlaxAttention(score, bound_mask, bias, normalizer, implementation, decode)


@dataclasses.dataclass(frozen=True, eq=False)
class FlaxAttention:
    """An `attention_fn` of Flax's layers with a score, mask, bias and normalizer of its own."""

    score: AnyScore | Sliced
    mask: MaskLike
    bias: BiasLike
    normalizer: AnyNormalizer | Sliced
    implementation: str | None
    decode: bool | None

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: MaskLike = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        is_causal: bool = False,
        input_positions: Any = None,
    ) -> Array:
        """Attend, with the keywords of Flax.

        Complex numbers have a softmax of Flax, but no order: where nothing is bound, they are left
        to Flax's own function. Else they are refused.

        Args:
          query: [*batch, T, N, Hq].
          key: [*batch, S, K, Hk].
          value: [*batch, S, K, V].
          bias: added to the logits and to the bound bias; broadcasts to [*batch, N, T, S].
          mask: broadcasts to [*batch, N, T, S], nonzero = may attend; or a mask as in `attend`.
          broadcast_dropout: drop the same pairs in every example and head.
          dropout_rng: decides what is dropped.
          dropout_rate: share of weights that are dropped.
          deterministic: True leaves dropout out.
          dtype: of the computation and the context; that of the operands unless given.
          precision: of all products, and of their derivatives; of two, the higher one.
          module: sows the weights before dropout, [*batch, N, T, S], where Flax does.
          force_fp32_for_softmax: it always is, or better; True sows the weights so too.
          einsum_dot_general: refused.
          qk_attn_weights_einsum: refused.
          attn_weights_value_einsum: refused.
          is_causal: query i attends to the keys 0 to i.
          input_positions: refused.
        """
        _refuse_keywords(
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
            input_positions=input_positions,
        )
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        if jnp.issubdtype(dtype, jnp.complexfloating) and self._is_flaxs_own:
            of_flax: Any = nnx if is_causal or isinstance(module, nnx.Module) else linen
            return of_flax.dot_product_attention(
                *(query, key, value, bias, mask),
                broadcast_dropout=broadcast_dropout,
                dropout_rng=dropout_rng,
                dropout_rate=dropout_rate,
                deterministic=deterministic,
                dtype=dtype,
                precision=precision,
                module=module,
                **({"is_causal": True} if is_causal else {}),
            )
        layout = Layout.of(query, key, value)
        operands = [layout.joined(x.astype(dtype)) for x in (query, key, value)]
        position = self._position(layout, mask, is_causal)
        attend_with = functools.partial(
            attend,
            *operands,
            **self._score_and_bias(layout, bias, position, dtype),
            mask=self._mask(layout, mask, position, is_causal),
            normalizer=self.normalizer,
            implementation=self.implementation,
        )
        dropout = {}
        if dropout_rate and not deterministic:
            dropout = _dropout(dropout_rate, dropout_rng, broadcast_dropout)
        with _in_precision(precision):
            if module is not None:
                weights = attend_with(return_weights=True).weights
                sown = at_least_float32(dtype) if force_fp32_for_softmax else dtype
                _sow(module, layout.split(weights.astype(sown)))
            return layout.split(attend_with(**dropout))

    @property
    def _is_flaxs_own(self) -> bool:
        """Whether this is what Flax's function computes: nothing is bound."""
        bound = (self.mask, self.bias, self.implementation)
        is_softmax = self.score is scaled_dot and self.normalizer is softmax
        return is_softmax and all(part is None for part in bound)

    def _position(self, layout: Layout, mask: MaskLike, is_causal: bool) -> Array | None:
        """Return the position of a single query of a layer that decodes; None where it is 0."""
        num_queries, num_keys = layout.pairs[1:]
        needed = (
            is_causal
            or self.mask is not None
            or self.bias is not None
            or is_positional(separate(function_of(self.score)).pairs)
        )
        if not needed or self.decode is False or not num_queries == 1 < num_keys:
            return None
        if self.decode is None:
            raise ValueError(
                "attention_fn: the position of a single query among several keys is not known, and "
                "score, mask, bias or is_causal depends on it; give attention_fn decode=True if "
                "the layer decodes, decode=False if the query is at position 0."
            )
        if mask is None or not is_array(mask):
            raise ValueError(
                "attention_fn: decode=True takes the position of the query from the mask of the "
                "layer's cache, and there is no such mask; give decode=False if the layer does not "
                "decode."
            )
        return last_allowed(layout.table(mask))

    def _mask(
        self, layout: Layout, passed: MaskLike, position: Array | None, is_causal: bool
    ) -> MaskLike:
        """Return the mask of these queries: what is bound, passed and causal, joined by `&`."""
        bound: Any = self.mask
        if bound is not None and position is not None:
            is_table = is_array(bound)
            rows = Rows(position)
            bound = shifted_array(bound, rows) if is_table else masks.Shift(bound, query=position)
        causal: Any = masks.Causal(0 if position is None else position) if is_causal else None
        parts = [part for part in (causal, bound, passed) if part is not None]
        given = [layout.table(part) if is_array(part) else masks.as_mask(part) for part in parts]
        return functools.reduce(operator.and_, given) if given else None

    def _score_and_bias(
        self, layout: Layout, passed: Array | None, position: Array | None, dtype: Any
    ) -> dict[str, Any]:
        """Return score and bias at the position of the query; the passed bias is added."""
        score, bias = self.score, self.bias
        if position is not None:
            rows = Rows(position)
            score = shifted_score(score, rows)
            bias = shifted_bias(bias, rows, num_queries=1)
        dtype = at_least_float32(dtype)
        bias = layout.fitted("bias", bias).astype(dtype) if is_array(bias) else bias
        if passed is not None:
            passed = layout.fitted("bias", passed).astype(dtype)
        return {"score": score, "bias": _sum(bias, passed)}


def _sum(bound: Any, passed: Array | None) -> Any:
    if bound is None or passed is None:
        return passed if bound is None else bound
    if not is_array(bound):
        raise ValueError(
            "attention_fn: bias is bound as a function and passed as an array, which are not "
            "added; bind or pass their sum."
        )
    return bound + passed


def _dropout(rate: float, key: Array | None, broadcast: bool) -> dict[str, Any]:
    if key is None:
        raise ValueError(
            f"attention_fn: dropout_rate {rate} needs a dropout_rng; give a jax.random key, or "
            "deterministic=True."
        )
    return {"dropout_rate": rate, "dropout_key": same_in_every_head(key) if broadcast else key}


def _sow(module: Any, weights: Array) -> None:
    collection = nnx.Intermediate if isinstance(module, nnx.Module) else "intermediates"
    module.sow(collection, "attention_weights", weights)


def _refuse_modules(**parts: Any) -> None:
    for name, part in parts.items():
        if isinstance(function_of(part), nnx.Module | linen.Module):
            raise TypeError(
                f"attention_fn: {name} is the Flax module {type(function_of(part)).__name__}, "
                "whose parameters the layer would not find and train; give a function, or use "
                "attention_jax.nnx.MultiHeadAttention, which owns them."
            )


def _in_precision(precision: Any) -> contextlib.AbstractContextManager[None]:
    """Compute the products in a precision of `jax.lax`; None leaves the one that is in force."""
    if precision is None:
        return contextlib.nullcontext()
    named = [_precision_name(one) for one in _pair(precision)]
    if None in named or (len(set(named)) > 1 and not set(named) <= set(_RISING)):
        raise ValueError(
            "attention_fn: precision must be a jax.lax.Precision, its name, two of them or a "
            f"jax.lax.DotAlgorithmPreset, got {precision!r}."
        )
    return jax.default_matmul_precision(max(named, key=(*_RISING, *named).index))


_RISING = ("default", "high", "highest")


def _pair(precision: Any) -> tuple[Any, ...]:
    return precision if isinstance(precision, tuple) and len(precision) == 2 else (precision,)


def _precision_name(precision: Any) -> str | None:
    """Return the name of one precision for `jax.default_matmul_precision`; None if it has none."""
    if isinstance(precision, jax.lax.DotAlgorithmPreset):
        return precision.name
    if isinstance(precision, str) and precision in jax.lax.DotAlgorithmPreset.__members__:
        return precision
    try:
        return jax.lax.Precision(precision).name.lower()
    except ValueError:
        return None


_INSTEAD = {
    "einsum_dot_general": "the products of tiles are not einsums; use Flax's own function",
    "qk_attn_weights_einsum": "the products of tiles are not einsums; use Flax's own function",
    "attn_weights_value_einsum": "the products of tiles are not einsums; use Flax's own function",
    "input_positions": "use attention_jax.nnx.MultiHeadAttention, which takes positions",
}


def _refuse_keywords(**keywords: Any) -> None:
    for name, value in keywords.items():
        if value is not None:
            raise ValueError(f"attention_fn: {name} is not honoured; {_INSTEAD[name]}.")
