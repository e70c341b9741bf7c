"""How a normalizer is computed tile by tile: what a row needs to know, and a weight given that.

Every kind keeps one promise. Given the statistics of a row, a weight is a function of its own logit
and of these alone; so any tile of weights can be computed again from logits and statistics, and no
derivative needs more than that.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp

from attention_jax.base.binding import ask, bind, taken_apart
from attention_jax.base.equality import ByValue
from attention_jax.base.typing import AnyNormalizer, Normalizer

__all__ = [
    "Elementwise",
    "Exponential",
    "LogSum",
    "Streaming",
    "is_queried",
    "name_of",
    "queried",
    "streaming",
    "with_query",
]

Array = jax.Array

F = TypeVar("F", bound=Callable[..., Any])


class Streaming(ByValue, abc.ABC):
    """How the weights of a row follow tile by tile; the answer of the rule "streaming"."""

    merges: ClassVar[bool] = False
    """Whether results over disjoint parts of the keys join to the result over all of them."""

    any_order: ClassVar[bool] = False
    """Whether every key keeps its weight when keys change places, those of equal logits too."""

    passes: ClassVar[str] = "one pass"
    """How it goes over the tiles, in the words of `explain`."""

    @abc.abstractmethod
    def weight(self, logits: Array, statistics: Any) -> Array:
        """Return the weights of a tile.

        Args:
          logits: [bt, bk], of pairs that may attend.
          statistics: of each row, arrays [bt].
        """


@dataclasses.dataclass(frozen=True, eq=False)
class LogSum(Streaming):
    """Weights whose magnitudes sum to one, found in one pass: those of Exponential, and others.

    The statistic of a row is L = log(sum_j exp(exponent(e_j)) + exp(sink)). A subclass defines
    `exponent` and `weight`, whose magnitude is |w| = exp(exponent(e) - L). At a logit of -inf they
    are -inf and 0.
    """

    sink: Any = None
    merges = True
    any_order = True
    signed: ClassVar[bool] = True

    @abc.abstractmethod
    def exponent(self, logits: Array) -> Array:
        """Return the logarithms of the terms of the sum, [bt, bk]."""


@dataclasses.dataclass(frozen=True, eq=False)
class Exponential(LogSum):
    """The softmax family, w = exp(e - L): softmax, and softmax with a sink.

    >>> Exponential().weight(jnp.zeros((1, 2)), jnp.log(jnp.array([4.0])))
    Array([[0.25, 0.25]], dtype=float32)
    """

    signed = False

    def exponent(self, logits: Array) -> Array:
        return logits

    def weight(self, logits: Array, statistics: Any) -> Array:
        return jnp.exp(logits - statistics[:, None])


@dataclasses.dataclass(frozen=True, eq=False)
class Elementwise(Streaming):
    """Weights that depend on their own logit alone: w = function(e).

    >>> Elementwise(jax.nn.relu).weight(jnp.array([[-1.0, 2.0]]), None)
    Array([[0., 2.]], dtype=float32)
    """

    function: Callable[[Array], Array]
    merges = True
    any_order = True

    def weight(self, logits: Array, statistics: Any) -> Array:
        return self.function(logits)


def streaming(normalizer: AnyNormalizer) -> Streaming | None:
    """Return how a normalizer streams over tiles, or None if it needs the whole row."""
    return ask(normalizer, "streaming")


def queried(normalizer: F) -> F:
    """Mark a normalizer that also takes the queries of its rows, `query [T, Hq]`.

    Its rule "streaming" is given them too, if they are known.

    >>> @queried
    ... def sharpened(logits, allowed, *, query):
    ...     return jnp.where(allowed, jax.nn.sigmoid(logits * query[:, :1]), 0.0)
    """
    normalizer.__queried__ = True
    return normalizer


def is_queried(normalizer: Any) -> bool:
    """Tell whether a possibly bound normalizer was marked `queried`."""
    return hasattr(taken_apart(normalizer)[0], "__queried__")


def with_query(normalizer: Any, query: Array) -> Normalizer:
    """Bind the queries of its rows, [T, Hq], to a normalizer that is marked `queried`.

    >>> from attention_jax import normalizers
    >>> with_query(normalizers.softmax, jnp.ones((3, 4))) is normalizers.softmax
    True
    """
    if not is_queried(normalizer):
        return normalizer
    function, _, parameters = taken_apart(normalizer)
    return bind(function, **{**parameters, "query": query})


def name_of(normalizer: AnyNormalizer) -> str:
    """Return the name of a normalizer for a message.

    >>> from attention_jax import bind, normalizers
    >>> name_of(bind(normalizers.top_k, k=2))
    'top_k'
    """
    function, _, _ = taken_apart(normalizer)
    name = getattr(function, "__name__", type(function).__name__)
    return "this normalizer" if name == "<lambda>" else name
