"""Linear attention: sums over keys instead of pairs, in time and memory linear in the sequence.

    context_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j)

The sums over j, phi(k_j) v_j^T and phi(k_j), are shared by all queries. Under a causal mask they
grow with time, and a scan over chunks of keys carries them; decoding goes on from a `LinearState`.
"""

from attention_jax.linear import feature_maps, linformer, performer
from attention_jax.linear.state import LinearState, decode, extend, init, linear_attention, read

__all__ = [
    "LinearState",
    "decode",
    "extend",
    "feature_maps",
    "init",
    "linear_attention",
    "linformer",
    "performer",
    "read",
]
