"""Score functions: how well a query and a key agree, one formula each.

A score is a pure function of one head, `score(query [T, Hq], key [S, Hk]) -> logits [T, S]`,
and its parameters are further arguments, bound with `bind`. Entry (i, j) depends on query row i
and key row j alone, so the same function serves a tile, a sequence and a decoding step.

Scores are also built from scores: `scaled`, `projected`, `row_normalized`, `soft_capped`. Each has
a rule that separates it into per-row and pairwise parts, tested to equal the formula.
"""

from attention_jax.scores import parameters as _parameters  # noqa: F401  (rules of the scores)
from attention_jax.scores.composition import (
    Separated,
    positional,
    projected,
    row_normalized,
    scaled,
    separate,
    soft_capped,
)
from attention_jax.scores.formulas import (
    bilinear,
    cosine,
    dot,
    gaussian,
    key_normalized_dot,
    location,
    low_rank_bilinear,
    scaled_dot,
    shared_projection,
    trilinear,
)
from attention_jax.scores.networks import additive, concat, normalized_additive
from attention_jax.scores.sines import TanhBySines

__all__ = [
    "Separated",
    "TanhBySines",
    "additive",
    "bilinear",
    "concat",
    "cosine",
    "dot",
    "gaussian",
    "key_normalized_dot",
    "location",
    "low_rank_bilinear",
    "normalized_additive",
    "positional",
    "projected",
    "row_normalized",
    "scaled",
    "scaled_dot",
    "separate",
    "shared_projection",
    "soft_capped",
    "trilinear",
]
