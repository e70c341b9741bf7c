"""tanh as a short sum of sines, by which additive attention is a product of matrices."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

FITS = 40
"""Weighted fits, after which the largest errors are alike."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class TanhBySines:
    r"""An activation of `additive`: tanh(x) ~ sum_m c_m sin(w_m x), which multiplies matrices.

    With sin(w (a + b)) = sin(w a) cos(w b) + cos(w a) sin(w b), the score
    sum_f v_f tanh(a_f + b_f) is the product of 2 M numbers for each query and feature and as many
    for each key: matrix units compute it, and no tanh is left to the pairs.

    Projected queries a and keys b are clipped to [-limit, limit] each. Within that range the logits
    differ by at most `error` times sum_f |v_f| from those of tanh, before rounding; beyond it
    they are those of clipped features, with gradients of zero there. The defaults have an error
    of 0.0032, less than the spacing of bfloat16 below one, 2^-8. Terms in proportion to the limit
    keep the error: (2, 5), (4, 9), (8, 17).

    Attributes:
      limit: largest size of a projected feature of a query and of a key; above zero.
      terms: M, the number of sines; at least one.

    Raises:
      ValueError: a limit that is not above zero, or terms that are no whole number above zero.

    The score is that of Bahdanau, Cho and Bengio 2015, appendix A.1.2; weights of the fit after
    Lawson 1961.

    >>> from attention_jax import bind, scores
    >>> one = jnp.ones((1, 1))
    >>> score = bind(
    ...     scores.additive,
    ...     query_weight=one,
    ...     key_weight=one,
    ...     value=jnp.ones(1),
    ...     bias=jnp.zeros(1),
    ...     activation=scores.TanhBySines(),
    ... )
    >>> bool(abs(score(one, -0.5 * one) - jnp.tanh(0.5))[0, 0] < scores.TanhBySines().error)
    True
    """

    limit: float = 4.0
    terms: int = 9

    def __post_init__(self) -> None:
        if not self.limit > 0 or not np.isfinite(self.limit):
            raise ValueError(f"TanhBySines: limit must be a number above 0, got {self.limit!r}.")
        if not isinstance(self.terms, int) or self.terms < 1:
            raise ValueError(
                f"TanhBySines: terms must be a whole number of at least 1, got {self.terms!r}."
            )

    @property
    def error(self) -> float:
        """The largest |tanh(x) - sum_m c_m sin(w_m x)| for |x| <= 2 limit, rounding apart."""
        return series(self.limit, self.terms)[2]

    def __call__(self, x: Array) -> Array:
        """Return the sum for each entry, clipped to twice the limit."""
        x = jnp.clip(x, -2.0 * self.limit, 2.0 * self.limit)
        coefficients, frequencies, _ = series(self.limit, self.terms)
        parts = zip(coefficients.tolist(), frequencies.tolist(), strict=True)
        return functools.reduce(jnp.add, (c * jnp.sin(w * x) for c, w in parts))

    def of_queries(self, query: Array, value: Array) -> Array:
        """Return v_f c_m (sin(w_m a_f), cos(w_m a_f)) for queries a [T, A], [T, 2 M A]."""
        coefficients, _, _ = series(self.limit, self.terms)
        gain = jnp.asarray(np.repeat(coefficients, len(value)), query.dtype)
        gain = (gain * jnp.tile(value, self.terms))[None, :]
        angles = self._angles(query)
        return jnp.concatenate([gain * jnp.sin(angles), gain * jnp.cos(angles)], axis=1)

    def of_keys(self, key: Array) -> Array:
        """Return (cos(w_m b_f), sin(w_m b_f)) for keys b [S, A], [S, 2 M A]."""
        angles = self._angles(key)
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)

    def _angles(self, x: Array) -> Array:
        """Return w_m x_f for x [T, A], [T, M A], with features within a term."""
        _, frequencies, _ = series(self.limit, self.terms)
        clipped = jnp.tile(jnp.clip(x, -self.limit, self.limit), (1, self.terms))
        return clipped * jnp.asarray(np.repeat(frequencies, x.shape[1])[None, :], x.dtype)


@functools.cache
def series(limit: float, terms: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return c, w and the largest error of tanh(x) ~ sum_m c_m sin(w_m x), for |x| <= 2 limit.

    The frequencies w_m = pi (2 m + 1) / (2 P), m = 0, 1, ..., are the odd ones of period 4 P: like
    tanh, the sum is flat at P, which is at the end of the range or little further. Coefficients
    are fitted again and again, with more weight where the error is large (Lawson 1961).

    >>> coefficients, frequencies, error = series(4.0, 9)
    >>> error < 2**-8
    True
    """
    found = [_fitted(2.0 * limit, terms, stretch) for stretch in (1.0, 1.1)]
    return min(found, key=lambda each: each[2])


def _fitted(ends: float, terms: int, stretch: float) -> tuple[np.ndarray, np.ndarray, float]:
    number = 40 * terms
    x = ends * np.cos(np.pi * (np.arange(number) + 0.5) / (2 * number))  # all are odd functions
    frequencies = np.pi * (2 * np.arange(terms) + 1) / (2 * ends * stretch)
    sines, wanted = np.sin(np.outer(x, frequencies)), np.tanh(x)
    weights, best = np.ones_like(x), (np.zeros(terms), np.inf)
    for _ in range(FITS):
        root = np.sqrt(weights)
        coefficients = np.linalg.lstsq(sines * root[:, None], wanted * root, rcond=1e-10)[0]
        errors = np.abs(sines @ coefficients - wanted)
        if errors.max() < best[1]:
            best = coefficients, errors.max()
        weights = weights * (errors + 1e-3 * errors.max())
        weights /= weights.max()
    coefficients, _ = best
    return coefficients, frequencies, _largest_error(coefficients, frequencies, ends)


def _largest_error(coefficients: np.ndarray, frequencies: np.ndarray, ends: float) -> float:
    """Bound the error everywhere: between two points it is curved by no more than both sides."""
    x, step = np.linspace(0.0, ends, 2**13, retstep=True)
    errors = np.abs(np.sin(np.outer(x, frequencies)) @ coefficients - np.tanh(x))
    curvature = np.abs(coefficients * frequencies**2).sum() + 1.0
    return float(errors.max() + curvature * step**2 / 8)
