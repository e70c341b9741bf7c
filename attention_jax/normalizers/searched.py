"""Normalizers that need several passes over the tiles of a row to find what holds for all of it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attention_jax.normalizers.protocol import Streaming

__all__ = ["MOST_PASSES", "Level", "OverThreshold", "Searched", "Threshold", "over_row"]

Array = jax.Array


MOST_PASSES = 100
"""A search ends after so many passes, whatever it has found."""


class Level(NamedTuple):
    """The statistics of a row [T]: a threshold less the largest logit, and that logit.

    Apart, because next to a large logit the digits of a small difference would be lost.
    """

    level: Array
    largest: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Searched(Streaming):
    """A search over a row, pass by pass, of which only a state of each row is kept.

    A pass sums the contributions of all tiles that may still matter, and then updates the state.
    Logits come less the largest of their row: none is above 0, and a hidden one is -inf.
    """

    passes = "several passes over the held logits of a row of tiles"

    @abc.abstractmethod
    def start(self, largest: Array) -> Any:
        """Return the state before the first pass, arrays [T], given the largest logits [T]."""

    def nothing(self, found: Any) -> Any:
        """Return the sums over no keys, of the shapes of `found`; zeros unless `joined` differs."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found)

    def joined(self, sums: Any, found: Any) -> Any:
        """Return the sums of a pass with what one more tile contributes; they are added up."""
        return jax.tree.map(jnp.add, sums, found)

    @abc.abstractmethod
    def contribution(self, relative: Array, state: Any) -> Any:
        """Return what a tile [bt, bk] adds to the sums of a pass, arrays [bt]."""

    @abc.abstractmethod
    def update(self, state: Any, sums: Any) -> Any:
        """Return the state after a pass."""

    @abc.abstractmethod
    def is_done(self, state: Any) -> Array:
        """Tell which rows need no further pass, bool [T]."""

    @abc.abstractmethod
    def level(self, state: Any) -> Array:
        """Return what the weights of a row are functions of, [T], given the state in the end."""

    @abc.abstractmethod
    def matters(self, relative: Array, state: Any, found: Any) -> Array:
        """Tell in which rows of a tile a key has weight or a part in the search, bool [bt].

        It is asked of the largest logits of a tile, [bt, 1], and `found` is their contribution; NaN
        matters. A tile where nothing does is skipped from then on.
        """


class Bracket(NamedTuple):
    """The root of a row is from `low` to `high`; `is_found` where it is `high`; [T] each."""

    low: Array
    high: Array
    is_found: Array


PROBES = 6
"""At how many thresholds a pass tries the sum of a row."""


@dataclasses.dataclass(frozen=True, eq=False)
class OverThreshold(Searched):
    """Weights w = function(e - t), whose threshold t makes each row sum to one.

    The tangent of t follows from sum_j function'(e_j - t) (e'_j - t') = 0.

    Attributes:
      function: from [bt, bk] to weights: zero up to 0, then rising; NaN of NaN.
      reach: function(reach) = 1, so that t is at most this far below the largest logit.
    """

    function: Callable[[Array], Array]
    reach: Any = 1.0
    any_order = True

    def weight(self, logits: Array, statistics: Level) -> Array:
        return self.function(logits - statistics.largest[:, None] - statistics.level[:, None])

    @abc.abstractmethod
    def resumed(self, state: Any) -> Any:
        """Return the state to go on from with more keys, where a search over some has ended.

        More keys make the sum of a row larger, and so its threshold higher.
        """

    def settled(self, relative: Array, state: Any) -> Any:
        """Return the state at the end of a search over the keys of one tile alone."""

        def one_pass(carry: tuple[Array, Any]) -> tuple[Array, Any]:
            number, state = carry
            return number + 1, self.update(state, self.contribution(relative, state))

        def goes_on(carry: tuple[Array, Any]) -> Array:
            number, state = carry
            return (number < MOST_PASSES) & ~jnp.all(self.is_done(state))

        return lax.while_loop(goes_on, one_pass, (jnp.int32(0), state))[1]


