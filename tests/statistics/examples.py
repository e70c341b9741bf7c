"""For every exported statistic: arguments, and what it says of one matrix, in plain NumPy.

A formula takes weights, logits and what is allowed, [T, S] each, and shares no code with the
library.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from attention_jax import masks, statistics

LENGTH = 11
TOKENS = np.array([3, 1, 2, 3, 1, 1, 2, 3, 3, 0, 1])


class StatisticExample(NamedTuple):
    """A statistic and its formula, (weights, logits, allowed) -> numbers."""

    statistic: Any
    formula: Callable[[np.ndarray, np.ndarray, np.ndarray], Any]


def shares(weights):
    total = abs(weights).sum(axis=1, keepdims=True)
    return abs(weights) / np.where(total > 0, total, 1)


def entropy(weights, *_):
    p = shares(weights)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(axis=1)


def distances(weights):
    rows, columns = np.indices(weights.shape)
    return abs(rows - columns)


def expected_distance(weights, *_):
    return (shares(weights) * distances(weights)).sum(axis=1)


def distance_spread(weights, *_):
    away = distances(weights) - expected_distance(weights)[:, None]
    return np.sqrt((shares(weights) * away**2).sum(axis=1))


def largest_logit(weights, logits, allowed):
    return np.where(allowed, logits, -np.inf).max(axis=1)


def heaviest(weights, *_):
    order = np.argsort(-weights, axis=1, kind="stable")[:, :3]
    found = np.maximum(np.take_along_axis(weights, order, axis=1), 0)
    return np.where(found > 0, order, -1), found


def where(rule):
    rows, columns = np.indices((LENGTH, LENGTH))
    return np.vectorize(rule)(rows, columns)


def mean_mass(rule):
    def formula(weights, logits, allowed):
        of_rule = where(rule)
        rows = (of_rule & allowed).any(axis=1)
        return (weights * of_rule)[rows].sum() / max(rows.sum(), 1)

    return formula


def by_distance(weights, *_):
    near = distances(weights)
    weights = abs(weights)
    masses = [weights[near == 0], weights[(near > 0) & (near < 4)], weights[near >= 4]]
    return np.array([mass.sum() for mass in masses]) / max(weights.sum(), 1e-300)


def saturated(weights, *_):
    rows = (weights > 0).any(axis=1)
    return (weights.max(axis=1) > 0.5)[rows].sum() / max(rows.sum(), 1)


def follows(i, j):
    return 1 <= j <= i and TOKENS[j - 1] == TOKENS[i]


STATISTICS = {
    "entropy": StatisticExample(statistics.entropy, entropy),
    "effective_support": StatisticExample(
        statistics.effective_support,
        lambda weights, *_: np.where(weights.any(axis=1), np.exp(entropy(weights)), 0),
    ),
    "largest_logit": StatisticExample(statistics.largest_logit, largest_logit),
    "largest_weight": StatisticExample(
        statistics.largest_weight, lambda weights, *_: np.maximum(weights.max(axis=1), 0)
    ),
    "jacobian_trace": StatisticExample(
        statistics.jacobian_trace, lambda weights, *_: (weights - weights**2).sum(axis=1)
    ),
    "expected_distance": StatisticExample(statistics.expected_distance, expected_distance),
    "distance_spread": StatisticExample(statistics.distance_spread, distance_spread),
    "heaviest": StatisticExample(statistics.heaviest(3), heaviest),
    "mass": StatisticExample(
        statistics.mass(masks.Window(2, 0)),
        lambda weights, *_: (weights * where(lambda i, j: i - 2 <= j <= i)).sum(axis=1),
    ),
    "mean_mass": StatisticExample(
        statistics.mean_mass(statistics.diagonal), mean_mass(lambda i, j: i == j)
    ),
    "previous_token_score": StatisticExample(
        statistics.previous_token_score, mean_mass(lambda i, j: j == i - 1)
    ),
    "induction_score": StatisticExample(statistics.induction_score(TOKENS), mean_mass(follows)),
    "mass_by_distance": StatisticExample(statistics.mass_by_distance([0, 1, 4]), by_distance),
    "saturated_rows": StatisticExample(statistics.saturated_rows(0.5), saturated),
    "head_largest_logit": StatisticExample(
        statistics.head_largest_logit, lambda *matrix: largest_logit(*matrix).max()
    ),
    "received_mass": StatisticExample(
        statistics.received_mass, lambda weights, *_: weights.sum(axis=0)
    ),
}
NOT_STATISTICS = {
    "Heaviest",
    "Induction",
    "Pairs",
    "Statistic",
    "Statistics",
    "checked",
    "fields_read",
    "diagonal",
    "of_matrix",
    "over_queries",
    "previous_token",
    "scaled",
}
