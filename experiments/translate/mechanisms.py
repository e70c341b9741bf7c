"""What is compared: a name of the command line as a score that declares its parameters."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from attention_jax import bind, scores
from attention_jax.binding import rule
from attention_jax.composition import Separated, projected
from attention_jax.parameters import Parameter, learned, parameters_of
from experiments.translate.config import SCORES, UsageError

Array = jax.Array

_GLOROT = initializers.glorot_uniform()


def uniform(query: Array, key: Array) -> Array:
    """Control: e_ij = 0, so that the context is the mean of the source."""
    return jnp.zeros((query.shape[0], key.shape[0]), query.dtype)


def score_of(name: str, query_depth: int, key_depth: int, attention_size: int) -> Any:
    """Return the score behind a name, with projections where it declares none of its own.

    Their matrices are drawn alike (Glorot and Bengio 2010), whatever the paper of the score
    says: the score is to be the only difference.

    Raises:
      UsageError: the name is a path that cannot be imported.
    """
    if name == "uniform":
        return uniform
    score = getattr(scores, name) if name in SCORES else _imported(name)
    declared = parameters_of(score, query_depth, key_depth, attention_size)
    if not any(len(parameter.shape) == 2 for parameter in jax.tree.leaves(declared)):
        return between_projections(score, query_depth, key_depth, attention_size)
    return learned(score, **jax.tree.map(_drawn_alike, declared))


def between_projections(score: Any, query_depth: int, key_depth: int, attention_size: int) -> Any:
    """Ask a score about learned projections: score(q P, k Q), P [Hq, A] and Q [Hk, A].

    A score without weights of its own then has as many as `additive`, and the same freedom
    (Britz et al. 2017 compare both in this form).
    """

    def asked(query: Array, key: Array, query_matrix: Array, key_matrix: Array, **own: Any):
        return separated(query_matrix, key_matrix, **own)(query, key)

    @rule(asked, "separation")
    def separated(query_matrix: Array, key_matrix: Array, **own: Any) -> Separated:
        return projected(bind(score, **own), query_matrix, key_matrix)

    return learned(
        asked,
        query_matrix=Parameter((query_depth, attention_size), _GLOROT),
        key_matrix=Parameter((key_depth, attention_size), _GLOROT),
        **parameters_of(score, attention_size, attention_size, attention_size),
    )


def _drawn_alike(parameter: Parameter) -> Parameter:
    return Parameter(parameter.shape, _GLOROT) if len(parameter.shape) == 2 else parameter


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--scores: {path} cannot be imported: {error}.") from None
