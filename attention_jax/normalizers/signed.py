"""Normalizers with negative weights, whose magnitudes sum to one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from attention_jax.base.binding import rule
from attention_jax.base.checks import at_least
from attention_jax.normalizers.common import log_normalizer
from attention_jax.normalizers.protocol import LogSum

__all__ = ["odd_power", "signed_softmax"]

Array = jax.Array


def signed_softmax(logits: Array, allowed: Array) -> Array:
    r"""Softmax of magnitudes, with the signs of the logits: w_ij = s_ij exp(|e_ij|) / sum.

    The sum is sum_k exp(|e_ik|), and s_ij is -1 where e_ij is negative, else 1.

    Args:
      logits: [T, S].
      allowed: [T, S], True = may attend.

    Returns:
      Weights [T, S], whose magnitudes sum to one; a row without allowed keys is zeros.

    Lv et al. 2024, "More expressive attention with negative weights" (Cog attention).

    >>> signed_softmax(jnp.array([[1.0, -1.0]]), jnp.ones((1, 2), bool))
    Array([[ 0.5, -0.5]], dtype=float32)
    """
    return _over_row(SignedExponential(), logits, allowed)


def odd_power(logits: Array, allowed: Array, power: int = 3) -> Array:
    r"""An odd power of each logit over the sum of magnitudes: w_ij = e_ij^p / sum_k |e_ik|^p.

    Args:
      logits: [T, S].
      allowed: [T, S], True = may attend.
      power: p, an odd number from 3 on.

    Returns:
      Weights [T, S], whose magnitudes sum to one; a row whose logits are all zero is zeros.

    Raises:
      ValueError: the power is even, or below 3.

    Saratchandran et al. 2024, "Rethinking softmax: self-attention with polynomial activations",
    with the scale given by the row.

    >>> odd_power(jnp.array([[1.0, -1.0, 0.0]]), jnp.ones((1, 3), bool))
    Array([[ 0.5, -0.5,  0. ]], dtype=float32)
    """
    return _over_row(OddPower(power=power), logits, allowed)


@dataclasses.dataclass(frozen=True, eq=False)
class SignedExponential(LogSum):
    """How `signed_softmax` streams."""

    def exponent(self, logits: Array) -> Array:
        return jnp.where(logits == -jnp.inf, -jnp.inf, jnp.abs(logits))

    def weight(self, logits: Array, statistics: Array) -> Array:
        weights = jnp.exp(self.exponent(logits) - statistics[:, None])
        return jnp.where(logits < 0, -weights, weights)


@dataclasses.dataclass(frozen=True, eq=False)
class OddPower(LogSum):
    """How `odd_power` streams."""

    power: int = 3

    def __post_init__(self) -> None:
        at_least("odd_power", 3, power=self.power)
        if self.power % 2 == 0:
            raise ValueError(f"odd_power: power must be odd, got {self.power}.")

    def exponent(self, logits: Array) -> Array:
        size = jnp.abs(logits)
        is_hidden = (size < jnp.finfo(size.dtype).tiny) | (logits == -jnp.inf)
        return jnp.where(is_hidden, -jnp.inf, self.power * jnp.log(jnp.where(is_hidden, 1.0, size)))

    def weight(self, logits: Array, statistics: Array) -> Array:
        weights = jnp.exp(self.exponent(logits) - statistics[:, None])
        return jnp.where(logits < 0, -weights, weights)


@rule(signed_softmax, "streaming")
def _() -> SignedExponential:
    return SignedExponential()


@rule(odd_power, "streaming")
def _(power: int = 3) -> OddPower:
    return OddPower(power=power)


def _over_row(how: LogSum, logits: Array, allowed: Array) -> Array:
    shown = jnp.where(allowed, logits, 0.0)
    total = log_normalizer(how.exponent(shown), allowed)
    weights = how.weight(shown, jnp.where(total == -jnp.inf, 0.0, total))
    return jnp.where(allowed, weights, 0.0)
