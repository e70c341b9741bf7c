"""FAVOR+: random features whose products are the softmax kernel exp(q . k / sqrt(H)) on average.

    projection = random_features(jax.random.key(0), 256, depth)      # drawn once, never from data
    feature_map = bind(positive, projection=projection)
    context = linear_attention(query, key, value, feature_map=feature_map, mask=masks.Causal())

Each map divides x by H^(1/4): the kernel is that of `scores.scaled_dot`. `linear_attention`
takes the scale of each row out of the exponent: of a query by the largest of its own features, of
keys by a running maximum, which no later key can change.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.base import checks
from attention_jax.base.binding import as_pytree, ask, rule
from attention_jax.base.typing import FeatureMap
from attention_jax.linear.feature_maps import ScaledFeatures, from_logarithm

__all__ = ["hyperbolic", "positive", "random_features", "trigonometric", "variance"]

Array = jax.Array


def random_features(
    rng: Array, num_features: int, depth: int, *, orthogonal: bool = True, dtype: Any = jnp.float32
) -> Array:
    r"""Draw the directions w_1 ... w_M of random features, each w ~ N(0, I).

    Orthogonal ones point at right angles within each block of H, uniformly over all rotations,
    and are as long as Gaussian vectors are: each alone has the same distribution, and together
    they err less.

    Args:
      rng: a `jax.random` key; the directions depend on nothing else.
      num_features: M.
      depth: H.
      orthogonal: False draws independent directions.
      dtype: of the result.

    Returns:
      [M, H].

    Raises:
      ValueError: no feature, or no depth.

    Choromanski et al. 2021, section 3 (ORF) and theorem 2; Yu et al. 2016.

    >>> random_features(jax.random.key(0), 6, 4).shape
    (6, 4)
    """
    checks.at_least("random_features", 1, num_features=num_features, depth=depth)
    of_rotation, of_length = jax.random.split(rng)
    gaussian = jax.random.normal(of_length, (num_features, depth), dtype)
    if not orthogonal:
        return gaussian
    blocks = -(-num_features // depth)
    rotations = jax.random.orthogonal(of_rotation, depth, (blocks,), dtype)
    lengths = jnp.linalg.norm(gaussian, axis=1, keepdims=True)
    return rotations.reshape(-1, depth)[:num_features] * lengths


def positive(x: Array, projection: Array, epsilon: float = 0.0) -> Array:
    r"""Positive features: phi(x) = (exp(W x - |x|^2 / 2) + epsilon) / sqrt(M), x / H^(1/4) for x.

    Args:
      x: [T, H].
      projection: W, [M, H], from `random_features`.
      epsilon: keeps features away from zero, where a query far from every direction would have
        only rounding left; the estimate is then of a kernel that is larger by about epsilon.

    Returns:
      [T, M], with E[phi(q) . phi(k)] = exp(q . k / sqrt(H)) for epsilon 0.

    Raises:
      ShapeError: x and projection of different depths.
      ValueError: a negative epsilon.

    Choromanski et al. 2021, lemma 1 (equation 7) and section 2.3; epsilon as in their code, though
    not relative to the largest feature.

    >>> positive(jnp.zeros((1, 4)), jnp.ones((2, 4))).round(3)
    Array([[0.707, 0.707]], dtype=float32)
    """
    return jnp.exp(_log_positive(x, projection, epsilon))


def hyperbolic(x: Array, projection: Array) -> Array:
    r"""Hyperbolic features: phi(x) = exp(-|x|^2 / 2) [exp(W x), exp(-W x)] / sqrt(2 M).

    Each direction is used both ways, which errs less than twice as many features would.

    Args:
      x: [T, H]; divided by H^(1/4) first.
      projection: W, [M, H], from `random_features`.

    Returns:
      [T, 2 M], with E[phi(q) . phi(k)] = exp(q . k / sqrt(H)).

    Raises:
      ShapeError: x and projection of different depths.

    Choromanski et al. 2021, lemma 1 (equation 8).

    >>> hyperbolic(jnp.zeros((1, 4)), jnp.ones((2, 4)))
    Array([[0.5, 0.5, 0.5, 0.5]], dtype=float32)
    """
    return jnp.exp(_log_hyperbolic(x, projection))


def trigonometric(x: Array, projection: Array) -> Array:
    r"""Trigonometric features: phi(x) = exp(|x|^2 / 2) [cos(W x), sin(W x)] / sqrt(M).

    Not positive: their error is largest where the kernel is smallest, and a normalizer may come
    out near zero. Here for comparison.

    Args:
      x: [T, H]; divided by H^(1/4) first.
      projection: W, [M, H], from `random_features`.

    Returns:
      [T, 2 M], with E[phi(q) . phi(k)] = exp(q . k / sqrt(H)).

    Raises:
      ShapeError: x and projection of different depths.

    Choromanski et al. 2021, equation 5; Rahimi and Recht 2007.

    >>> trigonometric(jnp.zeros((1, 4)), jnp.ones((1, 4)))
    Array([[1., 0.]], dtype=float32)
    """
    features, log_scale = _scaled_trigonometric(x, projection)
    return features * jnp.exp(log_scale)[:, None]


def variance(feature_map: FeatureMap, query: Array, key: Array) -> Array:
    r"""The mean squared error of phi(q) . phi(k) over draws of independent directions.

    With z = (q + k) / H^(1/4), y = (q - k) / H^(1/4) and SM = exp(q . k / sqrt(H)),

        positive:      exp(|z|^2) SM^2 (1 - exp(-|z|^2)) / M
        hyperbolic:    (1 - exp(-|z|^2)) / 2 of that
        trigonometric: exp(|z|^2) SM^-2 (1 - exp(-|y|^2))^2 / 2 M

    Orthogonal directions err less than this (theorem 2).

    Args:
      feature_map: one of the maps of this module, bound to its projection.
      query: [T, H].
      key: [S, H].

    Returns:
      [T, S].

    Raises:
      ShapeError: query and key of different depths.
      ValueError: another feature map.

    Choromanski et al. 2021, lemma 2.

    >>> from attention_jax import bind
    >>> x = jnp.zeros((1, 4))
    >>> variance(bind(positive, projection=jnp.ones((8, 4))), x, x)
    Array([[0.]], dtype=float32)
    """
    depth = checks.axes("variance", query=(query, "TH"), key=(key, "SH"))["H"]
    formula = ask(as_pytree(feature_map), "variance")
    if formula is None:
        raise ValueError("variance: known for positive, hyperbolic and trigonometric features.")
    query, key = query * depth**-0.25, key * depth**-0.25
    together = jnp.sum((query[:, None] + key[None, :]) ** 2, axis=-1)
    apart = jnp.sum((query[:, None] - key[None, :]) ** 2, axis=-1)
    return formula(query @ key.T, together, apart)


def _log_positive(x: Array, projection: Array, epsilon: float = 0.0) -> Array:
    if epsilon < 0:
        raise ValueError(f"positive: epsilon must be 0 or more, got {epsilon}.")
    projected, half_square = _parts(x, projection)
    logarithm = projected - half_square[:, None]
    if epsilon:
        logarithm = jnp.logaddexp(logarithm, jnp.asarray(math.log(epsilon), logarithm.dtype))
    return logarithm - math.log(len(projection)) / 2


def _log_hyperbolic(x: Array, projection: Array) -> Array:
    projected, half_square = _parts(x, projection)
    both = jnp.concatenate([projected, -projected], axis=1)
    return both - half_square[:, None] - math.log(2 * len(projection)) / 2


def _scaled_trigonometric(x: Array, projection: Array) -> ScaledFeatures:
    projected, half_square = _parts(x, projection)
    waves = jnp.concatenate([jnp.cos(projected), jnp.sin(projected)], axis=1)
    scale = jax.lax.stop_gradient(half_square)
    features = waves * jnp.exp(half_square - scale)[:, None] * len(projection) ** -0.5
    return ScaledFeatures(features, scale)


def _parts(x: Array, projection: Array) -> tuple[Array, Array]:
    """Return W x, [T, M], and |x|^2 / 2, [T], of x / H^(1/4)."""
    depth = checks.axes("random features", x=(x, "TH"), projection=(projection, "MH"))["H"]
    x = x * depth**-0.25
    return x @ jnp.asarray(projection, x.dtype).T, jnp.sum(x**2, axis=1) / 2


@rule(positive, "split_scale")
def _(projection: Array, epsilon: float = 0.0) -> Any:
    return lambda x: from_logarithm(_log_positive(x, projection, epsilon))


@rule(hyperbolic, "split_scale")
def _(projection: Array) -> Any:
    return lambda x: from_logarithm(_log_hyperbolic(x, projection))


@rule(trigonometric, "split_scale")
def _(projection: Array) -> Any:
    return lambda x: _scaled_trigonometric(x, projection)


@rule(positive, "variance")
def _(projection: Array, epsilon: float = 0.0) -> Any:
    if epsilon:
        raise ValueError(f"variance: known for positive features of epsilon 0, got {epsilon}.")

    def formula(logits: Array, together: Array, apart: Array) -> Array:
        return jnp.exp(together + 2 * logits) * -jnp.expm1(-together) / len(projection)

    return formula


@rule(hyperbolic, "variance")
def _(projection: Array) -> Any:
    def formula(logits: Array, together: Array, apart: Array) -> Array:
        of_positive = jnp.exp(together + 2 * logits) * -jnp.expm1(-together) / len(projection)
        return -jnp.expm1(-together) / 2 * of_positive

    return formula


@rule(trigonometric, "variance")
def _(projection: Array) -> Any:
    def formula(logits: Array, together: Array, apart: Array) -> Array:
        return jnp.exp(together - 2 * logits) * jnp.expm1(-apart) ** 2 / (2 * len(projection))

    return formula
