"""Normalizers turn the logits of one head [T, S] into weights [T, S].

Each takes the logits and `allowed`, the mask as a boolean array, and gives exact zeros where
nothing may be attended; a row without any allowed key is all zeros. The ones that can be
computed tile by tile carry a rule `streaming` that says how (`Streaming`); one that needs a whole
row runs under "dense" alone.
"""

from attention_jax.normalizers.common import (
    log_normalizer,
    sigmoid,
    softmax,
    softmax_plus_one,
    softmax_with_sink,
    stable_logsumexp,
)
from attention_jax.normalizers.contextual import contextual_positions
from attention_jax.normalizers.monotonic import hard_monotonic, monotonic
from attention_jax.normalizers.ordered import (
    Carried,
    Ordered,
    in_any_order,
    stick_breaking,
    whole_sequences,
)
from attention_jax.normalizers.powers import PowerThreshold
from attention_jax.normalizers.protocol import (
    Elementwise,
    Exponential,
    LogSum,
    Streaming,
    is_queried,
    name_of,
    queried,
    streaming,
    with_query,
)
from attention_jax.normalizers.searched import (
    MOST_PASSES,
    Level,
    OverThreshold,
    Searched,
    Threshold,
    over_row,
)
from attention_jax.normalizers.selected import Selected, Selection, hard, over_kept, top_k, top_p
from attention_jax.normalizers.signed import odd_power, signed_softmax
from attention_jax.normalizers.sparse import entmax, entmax15, sparsemax

__all__ = [
    "MOST_PASSES",
    "Carried",
    "Elementwise",
    "Exponential",
    "Level",
    "LogSum",
    "Ordered",
    "OverThreshold",
    "PowerThreshold",
    "Searched",
    "Selected",
    "Selection",
    "Streaming",
    "Threshold",
    "contextual_positions",
    "entmax",
    "entmax15",
    "hard",
    "hard_monotonic",
    "in_any_order",
    "is_queried",
    "log_normalizer",
    "monotonic",
    "name_of",
    "odd_power",
    "over_kept",
    "over_row",
    "queried",
    "sigmoid",
    "signed_softmax",
    "softmax",
    "softmax_plus_one",
    "softmax_with_sink",
    "sparsemax",
    "stable_logsumexp",
    "stick_breaking",
    "streaming",
    "top_k",
    "top_p",
    "whole_sequences",
    "with_query",
]