@dataclasses.dataclass(frozen=True, eq=False)
class Threshold(OverThreshold):
    """The threshold of a function that is cheap, looked for at several places in each pass.

    A pass tries thresholds from one end of a bracket to the other. The sum to the power of
    1 / power is convex and falls with t, so a line through two of its points is above it between
    them and below it elsewhere: where lines reach one are the ends of the next bracket.

    Attributes:
      function, reach: those of `OverThreshold`; the function is convex above 0.
      power: function grows like this power, at least 1.

    >>> sparsemax = Threshold(jax.nn.relu)
    >>> sparsemax.weight(jnp.array([[1.0, 0.5]]), Level(jnp.array([-0.25]), jnp.array([1.0])))
    Array([[0.25, 0.  ]], dtype=float32)
    """

    power: Any = 1.0

    def resumed(self, state: Bracket) -> Bracket:
        zeros = jnp.zeros_like(state.low)
        return Bracket(state.low, zeros, zeros > 0.0)

    def level(self, state: Bracket) -> Array:
        return state.high

    def start(self, largest: Array) -> Bracket:
        low = jnp.broadcast_to(-jnp.asarray(self.reach, largest.dtype), largest.shape)
        return Bracket(low, jnp.zeros_like(low), jnp.zeros(low.shape, bool))

    def contribution(self, relative: Array, state: Bracket) -> Array:
        """Return the sum of the weights at each probe, [bt, PROBES]."""
        over = relative[:, None, :] - self.thresholds(state)[:, :, None]
        return jnp.sum(self.function(over), axis=2)

    def update(self, state: Bracket, sums: Array) -> Bracket:
        at, power = self.thresholds(state), jnp.asarray(self.power, sums.dtype)
        over = sums ** (1.0 / power) - 1.0
        before = jnp.clip(jnp.sum(over >= 0.0, axis=1) - 1, 0, PROBES - 2)
        around = jnp.clip(before[:, None] + jnp.arange(-1, 3)[None, :], 0, PROBES - 1)
        points, values = (jnp.take_along_axis(x, around, axis=1) for x in (at, over))
        # Where the lines through the 1st and 2nd, 2nd and 3rd, 3rd and 4th point reach zero.
        roots = _roots(points, values)
        low = jnp.maximum(points[:, 1], jnp.maximum(roots[:, 0], roots[:, 2]))
        high = jnp.clip(roots[:, 1], low, points[:, 2])
        epsilon = 4.0 * jnp.finfo(sums.dtype).eps
        is_near = ~(high - low > epsilon * jnp.asarray(self.reach, sums.dtype))
        is_found = is_near | ~(jnp.abs(values[:, 1]) > epsilon)
        new = Bracket(low, high, is_found)
        return jax.tree.map(lambda old, new: jnp.where(state.is_found, old, new), state, new)

    def thresholds(self, state: Bracket) -> Array:
        """Return the thresholds to try, [T, PROBES]."""
        share = jnp.arange(PROBES).astype(state.low.dtype) / (PROBES - 1)
        return state.low[:, None] + (state.high - state.low)[:, None] * share[None, :]

    def is_done(self, state: Bracket) -> Array:
        return state.is_found

    def matters(self, relative: Array, state: Bracket, found: Array) -> Array:
        return found[:, 0] != 0.0


def _roots(points: Array, values: Array) -> Array:
    """Return where the lines through neighbouring points are zero, [T, n - 1]; -inf for none."""
    fall = values[:, :-1] - values[:, 1:]
    step = values[:, :-1] * (points[:, 1:] - points[:, :-1]) / jnp.where(fall > 0.0, fall, 1.0)
    return jnp.where(fall > 0.0, points[:, :-1] + step, -jnp.inf)


def over_row(how: OverThreshold, logits: Array, allowed: Array) -> Array:
    """Return the weights [T, S] of whole rows: what a normalizer is that streams by a threshold.

    Args:
      how: the threshold.
      logits: [T, S].
      allowed: [T, S], True = may attend.

    >>> over_row(Threshold(jax.nn.relu), jnp.array([[1.0, 0.5, -1.0]]), jnp.ones((1, 3), bool))
    Array([[0.75, 0.25, 0.  ]], dtype=float32)
    """
    shown = allowed & (logits != -jnp.inf)
    lowest = jnp.finfo(logits.dtype).min
    hidden = lax.stop_gradient(jnp.where(shown, logits, lowest))
    largest = jnp.max(hidden, axis=1, keepdims=True, initial=lowest)
    # Far enough below the threshold to have no weight, and no derivative.
    below = -2.0 * lax.stop_gradient(jnp.asarray(how.reach, logits.dtype))
    relative = jnp.where(shown, logits - largest, below)
    fixed = lax.stop_gradient(relative)
    state = how.settled(fixed, how.start(jnp.max(fixed, axis=1, initial=0.0)))
    level = lax.stop_gradient(how.level(state))
    for _ in range(2):  # at its root, two steps of Newton's are right up to third derivatives
        over = relative - level[:, None]
        weights, slope = jax.jvp(how.function, (over,), (jnp.ones_like(over),))
        fall = jnp.sum(slope, axis=1)
        level = level + (jnp.sum(weights, axis=1) - 1.0) / jnp.where(fall == 0.0, 1.0, fall)
    return jnp.where(shown, how.function(relative - level[:, None]), 0.0)
