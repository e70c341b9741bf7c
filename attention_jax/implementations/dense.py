"""The oracle: attention of one head in the plainest code, with all logits and weights held.

context = normalizer(score(query, key) + bias, mask) value
"""

from __future__ import annotations

import jax.numpy as jnp

from attention_jax.base.finite import finite_rows
from attention_jax.implementations.head import Attended, Head, kept
from attention_jax.masks.intervals import indices
from attention_jax.normalizers import LogSum, log_normalizer, streaming, with_query
from attention_jax.statistics import Pairs


def dense(head: Head, with_logsumexp: bool = True) -> Attended:
    """Attend with all T x S logits and weights held at once."""
    query, query_poison = finite_rows(head.query)
    key, key_poison = finite_rows(head.key)
    value, value_poison = finite_rows(head.value)
    q_idx = indices(query.shape[0])[:, None]
    kv_idx = indices(key.shape[0])[None, :]

    allowed = jnp.broadcast_to(head.mask(q_idx, kv_idx), (query.shape[0], key.shape[0]))
    logits = head.score.at(query, key, q_idx[:, 0], kv_idx[0])
    if head.bias is not None:
        bias = head.bias(q_idx, kv_idx) if callable(head.bias) else head.bias
        logits = logits + jnp.asarray(bias, logits.dtype)
    logits = logits + query_poison[:, None] + (key_poison + value_poison)[None, :]

    weights = with_query(head.normalizer, query)(logits, allowed)
    used = weights
    if head.dropout is not None:
        used = weights * kept(head.dropout, q_idx, kv_idx, weights.dtype)

    how = streaming(head.normalizer) if with_logsumexp else None
    logsumexp = None
    if isinstance(how, LogSum):
        logsumexp = log_normalizer(how.exponent(logits), allowed, how.sink)
    statistics = None
    if head.statistics is not None:
        pairs = Pairs.of(used, logits, allowed, q_idx, kv_idx)
        statistics = {name: each.of_pairs(pairs) for name, each in head.statistics.items()}
    return Attended(used @ value, used, logsumexp, statistics)
