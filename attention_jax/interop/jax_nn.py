"""`jax.nn.dot_product_attention`, argument for argument, in memory linear in the sequence."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.attention import attend
from attention_jax.base import checks
from attention_jax.base.typing import at_least_float32
from attention_jax.masks import Causal, Lengths, Mask, Window, as_mask, batch_axes
from attention_jax.scores import dot, scaled, scaled_dot

Array = jax.Array
ArrayLike = Any

OPERATION = "dot_product_attention"


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    r"""Scaled dot-product attention: context = softmax(scale * Q K^T + bias) V, as masked.

    Arguments and results are those of `jax.nn.dot_product_attention`, but for four differences:

    - a query that may attend to nothing gets zeros, zero gradients and the residual -inf, where
      `jax.nn` averages all values unless the query lies behind its `query_seq_lengths`;
    - float64 is honoured throughout, where `jax.nn` takes the softmax in float32;
    - the residual has float32 or better, where `jax.nn` rounds it to the dtype of the key;
    - the residual has a gradient, where that of `jax.nn` is zero.

    And `value` may have another depth than `key`.

    Args:
      query: [B, T, N, H] or [T, N, H].
      key: [B, S, K, H] or [S, K, H]; K divides N, and each key head serves N / K query heads.
      value: [B, S, K, V] or [S, K, V].
      bias: added to the logits; broadcasts to [B, N, T, S].
      mask: boolean, True = may attend; broadcasts to [B, N, T, S].
      scale: of the logits; 1 / sqrt(H) unless given.
      is_causal: query i attends to the keys 0 to i; the first query stands at the first key also
        where T != S.
      query_seq_lengths: integers [B]; later queries attend to nothing.
      key_value_seq_lengths: integers [B]; nothing attends to later keys.
      local_window_size: (left, right), query i attends to the keys i - left to i + right; one
        number for both.
      implementation: "dense" or "tiled", as in `attend`, or "xla" or "cudnn", which hand the call
        to `jax.nn` with its own rules, for the four differences too. A name is done or refused;
        None chooses as `attend` does.
      return_residual: also return the log-sum-exp of the logits.

    Returns:
      Context, with the axes of the query and the depth of the value; with `return_residual` a
      tuple of it and the residual, [B, T, N] or [T, N].

    Raises:
      ShapeError: operands that do not fit each other.
      ValueError: an argument out of range, or something the implementation cannot do.
      TypeError: a mask that is not boolean.

    Vaswani et al. 2017, equation 1; Dao 2023 (FlashAttention-2), section 3.1.1 (residual).

    >>> x = jax.random.normal(jax.random.key(0), (2, 5, 4, 8))
    >>> ours, theirs = (
    ...     jax.jit(functools.partial(attention, is_causal=True))(x, x, x)
    ...     for attention in (dot_product_attention, jax.nn.dot_product_attention)
    ... )
    >>> bool(jnp.allclose(ours, theirs, atol=1e-5))
    True
    """
    if implementation in ("xla", "cudnn"):
        return _handed_over(
            query,
            key,
            value,
            bias,
            mask,
            scale=scale,
            is_causal=is_causal,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            local_window_size=local_window_size,
            implementation=implementation,
            return_residual=return_residual,
        )
    if implementation not in (None, "dense", "tiled"):
        raise ValueError(
            f"{OPERATION}: implementation must be None, 'dense', 'tiled', 'xla' or 'cudnn', got "
            f"{implementation!r}."
        )
    is_single = jnp.ndim(query) == 3
    query, key, value = (
        _with_batch(name, array)
        for name, array in (("query", query), ("key", key), ("value", value))
    )
    checks.floating(OPERATION, query=query, key=key, value=value)
    sizes = checks.axes(OPERATION, query=(query, "BTNH"), key=(key, "BSKH"), value=(value, "BSKV"))
    checks.multiple(OPERATION, "query heads N", sizes["N"], "key heads K", sizes["K"])
    if bias is not None:
        bias = jnp.asarray(bias, at_least_float32(query.dtype))
        batch_axes.of_array(f"{OPERATION}: bias", bias, sizes)

    masks = (
        Causal() if is_causal else None,
        _window(local_window_size),
        _table(mask, sizes),
        _padding(query_seq_lengths, key_value_seq_lengths, sizes),
    )
    given = [mask for mask in masks if mask is not None]
    found = attend(
        query,
        key,
        value,
        score=scaled_dot if scale is None else scaled(dot, scale),
        mask=functools.reduce(operator.and_, given) if given else None,
        bias=bias,
        implementation=implementation,
        return_logsumexp=return_residual,
    )
    if is_single:
        found = jax.tree.map(lambda x: x[0], found)
    if not return_residual:
        return found
    return found.context, found.logsumexp


def _handed_over(*operands: Any, implementation: str, **options: Any) -> Any:
    try:
        return jax.nn.dot_product_attention(*operands, implementation=implementation, **options)  # type: ignore[arg-type]
    except Exception as error:
        raise ValueError(
            f"{OPERATION}: jax.nn refuses implementation {implementation!r}: {error} "
            "Use implementation='tiled', or None to let the library choose."
        ) from error


def _with_batch(name: str, array: ArrayLike) -> Array:
    array = jnp.asarray(array)
    if array.ndim not in (3, 4):
        letters = "T, N, H" if name == "query" else "S, K, H"
        raise checks.ShapeError(
            f"{OPERATION}: {name} must be [B, {letters}] or [{letters}], got shape {array.shape}."
        )
    return array[None] if array.ndim == 3 else array


def _table(mask: ArrayLike | None, sizes: batch_axes.Sizes) -> Mask | None:
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    table = as_mask(mask.reshape((1,) * (4 - mask.ndim) + mask.shape))
    batch_axes.of_mask(OPERATION, table, sizes)
    return table


def _window(size: Any) -> Mask | None:
    """Return the band i - left <= j <= i + right; a negative side leaves the diagonal out."""
    if size is None:
        return None
    if np.shape(size) not in ((), (2,)):
        raise ValueError(
            f"{OPERATION}: local_window_size must be one number of keys or two (left, right), got "
            f"{size}."
        )
    left, right = np.broadcast_to(size, (2,)).tolist()
    return Window(left, right) if min(left, right) >= 0 else ~Causal(-left - 1) & Causal(right)


def _padding(query_lengths: Any, key_lengths: Any, sizes: batch_axes.Sizes) -> Mask | None:
    if query_lengths is None and key_lengths is None:
        return None
    queries = _lengths("query_seq_lengths", query_lengths, sizes)
    keys = _lengths("key_value_seq_lengths", key_lengths, sizes)
    return Lengths(sizes["S"] if keys is None else keys, queries)


def _lengths(name: str, lengths: Any, sizes: batch_axes.Sizes) -> Array | None:
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    if lengths.shape != (sizes["B"],) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise checks.ShapeError(
            f"{OPERATION}: {name} must hold an integer for each of the B = {sizes['B']} examples, "
            f"got shape {lengths.shape} of {lengths.dtype}."
        )
    return lengths
