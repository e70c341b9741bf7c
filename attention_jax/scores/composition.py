"""Scores built from scores, and the normal form that all of them reduce to.

`Separated` splits a score into a map over query rows, a map over key rows, a pairwise part and a
map of the logits. The per-row parts are then computed once per row, however many tiles or decoding
steps use them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar, overload

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from attention_jax.base import checks
from attention_jax.base.binding import Sliced, as_pytree, ask, bind, taken_apart, unbound
from attention_jax.base.matmul import Products
from attention_jax.base.typing import AnyScore, PositionalScore, Score, require_callable
from attention_jax.masks.intervals import indices
from attention_jax.scores.tanh_pairs import activation_pairs, tanh_pairs

Array = jax.Array


def _identity(x: Array) -> Array:
    return x


identity = bind(_identity)

P = ParamSpec("P")
S = TypeVar("S", bound=Callable[..., Any])


class Separated(NamedTuple):
    """A score in normal form: logits = finish(pairs(query_map(query), key_map(key))).

    `query_map` and `key_map` act on rows, so tiles, and the steps of a decoder that attends to the
    same keys, share their results. It is itself a score, and a pytree.
    """

    query_map: Partial
    key_map: Partial
    pairs: Partial
    finish: Partial

    def __call__(self, query: Array, key: Array) -> Array:
        q_idx, kv_idx = indices(query.shape[0]), indices(key.shape[0])
        return self.at(query, key, q_idx, kv_idx)

    def at(self, query: Array, key: Array, q_idx: Array, kv_idx: Array) -> Array:
        """Score rows at the given positions."""
        return self.paired(self.query_map(query), self.key_map(key), q_idx, kv_idx)

    def paired(self, query: Array, key: Array, q_idx: Array, kv_idx: Array) -> Array:
        """Score rows to which the two maps have been applied."""
        indices = {"q_idx": q_idx, "kv_idx": kv_idx} if is_positional(self.pairs) else {}
        return self.finish(self.pairs(query, key, **indices))

    @property
    def adds_features(self) -> bool:
        """Whether pairs are sums over features that no product of matrices computes."""
        return taken_apart(self.pairs)[0] in (tanh_pairs, activation_pairs)

    @property
    def is_product(self) -> bool:
        """Whether the pairwise part is a product of rows, marked `multiplies`."""
        return hasattr(taken_apart(self.pairs)[0], "__multiplies__")

    def multiplied(self, products: Products) -> Separated:
        """Return the score with the product of its rows computed so, if it is marked `multiplies`.

        What else a score computes is left as it is written.
        """
        function, _, keywords = taken_apart(self.pairs)
        if not self.is_product:
            return self
        return self._replace(pairs=bind(function, **keywords | {"products": products}))


class Composition(Protocol[P]):
    """Makes a score from a score; from a `per_head` or `per_example` one, one like it."""

    @overload
    def __call__(self, score: Sliced, *args: P.args, **kwargs: P.kwargs) -> Sliced: ...
    @overload
    def __call__(self, score: AnyScore, *args: P.args, **kwargs: P.kwargs) -> Separated: ...


def composition(compose: Callable[Concatenate[Any, P], Separated]) -> Composition[P]:
    """Let a function that makes a score from a score also take a `per_head` or `per_example` one.

    Its own parameters are then shared by all heads and examples.
    """

    @functools.wraps(compose)
    def composed(score: Any, *args: Any, **keywords: Any) -> Any:
        if not isinstance(score, Sliced):
            return compose(score, *args, **keywords)
        args, keywords = _repeated((args, keywords), score)
        return Sliced(compose(score.function, *args, **keywords), score.axes)

    return composed


def _repeated(parameters: Any, score: Sliced) -> Any:
    """Repeat parameters for each slice of a score: they get its leading axes."""
    leaves, rank = jax.tree.leaves(score), len(score.axes)
    sizes = {jnp.shape(leaf)[:rank] for leaf in leaves}
    if len(sizes) > 1 or any(len(size) < rank for size in sizes):
        mark = "per_example" if "B" in score.axes else "per_head"
        axes = " and ".join(score.axes)
        raise checks.ShapeError(
            f"{mark}: every parameter must have the same leading {'axis' if rank == 1 else 'axes'} "
            f"{axes}, got the shapes {', '.join(str(jnp.shape(leaf)) for leaf in leaves)}."
        )

    def repeat(leaf: Any) -> Any:
        is_number = hasattr(leaf, "dtype") or isinstance(leaf, float)
        return jnp.broadcast_to(leaf, (*size, *jnp.shape(leaf))) if is_number else leaf

    size = sizes.pop() if sizes else ()
    return jax.tree.map(repeat, parameters)


@composition
def separate(score: AnyScore) -> Separated:
    """Split any score into per-row and pairwise parts; without a rule all of it is pairwise.

    >>> from attention_jax import scores
    >>> from attention_jax import bind
    >>> parts = separate(bind(scores.bilinear, weight=jnp.ones((3, 2))))
    >>> parts.query_map(jnp.ones((5, 3))).shape
    (5, 2)
    """
    if isinstance(score, Separated):
        return score
    parts = ask(score, "separation")
    return parts or Separated(identity, identity, as_pytree(score), identity)


def positional(score: S) -> S:
    """Mark a score that also takes the positions of its rows: q_idx [T] and kv_idx [S].

    >>> @positional
    ... def distance_penalized(query, key, q_idx, kv_idx):
    ...     return query @ key.T - jnp.abs(q_idx[:, None] - kv_idx[None, :]).astype(query.dtype)
    """
    score.__positional__ = True
    return score


def multiplies(pairs: S) -> S:
    """Mark a pairwise part that is a product of rows and takes `products`, how to compute it."""
    pairs.__multiplies__ = True
    return pairs


def require_score(label: str, score: Any) -> None:
    """Require a function of the rows of one head, and of their positions if marked so.

    Raises:
      TypeError: a score that is no such function, or waits for its parameters.
    """
    waiting = unbound(score) if callable(score) and not is_positional(score) else []
    if waiting:
        raise TypeError(
            f"{label} still waits for {', '.join(waiting)}; give them with "
            f"bind({label.split()[-1]}, {waiting[0]}=...)."
        )
    require_callable(label, score, PositionalScore if is_positional(score) else Score)


def is_positional(score: Any) -> bool:
    """Tell whether a possibly bound score was marked `positional`."""
    return hasattr(taken_apart(score)[0], "__positional__")


@composition
def scaled(score: AnyScore, scale: Any) -> Separated:
    """Multiply the logits: scale * score(q, k).

    >>> from attention_jax.scores import dot
    >>> scaled(dot, 0.5)(jnp.ones((1, 4)), jnp.ones((1, 4)))
    Array([[2.]], dtype=float32)
    """
    return finished(score, bind(_multiply, scale=scale))


@composition
def soft_capped(score: AnyScore, cap: Any) -> Separated:
    """Bound the logits smoothly: cap * tanh(score(q, k) / cap).

    Gemma Team 2024 (Gemma 2), section 2 ("logit soft-capping").

    >>> from attention_jax.scores import dot
    >>> soft_capped(dot, 1.0)(100.0 * jnp.ones((1, 1)), jnp.ones((1, 1)))
    Array([[1.]], dtype=float32)
    """
    return finished(score, bind(_soft_cap, cap=cap))


@composition
def projected(score: AnyScore, query_weight: Any = None, key_weight: Any = None) -> Separated:
    """Project query and key first: score(q P, k Q); None leaves a side as it is.

    >>> from attention_jax.scores import dot
    >>> general = projected(dot, query_weight=jnp.ones((3, 2)))  # Luong's general
    >>> general(jnp.ones((1, 3)), jnp.ones((1, 2)))
    Array([[6.]], dtype=float32)
    """
    query_map = identity if query_weight is None else bind(project_rows, weight=query_weight)
    key_map = identity if key_weight is None else bind(project_rows, weight=key_weight)
    return mapped(score, query_map, key_map)


@composition
def row_normalized(score: AnyScore, query: bool = True, key: bool = True) -> Separated:
    """Bring rows to unit length first: score(q / |q|, k / |k|).

    >>> from attention_jax.scores import dot
    >>> row_normalized(dot)(jnp.array([[3.0, 4.0]]), jnp.array([[4.0, 3.0]]))
    Array([[0.96]], dtype=float32)
    """
    unit = bind(unit_rows)
    return mapped(score, unit if query else identity, unit if key else identity)


def unit_rows(x: Array) -> Array:
    """Divide each row by its Euclidean length; a zero row stays zero, with zero gradient."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0.0))
    x = x / jnp.where(largest == 0, 1.0, largest)  # so that no square overflows or underflows
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    zero = square == 0
    return jnp.where(zero, 0.0, x * jax.lax.rsqrt(jnp.where(zero, 1.0, square)))


