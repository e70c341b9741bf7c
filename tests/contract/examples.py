"""For every exported score, mask and normalizer: arguments, and what it says, in plain NumPy.

An export without an entry here fails `test_catalogue.py`. The second half of each entry is
written from the paper's formula, for one pair or one row, and shares no code with the library.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from attention_jax import bind, head_maps, masks, normalizers, scores
from tests import oracle


class ScoreExample(NamedTuple):
    """A bound score and its formula for one pair, (q [Hq], k [Hk]) -> number."""

    score: Any
    formula: Callable[[np.ndarray, np.ndarray], float]


class MaskExample(NamedTuple):
    """A mask and its rule for one pair, (b, n, i, j) -> bool."""

    mask: Any
    allowed: Callable[[int, int, int, int], bool]


class NormalizerExample(NamedTuple):
    """A normalizer and what it makes of one row, (logits [S], allowed [S]) -> weights [S]."""

    normalizer: Any
    of_row: Callable[[np.ndarray, np.ndarray], np.ndarray]


class HeadMapExample(NamedTuple):
    """A map across heads, from how many heads, and what it makes of [M, T, S] in plain loops."""

    head_map: Any
    heads: int
    of_pairs: Callable[[np.ndarray], np.ndarray]


def length(x):
    return np.sqrt((x * x).sum())


def score_example(name, sample, query_depth=5, key_depth=5) -> ScoreExample:
    """Build the example of one score; `sample(*shape)` draws float64 parameters."""
    return _SCORES[name](sample, query_depth, key_depth)


def _bilinear(sample, query_depth, key_depth):
    weight = sample(query_depth, key_depth)
    return ScoreExample(bind(scores.bilinear, weight=weight), lambda q, k: q @ weight @ k)


def _low_rank_bilinear(sample, query_depth, key_depth):
    left, right = sample(query_depth, 2), sample(key_depth, 2)
    return ScoreExample(
        bind(scores.low_rank_bilinear, query_weight=left, key_weight=right),
        lambda q, k: q @ (left @ right.T) @ k,
    )


def _shared_projection(sample, query_depth, key_depth):
    weight = sample(query_depth, 3)
    return ScoreExample(
        bind(scores.shared_projection, weight=weight),
        lambda q, k: (weight.T @ q) @ (weight.T @ k) / np.sqrt(3),
    )


def _additive(sample, query_depth, key_depth):
    weights = {"query_weight": sample(query_depth, 6), "key_weight": sample(key_depth, 6)}
    value, bias = sample(6), sample(6)
    return ScoreExample(
        bind(scores.additive, **weights, value=value, bias=bias),
        lambda q, k: (
            value @ np.tanh(q @ weights["query_weight"] + k @ weights["key_weight"] + bias)
        ),
    )


def _normalized_additive(sample, query_depth, key_depth):
    left, right, value, bias = sample(query_depth, 6), sample(key_depth, 6), sample(6), sample(6)
    bound = bind(
        scores.normalized_additive,
        query_weight=left,
        key_weight=right,
        value=value,
        bias=bias,
        gain=1.5,
        offset=-0.5,
    )
    return ScoreExample(
        bound,
        lambda q, k: 1.5 * (value @ np.tanh(q @ left + k @ right + bias)) / length(value) - 0.5,
    )


def _trilinear(sample, query_depth, key_depth):
    weight = sample(3 * query_depth)
    query_weight, key_weight, product_weight = np.split(weight, 3)
    bound = bind(
        scores.trilinear,
        query_weight=query_weight,
        key_weight=key_weight,
        product_weight=product_weight,
    )
    return ScoreExample(bound, lambda q, k: weight @ np.concatenate([q, k, q * k]))


def _concat(sample, query_depth, key_depth):
    weights = [sample(query_depth + key_depth, 4), sample(4, 3)]
    biases, value = [sample(4), sample(3)], sample(3)

    def formula(q, k):
        hidden = np.concatenate([q, k])
        for weight, bias in zip(weights, biases, strict=True):
            hidden = np.tanh(hidden @ weight + bias)
        return hidden @ value

    return ScoreExample(bind(scores.concat, weights=weights, biases=biases, value=value), formula)


def _projected(sample, query_depth, key_depth):
    left, right = sample(query_depth, 3), sample(key_depth, 3)
    return ScoreExample(
        scores.projected(scores.scaled_dot, left, right),
        lambda q, k: (q @ left) @ (k @ right) / np.sqrt(3),
    )


_SCORES: dict[str, Callable[..., ScoreExample]] = {
    "dot": lambda sample, *_: ScoreExample(scores.dot, lambda q, k: q @ k),
    "scaled_dot": lambda sample, *_: ScoreExample(
        scores.scaled_dot, lambda q, k: q @ k / np.sqrt(len(q))
    ),
    "bilinear": _bilinear,
    "low_rank_bilinear": _low_rank_bilinear,
    "shared_projection": _shared_projection,
    "additive": _additive,
    "concat": _concat,
    "gaussian": lambda sample, *_: ScoreExample(
        bind(scores.gaussian, width=0.8), lambda q, k: -((q - k) @ (q - k)) / (2 * 0.8**2)
    ),
    "normalized_additive": _normalized_additive,
    "trilinear": _trilinear,
    "cosine": lambda sample, *_: ScoreExample(
        bind(scores.cosine, temperature=0.3), lambda q, k: q @ k / (length(q) * length(k) * 0.3)
    ),
    "key_normalized_dot": lambda sample, *_: ScoreExample(
        scores.key_normalized_dot, lambda q, k: q @ k / length(k)
    ),
    "scaled": lambda sample, *_: ScoreExample(
        scores.scaled(scores.dot, -0.7), lambda q, k: -0.7 * (q @ k)
    ),
    "soft_capped": lambda sample, *_: ScoreExample(
        scores.soft_capped(scores.dot, 2.0), lambda q, k: 2.0 * np.tanh(q @ k / 2.0)
    ),
    "row_normalized": lambda sample, *_: ScoreExample(
        scores.row_normalized(scores.dot), lambda q, k: q @ k / (length(q) * length(k))
    ),
    "projected": _projected,
    "separate": lambda sample, *_: ScoreExample(
        scores.separate(lambda query, key: query @ key.T), lambda q, k: q @ k
    ),
}
SCORES = sorted(_SCORES)
# Location is no function of rows alone, and what approximates tanh is none of queries and keys.
NOT_SCORES = {"Separated", "TanhBySines", "location", "positional"}
DIFFERENT_DEPTHS = {
    "additive",
    "bilinear",
    "concat",
    "low_rank_bilinear",
    "normalized_additive",
    "projected",
}


def mask_example(name, batch, heads, query_length, key_length) -> MaskExample:
    """Build the example of one mask, with different arrays for every example and head."""
    rng = np.random.default_rng(len(name))
    return _MASKS[name](rng, batch, heads, query_length, key_length)


def _prefix(rng, batch, heads, query_length, key_length):
    prefix = rng.integers(0, key_length + 1, (batch, heads))
    return MaskExample(
        masks.Prefix(prefix) | masks.Causal(), lambda b, n, i, j: j < prefix[b, n] or j <= i
    )


def _lengths(rng, batch, heads, query_length, key_length):
    keys = rng.integers(0, key_length + 1, batch)
    queries = rng.integers(0, query_length + 1, batch)
    return MaskExample(
        masks.Lengths(keys, queries), lambda b, n, i, j: j < keys[b] and i < queries[b]
    )


def _segment(rng, batch, heads, query_length, key_length):
    queries = np.sort(rng.integers(0, 3, (batch, query_length)))
    keys = np.sort(rng.integers(0, 3, (batch, key_length)))
    return MaskExample(masks.Segment(queries, keys), lambda b, n, i, j: queries[b, i] == keys[b, j])


def _table(rng, batch, heads, query_length, key_length):
    allowed = rng.random((batch, heads, query_length, key_length)) < 0.5
    return MaskExample(allowed, lambda b, n, i, j: allowed[b, n, i, j])


def _shift(rng, batch, heads, query_length, key_length):
    start = rng.integers(0, key_length, batch)
    return MaskExample(
        masks.Shift(masks.Causal(), query=start, key=1), lambda b, n, i, j: j + 1 <= i + start[b]
    )


def _global_tokens(rng, batch, heads, query_length, key_length):
    marks = rng.random((batch, max(query_length, key_length))) < 0.3
    return MaskExample(masks.GlobalTokens(marks), lambda b, n, i, j: marks[b, i] or marks[b, j])


def _edges(rng, batch, heads, query_length, key_length):
    neighbors = rng.integers(-1, key_length, (batch, heads, query_length, 2))
    return MaskExample(masks.Edges(neighbors), lambda b, n, i, j: j in neighbors[b, n, i])


def _random_blocks(rng, batch, heads, query_length, key_length):
    key = jax.random.key(int(rng.integers(99)))
    mask = masks.random_blocks(key, 8, size=2, num_blocks=2, num_heads=heads)
    drawn = np.asarray(mask.mask.neighbors)[0]
    return MaskExample(mask, lambda b, n, i, j: j // 2 in drawn[n, i // 2])


def _bigbird(rng, batch, heads, query_length, key_length):
    key = jax.random.key(int(rng.integers(99)))
    mask = masks.bigbird(key, 8, size=1, window=3, num_global=1, num_random=2)
    drawn = np.asarray(masks.random_blocks(key, 8, 1, 2, NEAR).mask.neighbors)
    return MaskExample(mask, lambda b, n, i, j: abs(i - j) <= 1 or 0 in (i, j) or j in drawn[i])


NEAR = masks.Window(1, 1) | masks.GlobalTokens(1)

_MASKS: dict[str, Callable[..., MaskExample]] = {
    "Full": lambda *_: MaskExample(masks.Full(), lambda b, n, i, j: True),
    "Causal": lambda *_: MaskExample(masks.Causal(offset=-2), lambda b, n, i, j: j <= i - 2),
    "Window": lambda *_: MaskExample(masks.Window(2, 1), lambda b, n, i, j: i - 2 <= j <= i + 1),
    "Prefix": _prefix,
    "Lengths": _lengths,
    "Segment": _segment,
    "Table": _table,
    "as_mask": lambda *_: MaskExample(None, lambda b, n, i, j: True),
    "Predicate": lambda *_: MaskExample(
        masks.Predicate(lambda q_idx, kv_idx: abs(q_idx - kv_idx) % 3 == 1),
        lambda b, n, i, j: abs(i - j) % 3 == 1,
    ),
    "Shift": _shift,
    "Strided": lambda *_: MaskExample(masks.Strided(3), lambda b, n, i, j: (i - j) % 3 == 0),
    "Fixed": lambda *_: MaskExample(masks.Fixed(3, 2), lambda b, n, i, j: j % 3 >= 1),
    "Dilated": lambda rng, batch, heads, *_: MaskExample(
        masks.Dilated(1, 2, np.arange(1, heads + 1)[None]),
        lambda b, n, i, j: j - i in [step * (n + 1) for step in (-1, 0, 1, 2)],
    ),
    "Chunked": lambda *_: MaskExample(
        masks.Chunked(3, before=1), lambda b, n, i, j: i // 3 - 1 <= j // 3 <= i // 3
    ),
    "Block": lambda *_: MaskExample(
        masks.Block(masks.Causal(), 2), lambda b, n, i, j: j // 2 <= i // 2
    ),
    "GlobalTokens": _global_tokens,
    "Heads": lambda rng, batch, heads, *_: MaskExample(
        masks.Heads([masks.Window(n, 0) for n in range(heads)]),
        lambda b, n, i, j: i - n <= j <= i,
    ),
    "Edges": _edges,
    "edges": lambda *_: MaskExample(
        masks.edges([(0, 1), (2, 0), (2, 2)], 8), lambda b, n, i, j: (i, j) in PAIRS
    ),
    "random_blocks": _random_blocks,
    "sparse_strided": lambda *_: MaskExample(
        masks.sparse_strided(2),
        lambda b, n, i, j: j <= i and (i - j <= 2 or (i - j) % 2 == 0),
    ),
    "sparse_fixed": lambda *_: MaskExample(
        masks.sparse_fixed(2), lambda b, n, i, j: j <= i and (i // 2 == j // 2 or j % 2 == 1)
    ),
    "longformer": lambda *_: MaskExample(
        masks.longformer(2, tokens=1), lambda b, n, i, j: abs(i - j) <= 1 or 0 in (i, j)
    ),
    "bigbird": _bigbird,
    "GridWindow": lambda *_: MaskExample(
        masks.GridWindow(2, 4, 2, shift=1),
        lambda b, n, i, j: (
            (i // 4 + 1) // 2 == (j // 4 + 1) // 2 and (i % 4 + 1) // 2 == (j % 4 + 1) // 2
        ),
    ),
    "swin": lambda *_: MaskExample(
        masks.swin(2, 4, 2), lambda b, n, i, j: i // 8 == j // 8 and i % 4 // 2 == j % 4 // 2
    ),
}
PAIRS = {(0, 1), (2, 0), (2, 2)}
MASKS = sorted(_MASKS)
NOT_MASKS = {"Mask", "Lookup", "MaskLike", "EMPTY", "PARTIAL", "FULL", "draw", "window_order"}


def _softmax_with_sink(sink):
    def of_row(logits, allowed):
        padded = oracle.softmax(np.append(logits, sink), np.append(allowed, True))
        return padded[:-1]

    return of_row


def _by_bisection(power, scale):
    """Find the threshold t of max(scale e - t, 0)^power that makes a row sum to one."""

    def of_row(logits, allowed):
        if not allowed.any():
            return np.zeros_like(logits)
        scaled = np.where(allowed, scale * logits, -np.inf)
        low, high = scaled.max() - 1.0, scaled.max()
        for _ in range(200):
            middle = (low + high) / 2
            total = (np.maximum(scaled - middle, 0.0) ** power).sum()
            low, high = (middle, high) if total > 1 else (low, middle)
        return np.maximum(scaled - low, 0.0) ** power

    return of_row


def _top_k(k):
    def of_row(logits, allowed):
        first = sorted(np.flatnonzero(allowed), key=lambda j: (-logits[j], j))[:k]
        return oracle.softmax(logits, np.isin(np.arange(len(logits)), first))

    return of_row


def _top_p(p):
    def of_row(logits, allowed):
        kept, mass, shares = [], 0.0, oracle.softmax(logits, allowed)
        for j in sorted(np.flatnonzero(allowed), key=lambda j: (-logits[j], j)):
            if mass < p:
                kept.append(j)
            mass += shares[j]
        return oracle.softmax(logits, np.isin(np.arange(len(logits)), kept))

    return of_row


def _signed(numerator):
    def of_row(logits, allowed):
        weights = np.where(allowed, numerator(np.where(allowed, logits, 0.0)), 0.0)
        return weights / (np.abs(weights).sum() or 1.0)

    return of_row


def _stick_breaking(logits, allowed):
    weights, rest = np.zeros_like(logits), 1.0
    for j in reversed(np.flatnonzero(allowed)):
        share = 1.0 / (1.0 + np.exp(-logits[j]))
        weights[j], rest = rest * share, rest * (1.0 - share)
    return weights


NORMALIZERS: dict[str, NormalizerExample] = {
    "softmax": NormalizerExample(normalizers.softmax, oracle.softmax),
    "softmax_with_sink": NormalizerExample(
        bind(normalizers.softmax_with_sink, sink=0.4), _softmax_with_sink(0.4)
    ),
    "softmax_plus_one": NormalizerExample(normalizers.softmax_plus_one, _softmax_with_sink(0.0)),
    "sigmoid": NormalizerExample(
        bind(normalizers.sigmoid, shift=-0.5),
        lambda logits, allowed: np.where(allowed, 1.0 / (1.0 + np.exp(0.5 - logits)), 0.0),
    ),
    "sparsemax": NormalizerExample(normalizers.sparsemax, _by_bisection(1, 1.0)),
    "entmax15": NormalizerExample(normalizers.entmax15, _by_bisection(2, 0.5)),
    "entmax": NormalizerExample(bind(normalizers.entmax, alpha=1.3), _by_bisection(1 / 0.3, 0.3)),
    "signed_softmax": NormalizerExample(
        normalizers.signed_softmax,
        _signed(lambda logits: np.where(logits < 0, -1.0, 1.0) * np.exp(np.abs(logits))),
    ),
    "odd_power": NormalizerExample(
        bind(normalizers.odd_power, power=3), _signed(lambda logits: logits**3)
    ),
    "stick_breaking": NormalizerExample(normalizers.stick_breaking, _stick_breaking),
    "top_k": NormalizerExample(bind(normalizers.top_k, k=2), _top_k(2)),
    "top_p": NormalizerExample(bind(normalizers.top_p, p=0.6), _top_p(0.6)),
    "hard": NormalizerExample(normalizers.hard, _top_k(1)),
}
NOT_NORMALIZERS = {
    "Carried",
    "Elementwise",
    "Exponential",
    "Level",
    "LogSum",
    "MOST_PASSES",
    "Ordered",
    "OverThreshold",
    "PowerThreshold",
    "Searched",
    "Selected",
    "Selection",
    "Streaming",
    "Threshold",
    "contextual_positions",  # needs the queries: tests/normalizers/test_contextual.py
    "hard_monotonic",  # no function of one row: tests/normalizers/test_monotonic.py
    "in_any_order",
    "is_queried",
    "log_normalizer",
    "monotonic",
    "name_of",
    "over_kept",
    "over_row",
    "queried",
    "stable_logsumexp",
    "streaming",
    "whole_sequences",
    "with_query",
}


def _neighbours(pairs, kernel):
    """Sum over earlier queries and near keys, one entry at a time; beyond the ends are zeros."""
    found, after = np.zeros(pairs.shape), (kernel.shape[2] - 1) // 2
    for n, i, j in np.ndindex(*pairs.shape):
        for a, b in np.ndindex(*kernel.shape[1:]):
            row, column = i - a, j - b + after
            if row >= 0 and 0 <= column < pairs.shape[2]:
                found[n, i, j] += kernel[n, a, b] * pairs[n, row, column]
    return found


def head_map_example(name, sample) -> HeadMapExample:
    """Build the example of one map; `sample(*shape)` draws float64 parameters."""
    return HEAD_MAPS[name](sample)


def _talking_example(sample):
    weight = sample(2, 3)
    return HeadMapExample(
        bind(head_maps.talking, weight=weight), 2, lambda pairs: np.tensordot(weight.T, pairs, 1)
    )


def _grouped_example(sample):
    weight = sample(2, 1, 2)
    return HeadMapExample(
        bind(head_maps.grouped, weight=weight),
        2,
        lambda pairs: np.stack([weight[n // 2, 0, n % 2] * pairs[n // 2] for n in range(4)]),
    )


def _difference_example(sample):
    scale = sample(2)
    return HeadMapExample(
        bind(head_maps.difference, scale=scale),
        4,
        lambda pairs: np.stack([pairs[2 * n] - scale[n] * pairs[2 * n + 1] for n in range(2)]),
    )


def _differential_example(sample):
    drawn = {name: sample(3) for name in ("query_1", "key_1", "query_2", "key_2")}
    scale = np.exp(drawn["query_1"] @ drawn["key_1"]) - np.exp(drawn["query_2"] @ drawn["key_2"])
    return HeadMapExample(
        bind(head_maps.differential, **drawn, initial=0.3),
        2,
        lambda pairs: pairs[:1] - (scale + 0.3) * pairs[1:],
    )


def _neighbours_example(sample):
    kernel = sample(2, 2, 3)
    return HeadMapExample(
        bind(head_maps.neighbours, kernel=kernel), 2, lambda pairs: _neighbours(pairs, kernel)
    )


HEAD_MAPS: dict[str, Callable[..., HeadMapExample]] = {
    "talking": _talking_example,
    "grouped": _grouped_example,
    "difference": _difference_example,
    "differential": _differential_example,
    "neighbours": _neighbours_example,
}
NOT_HEAD_MAPS = {"Halo", "NO_HALO", "group_of", "halo_of"}
