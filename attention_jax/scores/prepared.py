"""Attention of many decoder steps to one memory, whose keys are mapped once.

A recurrent decoder attends to the same memory at each of its steps. `prepare` maps the keys once
(Bahdanau's U_a h_j), and `attend_prepared` pairs them with one or more queries. It is dense: a
step has few queries, and returns their weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax import masks
from attention_jax.base import checks
from attention_jax.base.binding import as_pytree
from attention_jax.base.finite import finite_rows
from attention_jax.base.typing import AnyNormalizer, AnyScore
from attention_jax.masks import algebra, batch_axes
from attention_jax.masks.intervals import indices
from attention_jax.normalizers import softmax, whole_sequences, with_query
from attention_jax.scores.composition import Separated, require_score, separate

Array = jax.Array


class PreparedMemory(NamedTuple):
    """A prepared memory: mapped keys [B, S, A] and values [B, S, V].

    `poison` [B, S] is NaN for a row that held NaN or Inf, which the other two do not hold.
    """

    key: Array
    value: Array
    poison: Array


def prepare(score: AnyScore, memory: Array, value: Array | None = None) -> PreparedMemory:
    r"""Map the keys of a memory once: key_j = key_map(h_j), for additive W_k h_j + b.

    Args:
      score: a bound score.
      memory: what the keys are made of, [B, S, Hk].
      value: what is averaged, [B, S, V]; the memory itself unless given.

    Returns:
      The memory, for `attend_prepared`; in float32 or better.

    Raises:
      ShapeError: memory and value of different batch or length.

    Bahdanau, Cho and Bengio 2015, appendix A.1.2: U_a h_j "does not depend on i".

    >>> from attention_jax.scores import dot
    >>> prepare(dot, jnp.ones((2, 5, 4))).value.shape
    (2, 5, 4)
    """
    require_score("prepare: score", score)
    value = memory if value is None else value
    checks.axes("prepare", memory=(memory, "BSH"), value=(value, "BSV"))
    checks.floating("prepare", memory=memory, value=value)
    dtype = jnp.float64 if memory.dtype == jnp.float64 else jnp.float32
    memory, memory_poison = finite_rows(memory.astype(dtype))
    value, value_poison = finite_rows(value.astype(dtype))
    key = jax.vmap(separate(_cast(score, dtype)).key_map)(memory)
    return PreparedMemory(key, value, memory_poison + value_poison)


def attend_prepared(
    score: AnyScore,
    query: Array,
    memory: PreparedMemory,
    mask: masks.MaskLike = None,
    normalizer: AnyNormalizer = softmax,
) -> tuple[Array, Array]:
    r"""Attend to a prepared memory: context_i = sum_j normalizer(score(q_i, k_j))_j v_j.

    Args:
      score: the bound score that the memory was prepared with.
      query: [B, T, Hq], or [B, Hq] for one step.
      memory: from `prepare`.
      mask: a mask (`attention_jax.masks`), or a boolean array that broadcasts to the weights.
      normalizer: from logits to weights.

    Returns:
      Context [B, T, V] and weights [B, T, S], without T for one step; zeros for a query that
      may attend to nothing.

    Raises:
      ShapeError: query, memory and mask do not fit each other.
      ValueError: one step with a normalizer that needs the weights of the query before.

    Bahdanau, Cho and Bengio 2015, equations 5 and 6.

    >>> from attention_jax.scores import dot
    >>> memory = jnp.array([[[1.0], [2.0]]])
    >>> attend_prepared(dot, jnp.zeros((1, 1)), prepare(dot, memory))
    (Array([[1.5]], dtype=float32), Array([[0.5, 0.5]], dtype=float32))
    """
    if query.ndim == 2:
        whole_sequences("attend_prepared", normalizer)
        mask = mask[..., None, :] if isinstance(mask, Array | np.ndarray) else mask
        context, weights = attend_prepared(score, query[:, None], memory, mask, normalizer)
        return context[:, 0], weights[:, 0]
    sizes = checks.axes(
        "attend_prepared",
        query=(query, "BTQ"),
        key=(memory.key, "BSA"),
        value=(memory.value, "BSV"),
    )
    dtype = memory.key.dtype
    parts = separate(_cast(score, dtype))
    normalizer = _cast(normalizer, dtype)
    query, query_poison = finite_rows(query.astype(dtype))
    mask_arrays, mask_axes, mask_of = _by_example(mask, sizes)
    of_example = functools.partial(_attend_example, parts, normalizer, mask_of)
    lifted = jax.vmap(of_example, in_axes=(0, 0, 0, mask_axes))
    return lifted(query, query_poison, memory, mask_arrays)


def _attend_example(
    parts: Separated,
    normalizer: AnyNormalizer,
    mask_of: Callable[[list[Any]], masks.Mask],
    query: Array,
    poison: Array,
    memory: PreparedMemory,
    mask_arrays: list[Any],
) -> tuple[Array, Array]:
    q_idx, kv_idx = indices(query.shape[0]), indices(memory.key.shape[0])
    logits = parts.paired(parts.query_map(query), memory.key, q_idx, kv_idx)
    logits = logits + poison[:, None] + memory.poison[None, :]
    allowed = mask_of(mask_arrays)(q_idx[:, None], kv_idx[None, :])
    of_rows = with_query(normalizer, query)
    weights = of_rows(logits, jnp.broadcast_to(allowed, logits.shape))
    return weights @ memory.value, weights


def _by_example(
    mask: masks.MaskLike, sizes: dict[str, int]
) -> tuple[list[Any], list[int | None], Any]:
    """Return the arrays of a mask, which of them have a leading axis B, and how to rebuild it."""
    batch, *pairs = (sizes[axis] for axis in "BTS")
    mask = masks.as_mask(mask)
    if isinstance(mask, masks.Table):
        try:
            mask = masks.Table(jnp.broadcast_to(mask.allowed, (batch, *pairs)))
        except ValueError:
            raise checks.ShapeError(
                f"attend_prepared: mask must broadcast to [B, T, S] = {(batch, *pairs)}, got shape "
                f"{mask.allowed.shape}."
            ) from None
    for array, extra in algebra.leading_axes(mask):
        if extra > 1 or (extra and len(array) not in (1, batch)):
            raise checks.ShapeError(
                "attend_prepared: an array of the mask may have one axis more than for one "
                f"example, of size B = {batch}; got shape {jnp.shape(array)}."
            )
    fitted, letters = batch_axes.of_mask("attend_prepared", _with_one_head(mask), sizes | {"N": 1})
    arrays, structure = jax.tree.flatten(algebra.with_int32(fitted))
    return arrays, [0 if axes else None for axes in letters], structure.unflatten


def _with_one_head(mask: masks.Mask) -> masks.Mask:
    """Give tables [B, T, S] an axis for their only head: [B, 1, T, S]."""

    def is_table(part: Any) -> bool:
        return isinstance(part, masks.Table)

    def of_part(part: Any) -> Any:
        has_batch = is_table(part) and part.allowed.ndim == 3
        return masks.Table(part.allowed[:, None]) if has_batch else part

    return jax.tree.map(of_part, mask, is_leaf=is_table)


def _cast(function: Any, dtype: Any) -> Any:
    """Cast the floating-point numbers that are bound to a function."""
    return jax.tree.map(
        lambda x: jnp.asarray(x, dtype) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x,
        as_pytree(function),
    )
