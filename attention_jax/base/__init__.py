"""Types, checks, binding and parameters: what the other parts of the library are written with.

`attention_jax/EXTENDING.md` shows how to write your own score, mask, bias, normalizer and position
with them.
"""

from attention_jax.base import checks
from attention_jax.base.binding import BiasLike, Sliced, bind, per_example, per_head, rule
from attention_jax.base.checks import ShapeError
from attention_jax.base.parameters import (
    Learned,
    Parameter,
    bind_parameters,
    initialize,
    learned,
    parameters_of,
)
from attention_jax.base.typing import (
    AnyNormalizer,
    AnyScore,
    Bias,
    FeatureMap,
    HeadMap,
    MaskFunction,
    Normalizer,
    PositionalScore,
    QueriedNormalizer,
    Score,
)

__all__ = [
    "AnyNormalizer",
    "AnyScore",
    "Bias",
    "BiasLike",
    "FeatureMap",
    "HeadMap",
    "Learned",
    "MaskFunction",
    "Normalizer",
    "Parameter",
    "PositionalScore",
    "QueriedNormalizer",
    "Score",
    "ShapeError",
    "Sliced",
    "bind",
    "bind_parameters",
    "checks",
    "initialize",
    "learned",
    "parameters_of",
    "per_example",
    "per_head",
    "rule",
]
