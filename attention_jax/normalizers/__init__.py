"""Normalizers turn the logits of one head [T, S] into weights [T, S].

Each takes the logits and `allowed`, the mask as a boolean array, and gives exact zeros where
nothing may be attended; a row without any allowed key is all zeros. The ones that can be
computed tile by tile carry a rule `streaming` that says how; sparsemax, entmax, top-k and hard
attention need a whole row, and run under "dense" alone.
"""

from attention_jax.normalizers.common import (
    hard,
    log_normalizer,
    sigmoid,
    softmax,
    softmax_plus_one,
    softmax_with_sink,
    stable_logsumexp,
    top_k,
)
from attention_jax.normalizers.protocol import (
    Elementwise,
    Exponential,
    LogSum,
    Streaming,
    name_of,
    streaming,
)
from attention_jax.normalizers.sparse import entmax15, sparsemax

__all__ = [
    "Elementwise",
    "Exponential",
    "LogSum",
    "Streaming",
    "entmax15",
    "hard",
    "log_normalizer",
    "name_of",
    "sigmoid",
    "softmax",
    "softmax_plus_one",
    "softmax_with_sink",
    "sparsemax",
    "stable_logsumexp",
    "streaming",
    "top_k",
]