@composition
def finished(score: AnyScore, last: Partial) -> Separated:
    """Apply a function to the logits last."""
    parts = separate(score)
    return parts._replace(finish=_after(parts.finish, last))


@composition
def mapped(score: AnyScore, query_map: Partial, key_map: Partial) -> Separated:
    """Apply functions to the rows of query and key first."""
    parts = separate(score)
    return parts._replace(
        query_map=_after(query_map, parts.query_map), key_map=_after(key_map, parts.key_map)
    )


def _after(first: Partial, then: Partial) -> Partial:
    if first == identity:
        return then
    return first if then == identity else bind(_chain, first=first, then=then)


def _chain(x: Array, first: Partial, then: Partial) -> Array:
    return then(first(x))


def _multiply(logits: Array, scale: Any) -> Array:
    return logits * jnp.asarray(scale, logits.dtype)


def _soft_cap(logits: Array, cap: Any) -> Array:
    cap = jnp.asarray(cap, logits.dtype)
    return cap * jnp.tanh(logits / cap)


def project_rows(
    x: Array, weight: Array, bias: Any = None, multiply: Callable[..., Array] = jnp.matmul
) -> Array:
    """Return x W + b; `multiply` computes the product."""
    projection = multiply(x, weight)
    return projection if bias is None else projection + bias[None, :]
