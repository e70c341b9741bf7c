"""Feature maps: phi(q) . phi(k) stands for the kernel that weighs a pair in linear attention.

A feature map is a function `phi(x [T, H]) -> [T, M]` of one head's rows; its parameters are
further arguments, bound with `bind`. Its kernel must be positive to be normalised; `identity`
declares that its own is not. Features may be large or tiny: `split_scale` takes a factor out of
each row, by logarithms where the map carries a rule for that, so that no sum over keys overflows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import initializers

from attention_jax.base.binding import as_pytree, ask, bind, rule
from attention_jax.base.parameters import Parameter, one_size, require_depths
from attention_jax.base.typing import FeatureMap, at_least_float32

__all__ = [
    "ScaledFeatures",
    "elu_plus_one",
    "exponential",
    "from_logarithm",
    "hedgehog",
    "identity",
    "is_signed",
    "relu",
    "split_scale",
    "squared",
    "taylor",
]

Array = jax.Array

# e^-40 is below the rounding of the largest feature of its row, and e^-80 is above underflow: so
# a query and a key whose large features never meet still have a weight.
_LOWEST = -40.0


class ScaledFeatures(NamedTuple):
    """Features of rows as phi(x) = features exp(log_scale), features [T, M] and log_scale [T].

    A row without features has the scale -inf. The scale is a constant to derivatives.
    """

    features: Array
    log_scale: Array


def split_scale(feature_map: FeatureMap, x: Array) -> ScaledFeatures:
    """Take the largest magnitude out of every row of features.

    Args:
      feature_map: bound to its parameters; its rule "split_scale", if any, is used.
      x: [T, H].

    Returns:
      Features [T, M] of at most one, and the logarithm of the factor taken out of each row.

    >>> split_scale(elu_plus_one, jnp.array([[1.0, 3.0]]))
    ScaledFeatures(features=Array([[0.5, 1. ]], dtype=float32),
                   log_scale=Array([1.3862944], dtype=float32))
    """
    split = ask(as_pytree(feature_map), "split_scale")
    if split is not None:
        return split(x)
    features = feature_map(x)
    largest = lax.stop_gradient(jnp.max(jnp.abs(features), axis=-1))
    return ScaledFeatures(
        features / jnp.where(largest > 0, largest, 1.0)[:, None], jnp.log(largest)
    )


def from_logarithm(log_features: Array) -> ScaledFeatures:
    """Return exp of logarithms [T, M] that may be far from zero, as features and their scale.

    >>> from_logarithm(jnp.array([[1000.0, 1000.0]])).features
    Array([[1., 1.]], dtype=float32)
    """
    highest = lax.stop_gradient(jnp.max(log_features, axis=-1))
    return ScaledFeatures(jnp.exp(jnp.maximum(log_features - highest[:, None], _LOWEST)), highest)


def is_signed(feature_map: FeatureMap) -> bool:
    """Tell whether a map declares that its kernel may be negative, and so cannot be normalised."""
    return bool(ask(as_pytree(feature_map), "signed"))


def elu_plus_one(x: Array) -> Array:
    r"""Exponential below zero and linear above: phi(x) = elu(x) + 1 = exp(min(x, 0)) + max(x, 0).

    Without the subtraction and addition of one that would round exp(-8) to zero in half precision.

    Args:
      x: [T, H].

    Returns:
      [T, H], positive.

    Katharopoulos et al. 2020, equation 7.

    >>> elu_plus_one(jnp.array([[-8.0, 0.0, 2.0]], jnp.bfloat16))
    Array([[0.000335693, 1, 3]], dtype=bfloat16)
    """
    wide = _wide(x)
    return (jnp.exp(jnp.minimum(wide, 0.0)) + jnp.maximum(wide, 0.0)).astype(x.dtype)


def relu(x: Array, epsilon: float = 1e-3) -> Array:
    r"""Rectified features: phi(x) = max(x, 0) + epsilon.

    Args:
      x: [T, H].
      epsilon: a little for every feature, so that no query is without keys.

    Returns:
      [T, H], positive.

    Choromanski et al. 2021, section 4 ("Performer-ReLU") and appendix A.

    >>> relu(jnp.array([[-1.0, 2.0]]), epsilon=0.0)
    Array([[0., 2.]], dtype=float32)
    """
    return jnp.maximum(x, 0.0) + jnp.asarray(epsilon, x.dtype)


def exponential(x: Array) -> Array:
    r"""The exponential of each feature: phi(x) = exp(x).

    Args:
      x: [T, H].

    Returns:
      [T, H], positive.

    >>> exponential(jnp.zeros((1, 2)))
    Array([[1., 1.]], dtype=float32)
    """
    return jnp.exp(_wide(x)).astype(x.dtype)


def hedgehog(x: Array, weight: Array, bias: Array) -> Array:
    r"""Learned exponentials in pairs: phi(x) = [exp(x W + b), exp(-x W - b)].

    Args:
      x: [T, H].
      weight: W, [H, A].
      bias: b, [A].

    Returns:
      [T, 2 A], positive.

    Zhang et al. 2024 (Hedgehog), section 4.1.

    >>> hedgehog(jnp.zeros((1, 2)), jnp.eye(2), jnp.zeros(2))
    Array([[1., 1., 1., 1.]], dtype=float32)
    """
    return jnp.exp(_log_hedgehog(_wide(x), weight, bias)).astype(x.dtype)


def squared(x: Array) -> Array:
    r"""All products of two features, for the kernel (q . k)^2 / H.

    Args:
      x: [T, H].

    Returns:
      [T, H^2]; of any sign, but of a kernel that is positive.

    Choromanski et al. 2021, appendix; a polynomial kernel of degree 2.

    >>> squared(jnp.array([[1.0, 3.0]])) @ squared(jnp.array([[2.0, 0.0]])).T
    Array([[2.]], dtype=float32)
    """
    length, depth = x.shape
    return (x[:, :, None] * x[:, None, :]).reshape(length, depth**2) * depth**-0.5


def taylor(x: Array) -> Array:
    r"""The exponential to second order: phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(H).

    Args:
      x: [T, H].

    Returns:
      [T, 1 + H + H^2]; of any sign, but of a kernel that is never below 1 / 2.

    Arora et al. 2024 (Based), section 4.1; Keles, Wijewardena and Hegde 2023.

    >>> taylor(jnp.ones((1, 4))) @ taylor(jnp.ones((1, 4))).T
    Array([[5.]], dtype=float32)
    """
    one = jnp.ones_like(x[:, :1])
    return jnp.concatenate([one, x * x.shape[1] ** -0.25, squared(x) * 2**-0.5], axis=1)


def identity(x: Array) -> Array:
    r"""No map: the kernel q . k, of either sign, for linear attention that is not normalised.

    Args:
      x: [T, H].

    Returns:
      [T, H].

    Schmidhuber 1992; Schlag, Irie and Schmidhuber 2021, section 3.1.

    >>> identity(jnp.ones((1, 2)))
    Array([[1., 1.]], dtype=float32)
    """
    return x


def _log_hedgehog(x: Array, weight: Array, bias: Array) -> Array:
    projected = x @ jnp.asarray(weight, x.dtype) + jnp.asarray(bias, x.dtype)[None, :]
    return jnp.concatenate([projected, -projected], axis=1)


def _wide(x: Array) -> Array:
    return x.astype(at_least_float32(x.dtype))


@rule(exponential, "split_scale")
def _() -> Any:
    return from_logarithm


@rule(hedgehog, "split_scale")
def _(weight: Array, bias: Array) -> Any:
    return bind(_scaled_hedgehog, weight=weight, bias=bias)


def _scaled_hedgehog(x: Array, weight: Array, bias: Array) -> ScaledFeatures:
    return from_logarithm(_log_hedgehog(x, weight, bias))


@rule(identity, "signed")
def _() -> bool:
    return True


@rule(hedgehog, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Parameter]:
    """Zhang et al. 2024, appendix A: the layer starts as the identity."""
    require_depths("hedgehog", query_depth=query_depth)
    size = one_size("hedgehog", attention_size, default=query_depth)
    return {
        "weight": Parameter((query_depth, size), _eye),
        "bias": Parameter((size,), initializers.zeros),
    }


def _eye(rng: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
    return jnp.eye(*shape, dtype=dtype)
