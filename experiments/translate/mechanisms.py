"""Mechanisms: names of the command line as scores that declare their parameters."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.tree_util import Partial

from attention_jax import scores
from attention_jax.base.binding import rule
from attention_jax.base.parameters import (
    Parameter,
    bind_parameters,
    initialize,
    learned,
    parameters_of,
)
from attention_jax.scores import Separated, projected, separate
from attention_jax.scores.composition import mapped
from experiments.command_line import UsageError
from experiments.translate.checks import SCORES

Array = jax.Array

_GLOROT = initializers.glorot_uniform()


def uniform(query: Array, key: Array) -> Array:
    """Control: e_ij = 0, so that the context is the mean of the source."""
    return jnp.zeros((query.shape[0], key.shape[0]), query.dtype)


def score_of(
    name: str,
    query_depth: int,
    key_depth: int,
    attention_size: int,
    *,
    tied: bool = False,
    normed: bool = False,
) -> Any:
    """Return the score of a name, with projections if it declares none of its own.

    All matrices are drawn alike (Glorot and Bengio 2010), whatever the paper of the score says,
    so that the score is the only difference.

    Args:
      name: of a score, or the control `uniform`, which has no projections.
      query_depth: of queries.
      key_depth: of keys.
      attention_size: of the projections.
      tied: let query and key share their projection.
      normed: normalize queries and keys of the score to unit mean square.

    Raises:
      UsageError: the name is a path that cannot be imported, or there is nothing to tie.
    """
    if name == "uniform":
        return uniform
    score = getattr(scores, name) if name in SCORES else _imported(name)
    declared = parameters_of(score, query_depth, key_depth, attention_size)
    projects = any(len(parameter.shape) == 2 for parameter in jax.tree.leaves(declared))
    if projects:
        score = learned(score, **jax.tree.map(_drawn_alike, declared))
    if normed:
        depths = (query_depth, key_depth) if projects else (attention_size, attention_size)
        score = between_norms(score, *depths, attention_size)
    if not projects:
        score = between_projections(score, query_depth, key_depth, attention_size)
    return with_tied_projections(name, score) if tied else score


def score_of_head(name: str, depth: int) -> Any:
    """Return the score of a name for queries and keys that are projected already.

    Raises:
      UsageError: the name is a path that cannot be imported.
    """
    if name == "uniform":
        return uniform
    score = getattr(scores, name) if name in SCORES else _imported(name)
    declared = parameters_of(score, depth, depth, depth)
    return learned(score, **jax.tree.map(_drawn_alike, declared)) if declared else score


def check(name: str, make: Callable[[], Any], depth: int, attention_size: int) -> None:
    """Refuse what is not a score; nothing is computed.

    Args:
      name: from the command line.
      make: returns the score of that name.
      depth: of queries and keys.
      attention_size: see `score_of`.

    Raises:
      UsageError: the name cannot be imported, or does not return logits [T, S].
    """
    query, key = (jax.ShapeDtypeStruct((length, depth), jnp.float32) for length in (2, 4))
    try:
        found = jax.eval_shape(functools.partial(_initialized, make, attention_size), query, key)
    except UsageError:
        raise
    except Exception as error:  # of any kind, because the function may be anything
        happened = f"raises {_in_one_line(error)}"
    else:
        shape = getattr(found, "shape", None)
        if shape == (2, 4):
            return
        happened = f"returns {type(found).__name__ if shape is None else list(shape)}"
    raise UsageError(
        f"--scores: {name} is no score: for a query [2, {depth}] and keys [4, {depth}] logits "
        f"[2, 4] are needed, but it {happened}."
    )


def _initialized(make: Callable[[], Any], attention_size: int, query: Array, key: Array) -> Any:
    """Return the logits of a score with its initial parameters."""
    score, depth = make(), query.shape[-1]
    declared = parameters_of(score, depth, depth, attention_size)
    return bind_parameters(score, initialize(jax.random.key(0), declared))(query, key)


def between_projections(score: Any, query_depth: int, key_depth: int, attention_size: int) -> Any:
    """Apply a score to learned projections: score(q P, k Q), P [Hq, A] and Q [Hk, A].

    A score without weights of its own then has as many as `additive`, and the same freedom
    (Britz et al. 2017 compare both in this form).
    """

    def with_projections(
        query: Array, key: Array, query_matrix: Array, key_matrix: Array, **own: Any
    ) -> Array:
        return separated(query_matrix, key_matrix, **own)(query, key)

    @rule(with_projections, "separation")
    def separated(query_matrix: Array, key_matrix: Array, **own: Any) -> Separated:
        return projected(bind_parameters(score, own), query_matrix, key_matrix)

    return learned(
        with_projections,
        query_matrix=Parameter((query_depth, attention_size), _GLOROT),
        key_matrix=Parameter((key_depth, attention_size), _GLOROT),
        **parameters_of(score, attention_size, attention_size, attention_size),
    )


def between_norms(score: Any, query_depth: int, key_depth: int, attention_size: int) -> Any:
    """Apply a score to rows of unit mean square, times learned gains: score(norm(q), norm(k)).

    Henry et al. 2020; Zhang and Sennrich 2019 (the norm).
    """

    def with_norms(
        query: Array, key: Array, query_gain: Array, key_gain: Array, **own: Any
    ) -> Array:
        return separated(query_gain, key_gain, **own)(query, key)

    @rule(with_norms, "separation")
    def separated(query_gain: Array, key_gain: Array, **own: Any) -> Separated:
        norms = (Partial(root_mean_square_normed, gain=gain) for gain in (query_gain, key_gain))
        return mapped(bind_parameters(score, own), *norms)

    return learned(
        with_norms,
        query_gain=Parameter((query_depth,), initializers.ones),
        key_gain=Parameter((key_depth,), initializers.ones),
        **parameters_of(score, query_depth, key_depth, attention_size),
    )


def root_mean_square_normed(x: Array, gain: Array) -> Array:
    """Divide rows by their root mean square: x / sqrt(mean(x^2) + 1e-6) * gain."""
    square = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(square + 1e-6) * gain[None, :]


def with_tied_projections(name: str, score: Any) -> Any:
    """Share one projection between query and key: score(q P, k P).

    Raises:
      UsageError: the score has no two projections of one shape.
    """
    own = score.parameters
    for of_query, of_key in (("query_matrix", "key_matrix"), ("query_weight", "key_weight")):
        if {of_query, of_key} <= set(own) and len(own[of_query].shape) == 2:
            break
    else:
        raise UsageError(f"--projections=tied: {name} has no two projections to tie.")
    shared = {of_key: of_query}

    def tied(query: Array, key: Array, **kept: Any):
        return separated(**kept)(query, key)

    @rule(tied, "separation")
    def separated(**kept: Any) -> Separated:
        copied = {name: kept[other] for name, other in shared.items()}
        return separate(bind_parameters(score, kept | copied))

    return learned(tied, **{name: own[name] for name in own if name != of_key})


def _drawn_alike(parameter: Parameter) -> Parameter:
    return Parameter(parameter.shape, _GLOROT) if len(parameter.shape) == 2 else parameter


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # of any kind, because importing runs the module
        raise UsageError(f"--scores: {path} cannot be imported: {_in_one_line(error)}.") from None


def _in_one_line(error: Exception) -> str:
    first, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first}".rstrip(".: ")
