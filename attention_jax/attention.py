"""One operator: any score, any mask, any bias and normalizer, by the implementation that fits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from attention_jax import masks
from attention_jax.base import checks
from attention_jax.base.typing import at_least_float32
from attention_jax.implementations import choice, cudnn
from attention_jax.implementations.dense import dense
from attention_jax.implementations.tiled import tiled
from attention_jax.masks import algebra
from attention_jax.normalizers import Exponential, softmax, streaming
from attention_jax.request import KeyOfExample, Operands, function_of
from attention_jax.scores import scaled_dot

Array = jax.Array

IMPLEMENTATIONS = ("dense", "tiled", "cudnn")


def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    score: Any = scaled_dot,
    mask: Any = None,
    bias: Any = None,
    normalizer: Any = softmax,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    implementation: str | None = None,
    tile_sizes: tuple[int, int] | None = None,
    return_weights: bool = False,
    return_logsumexp: bool = False,
) -> Any:
    r"""Attention: context_i = sum_j normalizer(score(q_i, k_j) + bias_ij)_j v_j, j as masked.

    A query that may attend to nothing gets zeros and zero gradients. NaN or Inf in a masked key
    or value reaches nothing; attended, it makes NaN of that query's context.

    Args:
      query: [B, T, N, Hq].
      key: [B, S, K, Hk]; K divides N, and each key head serves N / K query heads.
      value: [B, S, K, V].
      score: a score of one head (`attention_jax.scores`, or your own function), bound with `bind`
        if it has parameters; `per_head` of it if every query head has its own.
      mask: a mask (`attention_jax.masks`), a function (q_idx, kv_idx) -> bool, or a boolean array
        that broadcasts to [B, N, T, S]. True = may attend.
      bias: added to the logits: an array that broadcasts to [B, N, T, S], or a function
        (q_idx, kv_idx) -> numbers, bound and `per_head` like a score.
      normalizer: from logits to weights (`attention_jax.normalizers`).
      dropout_rate: share of weights that are dropped, in [0, 1).
      dropout_key: a `jax.random` key; which pairs are dropped depends on it, on example, head
        and position alone, whatever the implementation.
      implementation: "dense" holds all T x S weights; "tiled" never does, in memory linear in T
        and S, with every derivative; "cudnn" is NVIDIA's kernel, for plain dot products in half
        precision. A name is done or refused; None takes "dense" where weights are asked for or
        all pairs fit in one tile, "cudnn" where it applies, and else "tiled".
      tile_sizes: queries and keys a tile; None chooses from shapes, mask and device.
      return_weights: also return the weights [B, N, T, S], after dropout.
      return_logsumexp: also return the log of the softmax normalizer, [B, T, N], in float32 or
        better; -inf for a query that may attend to nothing.

    Returns:
      Context [B, T, N, V] in the dtype of `value`; a tuple with what else was asked for, in the
      order weights, log-sum-exp.

    Raises:
      ShapeError: operands that do not fit each other.
      ValueError: an argument out of range, or something the implementation cannot do.
      TypeError: what is no array, function or mask where one belongs.

    Vaswani et al. 2017, equation 1, for a general score; Bahdanau, Cho and Bengio 2015.

    >>> x = jax.random.normal(jax.random.key(0), (2, 5, 4, 8))
    >>> attend(x, x[:, :, :2], x[:, :, :2], mask=masks.Causal()).shape
    (2, 5, 4, 8)
    """
    sizes = _sizes(query, key, value)
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    _check_dropout(dropout_rate, dropout_key)
    mask = algebra.with_int32(algebra.as_mask(mask))
    name, tile = _resolve(
        sizes,
        query.dtype,
        score,
        mask,
        bias,
        normalizer,
        dropout_rate,
        implementation,
        tile_sizes,
        return_weights,
        return_logsumexp,
    )
    if name == "cudnn":
        return cudnn.attend(query, key, value, score, mask)

    operands = _operands(
        sizes, query, key, value, score, mask, bias, normalizer, dropout_rate, dropout_key
    )
    if name == "dense":
        context, weights, logsumexp = operands.run(dense, return_weights, sequential="")
    else:
        of_head = functools.partial(tiled, query_size=tile[0], key_size=tile[1])
        sequential = choice.sequential_axes(operands.mask_axes)
        context, weights, logsumexp = operands.run(of_head, False, sequential)
    returned: list[Any] = [context.astype(value.dtype)]
    if return_weights:
        returned.append(weights)
    if return_logsumexp and logsumexp is not None:
        returned.append(logsumexp)
    return tuple(returned) if len(returned) > 1 else returned[0]


def explain(
    query: Any,
    key: Any,
    value: Any,
    *,
    score: Any = scaled_dot,
    mask: Any = None,
    bias: Any = None,
    normalizer: Any = softmax,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    implementation: str | None = None,
    tile_sizes: tuple[int, int] | None = None,
    return_weights: bool = False,
    return_logsumexp: bool = False,
) -> choice.Choice:
    """Tell what `attend` would run for the same arguments: tiles of each kind, operations, bytes.

    Nothing is computed. The arguments are those of `attend`; the arrays [B, T, N, H] may be
    `jax.ShapeDtypeStruct`.

    >>> x = jax.ShapeDtypeStruct((1, 4096, 8, 64), "float32")
    >>> found = explain(x, x, x, mask=masks.Causal(), tile_sizes=(512, 512))
    >>> found.implementation, found.empty, found.partial, found.full
    ('tiled', 28, 8, 28)
    """
    sizes: dict[str, int] = {}
    jax.eval_shape(lambda *operands: sizes.update(_sizes(*operands)), query, key, value)
    _check_dropout(dropout_rate, dropout_key)
    mask = algebra.with_int32(algebra.as_mask(mask))
    name, tile = _resolve(
        sizes,
        query.dtype,
        score,
        mask,
        bias,
        normalizer,
        dropout_rate,
        implementation,
        tile_sizes,
        return_weights,
        return_logsumexp,
    )

    def check(query: Array, key: Array, value: Array) -> None:
        _operands(
            sizes, query, key, value, score, mask, bias, normalizer, dropout_rate, dropout_key
        )

    jax.eval_shape(check, query, key, value)
    itemsize = at_least_float32(query.dtype).itemsize
    return choice.describe(name, mask, sizes, tile, itemsize)


def _sizes(query: Any, key: Any, value: Any) -> dict[str, int]:
    checks.floating("attend", query=query, key=key, value=value)
    letters = {"query": (query, "BTNQ"), "key": (key, "BSKH"), "value": (value, "BSKV")}
    sizes = checks.axes("attend", **letters)
    checks.at_least("attend", 1, **{"query heads N": sizes["N"]})
    checks.multiple("attend", "query heads N", sizes["N"], "key heads K", sizes["K"])
    return sizes


def _operands(
    sizes: dict[str, int],
    query: Array,
    key: Array,
    value: Array,
    score: Any,
    mask: masks.Mask,
    bias: Any,
    normalizer: Any,
    dropout_rate: float,
    dropout_key: Array | None,
) -> Operands:
    """Collect the operands, each checked against the others."""
    operands = Operands(sizes, at_least_float32(query.dtype))
    operands.add("query", query, "BTN")
    operands.add("key", key, "BSK")
    operands.add("value", value, "BSK")
    operands.add_score(score)
    operands.add_mask(mask)
    operands.add_bias(bias)
    operands.add_normalizer(normalizer)
    operands.add_dropout(dropout_rate, dropout_key)
    return operands


def _resolve(
    sizes: dict[str, int],
    dtype: Any,
    score: Any,
    mask: masks.Mask,
    bias: Any,
    normalizer: Any,
    dropout_rate: float,
    implementation: str | None,
    tile_sizes: tuple[int, int] | None,
    return_weights: bool,
    return_logsumexp: bool,
) -> tuple[str, tuple[int, int]]:
    """Return the implementation that runs and its tile; refuse what was asked for in vain."""
    how = streaming(function_of(normalizer))
    if return_logsumexp and not isinstance(how, Exponential):
        raise ValueError(
            "attend: return_logsumexp needs a softmax normalizer; this one has no log-sum-exp."
        )
    lacks = {
        "dense": None,
        "tiled": _tiled_lacks(how, return_weights),
        "cudnn": cudnn.lacks(
            sizes,
            dtype,
            score,
            mask,
            bias,
            normalizer,
            dropout_rate,
            return_weights or return_logsumexp,
        ),
    }
    if implementation is not None and implementation not in lacks:
        raise ValueError(
            f"attend: implementation must be None or one of {', '.join(IMPLEMENTATIONS)}, got "
            f"{implementation!r}."
        )
    if implementation is not None and lacks[implementation]:
        raise ValueError(f"attend: implementation {implementation!r} {lacks[implementation]}")
    if implementation is None:
        implementation = choice.choose(sizes, able=[n for n in lacks if not lacks[n]])
    if tile_sizes is not None and not _are_tile_sizes(tile_sizes):
        raise ValueError(
            f"attend: tile_sizes must be two positive numbers, got {tile_sizes}; give how many "
            "queries and how many keys, as integers."
        )
    if tile_sizes is None:
        return implementation, choice.choose_tile(mask, sizes)
    longest = max(sizes["T"], 1), max(sizes["S"], 1)
    return implementation, (min(tile_sizes[0], longest[0]), min(tile_sizes[1], longest[1]))


def _are_tile_sizes(sizes: Any) -> bool:
    is_pair = isinstance(sizes, tuple | list) and len(sizes) == 2
    return is_pair and all(isinstance(size, int | np.integer) and size > 0 for size in sizes)


def _tiled_lacks(how: Any, return_weights: bool) -> str | None:
    if return_weights:
        return "never holds the weights; use implementation='dense' to look at them."
    if how is None:
        return (
            "cannot stream this normalizer, which needs a whole row of logits; use "
            "implementation='dense'."
        )
    return None


def _check_dropout(rate: float, key: Any) -> None:
    key = key.key if isinstance(key, KeyOfExample) else key
    if isinstance(rate, jax.core.Tracer):
        raise TypeError(
            "attend: dropout_rate must be a number that is known while tracing, got one known only "
            "inside jit; name it in static_argnames."
        )
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"attend: dropout_rate must be in [0, 1), got {rate}.")
    if rate and key is None:
        raise ValueError(
            f"attend: dropout_rate {rate} needs a dropout_key; give a jax.random key, or rate 0."
        )
    if rate and not _is_one_key(key):
        is_array = hasattr(key, "dtype")
        got = f"{key.dtype} of shape {key.shape}" if is_array else type(key).__name__
        raise ValueError(f"attend: dropout_key must be one jax.random key, got {got}.")


def _is_one_key(key: Any) -> bool:
    """Tell whether it is a key of `jax.random.key`, or the words of one of `PRNGKey`."""
    if not hasattr(key, "dtype"):
        return False
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key.ndim == 0
    return key.dtype == jnp.uint32 and key.ndim == 1
