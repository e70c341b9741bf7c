"""What a statistic is: what a tile adds, how sums are joined and rescaled, and how it ends.

Weights stream: while the tiles of a query are visited, its weights are known up to a positive
factor, which is known at the end alone. A statistic of queries says what a factor does to its sums
(`rescale`); so it needs no second visit, and the last rescaling makes its sums exactly those of the
final weights. One that cannot say so, and one of keys, is given final weights in a second pass.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from attention_jax.base.binding import as_pytree, bind
from attention_jax.base.equality import ByValue
from attention_jax.base.typing import require_callable
from attention_jax.masks.intervals import indices

__all__ = [
    "Pairs",
    "Statistic",
    "Statistics",
    "checked",
    "fields_read",
    "of_matrix",
    "over_queries",
    "scaled",
]

Array = jax.Array
AXES = {"query": "T", "key": "S", "head": ""}
"""For each kind of statistic the letter of the axis that its result has, for one head."""

OF_LOGITS = "logits", "largest_logit"
OF_WEIGHTS = "weights", "log_weights"
"""Fields of `Pairs` that need not be of the same heads, where maps mix these."""


class Pairs(NamedTuple):
    """What a statistic is told of pairs: all of a head [T, S], or one tile of them.

    Attributes:
      weights: [T, S], after dropout, zero where nothing may be attended; in a statistic that
        rescales times a positive factor of each query, which is one in all others.
      log_weights: [T, S], the logarithms of their magnitudes; some finite number where a weight is
        zero.
      logits: [T, S], zero where nothing may be attended.
      allowed: [T, S], True = may attend.
      q_idx: [T, 1], positions of the queries.
      kv_idx: [1, S], positions of the keys.
      largest_logit: [T], over the allowed keys; the smallest number where there are none.

    Where maps mix heads and change their number, logits and weights are of different heads, and a
    statistic reads one of the two (`fields_read`).
    """

    weights: Array
    log_weights: Array
    logits: Array
    allowed: Array
    q_idx: Array
    kv_idx: Array
    largest_logit: Array

    @classmethod
    def of(
        cls, weights: Array, logits: Array, allowed: Array, q_idx: Array, kv_idx: Array
    ) -> Pairs:
        """Return the pairs of weights that are final, with logits that need not be hidden."""
        logits = jnp.where(allowed, logits, 0.0)
        return cls(
            weights,
            jnp.log(jnp.where(weights != 0, jnp.abs(weights), 1.0)),
            logits,
            allowed,
            q_idx,
            kv_idx,
            row_maximum(jnp.where(allowed, logits, jnp.finfo(logits.dtype).min)),
        )

    @classmethod
    def none(cls, queries: int, keys: int, dtype: Any) -> Pairs:
        """Return pairs of which none may attend."""
        zeros = jnp.zeros((queries, keys), dtype)
        q_idx, kv_idx = indices(queries)[:, None], indices(keys)[None, :]
        return cls.of(zeros, zeros, jnp.zeros(zeros.shape, bool), q_idx, kv_idx)


def scaled(sums: Any, log_factor: Array) -> Any:
    """Multiply sums that are linear in the weights by exp(log_factor [T]); integers stay.

    >>> scaled(jnp.ones((2, 1)), jnp.log(jnp.array([1.0, 2.0])))
    Array([[1.],
           [2.]], dtype=float32)
    """
    return jax.tree.map(functools.partial(_scaled_leaf, factor=jnp.exp(log_factor)), sums)


def added(first: Any, second: Any) -> Any:
    """Add two sums, leaf by leaf."""
    return jax.tree.map(jnp.add, first, second)


def unchanged(sums: Any) -> Any:
    """Return the sums: a statistic that is nothing but its sums."""
    return sums


class OfTile(Protocol):
    """`of_tile(pairs) -> sums`, each with the leading axis T (of keys: S)."""

    def __call__(self, pairs: Pairs, /) -> Any: ...


class Finish(Protocol):
    """`finish(sums) -> result`, of all queries (or keys) of a head."""

    def __call__(self, sums: Any, /) -> Any: ...


class Merge(Protocol):
    """`merge(sums, sums) -> sums`, of two disjoint sets of pairs."""

    def __call__(self, first: Any, second: Any, /) -> Any: ...


class Rescale(Protocol):
    """`rescale(sums, log_factor [T]) -> sums`, of weights times exp(log_factor)."""

    def __call__(self, sums: Any, log_factor: Array, /) -> Any: ...


class Change(Protocol):
    """`change(pairs, merged) -> sums`, whose sum over all tiles moves as `merged` does."""

    def __call__(self, pairs: Pairs, merged: Any, /) -> Any: ...


_KINDS = {
    "of_tile": OfTile,
    "finish": Finish,
    "merge": Merge,
    "rescale": Rescale,
    "change": Change,
}


@functools.partial(jax.tree_util.register_dataclass, data_fields=list(_KINDS), meta_fields=["of"])
@dataclasses.dataclass(frozen=True, eq=False)
class Statistic(ByValue):
    r"""A statistic of attention, computed with the context, a tile at a time.

    Args:
      of_tile: `Pairs` -> sums, arrays (or a pytree of them) with the leading axis T: what the keys
        of a tile add for each query. Of pairs that may not attend it is the neutral element of
        `merge`. For a statistic of keys the leading axis is S, and the queries are summed over.
      finish: the sums of all queries [T, ...] -> the result; of a head without the axis T.
      rescale: (sums, log_factor [T]) -> the sums if all weights of each query are multiplied by
        exp(log_factor). `scaled` where they are linear in the weights. None: `of_tile` has to be
        given final weights, which takes a second pass over the tiles.
      merge: (sums, sums) -> sums of two disjoint sets of keys; addition unless given.
      change: where sums are not added, (pairs, merged) -> what is added for the derivative: with
        `merged` held fixed, the derivative of the total over all tiles is that of the merged sums.
        None: `of_tile` if sums are added, and else the result has no derivative.
      of: "query", "key" or "head": what the result is of.

    Raises:
      TypeError: what should be a function is none, or takes other arguments.
      ValueError: `of` is something else; or a statistic of keys that rescales.

    >>> from attention_jax import attend
    >>> def of_tile(pairs):
    ...     return (pairs.weights**2).sum(axis=1)
    >>> def rescale(sums, log_factor):
    ...     return sums * jnp.exp(2 * log_factor)
    >>> effective_keys = Statistic(of_tile, lambda sums: 1 / sums, rescale)
    >>> x = jnp.zeros((1, 4, 1, 2))
    >>> attend(x, x, x, statistics={"keys": effective_keys}).statistics["keys"][0, :, 0]
    Array([4., 4., 4., 4.], dtype=float32)
    """

    of_tile: Callable[[Pairs], Any]
    finish: Callable[[Any], Any] = unchanged
    rescale: Callable[[Any, Array], Any] | None = scaled
    merge: Callable[[Any, Any], Any] = added
    change: Callable[[Pairs, Any], Any] | None = None
    of: str = "query"

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            function = getattr(self, name)
            if function is not None and not isinstance(function, jax.tree_util.Partial):
                require_callable(f"Statistic: {name}", function, kind)
                object.__setattr__(self, name, as_pytree(function))
        if self.of not in AXES:
            raise ValueError(f"Statistic: of must be query, key or head, got {self.of!r}.")

    @property
    def axis(self) -> str:
        """The letter of the axis of its result for one head, if it has one."""
        return AXES[self.of]

    @property
    def streams(self) -> bool:
        """Whether its sums follow in the pass that computes the context."""
        return self.rescale is not None and self.of != "key"

    @property
    def is_added(self) -> bool:
        """Whether its sums are added."""
        return getattr(self.merge, "func", None) is added

    def moved(self, pairs: Pairs, merged: Any) -> Any:
        """Return what a tile adds to the derivative of the merged sums, or None."""
        if self.change is not None:
            return self.change(pairs, merged)
        return self.of_tile(pairs) if self.is_added else None

    def of_pairs(self, pairs: Pairs) -> Any:
        """Return the statistic of all pairs of a head, with final weights."""
        return self.finish(self.of_tile(pairs))


def fields_read(statistic: Statistic, dtype: Any = jnp.float32) -> frozenset[str]:
    """Return the names of the fields of `Pairs` whose numbers a statistic reads.

    Args:
      statistic: any, with the parameters of one head.
      dtype: that of weights and logits.

    >>> from attention_jax import statistics
    >>> sorted(fields_read(statistics.largest_logit))
    ['kv_idx', 'largest_logit']
    >>> sorted(fields_read(statistics.expected_distance))
    ['kv_idx', 'q_idx', 'weights']
    """
    pairs = jax.eval_shape(functools.partial(Pairs.none, 3, 5, dtype))
    leaves, structure = jax.tree.flatten(statistic)
    shapes = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves]

    def of_tile(pairs: Pairs, leaves: list[Array]) -> Any:
        return structure.unflatten(leaves).of_tile(pairs)

    def moved(pairs: Pairs, leaves: list[Array], sums: Any) -> Any:
        return structure.unflatten(leaves).moved(pairs, sums)

    sums = jax.eval_shape(of_tile, pairs, shapes)
    found: frozenset[str] = frozenset()
    for function, given in ((of_tile, (pairs, shapes)), (moved, (pairs, shapes, sums))):
        program = jax.make_jaxpr(function)(*given).jaxpr
        used = [x for equation in program.eqns for x in equation.invars] + program.outvars
        names = zip(Pairs._fields, program.invars, strict=False)
        found |= {name for name, variable in names if any(variable is x for x in used)}
    return found


def reads(statistic: Statistic, dtype: Any) -> tuple[bool, bool]:
    """Tell whether a statistic of one head reads logits, and whether it reads weights."""
    fields = fields_read(statistic, dtype)
    return not fields.isdisjoint(OF_LOGITS), not fields.isdisjoint(OF_WEIGHTS)


Statistics = Mapping[str, Statistic]
"""What `attend` takes: statistics by the names that their results get."""


def checked(operation: str, given: Any) -> dict[str, Statistic] | None:
    """Return statistics by name; to ask for none of them is not to ask.

    Raises:
      TypeError: no dict, or something else than statistics in it.

    >>> checked("f", {})
    """
    if not given:
        return None
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{operation}: statistics must be a dict from names to statistics, such as "
            f"{{'entropy': statistics.entropy}}, got {type(given).__name__}."
        )
    for name, statistic in given.items():
        if not isinstance(name, str):
            raise TypeError(f"{operation}: the names of statistics must be strings, got {name!r}.")
        if not isinstance(statistic, Statistic):
            what = getattr(statistic, "__name__", type(statistic).__name__)
            advice = "call it with its arguments, or wrap " if callable(statistic) else "wrap "
            raise TypeError(
                f"{operation}: statistics[{name!r}] must be one of attention_jax.statistics, got "
                f"{what}; {advice}your own function of a tile in statistics.Statistic."
            )
    return dict(given)


def over_queries(statistic: Statistic, reduce: Callable[..., Array] = jnp.mean) -> Statistic:
    """Reduce a statistic of queries to one of the head: `reduce(result, axis=0)`.

    Args:
      statistic: of queries, with a result [T] or [T, k], say, for one head.
      reduce: such as `jnp.max` or `jnp.mean`; queries that may attend to nothing count too.

    Raises:
      ValueError: a statistic of keys or of a head.

    >>> from attention_jax import attend, statistics
    >>> x = jax.random.normal(jax.random.key(0), (2, 5, 3, 4))
    >>> largest = over_queries(statistics.largest_logit, jnp.max)
    >>> attend(x, x, x, statistics={"largest": largest}).statistics["largest"].shape
    (2, 3)
    """
    if statistic.of != "query":
        raise ValueError(f"over_queries: give a statistic of queries, got one of {statistic.of!r}.")
    finish = bind(_reduced, finish=statistic.finish, reduce=reduce)
    return dataclasses.replace(statistic, finish=finish, of="head")


def of_matrix(
    statistic: Statistic, weights: Array, logits: Array | None = None, allowed: Array | None = None
) -> Any:
    """Return a statistic of weights that are there, [..., T, S].

    Args:
      statistic: any.
      weights: [..., T, S], final.
      logits: [..., T, S]; the logarithms of the weights unless given.
      allowed: [..., T, S]; where a weight is not zero unless given.

    Returns:
      Arrays [..., T] and further axes; of keys [..., S], of a head [...].

    >>> from attention_jax import statistics
    >>> of_matrix(statistics.largest_weight, jnp.array([[[0.3, 0.7], [0.0, 0.0]]]))
    Array([[0.7, 0. ]], dtype=float32)
    """
    allowed = weights != 0 if allowed is None else jnp.broadcast_to(allowed, weights.shape)
    logits = jnp.log(jnp.where(weights > 0, weights, 1.0)) if logits is None else logits
    function = functools.partial(_of_one_matrix, statistic)
    for _ in range(weights.ndim - 2):
        function = jax.vmap(function)
    return function(weights, logits, allowed)


def _of_one_matrix(statistic: Statistic, weights: Array, logits: Array, allowed: Array) -> Any:
    q_idx, kv_idx = (indices(length) for length in weights.shape)
    return statistic.of_pairs(Pairs.of(weights, logits, allowed, q_idx[:, None], kv_idx[None, :]))


@jax.custom_jvp
def row_maximum(x: Array) -> Array:
    """Return the largest of each row, [T, S] -> [T]; of equal ones the first has the derivative."""
    lowest = jnp.finfo(x.dtype).min
    if x.shape[1] == 0:
        return jnp.full(x.shape[0], lowest, x.dtype)
    return jnp.maximum(jnp.max(x, axis=1), lowest)


@row_maximum.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (change,) = primals, tangents
    if x.shape[1] == 0:
        return row_maximum(x), jnp.zeros(x.shape[0], x.dtype)
    is_first = indices(x.shape[1])[None, :] == jnp.argmax(x, axis=1).astype(jnp.int32)[:, None]
    return row_maximum(x), jnp.sum(jnp.where(is_first, change, 0.0), axis=1)


def _scaled_leaf(leaf: Array, factor: Array) -> Array:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    return leaf * factor.reshape(factor.shape + (1,) * (leaf.ndim - 1))


def _reduced(sums: Any, finish: Callable[[Any], Any], reduce: Callable[..., Array]) -> Any:
    return jax.tree.map(functools.partial(reduce, axis=0), finish(sums))
