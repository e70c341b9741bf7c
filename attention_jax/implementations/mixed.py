"""The oracle where maps mix heads: attention of all heads of an example, with all weights held.

logits' = mix_logits(score(query, key) + bias),  weights = mix_weights(normalizer(logits', mask)),
context_n = weights_n value. What the mask leaves out counts as zero where a map looks at it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.base.finite import finite, poison
from attention_jax.head_maps import halo_of
from attention_jax.implementations.head import Attended
from attention_jax.implementations.mixed_heads import (
    Heads,
    allowed_of,
    attendable_of,
    bias_of,
    kept_of,
    repeated,
)
from attention_jax.implementations.mixed_statistics import MixedPairs, of_pairs
from attention_jax.masks.intervals import indices
from attention_jax.normalizers import LogSum, log_normalizer, streaming

Array = jax.Array


def dense(heads: Heads, with_logsumexp: bool = True) -> Attended:
    """Attend with the logits and weights of all heads held at once; context [T, N, V]."""
    query, key, value = map(finite, heads[:3])
    groups = len(query) // len(key)
    pair = indices(query.shape[1])[:, None], indices(key.shape[1])[None, :]

    allowed = allowed_of(heads.mask, *pair)
    logits = heads.score.map(_call, query, repeated(key, groups))
    logits = logits + bias_of(heads.bias, logits.dtype, *pair)
    logits = logits + poison(heads.query)[:, :, None]
    logits = logits + repeated(poison(heads.key), groups)[:, None, :]
    if heads.mix_logits is not None:
        shown = jnp.where(allowed, logits, 0.0)
        logits = heads.mix_logits(jnp.pad(shown, halo_of(heads.mix_logits).padding))

    may = jnp.broadcast_to(allowed, logits.shape)
    weights = heads.normalizer.map(_call, logits, may)
    attendable = allowed
    if heads.mix_weights is not None:
        mixed = heads.mix_weights(jnp.pad(weights, halo_of(heads.mix_weights).padding))
        attendable = attendable_of(allowed, heads.mix_weights, len(mixed))
        weights = jnp.where(attendable, mixed, 0.0)
    shared = len(weights) // len(value)
    spoilt = repeated(poison(heads.value), shared)[:, None, :]
    used = weights + jnp.where(attendable, spoilt, 0.0)
    if heads.dropout is not None:
        used = used * kept_of(heads.dropout, *pair, used.dtype)

    statistics = None
    if heads.statistics:
        pairs = MixedPairs.of(used, logits, may, attendable, pair)
        statistics = of_pairs(heads.statistics, pairs)
    logsumexp = heads.normalizer.map(_logsumexp, logits, may) if with_logsumexp else None
    context = jnp.einsum("nts,nsv->tnv", used, repeated(value, shared))
    return Attended(context, used, logsumexp if logsumexp is None else logsumexp.T, statistics)


def _call(function: Any, *arguments: Any) -> Any:
    return function(*arguments)


def _logsumexp(normalizer: Any, logits: Array, allowed: Array) -> Array | None:
    how = streaming(normalizer)
    if not isinstance(how, LogSum):
        return None
    return log_normalizer(how.exponent(logits), allowed, how.sink)
