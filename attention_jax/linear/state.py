"""Linear attention of whole sequences, and its state for decoding."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax import masks
from attention_jax.base import checks
from attention_jax.base.binding import Sliced, function_of
from attention_jax.base.typing import FeatureMap, at_least_float32, require_callable
from attention_jax.linear.feature_maps import elu_plus_one, is_signed
from attention_jax.linear.recurrence import KeySums, extended, padded, read_out, scanned
from attention_jax.masks import padding
from attention_jax.masks.intervals import indices

__all__ = ["LinearState", "decode", "extend", "init", "linear_attention", "read"]

Array = jax.Array

_CHUNK = 128
_SHARED = "its queries share one sum over the keys"


class LinearState(NamedTuple):
    """The sums over the keys so far, and the number of tokens so far, [B].

    Its size never grows, and every example has its own length.
    """

    sums: KeySums
    length: Array


def linear_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    feature_map: FeatureMap | Sliced = elu_plus_one,
    mask: masks.MaskLike = None,
    normalize: bool = True,
    chunk_size: int = _CHUNK,
) -> Array:
    r"""Linear attention: context_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j).

    A query that may attend to nothing gets zeros and zero gradients. NaN or Inf in a masked key
    or value reaches nothing.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H]; K divides N, and each key head serves N / K query heads.
      value: [B, S, K, V].
      feature_map: phi, a function [T, H] -> [T, M] (`attention_jax.feature_maps`,
        `attention_jax.performer`, or your own), bound with `bind` if it has parameters;
        `per_head` of it if every key head has its own.
      mask: `masks.Causal`, padding by `masks.Lengths` or by an array over the keys alone,
        [B, 1, 1, S], or these joined by `&`. Others depend on pairs and are refused.
      normalize: False leaves out the denominator.
      chunk_size: under a causal mask, how many keys are taken at once.

    Returns:
      Context [B, T, N, V] in the dtype of `value`. Time is O(S M V); memory O(S (M + V)), of the
      derivative too; no array of T x S or S x M x V is made.

    Raises:
      ShapeError: operands that do not fit each other.
      ValueError: a mask that cannot be honoured, or a signed feature map to be normalised.

    Katharopoulos et al. 2020, equations 4 to 9; without denominator Sun et al. 2023, section 2.

    >>> from attention_jax import masks
    >>> x = jax.random.normal(jax.random.key(0), (2, 5, 4, 8))
    >>> linear_attention(x, x[:, :, :2], x[:, :, :2], mask=masks.Causal()).shape
    (2, 5, 4, 8)
    """
    name = "linear_attention"
    sizes = _sizes(name, query, key, value)
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    _check_options(name, feature_map, normalize, chunk_size)
    found = padding.from_mask(name, mask, sizes, causal=True, reason=_SHARED)
    sums = _empty(sizes["B"], key, value, feature_map)
    query = jnp.where(found.query[:, :, None, None], query, 0.0)
    if found.causal is None:
        sums = extended(sums, key, value, found.key, feature_map)
        context = read_out(query, sums, feature_map, normalize)
    else:
        behind, ahead = max(found.causal, 0), max(-found.causal, 0)
        end = max(sizes["T"] + behind, sizes["S"] + ahead)
        query = padded(query, behind, end)
        key, value, present = (padded(x, ahead, end) for x in (key, value, found.key))
        context, _ = scanned(query, key, value, present, sums, feature_map, normalize, chunk_size)
        context = context[:, behind : behind + sizes["T"]]
    return jnp.where(found.query[:, :, None, None], context, 0.0).astype(value.dtype)


def init(
    batch: int,
    num_key_heads: int,
    key_depth: int,
    value_depth: int | None = None,
    *,
    feature_map: FeatureMap | Sliced = elu_plus_one,
    dtype: Any = jnp.float32,
) -> LinearState:
    """Return the state before any key, for `decode` and `extend`.

    Args:
      batch: B.
      num_key_heads: K.
      key_depth: H.
      value_depth: V; H unless given.
      feature_map: as in `linear_attention`; it decides the number of features M.
      dtype: of the tokens; sums are in float32 or better.

    Raises:
      ShapeError: the feature map does not return features [T, M].

    >>> init(2, 4, 8).sums.values.shape
    (2, 4, 8, 9)
    """
    dtype = at_least_float32(dtype)
    value_depth = key_depth if value_depth is None else value_depth
    num_features = _num_features(feature_map, key_depth, dtype)
    values = jnp.zeros((batch, num_key_heads, num_features, value_depth + 1), dtype)
    nothing = jnp.full((batch, num_key_heads), -jnp.inf, dtype)
    return LinearState(
        KeySums(values, nothing, jnp.zeros_like(nothing)), jnp.zeros(batch, jnp.int32)
    )


def decode(
    query: Array,
    key: Array,
    value: Array,
    state: LinearState,
    *,
    feature_map: FeatureMap | Sliced = elu_plus_one,
    mask: masks.MaskLike = masks.Causal(),  # noqa: B008
    count: Any = None,
    normalize: bool = True,
    chunk_size: int = _CHUNK,
) -> tuple[Array, LinearState]:
    """Attend causally from the next tokens of a sequence to all tokens so far and themselves.

    Args:
      query: [B, T, N, H], any number T of tokens.
      key: [B, T, K, H].
      value: [B, T, K, V].
      state: from `init`, or from the previous call; its size never grows.
      feature_map: as in `linear_attention`.
      mask: the mask of the whole sequence, `Causal()` and padding; index 0 is its first token.
      count: how many of the T are tokens, [B] where examples differ; the rest is padding.
      normalize: False leaves out the denominator.
      chunk_size: how many keys are taken at once.

    Returns:
      What the full pass gives at these positions, [B, T, N, V], and the next state.

    Raises:
      ShapeError: operands that do not fit each other or the state.
      ValueError: a mask that cannot be honoured, a signed feature map to be normalised, or a count
        that is not in [0, T].

    Katharopoulos et al. 2020, section 3.4, equations 16 to 20.

    >>> x = jnp.ones((1, 3, 2, 4))
    >>> context, state = decode(x, x, x, init(1, 2, 4))
    >>> context.shape
    (1, 3, 2, 4)
    """
    sizes = _sizes("decode", query, key, value)
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    checks.axes("decode", query=(query, "BTNH"), key=(key, "BTKH"))
    _check_options("decode", feature_map, normalize, chunk_size)
    _check_state("decode", state, key, value, feature_map)
    starts = (state.length, state.length)
    found = padding.from_mask("decode", mask, sizes, causal=True, reason=_SHARED, starts=starts)
    if found.causal != 0:
        raise ValueError(
            "decode: the mask must be masks.Causal() with offset 0, or that and padding joined by "
            "&, because the sums of the past hold all tokens so far and no later one."
        )
    count = checks.tokens("decode", count, sizes["T"], (sizes["B"],))
    is_token = indices(sizes["T"])[None, :] < count[:, None]
    asked, present = is_token & found.query, is_token & found.key
    query = jnp.where(asked[:, :, None, None], query, 0.0)
    how = (feature_map, normalize, chunk_size)
    context, sums = scanned(query, key, value, present, state.sums, *how)
    context = jnp.where(asked[:, :, None, None], context, 0.0).astype(value.dtype)
    return context, LinearState(sums, state.length + count)


def extend(
    state: LinearState,
    key: Array,
    value: Array,
    *,
    feature_map: FeatureMap | Sliced = elu_plus_one,
    count: Any = None,
) -> LinearState:
    """Add keys and values to a state, which `read` attends to.

    Args:
      state: from `init`, or from the previous call.
      key: [B, S, K, H].
      value: [B, S, K, V].
      feature_map: as in `linear_attention`.
      count: how many of the S are tokens, [B] where examples differ; the rest is padding.

    Returns:
      The next state.

    Raises:
      ShapeError: operands that do not fit each other or the state.
      ValueError: a count that is not in [0, S].

    >>> x = jnp.ones((1, 3, 2, 4))
    >>> read(x, extend(init(1, 2, 4), x, x))[0, 0, 0]
    Array([1., 1., 1., 1.], dtype=float32)
    """
    sizes = checks.axes("extend", key=(key, "BTKH"), value=(value, "BTKV"))
    _check_state("extend", state, key, value, feature_map)
    count = checks.tokens("extend", count, sizes["T"], (sizes["B"],))
    present = indices(sizes["T"])[None, :] < count[:, None]
    sums = extended(state.sums, key, value, present, feature_map)
    return LinearState(sums, state.length + count)


def read(
    query: Array,
    state: LinearState,
    *,
    feature_map: FeatureMap | Sliced = elu_plus_one,
    normalize: bool = True,
) -> Array:
    """Attend to all keys of a state; [B, T, N, H] -> [B, T, N, V].

    Args:
      query: [B, T, N, H].
      state: from `extend` or `decode`.
      feature_map: as in `linear_attention`.
      normalize: False leaves out the denominator.

    Returns:
      Context [B, T, N, V] in the dtype of the state; zeros where the state holds no key.

    Raises:
      ShapeError: queries and a state that do not fit each other.
      ValueError: a signed feature map to be normalised.

    >>> read(jnp.ones((1, 3, 2, 4)), init(1, 2, 4)).shape
    (1, 3, 2, 4)
    """
    _check_options("read", feature_map, normalize)
    sizes = checks.axes("read", query=(query, "BTNH"), sums=(state.sums.values, "BKMV"))
    checks.multiple("read", "query heads N", sizes["N"], "key heads K", sizes["K"])
    return read_out(query, state.sums, feature_map, normalize)


def _sizes(operation: str, query: Array, key: Array, value: Array) -> dict[str, int]:
    checks.floating(operation, query=query, key=key, value=value)
    sizes = checks.axes(operation, query=(query, "BTNH"), key=(key, "BSKH"), value=(value, "BSKV"))
    checks.multiple(operation, "query heads N", sizes["N"], "key heads K", sizes["K"])
    return sizes


def _check_options(
    operation: str, feature_map: FeatureMap | Sliced, normalize: bool, chunk_size: int = 1
) -> None:
    checks.at_least(operation, 1, chunk_size=chunk_size)
    function = function_of(feature_map)
    if isinstance(feature_map, Sliced) and feature_map.axes != "N":
        raise ValueError(
            f"{operation}: feature_map is per_example, but all examples share one; leave it "
            "unmarked, or mark it per_head."
        )
    require_callable(f"{operation}: feature_map", function, FeatureMap)
    if normalize and is_signed(function):
        raise ValueError(
            f"{operation}: this feature map gives weights of either sign, which may sum to zero; "
            "give normalize=False, or a map whose kernel is positive."
        )


def _check_state(
    operation: str, state: LinearState, key: Array, value: Array, feature_map: FeatureMap | Sliced
) -> None:
    """Require the state that `init` would return for these keys, values and features."""
    sums = state.sums.values
    features = _num_features(feature_map, key.shape[-1], sums.dtype)
    expected = (key.shape[0], key.shape[2], features, value.shape[-1] + 1)
    if sums.shape != expected:
        raise checks.ShapeError(
            f"{operation}: state.sums [B, K, M, V + 1] must be {expected} for these keys, values "
            f"and features, got shape {sums.shape}; init it for them."
        )


def _num_features(feature_map: FeatureMap | Sliced, depth: int, dtype: Any) -> int:
    first_head: Any = feature_map
    if isinstance(feature_map, Sliced):
        first_head = feature_map.of_first
    row = jax.ShapeDtypeStruct((1, depth), dtype)
    shape = jax.eval_shape(lambda x: first_head(x), row).shape
    if len(shape) != 2 or shape[0] != 1:
        raise checks.ShapeError(
            f"feature_map: one row [1, H] must become features [1, M], got shape {shape}."
        )
    return shape[1]


def _empty(batch: int, key: Array, value: Array, feature_map: FeatureMap | Sliced) -> KeySums:
    sizes = (batch, key.shape[2], key.shape[3], value.shape[3])
    return init(*sizes, feature_map=feature_map, dtype=key.dtype).sums
