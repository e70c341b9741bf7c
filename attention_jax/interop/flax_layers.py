"""Any score, mask, bias and normalizer inside Flax's own multi-head attention layers.

Linen passes a keyword only where the signature names it, NNX passes all it has: so every keyword
of either is named here, and is honoured or refused, never dropped.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from attention_jax import masks
from attention_jax.attention import attend
from attention_jax.interop import layout
from attention_jax.interop.dropout import same_in_every_head
from attention_jax.normalizers import softmax
from attention_jax.request import function_of
from attention_jax.scores import scaled_dot, separate
from attention_jax.scores.composition import is_positional

Array = jax.Array


def attention_fn(
    *,
    score: Any = scaled_dot,
    mask: Any = None,
    bias: Any = None,
    normalizer: Any = softmax,
    implementation: str | None = None,
    decode: bool | None = None,
) -> Callable[..., Array]:
    r"""Return an `attention_fn` for Linen's `MultiHeadDotProductAttention` or NNX's layer.

    context_i = sum_j normalizer(score(q_i, k_j) + bias_ij)_j v_j, over the keys j that this mask,
    the layer's mask and its `is_causal` all allow. A query that may attend to nothing gets zeros,
    where Flax averages all values. The docstring of the returned function says what it does with
    each keyword of the layers.

    Args:
      score: as in `attend`.
      mask: as in `attend`. A boolean array broadcasts to [*batch, N, T, S]; for the arrays that
        a mask holds, all the layer's batch axes are joined into one.
      bias: as in `attend`. An array broadcasts to [*batch, N, T, S].
      normalizer: as in `attend`.
      implementation: as in `attend`.
      decode: where a single query (T = 1 < S) stands, if this mask, this bias, a score that knows
        positions or `is_causal` is to be asked. True: the layer decodes; the query stands at the
        last key that the layer's mask allows, which is the one just written to the cache. False:
        at position 0, as the first of several queries does. None refuses to guess.

    Returns:
      A function of query [*batch, T, N, Hq], key [*batch, S, K, Hk], value [*batch, S, K, V] and
      Flax's keywords; it returns the context [*batch, T, N, V].

    Raises:
      TypeError: a Flax module, whose parameters the layer would not find.

    Vaswani et al. 2017, section 3.2.2, for a general score.

    >>> causal = attention_fn(mask=masks.Causal())
    >>> layer = linen.MultiHeadDotProductAttention(num_heads=2, attention_fn=causal)
    >>> x = jnp.ones((3, 5, 8))
    >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
    (3, 5, 8)
    """
    _refuse_modules(score=score, mask=mask, bias=bias, normalizer=normalizer)
    bound_mask = mask if mask is None or layout.is_array(mask) else masks.as_mask(mask)
    bound_bias = bias

    def attention(
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Any = None,
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
          precision: refused unless it is the default.
          module: sows the weights before dropout, [*batch, N, T, S], where Flax does.
          force_fp32_for_softmax: it always is, or better.
          einsum_dot_general: refused.
          qk_attn_weights_einsum: refused.
          attn_weights_value_einsum: refused.
          is_causal: query i attends to the keys 0 to i.
          input_positions: refused.
        """
        _refuse_precision(precision)
        _refuse_keywords(
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
            input_positions=input_positions,
        )
        batch = layout.batch_axes(query=query, key=key, value=value)
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        query, key, value = (layout.joined(x.astype(dtype)) for x in (query, key, value))
        pairs = query.shape[2], query.shape[1], key.shape[1]
        mask = layout.as_masked(mask, batch, pairs)
        bias = layout.as_bias(bias, batch, pairs, dtype)

        position = None
        is_asked = is_causal or bound_mask is not None or bound_bias is not None
        if pairs[1] == 1 < pairs[2] and decode is not False and (is_asked or _has_places(score)):
            _check_decode(decode, mask)
            position = layout.last_allowed(mask, pairs[2])
        at = functools.partial(layout.placed, position=position, num_heads=pairs[0])
        causal = at(masks.Causal()) if is_causal else None
        own_mask = layout.as_masked(at(bound_mask), batch, pairs)
        own_bias = layout.as_bias(at(bound_bias), batch, pairs, dtype)
        given = [part for part in (causal, own_mask, mask) if part is not None]
        attend_with = functools.partial(
            attend,
            query,
            key,
            value,
            score=layout.placed_score(score, position, pairs[0]),
            mask=functools.reduce(operator.and_, given) if given else None,
            bias=_sum(own_bias, bias),
            normalizer=normalizer,
            implementation=implementation,
        )
        dropout = {}
        if dropout_rate and not deterministic:
            dropout = _dropout(dropout_rate, dropout_rng, broadcast_dropout)
        if module is not None:
            weights = attend_with(return_weights=True).weights
            _sow(module, weights.astype(dtype).reshape(*batch, *pairs))
        context = attend_with(**dropout)
        return context.reshape(*batch, *context.shape[1:])

    return attention


def _has_places(score: Any) -> bool:
    return is_positional(separate(function_of(score)).pairs)


def _check_decode(decode: bool | None, mask: Any) -> None:
    """Require what it takes to know where a single query stands."""
    if decode is None:
        raise ValueError(
            "attention_fn: a single query meets several keys, and score, mask, bias or is_causal "
            "asks where it stands; give attention_fn decode=True if the layer decodes, "
            "decode=False if the query stands at position 0."
        )
    if not isinstance(mask, masks.Table):
        raise ValueError(
            "attention_fn: decode=True reads from the mask of the layer's cache where the query "
            "stands, and there is no such mask; give decode=False if the layer does not decode."
        )


def _sum(bound: Any, passed: Array | None) -> Any:
    if bound is None or passed is None:
        return passed if bound is None else bound
    if not layout.is_array(bound):
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


def _refuse_precision(precision: Any) -> None:
    if precision not in (None, "default", jax.lax.Precision.DEFAULT):
        raise ValueError(
            f"attention_fn: precision {precision!r} is not done for one layer; leave it out and "
            "call the whole function under jax.default_matmul_precision(...)."
        )


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
