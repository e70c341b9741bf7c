"""Measures of attention weights, pictures and pages of them, and alignments.

All take weights [..., T, S] as `attend(..., return_weights=True)` gives them, and count in float32
or better. Of sequences whose weights are too many to be held, `attend(..., statistics=...)` gives
entropy, effective support, the trace of the Jacobian, the share of saturated rows and more. A query
that attends to nothing, a row of zeros, has no entropy and no support, and is
left out of means over rows; no gradient is made NaN by a weight of zero.
"""

from attention_jax.diagnostics import plots
from attention_jax.diagnostics.alignment import (
    AlignmentQuality,
    alignment_quality,
    links,
    quality_of_counts,
)
from attention_jax.diagnostics.explorer import Explorer, View, explore
from attention_jax.diagnostics.weights import (
    additive_saturation,
    effective_support,
    entropy,
    head_ablation,
    jacobian_trace,
    jensen_shannon,
    linear_cka,
    replace_heads,
    rollout,
    saturated_rows,
    tanh_saturation,
    uniform,
)

__all__ = [
    "AlignmentQuality",
    "Explorer",
    "View",
    "additive_saturation",
    "alignment_quality",
    "effective_support",
    "entropy",
    "explore",
    "head_ablation",
    "jacobian_trace",
    "jensen_shannon",
    "linear_cka",
    "links",
    "plots",
    "quality_of_counts",
    "replace_heads",
    "rollout",
    "saturated_rows",
    "tanh_saturation",
    "uniform",
]
