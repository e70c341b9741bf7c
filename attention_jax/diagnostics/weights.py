"""Measures of attention weights, and of what removing a head changes.

Those of single rows are statistics (`attention_jax.statistics`) of weights that are there; without
the weights, `attend(..., statistics=...)` computes the same at any length. Weights of several heads
or layers together, and weights that are changed, have to be held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax import statistics
from attention_jax.base import checks
from attention_jax.base.typing import at_least_float32
from attention_jax.statistics import of_matrix

__all__ = [
    "additive_saturation",
    "effective_support",
    "entropy",
    "head_ablation",
    "jacobian_trace",
    "jensen_shannon",
    "linear_cka",
    "replace_heads",
    "rollout",
    "saturated_rows",
    "tanh_saturation",
    "uniform",
]

Array = jax.Array


def entropy(weights: Array) -> Array:
    r"""Entropy of each row in nats: H_i = -sum_j p_ij ln p_ij with p_ij = w_ij / sum_k w_ik.

    Args:
      weights: [..., T, S], not negative.

    Returns:
      [..., T], between 0 (one key) and ln S (all keys alike); 0 for a row of zeros.

    Shannon 1948, section 6; Clark et al. 2019, section 3.3 (heads that attend broadly).

    >>> entropy(jnp.array([[0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])) + 0.0
    Array([0.693, 0.   ], dtype=float32)
    """
    return of_matrix(statistics.entropy, _wide("entropy", weights))


def effective_support(weights: Array) -> Array:
    r"""The number of keys a row attends to, as if to each alike: exp(H_i), the perplexity.

    Args:
      weights: [..., T, S], not negative.

    Returns:
      [..., T], between 1 and S; 0 for a row of zeros.

    >>> effective_support(jnp.array([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]))
    Array([2., 0.], dtype=float32)
    """
    return of_matrix(statistics.effective_support, _wide("effective_support", weights))


def jacobian_trace(weights: Array) -> Array:
    r"""Trace of the softmax Jacobian diag(w) - w w^T: sum_j w_ij - sum_j w_ij^2.

    What is left of the gradient to the logits: 1 - 1/S where all keys weigh alike, and 0 where one
    key has all weight and softmax is saturated.

    Args:
      weights: [..., T, S], made by softmax.

    Returns:
      [..., T]; 0 for a row of zeros.

    >>> jacobian_trace(jnp.array([[0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]))
    Array([0.5, 0. ], dtype=float32)
    """
    return of_matrix(statistics.jacobian_trace, _wide("jacobian_trace", weights))


def saturated_rows(weights: Array, threshold: float = 0.95) -> Array:
    r"""Share of the rows whose largest weight exceeds the threshold, of those that attend.

    Args:
      weights: [..., T, S].
      threshold: of the largest weight.

    Returns:
      [...], between 0 and 1; 0 where no row attends to anything.

    >>> saturated_rows(jnp.array([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0]]))
    Array(0.5, dtype=float32)
    """
    return of_matrix(statistics.saturated_rows(threshold), _wide("saturated_rows", weights))


def tanh_saturation(inputs: Array, threshold: float = 0.05) -> Array:
    r"""Share of the features where tanh hardly passes a gradient: 1 - tanh(x)^2 < threshold.

    Args:
      inputs: what tanh is applied to, [..., A].
      threshold: of the derivative, which is 1 at 0.

    Returns:
      [...], between 0 and 1.

    Glorot and Bengio 2010, section 3 (saturation of hidden units).

    >>> tanh_saturation(jnp.array([-9.0, 0.0, 0.5, 9.0]))
    Array(0.5, dtype=float32)
    """
    inputs = inputs.astype(at_least_float32(inputs.dtype))
    return jnp.mean(1.0 - jnp.tanh(inputs) ** 2 < threshold, axis=-1, dtype=inputs.dtype)


def additive_saturation(
    query: Array,
    key: Array,
    query_weight: Array,
    key_weight: Array,
    bias: Array,
    threshold: float = 0.05,
) -> Array:
    r"""`tanh_saturation` of W_q q_i + W_k k_j + b, for every pair of an additive score.

    One query row at a time, so that no array of T x S x A is made.

    Args:
      query: [T, Hq].
      key: [S, Hk].
      query_weight: W_q, [Hq, A].
      key_weight: W_k, [Hk, A].
      bias: b, [A].
      threshold: of the derivative of tanh.

    Returns:
      [T, S], between 0 and 1.

    Raises:
      ShapeError: a parameter does not fit.

    >>> one = jnp.ones((1, 1))
    >>> additive_saturation(9 * one, jnp.array([[0.0], [-9.0]]), one, one, jnp.zeros(1))
    Array([[1., 0.]], dtype=float32)
    """
    checks.axes(
        "additive_saturation",
        query=(query, "TQ"),
        key=(key, "SH"),
        query_weight=(query_weight, "QA"),
        key_weight=(key_weight, "HA"),
        bias=(bias, "A"),
    )
    keys = key @ key_weight + bias[None, :]
    return jax.lax.map(
        lambda row: tanh_saturation(row[None, :] + keys, threshold), query @ query_weight
    )


def jensen_shannon(weights: Array) -> Array:
    r"""How differently heads attend: JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2, mean over rows.

    Args:
      weights: [..., N, T, S], not negative.

    Returns:
      [..., N, N] in nats, between 0 (alike) and ln 2 (no key in common), over the rows in which
      both heads attend to something; 0 where there is none.

    Of pairs of heads, so that the weights of all heads have to be held.

    Lin 1991, equation 4.1; Clark et al. 2019, section 6 (distances between heads).

    >>> jensen_shannon(jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]]))
    Array([[0.   , 0.693],
           [0.693, 0.   ]], dtype=float32)
    """
    p = jnp.moveaxis(_distributions("jensen_shannon", weights, "NTS"), -3, 0)

    def from_head(q: Array) -> Array:
        """Compare one head [..., T, S] with all of them."""
        divergence = _entropy((p + q[None]) / 2) - (_entropy(p) + _entropy(q)[None]) / 2
        return _mean_where(divergence, _attends(p) & _attends(q)[None])

    return jnp.moveaxis(jax.lax.map(from_head, p), (0, 1), (-2, -1))


def linear_cka(features: Array, rows: Array | None = None) -> Array:
    r"""How alike heads represent the queries: CKA(X, Y) = |Y^T X|^2 / (|X^T X| |Y^T Y|), centred.

    Unchanged by rotation and scale of a head's features, which may be its contexts or its weights.
    Memory is N^2 V^2, and nothing of T x T, unless V exceeds T; then N T^2.

    Args:
      features: [..., N, T, V], of contexts [B, T, N, V] `jnp.swapaxes(contexts, -3, -2)`; or
        weights [..., N, T, S].
      rows: which rows count, [..., T] boolean; all unless given.

    Returns:
      [..., N, N], between 0 and 1; 0 for a head whose features are the same in every row.

    Raises:
      ShapeError: fewer than three axes.

    Kornblith et al. 2019, section 3 and equation 7 (linear CKA).

    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 5.0]])
    >>> linear_cka(jnp.stack([x, 3 * x[:, ::-1] + 1])).round(4)
    Array([[1., 1.],
           [1., 1.]], dtype=float32)
    """
    x = _wide("linear_cka", features, "NTV")
    counted = jnp.ones(x.shape[-2], bool) if rows is None else rows[..., None, :]
    counted = jnp.broadcast_to(counted, x.shape[:-1])[..., None]
    number = jnp.sum(counted, axis=-2, keepdims=True, dtype=x.dtype)
    x = jnp.where(counted, x, 0.0)
    mean = jnp.sum(x, axis=-2, keepdims=True) / jnp.maximum(number, 1.0)
    centred = jnp.where(counted, x - mean, 0.0)

    product = _squared_products(centred)
    own = jnp.diagonal(product, axis1=-2, axis2=-1)
    # Rounding leaves a small difference between equal rows; it counts as none.
    rounding = (8 * jnp.finfo(x.dtype).eps) ** 4 * jnp.sum(x**2, axis=(-2, -1)) ** 2
    differs = own > rounding
    scale = jnp.where(differs, jax.lax.rsqrt(jnp.where(differs, own, 1.0)), 0.0)
    return product * scale[..., :, None] * scale[..., None, :]


def _squared_products(x: Array) -> Array:
    """Return |X_n^T X_m|^2 for every pair of heads, [..., N, N], by the smaller of two matrices."""
    if x.shape[-1] <= x.shape[-2]:
        products = jnp.einsum("...ntv,...mtw->...nmvw", x, x)
        return jnp.sum(products**2, axis=(-2, -1))
    pairs = jnp.einsum("...tv,...uv->...tu", x, x)
    return jnp.einsum("...ntu,...mtu->...nm", pairs, pairs)


def uniform(weights: Array) -> Array:
    r"""Spread each row evenly over the keys that it attends to at all: w_ij = [w_ij > 0] / count.

    Args:
      weights: [..., T, S].

    Returns:
      [..., T, S]; a row of zeros stays one.

    >>> uniform(jnp.array([[0.9, 0.1, 0.0], [0.0, 0.0, 0.0]]))
    Array([[0.5, 0.5, 0. ],
           [0. , 0. , 0. ]], dtype=float32)
    """
    return _distributions("uniform", jnp.asarray(weights > 0, weights.dtype)).astype(weights.dtype)


def replace_heads(
    weights: Array, keep: Array, replacement: Callable[[Array], Array] = jnp.zeros_like
) -> Array:
    """Replace the weights of the heads that are not kept, by zeros or by `uniform` ones.

    It needs the weights; a head is removed without them as `head_ablation` says.

    Args:
      weights: [..., N, T, S].
      keep: [N] boolean.
      replacement: from weights to weights of the same shape.

    Returns:
      [..., N, T, S].

    Raises:
      ShapeError: not one `keep` for each head.

    >>> replace_heads(jnp.array([[[0.9, 0.1]], [[0.2, 0.8]]]), jnp.array([True, False]), uniform)
    Array([[[0.9, 0.1]],
           [[0.5, 0.5]]], dtype=float32)
    """
    _check("replace_heads", weights, "NTS")
    if keep.shape != weights.shape[-3:-2]:
        raise checks.ShapeError(
            f"replace_heads: keep must have the shape ({weights.shape[-3]},), one for each of the "
            f"N heads, got {keep.shape}."
        )
    keep = jnp.broadcast_to(keep[:, None, None], weights.shape)
    return jnp.where(keep, weights, replacement(weights))


def head_ablation(evaluate: Callable[[Array], Any], num_heads: int) -> Any:
    """Evaluate with each head left out in turn.

    `evaluate` decides how a head is left out: it may use `replace_heads` on weights, which have to
    be held; or multiply the rows of an output projection W^O [N, V, D] by `keep[:, None, None]`,
    which removes the head from a trained model exactly, at any length.

    Args:
      evaluate: from `keep`, [N] boolean, to a loss or any pytree of outputs.
      num_heads: N.

    Returns:
      The outputs of `evaluate` without head n, along a new first axis N; compare them with
      `evaluate(jnp.ones(N, bool))`.

    Michel, Levy and Neubig 2019, section 3.2 ("ablating one head").

    >>> gain = jnp.array([1.0, 2.0, 4.0])
    >>> head_ablation(lambda keep: jnp.sum(gain, where=keep), num_heads=3)
    Array([6., 5., 3.], dtype=float32)
    """
    return jax.lax.map(evaluate, ~jnp.eye(num_heads, dtype=bool))


def rollout(layers: Sequence[Array]) -> Array:
    r"""Attention from the last layer back to the input: A_L ... A_1, A_l = (W_l + I) / row sums.

    W_l is the mean over heads of layer l, and I stands for the residual connection; a row that
    attends to nothing is the residual alone. The result is a matrix, and its layers have to be
    held; to follow few positions X [T, n] from the input, apply A_l X by `attend` with X as values.

    Args:
      layers: weights [..., N, T, T] of each layer, the first layer first.

    Returns:
      [..., T, T]; each row sums to one.

    Raises:
      ShapeError: no layer, or weights that are not square.

    Abnar and Zuidema 2020, section 3 ("attention rollout", equation 1).

    >>> rollout([jnp.array([[[1.0, 0.0], [1.0, 0.0]]])] * 2)
    Array([[1.  , 0.  ],
           [0.75, 0.25]], dtype=float32)
    """
    if len(layers) == 0:
        raise checks.ShapeError("rollout: give the weights of at least one layer, got none.")
    result: Any = None
    for weights in layers:
        weights = _wide("rollout", weights, "NTT")
        length = weights.shape[-1]
        if weights.shape[-2] != length:
            raise checks.ShapeError(
                "rollout: weights must be of self-attention, [..., N, T, T], got shape "
                f"{weights.shape}."
            )
        mixed = jnp.mean(weights, axis=-3)
        mixed = mixed + jnp.broadcast_to(jnp.eye(length, dtype=mixed.dtype), mixed.shape)
        mixed = mixed / jnp.sum(mixed, axis=-1, keepdims=True)
        result = mixed if result is None else mixed @ result
    return result


def _entropy(p: Array) -> Array:
    return -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1.0)), axis=-1)


def _distributions(operation: str, weights: Array, letters: str = "TS") -> Array:
    """Divide each row by its sum; a row of zeros stays one."""
    weights = _wide(operation, weights, letters)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def _attends(weights: Array) -> Array:
    return jnp.any(weights > 0, axis=-1)


def _mean_where(rows: Array, counted: Array) -> Array:
    """Return the mean over the counted entries of the last axis; 0 where there are none."""
    number = jnp.sum(counted, axis=-1, dtype=rows.dtype)
    total = jnp.sum(rows, axis=-1, where=counted)
    return total / jnp.maximum(number, 1.0)


def _wide(operation: str, weights: Array, letters: str = "TS") -> Array:
    _check(operation, weights, letters)
    return weights.astype(at_least_float32(weights.dtype))


def _check(operation: str, weights: Array, letters: str = "TS") -> None:
    checks.floating(operation, weights=weights)
    if weights.ndim < len(letters):
        raise checks.ShapeError(
            f"{operation}: expected an array [..., {', '.join(letters)}], got shape "
            f"{weights.shape}."
        )
