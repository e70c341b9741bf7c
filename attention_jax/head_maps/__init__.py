"""Maps across heads: of the logits before the normalizer, or of the weights after it.

Each takes the numbers of all heads at pairs of queries and keys, [M, T, S], and returns those of N
heads, [N, T, S]: `attend(..., mix_logits=..., mix_weights=...)`. One that looks at neighbouring
pairs carries a rule `halo` that says at how many.

Statistics of mixed heads (`attend(..., statistics=...)`) are those of the mixed logits and of the
mixed weights, which may be negative; see `attention_jax.statistics`.
"""

from attention_jax.head_maps.common import difference, differential, grouped, talking
from attention_jax.head_maps.neighbours import neighbours
from attention_jax.head_maps.protocol import NO_HALO, Halo, group_of, halo_of

__all__ = [
    "NO_HALO",
    "Halo",
    "difference",
    "differential",
    "group_of",
    "grouped",
    "halo_of",
    "neighbours",
    "talking",
]
