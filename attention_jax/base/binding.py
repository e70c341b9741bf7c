"""Bind parameters to functions, and attach rules to functions.

A bound function is a `jax.tree_util.Partial`: its parameters are pytree leaves, so it goes through
`jit`, `vmap`, `grad` and into an optimizer; integers, booleans and strings are static. A rule is a
further function that a function carries under a name, such as how a score separates into per-row
and pairwise parts, or how a normalizer streams. `rule` attaches one, and `ask` calls it with the
bound parameters.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from attention_jax.base.equality import ByValue
from attention_jax.base.typing import Bias

F = TypeVar("F", bound=Callable[..., Any])


class BoundFunction(ByValue, Partial):
    """A partial application whose integers, booleans and strings are no leaves.

    Two of the same function and equal parameters are equal, and hash equal.
    """


def _flatten_bound(bound: BoundFunction) -> tuple[tuple[Any, Any], Any]:
    fixed = {name: x for name, x in bound.keywords.items() if isinstance(x, int | str)}
    leaves = {name: x for name, x in bound.keywords.items() if name not in fixed}
    return (bound.args, leaves), (bound.func, tuple(sorted(fixed.items())))


def _unflatten_bound(fixed: Any, leaves: Any) -> BoundFunction:
    function, words = fixed
    return BoundFunction(function, *leaves[0], **leaves[1], **dict(words))


jax.tree_util.register_pytree_node(BoundFunction, _flatten_bound, _unflatten_bound)


def bind(function: Callable[..., Any], /, **parameters: Any) -> Partial:
    """Bind parameters by name; the result is a pytree whose leaves are those parameters.

    Callables (an activation, say), integers, booleans and strings are static, not leaves; give an
    integer as an array to make it a leaf.

    >>> import jax, jax.numpy as jnp
    >>> from attention_jax import scores
    >>> score = bind(scores.bilinear, weight=jnp.eye(3))
    >>> [leaf.shape for leaf in jax.tree.leaves(score)]
    [(3, 3)]
    """
    return BoundFunction(function, **{name: as_pytree(value) for name, value in parameters.items()})


def as_pytree(value: Any) -> Any:
    """Wrap a plain function as a pytree without leaves."""
    is_plain_function = callable(value) and jax.tree_util.all_leaves([value])
    return BoundFunction(value) if is_plain_function and not hasattr(value, "dtype") else value


def unbound(function: Any, given: int = 2) -> list[str]:
    """Return the names of the parameters without a value, the first `given` left out.

    >>> from attention_jax import scores
    >>> unbound(scores.bilinear), unbound(scores.dot)
    (['weight'], [])
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())[given:]
    except (TypeError, ValueError):  # some builtins do not tell
        return []
    variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return [x.name for x in parameters if x.default is x.empty and x.kind not in variable]


def rule(function: Callable[..., Any], name: str) -> Callable[[F], F]:
    """Attach the decorated rule to a function under a name."""

    def attach(answer: F) -> F:
        setattr(function, f"__{name}__", answer)
        return answer

    return attach


def ask(function: Any, name: str) -> Any:
    """Apply the rule `name` of a possibly bound function to its parameters; None without rule."""
    function, arguments, keywords = taken_apart(function)
    answer = getattr(function, f"__{name}__", None)
    return answer and answer(*arguments, **keywords)


def taken_apart(function: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return the function inside nested partial applications, and all arguments they give it.

    >>> import functools
    >>> function, arguments, keywords = taken_apart(functools.partial(bind(max, key=abs), 3))
    >>> function, arguments, list(keywords)
    (<built-in function max>, (3,), ['key'])
    """
    arguments, keywords = (), {}
    while hasattr(function, "func") and hasattr(function, "keywords"):
        arguments = (*function.args, *arguments)
        keywords = {**function.keywords, **keywords}
        function = function.func
    return function, arguments, keywords


@functools.partial(jax.tree_util.register_dataclass, data_fields=["function"], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True, eq=False)
class Sliced(ByValue):
    """Marks a bound function whose parameters carry leading axes, of which each head has a slice.

    Attributes:
      function: bound, with all its parameters.
      axes: the letters of these axes: N, one slice per query head; B, one per example; or BN.
    """

    function: Any
    axes: str = "N"

    @property
    def of_first(self) -> Any:
        """The function with the parameters of the first example and head."""
        return jax.tree.map(functools.partial(_first, len(self.axes)), self.function)


def _first(axes: int, leaf: Any) -> Any:
    """Return the first entry along so many leading axes; zeros where there is none."""
    is_empty = 0 in leaf.shape[:axes]
    return jnp.zeros(leaf.shape[axes:], leaf.dtype) if is_empty else leaf[(0,) * axes]


def function_of(function: Any) -> Any:
    """Return the function behind a `per_head` or `per_example` mark."""
    return function.function if isinstance(function, Sliced) else function


BiasLike = Bias | Sliced | jax.Array | None
"""What `attend` takes as a bias."""


def per_head(function: Any) -> Sliced:
    """Give every query head its own slice of a bound function's parameters.

    Every leaf of the bound score, bias or normalizer must have a leading axis N.

    Raises:
      TypeError: the function is marked already; mark it `per_head` first and then `per_example`.

    >>> import jax.numpy as jnp
    >>> from attention_jax import scores
    >>> score = per_head(bind(scores.bilinear, weight=jnp.zeros((8, 16, 16))))  # N=8, Hq=Hk=16
    """
    if isinstance(function, Sliced):
        raise TypeError(
            "per_head: the function is marked per_head or per_example already; for parameters "
            "[B, N, ...] write per_example(per_head(function))."
        )
    return Sliced(as_pytree(function))


def per_example(function: Any) -> Sliced:
    """Give every example its own slice of a bound function's parameters.

    Every leaf of the bound score, bias or normalizer must have a leading axis B; that of a function
    which is `per_head` leading axes B, N. Parameters that a network predicts for each example are
    differentiated as any others.

    Raises:
      TypeError: the function is `per_example` already.

    >>> import jax.numpy as jnp
    >>> from attention_jax import attend, positions, scores
    >>> x = jnp.ones((2, 3, 1, 4))  # B=2
    >>> score = per_example(bind(scores.cosine, temperature=jnp.array([0.5, 1.0])))
    >>> attend(x, x, x, score=score).shape
    (2, 3, 1, 4)
    """
    if isinstance(function, Sliced):
        if "B" in function.axes:
            raise TypeError("per_example: the function is marked per_example already.")
        return Sliced(function.function, "B" + function.axes)
    return Sliced(as_pytree(function), "B")
