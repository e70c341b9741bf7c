"""The threshold above which a row of powers sums to one: that of alpha-entmax."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from attention_jax.base.binding import bind
from attention_jax.normalizers.searched import OverThreshold

__all__ = ["PowerThreshold"]

Array = jax.Array

ROUNDING = 32.0
"""Of a threshold found among some keys, so many units of rounding may be wrong."""


class Root(NamedTuple):
    """The root of a row is from `low` to `high`, and `at` where it `is_found`; [T] each.

    `at` is what the next pass tries.
    """

    at: Array
    low: Array
    high: Array
    is_found: Array


class Sums(NamedTuple):
    """Sums over a row of u^p, u^(p - 1) and u^(p - 2), for u = (e - t) / p above zero; [T]."""

    weights: Array
    slopes: Array
    bends: Array


@dataclasses.dataclass(frozen=True, eq=False)
class PowerThreshold(OverThreshold):
    """Weights w = (max(e - t, 0) / p)^p, whose threshold t makes each row sum to one.

    A power is dear, so a pass tries one threshold and takes from it all it can: with f the sum of
    the weights, g = f^(1/p) is convex where p >= 1 and nearly straight. Newton's step on g = 1 ends
    at or below the root from wherever it starts; with the curvature it is Halley's, whose error
    shrinks as a cube. A step out of the bracket is replaced by half of the bracket.

    Attributes:
      function: (max(x, 0) / p)^p.
      reach: p; function(p) = 1.
    """

    @classmethod
    def of(cls, power: Any) -> PowerThreshold:
        """Return the threshold for a power, a number or a scalar array.

        >>> PowerThreshold.of(2.0).function(jnp.array([-1.0, 4.0]))
        Array([0., 4.], dtype=float32)
        """
        return cls(bind(_power_above_zero, power=power), power)

    def start(self, largest: Array) -> Root:
        low = jnp.broadcast_to(-self.power(largest), largest.shape)
        zeros = jnp.zeros_like(low)
        return Root(low, low, zeros, zeros > 0.0)

    def resumed(self, state: Root) -> Root:
        epsilon = ROUNDING * jnp.finfo(state.at.dtype).eps
        low = state.at - epsilon * self.power(state.at)
        zeros = jnp.zeros_like(low)
        return Root(state.at, low, zeros, zeros > 0.0)

    def power(self, like: Array) -> Array:
        """Return p in the dtype of an array; a search is not differentiated."""
        return lax.stop_gradient(jnp.asarray(self.reach, like.dtype))

    def level(self, state: Root) -> Array:
        return state.at

    def contribution(self, relative: Array, state: Root) -> Sums:
        power = self.power(relative)
        over = relative - state.at[:, None]
        share = jnp.where(over <= 0.0, 0.0, over / power)  # NaN stays
        # Written down, since XLA would compute the power again for each sum.
        slopes = lax.optimization_barrier(_power(share, power - 1.0))
        bends = slopes / jnp.where(share == 0.0, 1.0, share)
        return Sums(*(jnp.sum(x, axis=1) for x in (slopes * share, slopes, bends)))

    def update(self, state: Root, sums: Sums) -> Root:
        power = self.power(sums.weights)
        is_known = ~(sums.weights * sums.slopes <= 0.0)  # NaN is
        weights, slopes, bends = (jnp.where(is_known, x, 1.0) for x in sums)
        root = weights ** (1.0 / power)
        newton = (root - 1.0) * power * weights / (root * slopes)
        curvature = (power - 1.0) * (weights * bends / slopes**2 - 1.0) / root  # g g'' / g'^2
        bend = jnp.clip(0.5 * (root - 1.0) * curvature, -1.0, 0.5)
        step = newton / jnp.where(power >= 2.0, 1.0 - bend, 1.0)
        new = self.bracket(state, state.at + newton, weights >= 1.0, power)
        at = state.at + jnp.where(is_known, step, 0.0)
        is_out = (at < new.low) | (at > new.high)
        # Where g is not convex, steps to and fro could leave the bracket as it is.
        is_long = (power < 1.0) & (jnp.abs(step) > 0.5 * (state.high - state.low))
        at = jnp.where(is_out | is_long, 0.5 * (new.low + new.high), at)
        size = jnp.abs(at - state.at) / power
        order = jnp.clip(power, 1.0, 3.0)  # how much a step shortens the next, as a power
        epsilon = 4.0 * jnp.finfo(at.dtype).eps / jnp.maximum(power - 1.0, 1.0)
        new = new._replace(at=at, is_found=~(size**order > epsilon))
        return jax.tree.map(functools.partial(jnp.where, state.is_found), state, new)

    def bracket(self, state: Root, newton: Array, is_below: Array, power: Array) -> Root:
        """Return the bracket after a pass."""
        low = jnp.where(is_below, state.at, state.low)
        high = jnp.where(is_below, state.high, state.at)
        low = jnp.where(power >= 1.0, jnp.clip(newton, low, high), low)
        return state._replace(low=low, high=high)

    def is_done(self, state: Root) -> Array:
        return state.is_found

    def matters(self, relative: Array, state: Root, found: Sums) -> Array:
        return ~(jnp.max(relative, axis=1) <= state.low)


def _power(share: Array, power: Array) -> Array:
    """Return share^power for share >= 0, zero at 0; NaN of NaN. It is not differentiated.

    In float32 2^(power log2(share)) by polynomials, as exact as the exponent is: with XLA's
    exponential and logarithm a pass takes half as long again on a CPU.
    """
    is_none = share <= 0.0
    positive = jnp.where(is_none, 1.0, share)
    if share.dtype != jnp.float32:
        return jnp.where(is_none, 0.0, jnp.exp(power * jnp.log(positive)))
    bits = lax.bitcast_convert_type(positive, jnp.int32)
    exponent = lax.shift_right_arithmetic(bits - ROOT_OF_HALF, jnp.int32(FRACTION))
    rest = lax.bitcast_convert_type(bits - (exponent << FRACTION), jnp.float32) - 1.0
    logarithm = exponent.astype(jnp.float32) + rest * _polynomial(LOG2_RATIO, rest)
    scaled = jnp.clip(power * logarithm, -126.0, 127.0)
    whole = jnp.round(scaled)
    fraction = lax.bitcast_convert_type(_polynomial(EXP2, scaled - whole), jnp.int32)
    bits = fraction + (whole.astype(jnp.int32) << FRACTION)
    result = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(is_none, 0.0, jnp.where(jnp.isnan(share), share, result))


def _fitted(function: Callable[..., Any], low: float, high: float, degree: int) -> list[float]:
    """Return the coefficients, lowest first, of a polynomial through the Chebyshev nodes."""
    fit = np.polynomial.Chebyshev.interpolate(function, degree, (low, high))
    return fit.convert(kind=np.polynomial.Polynomial).coef.tolist()


def _log2_ratio(x: np.ndarray) -> np.ndarray:
    return np.log1p(x) / (x * np.log(2.0))


LOG2_RATIO = _fitted(_log2_ratio, 0.5**0.5 - 1.0, 2.0**0.5 - 1.0, 9)
"""log2(1 + x) / x."""

EXP2 = _fitted(np.exp2, -0.5, 0.5, 6)
"""2^x."""

ROOT_OF_HALF, FRACTION = 0x3F3504F3, 23
"""The bits of the square root of one half in float32, and how many bits its fraction has."""


def _polynomial(coefficients: list[float], x: Array) -> Array:
    """Return the polynomial, lowest coefficient first; by pairs, for a short chain of operations.

    Estrin 1960.
    """
    terms = [jnp.full_like(x, coefficient) for coefficient in coefficients]
    while len(terms) > 1:
        pairs = zip(terms[::2], terms[1::2], strict=False)
        odd = terms[-1:] if len(terms) % 2 else []
        terms = [low + x * high for low, high in pairs] + odd
        x = x * x
    return terms[0]


@jax.custom_jvp
def _power_above_zero(over: Array, power: Any) -> Array:
    """Return (over / power)^power above zero, zero below; NaN of NaN."""
    power = jnp.asarray(power, over.dtype)
    return _power(jnp.where(over <= 0.0, 0.0, over / power), power)  # NaN stays


@functools.partial(_power_above_zero.defjvp, symbolic_zeros=True)
def _power_above_zero_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    over, power = primals[0], jnp.asarray(primals[1], primals[0].dtype)
    weights = _power_above_zero(over, power)
    above = jnp.where(over <= 0.0, 1.0, over)
    change = jnp.zeros_like(weights)
    if not isinstance(tangents[0], SymbolicZero):
        change = change + weights * (power / above) * tangents[0]
    if not isinstance(tangents[1], SymbolicZero):
        change = change + weights * (jnp.log(above / power) - 1.0) * tangents[1]
    return weights, change
