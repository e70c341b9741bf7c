"""Attention as plain loops over numbers in float64, and tiles counted one by one."""

import numpy as np

from attention_jax.masks import EMPTY, FULL, PARTIAL


def sample(*shape, seed=0):
    """Return normally distributed numbers, the same for the same shape and seed."""
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def softmax(logits, allowed):
    if not allowed.any():
        return np.zeros_like(logits)
    exponentials = np.where(allowed, np.exp(logits - logits[allowed].max()), 0.0)
    return exponentials / exponentials.sum()


def logits_of(query, key, formula):
    """Return formula(q_i, k_j) for every pair, [T, S]."""
    logits = np.zeros((len(query), len(key)))
    for i, q in enumerate(query):
        for j, k in enumerate(key):
            logits[i, j] = formula(q, k)
    return logits


def attention(query, key, value, formula, allowed=None, bias=None, normalizer=softmax, keep=None):
    """Return context [B, T, N, V] and weights [B, N, T, S], one query at a time.

    Args:
      query, key, value: [B, T, N, H], [B, S, K, H], [B, S, K, V].
      formula: (q [Hq], k [Hk]) -> number; one for each head if it is a list.
      allowed: (b, n, i, j) -> bool.
      bias: (b, n, i, j) -> number.
      normalizer: (logits [S], allowed [S]) -> weights [S].
      keep: [B, N, T, S], factors of the weights.
    """
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, query_length, heads, _ = query.shape
    key_length, groups = key.shape[1], heads // key.shape[2]
    context = np.zeros((batch, query_length, heads, value.shape[-1]))
    weights = np.zeros((batch, heads, query_length, key_length))
    for b, n in np.ndindex(batch, heads):
        of_head = formula[n] if isinstance(formula, list) else formula
        logits = logits_of(query[b, :, n], key[b, :, n // groups], of_head)
        for i in range(query_length):
            row, may = logits[i], np.ones(key_length, bool)
            for j in range(key_length):
                row[j] += bias(b, n, i, j) if bias else 0.0
                may[j] = allowed(b, n, i, j) if allowed else True
            weights[b, n, i] = normalizer(row, may)
            if keep is not None:
                weights[b, n, i] *= keep[b, n, i]
            for j in np.flatnonzero(weights[b, n, i]):
                context[b, i, n] += weights[b, n, i, j] * value[b, j, n // groups]
    return context, weights


def mixed_heads(query, key, allowed, mix_logits=None, mix_weights=None):
    """Return logits and weights of scaled dot-product attention of one example, [N, T, S] each.

    Args:
      query, key: [T, M, H], [S, K, H].
      allowed: [T, S].
      mix_logits, mix_weights: functions of all heads [M, T, S]; zero where not allowed.
    """
    heads = query.shape[1]
    keys = np.repeat(np.asarray(key), heads // key.shape[1], axis=1)
    logits = np.einsum("tnh,snh->nts", query, keys) / np.sqrt(query.shape[2])
    if mix_logits is not None:
        logits = mix_logits(np.where(allowed, logits, 0.0))
    weights = np.array(
        [[softmax(*row) for row in zip(one, allowed, strict=True)] for one in logits]
    )
    if mix_weights is not None:
        weights = np.where(allowed, mix_weights(weights), 0.0)
    return logits, weights


def states_of(dense, query_size, key_size):
    """Return what each tile of a dense mask really is."""
    rows = range(0, dense.shape[0], query_size)
    columns = range(0, dense.shape[1], key_size)
    tiles = [[dense[i : i + query_size, j : j + key_size] for j in columns] for i in rows]
    return np.array(
        [[FULL if t.all() else PARTIAL if t.any() else EMPTY for t in row] for row in tiles]
    )


def assert_sound(states, dense, query_size, key_size):
    """FULL and EMPTY must be true; PARTIAL says nothing."""
    real = states_of(np.asarray(dense), query_size, key_size)
    states = np.asarray(states)
    assert states.shape == real.shape
    np.testing.assert_array_equal(states[states != PARTIAL], real[states != PARTIAL])
