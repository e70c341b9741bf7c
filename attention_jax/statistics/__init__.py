"""Statistics of attention weights, computed with the context in memory linear in the sequence.

`attend(..., statistics={"entropy": statistics.entropy})` returns them by name, in
`Attended.statistics`: of each query [B, T, N], of each key [B, S, N] or of each head [B, N], with
further axes where a statistic has them. They are those of the weights that `return_weights`
returns, that is, after dropout; `largest_logit` is of the logits, with their bias. All but those of
keys are computed with the context, in one pass over the tiles, and are differentiable in every way
that the context is. A query that may attend to nothing has the values that each statistic names,
and derivatives of zero; NaN or Inf in a key or value makes NaN of the statistics of the queries
that attend to it, and of the keys that these attend to.

Weights may be negative: those of some normalizers, or of heads that `mix_weights` mixes. Entropy,
distances and shares by distance count a weight by its magnitude; masses and sums of squares keep
its sign; the largest and the heaviest weights are those above zero.

Where maps mix heads, statistics of logits belong to the heads that are normalized, after
`mix_logits`, and all others to the heads of the context, after `mix_weights`. Their weights are
final ones, computed in a second pass over tiles of all heads. NaN or Inf in a value makes NaN of
the weights of its own pairs there, and of the statistics that read them.

Your own is a `Statistic`: what a tile adds, how sums are rescaled, and how it ends.
"""

from attention_jax.statistics.heads import (
    Induction,
    diagonal,
    head_largest_logit,
    induction_score,
    mass_by_distance,
    mean_mass,
    previous_token,
    previous_token_score,
    received_mass,
    saturated_rows,
)
from attention_jax.statistics.protocol import (
    Pairs,
    Statistic,
    Statistics,
    checked,
    fields_read,
    of_matrix,
    over_queries,
    scaled,
)
from attention_jax.statistics.queries import (
    Heaviest,
    distance_spread,
    effective_support,
    entropy,
    expected_distance,
    heaviest,
    jacobian_trace,
    largest_logit,
    largest_weight,
    mass,
)

__all__ = [
    "Heaviest",
    "Induction",
    "Pairs",
    "Statistic",
    "Statistics",
    "checked",
    "diagonal",
    "distance_spread",
    "effective_support",
    "entropy",
    "expected_distance",
    "fields_read",
    "head_largest_logit",
    "heaviest",
    "induction_score",
    "jacobian_trace",
    "largest_logit",
    "largest_weight",
    "mass",
    "mass_by_distance",
    "mean_mass",
    "of_matrix",
    "over_queries",
    "previous_token",
    "previous_token_score",
    "received_mass",
    "saturated_rows",
    "scaled",
]
