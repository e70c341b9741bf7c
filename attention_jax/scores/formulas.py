"""Scores that are one formula, and the rules that separate them by row and pair."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.base import checks
from attention_jax.base.binding import bind, rule
from attention_jax.base.matmul import Products, times_transpose
from attention_jax.scores.composition import (
    Separated,
    finished,
    identity,
    mapped,
    multiplies,
    positional,
    projected,
    row_normalized,
    unit_rows,
)
from attention_jax.scores.tanh_pairs import activation_pairs

__all__ = [
    "bilinear",
    "cosine",
    "dot",
    "gaussian",
    "key_normalized_dot",
    "location",
    "low_rank_bilinear",
    "scaled_dot",
    "shared_projection",
    "trilinear",
]

Array = jax.Array


def dot(query: Array, key: Array) -> Array:
    r"""Dot product: e_ij = q_i . k_j.

    With the same unprojected x as query and key this is the parameter-free X X^T.

    Args:
      query: [T, H].
      key: [S, H].

    Returns:
      Logits [T, S].

    Raises:
      ShapeError: query and key of different depth; project one of them, or use `bilinear`.

    Luong, Pham and Manning 2015, equation 8 ("dot").

    >>> dot(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0], [1.0, 0.0]]))
    Array([[11.,  1.]], dtype=float32)
    """
    checks.axes("dot", query=(query, "TH"), key=(key, "SH"))
    return query @ key.T


def scaled_dot(query: Array, key: Array) -> Array:
    r"""Scaled dot product: e_ij = q_i . k_j / sqrt(H).

    The scale keeps the variance of the logits at one for independent unit-variance entries.

    Args:
      query: [T, H].
      key: [S, H].

    Returns:
      Logits [T, S].

    Raises:
      ShapeError: query and key of different depth.

    Vaswani et al. 2017, equation 1.

    >>> scaled_dot(jnp.ones((1, 4)), jnp.ones((2, 4)))
    Array([[2., 2.]], dtype=float32)
    """
    checks.axes("scaled_dot", query=(query, "TH"), key=(key, "SH"))
    return (query * _inverse_root(query)) @ key.T


def bilinear(query: Array, key: Array, weight: Array) -> Array:
    r"""Bilinear ("general"): e_ij = q_i^T W k_j, for depths that may differ.

    Args:
      query: [T, Hq].
      key: [S, Hk].
      weight: W, [Hq, Hk].

    Returns:
      Logits [T, S].

    Raises:
      ShapeError: W does not fit query and key.

    Luong, Pham and Manning 2015, equation 8 ("general").

    >>> bilinear(jnp.array([[1.0, 1.0]]), jnp.array([[3.0]]), weight=jnp.array([[1.0], [2.0]]))
    Array([[9.]], dtype=float32)
    """
    checks.axes("bilinear", query=(query, "TQ"), key=(key, "SH"), weight=(weight, "QH"))
    return (query @ weight) @ key.T


def low_rank_bilinear(query: Array, key: Array, query_weight: Array, key_weight: Array) -> Array:
    r"""Low-rank bilinear: e_ij = (P^T q_i) . (Q^T k_j), that is bilinear with W = P Q^T.

    Args:
      query: [T, Hq].
      key: [S, Hk].
      query_weight: P, [Hq, A]; A is the rank.
      key_weight: Q, [Hk, A].

    Returns:
      Logits [T, S].

    Raises:
      ShapeError: P or Q does not fit.

    Kim et al. 2017, "Hadamard product for low-rank bilinear pooling", equation 2.

    >>> p = jnp.array([[1.0], [2.0]])
    >>> low_rank_bilinear(jnp.array([[1.0, 1.0]]), jnp.array([[3.0]]), p, jnp.array([[2.0]]))
    Array([[18.]], dtype=float32)
    """
    checks.axes(
        "low_rank_bilinear",
        query=(query, "TQ"),
        key=(key, "SH"),
        query_weight=(query_weight, "QA"),
        key_weight=(key_weight, "HA"),
    )
    return (query @ query_weight) @ (key @ key_weight).T


def shared_projection(query: Array, key: Array, weight: Array) -> Array:
    r"""Query and key through one projection: e_ij = (W^T q_i) . (W^T k_j) / sqrt(A).

    The logits of self-attention become symmetric; the weights do not.

    Args:
      query: [T, H].
      key: [S, H].
      weight: W, [H, A].

    Returns:
      Logits [T, S].

    Raises:
      ShapeError: W does not fit.

    Kitaev, Kaiser and Levskaya 2020, section 2 ("shared-QK").

    >>> shared_projection(jnp.ones((1, 2)), jnp.ones((1, 2)), weight=2.0 * jnp.ones((2, 1)))
    Array([[16.]], dtype=float32)
    """
    checks.axes("shared_projection", query=(query, "TH"), key=(key, "SH"), weight=(weight, "HA"))
    return scaled_dot(query @ weight, key @ weight)


def cosine(query: Array, key: Array, temperature: Any = 1.0) -> Array:
    r"""Cosine with temperature: e_ij = q_i . k_j / (|q_i| |k_j| temperature).

    Args:
      query: [T, H].
      key: [S, H].
      temperature: number or learned scalar; 1 / temperature bounds the logits.

    Returns:
      Logits [T, S]; zero where a row is zero.

    Raises:
      ShapeError: query and key of different depth.

    Graves, Wayne and Danihelka 2014, equations 5 and 6; Liu et al. 2022 (Swin v2), equation 2.

    >>> cosine(jnp.array([[3.0, 4.0]]), jnp.array([[4.0, 3.0]]), temperature=0.5)
    Array([[1.92]], dtype=float32)
    """
    checks.axes("cosine", query=(query, "TH"), key=(key, "SH"))
    return dot(unit_rows(query), unit_rows(key)) / jnp.asarray(temperature, query.dtype)


def key_normalized_dot(query: Array, key: Array) -> Array:
    r"""Dot product with keys of unit length: e_ij = q_i . k_j / |k_j|.

    A long key then cannot win by its length alone.

    Args:
      query: [T, H].
      key: [S, H].

    Returns:
      Logits [T, S].

    Raises:
      ShapeError: query and key of different depth.

    Henry et al. 2020 normalise both sides (section 3, "QKNorm"); this is the half that removes
    the gain of the key.

    >>> key_normalized_dot(jnp.array([[1.0, 1.0]]), jnp.array([[3.0, 4.0]]))
    Array([[1.4]], dtype=float32)
    """
    checks.axes("key_normalized_dot", query=(query, "TH"), key=(key, "SH"))
    return dot(query, unit_rows(key))


def gaussian(query: Array, key: Array, width: Any = 1.0) -> Array:
    r"""Negative squared distance: e_ij = -|q_i - k_j|^2 / (2 width^2).

    Its softmax weights are a Gaussian kernel around the query, normalised. Differences are taken
    before they are squared, so a common offset of query and key costs no precision.

    Args:
      query: [T, H].
      key: [S, H].
      width: number or learned scalar.

    Returns:
      Logits [T, S].

    Raises:
      ShapeError: query and key of different depth.

    Nadaraya 1964 and Watson 1964 (kernel regression); Tsai et al. 2019 (attention as a kernel).

    >>> gaussian(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 2.0], [4.0, 6.0]]), width=5.0)
    Array([[-0. , -0.5]], dtype=float32)
    """
    checks.axes("gaussian", query=(query, "TH"), key=(key, "SH"))
    return _separate_gaussian(width)(query, key)


def trilinear(
    query: Array, key: Array, query_weight: Array, key_weight: Array, product_weight: Array
) -> Array:
    r"""Trilinear: e_ij = w^T [q_i; k_j; q_i * k_j] = w_q . q_i + w_k . k_j + (w_p * q_i) . k_j.

    Args:
      query: [T, H].
      key: [S, H].
      query_weight: w_q, [H].
      key_weight: w_k, [H].
      product_weight: w_p, [H].

    Returns:
      Logits [T, S].

    Raises:
      ShapeError: query, key and weights of different depth.

    Seo et al. 2017 (BiDAF), section 2 ("attention flow layer", similarity matrix).

    >>> w = jnp.array([1.0, 0.0])
    >>> trilinear(jnp.array([[2.0, 3.0]]), jnp.array([[5.0, 7.0]]), w, 10.0 * w, 100.0 * w)
    Array([[1052.]], dtype=float32)
    """
    checks.axes(
        "trilinear",
        query=(query, "TH"),
        key=(key, "SH"),
        query_weight=(query_weight, "H"),
        key_weight=(key_weight, "H"),
        product_weight=(product_weight, "H"),
    )
    of_query, of_key = query @ query_weight, key @ key_weight
    return of_query[:, None] + of_key[None, :] + (query * product_weight[None, :]) @ key.T


@positional
def location(
    query: Array,
    key: Array,
    weight: Array,
    q_idx: Array | None = None,
    kv_idx: Array | None = None,
) -> Array:
    r"""Location: e_ij = w_j . q_i; it depends on the query and on positions, not on the keys.

    Args:
      query: [T, Hq].
      key: [S, Hk]; only how many there are matters.
      weight: W = [w_1 ... w_L], [Hq, L], a column for each position.
      q_idx: not used.
      kv_idx: positions of the keys, [S]; 0 to S - 1 unless given.

    Returns:
      Logits [T, S].

    Raises:
      ShapeError: W does not fit the query, or has fewer columns than there are keys.

    Luong, Pham and Manning 2015, section 3.1 ("location").

    >>> location(jnp.array([[1.0, 2.0]]), jnp.zeros((2, 3)), weight=jnp.eye(2))
    Array([[1., 2.]], dtype=float32)
    """
    sizes = checks.axes("location", query=(query, "TQ"), key=(key, "SH"), weight=(weight, "QL"))
    if sizes["S"] > sizes["L"]:
        raise checks.ShapeError(
            f"location: weight [Q, L] has L = {sizes['L']} positions, too few for S = "
            f"{sizes['S']} keys; give it a column for every position."
        )
    kv_idx = jnp.arange(sizes["S"]) if kv_idx is None else kv_idx
    return query @ weight.at[:, kv_idx].get(mode="clip")


@rule(dot, "separation")
def _separate_dot() -> Separated:
    return Separated(identity, identity, bind(_pairs), identity)


@rule(scaled_dot, "separation")
def _separate_scaled_dot() -> Separated:
    # Scaling is part of the pairs: free in a tile, but a pass over memory for all queries.
    return Separated(identity, identity, bind(_scaled_pairs), identity)


@rule(bilinear, "separation")
def _separate_bilinear(weight: Array) -> Separated:
    return projected(dot, query_weight=weight)


@rule(low_rank_bilinear, "separation")
def _separate_low_rank(query_weight: Array, key_weight: Array) -> Separated:
    return projected(dot, query_weight, key_weight)


@rule(shared_projection, "separation")
def _separate_shared(weight: Array) -> Separated:
    return projected(scaled_dot, weight, weight)


@rule(cosine, "separation")
def _separate_cosine(temperature: Any = 1.0) -> Separated:
    return finished(row_normalized(dot), bind(_divide, by=temperature))


@rule(key_normalized_dot, "separation")
def _separate_key_normalized() -> Separated:
    return row_normalized(dot, query=False)


@rule(gaussian, "separation")
def _separate_gaussian(width: Any = 1.0) -> Separated:
    parts = Separated(identity, bind(jnp.negative), bind(_squared_distances), identity)
    return finished(parts, bind(_over_twice_square, width=width))


@rule(trilinear, "separation")
def _separate_trilinear(query_weight: Array, key_weight: Array, product_weight: Array) -> Separated:
    return mapped(
        dot,
        bind(_query_of_trilinear, weight=query_weight, bias=key_weight, gain=product_weight),
        bind(_with_one),
    )


def _inverse_root(query: Array) -> Array:
    return jnp.asarray(query.shape[-1] ** -0.5 if query.shape[-1] else 1.0, query.dtype)


@multiplies
def _pairs(query: Array, key: Array, products: Products | None = None) -> Array:
    return times_transpose(query, key, products)


@multiplies
def _scaled_pairs(query: Array, key: Array, products: Products | None = None) -> Array:
    if products is None or products.operands is None:
        return times_transpose(query * _inverse_root(query), key, products)
    # A query that is scaled first would be rounded once more.
    return times_transpose(query, key, products) * _inverse_root(query)


def _divide(logits: Array, by: Any) -> Array:
    return logits / jnp.asarray(by, logits.dtype)


def _squared_distances(query: Array, negative_key: Array) -> Array:
    """Return |q - k|^2, [T, S], without the array of all differences."""
    return activation_pairs(query, negative_key, jnp.ones(query.shape[-1], query.dtype), jnp.square)


def _over_twice_square(squares: Array, width: Any) -> Array:
    width = jnp.asarray(width, squares.dtype)
    return -squares / (2.0 * width * width)


def _query_of_trilinear(query: Array, weight: Array, bias: Array, gain: Array) -> Array:
    """Return [w_p * q + w_k; w_q . q], whose product with [k; 1] is the score."""
    return jnp.concatenate(
        [query * gain[None, :] + bias[None, :], (query @ weight)[:, None]], axis=1
    )


def _with_one(key: Array) -> Array:
    return jnp.concatenate([key, jnp.ones((key.shape[0], 1), key.dtype)], axis=1)
