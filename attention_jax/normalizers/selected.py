"""Softmax over the keys with the largest logits: the first k, or the fewest that hold a mass.

In the order of their logits, of equal ones the first key first, a key is kept as long as the
measure of those before it is less than a target: k of the number of keys, or p of their mass.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.base.binding import rule
from attention_jax.base.checks import at_least
from attention_jax.base.typing import Normalizer
from attention_jax.normalizers.common import softmax
from attention_jax.normalizers.protocol import Exponential
from attention_jax.normalizers.searched import Searched

__all__ = ["Selected", "Selection", "hard", "over_kept", "top_k", "top_p"]

Array = jax.Array

PROBES = 8
"""At how many thresholds a pass measures what is above."""

FIRST = (-16.0, -8.0, -4.0, -2.0, -1.0, -0.5)
"""Thresholds of the first pass, besides one below all logits and one just below the largest."""

ROUNDING = 64.0
"""A mass that is short of its target by so many units of rounding counts as reached."""


class Selection(NamedTuple):
    """Which keys of a row are kept; [T] each.

    Of logits less `largest`, those above `high`, and of those above `low` the ones up to the key of
    number `last`: between `low` and `high` all are equal.
    """

    low: Array
    high: Array
    last: Array
    largest: Array

    def keeps(self, logits: Array, kv_idx: Array) -> Array:
        """Tell which pairs of a tile are kept, bool [bt, bk], given the numbers of its keys [bk].

        >>> half = Selection(*map(jnp.array, ([-0.5], [0.5], [0], [2.0])))
        >>> half.keeps(jnp.array([[2.0, 2.0, 1.0]]), jnp.arange(3))
        Array([[ True, False, False]], dtype=bool)
        """
        relative = logits - self.largest[:, None]
        is_equal = (relative > self.low[:, None]) & (kv_idx[None, :] <= self.last[:, None])
        return (relative > self.high[:, None]) | is_equal


class Cut(NamedTuple):
    """What is known of where the kept keys end, [T] each.

    Those above `low` reach the target, those above `high` do not, and measure `above`. `least` and
    `most` are the ends of what lay between when it was last asked. Where `is_found`, all above
    `low` are kept if `equal` is 0, else so many of those that are equal to each other.
    """

    low: Array
    high: Array
    above: Array
    least: Array
    most: Array
    target: Array
    equal: Array
    is_found: Array


class Measured(NamedTuple):
    """Of a tile or row: what is above each probe, [T, probes]; the ends between low and high."""

    sums: Array
    least: Array
    most: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Selected(Searched):
    """Softmax over the first keys in the order of their logits, up to a target.

    A pass measures what is above a few thresholds, between which the next ones are, and ends where
    the kept keys do not change any more, or where all between two thresholds are equal.
    """

    of_kept: ClassVar[Normalizer] = staticmethod(softmax)
    """What the weights of those keys are."""

    @abc.abstractmethod
    def measure(self, relative: Array) -> Array:
        """Return what each key counts, [bt, bk]; more for a larger logit, or the same."""

    @abc.abstractmethod
    def target(self, total: Array) -> Array:
        """Return the target of a row, given the measure of all its keys, [T]."""

    def weight(self, logits: Array, statistics: Any) -> Array:
        return Exponential().weight(logits, statistics)

    def start(self, largest: Array) -> Cut:
        lowest = jnp.full_like(largest, jnp.finfo(largest.dtype).min)
        zeros = jnp.zeros_like(largest)
        # A row that holds NaN is NaN, whatever is kept of it.
        return Cut(lowest, zeros + 1.0, zeros, -lowest, lowest, zeros, zeros, jnp.isnan(largest))

    def thresholds(self, state: Cut) -> Array:
        """Return where to measure, [T, probes]; first at `low`."""
        low, dtype = state.low, state.low.dtype
        least, most = jnp.maximum(low, state.least), jnp.minimum(state.high, state.most)
        # Odd shares, so that probes do not coincide with numbers that are multiples of others.
        share = (jnp.arange(PROBES - 1).astype(dtype) + 0.37) / (PROBES - 1)
        between = least[:, None] + (most - least)[:, None] * share[None, :]
        first = jnp.array([*FIRST, -4.0 * jnp.finfo(dtype).tiny], dtype)
        is_first = (state.least > state.most)[:, None]
        return jnp.concatenate([low[:, None], jnp.where(is_first, first, between)], axis=1)

    def nothing(self, found: Any) -> Measured:
        sums, least, most = (jnp.zeros(x.shape, x.dtype) for x in found)
        largest = jnp.finfo(sums.dtype).max
        return Measured(sums, least + largest, most - largest)

    def joined(self, sums: Measured, found: Measured) -> Measured:
        return Measured(
            sums.sums + found.sums,
            jnp.minimum(sums.least, found.least),
            jnp.maximum(sums.most, found.most),
        )

    def contribution(self, relative: Array, state: Cut) -> Measured:
        at, largest = self.thresholds(state), jnp.finfo(relative.dtype).max
        is_above = relative[:, None, :] > at[:, :, None]
        sums = jnp.sum(jnp.where(is_above, self.measure(relative)[:, None, :], 0.0), axis=2)
        is_between = (relative > state.low[:, None]) & (relative <= state.high[:, None])
        least = jnp.min(jnp.where(is_between, relative, largest), axis=1)
        return Measured(sums, least, jnp.max(jnp.where(is_between, relative, -largest), axis=1))

    def update(self, state: Cut, sums: Measured) -> Cut:
        (measured, least, most), at = sums, self.thresholds(state)
        whole, is_all = measured[:, 0], state.low == jnp.finfo(state.low.dtype).min
        target = jnp.where(is_all, self.target(whole), state.target)
        of_least, of_most = (self.measure(x[:, None])[:, 0] for x in (least, most))
        is_kept = (whole - of_least < target) | (whole == 0.0)
        is_equal = least == most
        number = jnp.ceil((target - state.above) / jnp.where(of_most > 0.0, of_most, 1.0))
        last = jnp.sum(measured >= target[:, None], axis=1) - 1
        last = jnp.clip(last, 0, PROBES - 1)[:, None]
        after = jnp.minimum(last + 1, PROBES - 1)
        is_inside = last[:, 0] < PROBES - 1
        low, high, above = (
            jnp.take_along_axis(x, n, axis=1)[:, 0]
            for x, n in ((at, last), (at, after), (measured, after))
        )
        narrower = Cut(
            low,
            jnp.where(is_inside, high, state.high),
            jnp.where(is_inside, above, state.above),
            least,
            most,
            target,
            jnp.zeros_like(low),
            jnp.zeros_like(is_kept),
        )
        # Far from what is kept and what is not, so that rounding makes no difference.
        found = narrower._replace(
            low=jnp.where(is_all, state.low, 0.5 * (state.low + least)),
            high=0.5 * (state.high + most),
            equal=jnp.where(is_kept, 0.0, number),
            is_found=jnp.ones_like(is_kept),
        )
        new = _where(is_kept | is_equal, found, narrower)
        return _where(state.is_found, state, new)

    def is_done(self, state: Cut) -> Array:
        return state.is_found

    def level(self, state: Cut) -> Array:
        return state.low

    def matters(self, relative: Array, state: Cut, found: Measured) -> Array:
        return found.sums[:, 0] != 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class TopK(Selected):
    """How `top_k` streams."""

    k: Any = 1

    def measure(self, relative: Array) -> Array:
        return jnp.ones_like(relative)

    def target(self, total: Array) -> Array:
        return jnp.broadcast_to(jnp.asarray(self.k, total.dtype), total.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class TopP(Selected):
    """How `top_p` streams."""

    p: Any = 1.0

    def measure(self, relative: Array) -> Array:
        return jnp.exp(jnp.minimum(relative, 0.0))

    def target(self, total: Array) -> Array:
        return _short_of(self.p, total) * total


def over_kept(how: Selected, logits: Array, allowed: Array) -> Array:
    """Return the weights [T, S] of whole rows: what a normalizer is that streams by a selection.

    Args:
      how: what is kept.
      logits: [T, S].
      allowed: [T, S], True = may attend.

    >>> over_kept(TopK(k=1), jnp.array([[1.0, 0.5, -1.0]]), jnp.ones((1, 3), bool))
    Array([[1., 0., 0.]], dtype=float32)
    """
    shown = allowed & (logits != -jnp.inf)
    fixed, lowest = jax.lax.stop_gradient(logits), jnp.finfo(logits.dtype).min
    hidden = jnp.where(shown, fixed, lowest)
    largest = jnp.max(hidden, axis=1, keepdims=True, initial=lowest)
    measure = jnp.where(shown, how.measure(jnp.where(shown, fixed - largest, 0.0)), 0.0)
    # NaN comes first, and what is hidden last.
    ranked = jnp.nan_to_num(fixed, nan=jnp.finfo(logits.dtype).max)
    order = jnp.lexsort((-ranked, ~allowed), axis=1)
    in_order = jnp.take_along_axis(measure, order, axis=1)
    before = jnp.cumsum(in_order, axis=1) - in_order
    is_kept = ~(before >= how.target(jnp.sum(measure, axis=1))[:, None])  # NaN is
    return how.of_kept(
        logits, allowed & jnp.take_along_axis(is_kept, jnp.argsort(order, 1), axis=1)
    )


def top_k(logits: Array, allowed: Array, k: Any) -> Array:
    r"""Softmax over the k largest logits of a row; of equal ones the first count as larger.

    Args:
      logits: [T, S].
      allowed: [T, S], True = may attend.
      k: how many keys a query attends to; a row that allows fewer takes those.

    Returns:
      Weights [T, S]; a row without allowed keys is zeros.

    Raises:
      ValueError: k is not positive.

    Zhao et al. 2019, equation 4; Gupta et al. 2021.

    >>> top_k(jnp.array([[1.0, 3.0, 3.0, 2.0]]), jnp.ones((1, 4), bool), k=2)
    Array([[0. , 0.5, 0.5, 0. ]], dtype=float32)
    """
    at_least("top_k", 1, k=k)
    return over_kept(TopK(k=k), logits, allowed)


def top_p(logits: Array, allowed: Array, p: Any) -> Array:
    r"""Softmax over the fewest keys of a row that have a share p of its softmax.

    A key is kept where those before it, in the order of their logits, of equal ones the first
    first, have less than p. No derivative with respect to p.

    Args:
      logits: [T, S].
      allowed: [T, S], True = may attend.
      p: the share, above 0 and at most 1, where it is softmax; reached but for rounding is reached.

    Returns:
      Weights [T, S]; a row without allowed keys is zeros.

    Raises:
      ValueError: p is a number outside of that.

    Holtzman et al. 2020, section 3.1 (nucleus sampling), with weights in place of probabilities.

    >>> logits = jnp.log(jnp.array([[0.2, 0.4, 0.1, 0.3]]))
    >>> top_p(logits, jnp.ones((1, 4), bool), p=0.6)
    Array([[0.   , 0.571, 0.   , 0.429]], dtype=float32)
    """
    _check_share(p)
    return over_kept(TopP(p=p), logits, allowed)


def hard(logits: Array, allowed: Array) -> Array:
    r"""All weight on the largest logit, the first of equal ones; its gradient is zero.

    Args:
      logits: [T, S].
      allowed: [T, S], True = may attend.

    Returns:
      Weights [T, S], a one in each row; a row without allowed keys is zeros.

    The limit of softmax(e / t) for t to 0.

    >>> hard(jnp.array([[1.0, 3.0, 3.0]]), jnp.ones((1, 3), bool))
    Array([[0., 1., 0.]], dtype=float32)
    """
    return top_k(logits, allowed, 1)


@rule(top_k, "streaming")
def _(k: Any) -> TopK:
    at_least("top_k", 1, k=k)
    return TopK(k=k)


@rule(top_p, "streaming")
def _(p: Any) -> TopP:
    _check_share(p)
    return TopP(p=p)


@rule(hard, "streaming")
def _() -> TopK:
    return TopK()


def _check_share(p: Any) -> None:
    if isinstance(p, int | float) and not 0.0 < p <= 1.0:
        raise ValueError(f"top_p: p must be above 0 and at most 1, got {p}.")


def _short_of(p: Any, like: Array) -> Array:
    """Return p less what sums may be rounded by; nothing reaches it if p is 1."""
    share = jax.lax.stop_gradient(jnp.asarray(p, like.dtype))
    return jnp.where(share < 1.0, share * (1.0 - ROUNDING * jnp.finfo(like.dtype).eps), 2.0)


def _where(condition: Array, yes: Cut, no: Cut) -> Cut:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
