"""Positions of queries and keys, absolute and relative.

Everything here is a function of indices, so a tile computes what it needs and nothing of size
T x S is stored. Four kinds, by where they enter:

- added to the input: `sinusoidal`, `embedded`;
- rotating queries and keys of one head: `rotary`;
- a bias on the logits: `alibi`, `t5_bias`, `grid_bias`;
- a term of the score: `relative_key`; and one of the context: `relative_values`.

Learned ones are declared for the Flax modules: give `learned_buckets()` or `learned_grid(...)` as
a bias, `relative_key` as a score.
"""

from attention_jax.positions.absolute import (
    embedded,
    learned_table,
    llama3_frequencies,
    longrope_frequencies,
    longrope_gain,
    rotary,
    sinusoidal,
    sinusoidal_step,
    stretched_base,
    yarn_frequencies,
    yarn_gain,
)
from attention_jax.positions.relative import (
    alibi,
    alibi_bias,
    alibi_slopes,
    grid_bias,
    learned_buckets,
    learned_grid,
    relative_key,
    relative_values,
    t5_bias,
    t5_bucket,
)

__all__ = [
    "alibi",
    "alibi_bias",
    "alibi_slopes",
    "embedded",
    "grid_bias",
    "learned_buckets",
    "learned_grid",
    "learned_table",
    "llama3_frequencies",
    "longrope_frequencies",
    "longrope_gain",
    "relative_key",
    "relative_values",
    "rotary",
    "sinusoidal",
    "sinusoidal_step",
    "stretched_base",
    "t5_bias",
    "t5_bucket",
    "yarn_frequencies",
    "yarn_gain",
]
