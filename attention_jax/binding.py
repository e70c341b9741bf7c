"""Binding parameters to a function, and the rules that a function carries about itself.

A bound function is a `jax.tree_util.Partial`: its parameters are pytree leaves, so it goes
through `jit`, `vmap`, `grad` and into an optimizer. Some functions carry rules beside their
formula (how a score separates into per-row and per-pair parts, how a normalizer streams);
`rule` attaches one and `ask` finds it on the function or on a bound version of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.tree_util import Partial

F = TypeVar("F", bound=Callable[..., Any])


def bind(function: Callable[..., Any], /, **parameters: Any) -> Partial:
    """Bind parameters by name; the result is a pytree whose leaves are those parameters.

    Callables among the parameters (an activation, say) are kept out of the leaves.

    >>> import jax, jax.numpy as jnp
    >>> from attention_jax import scores
    >>> score = bind(scores.bilinear, weight=jnp.eye(3))
    >>> [leaf.shape for leaf in jax.tree.leaves(score)]
    [(3, 3)]
    """
    return Partial(function, **{name: as_pytree(value) for name, value in parameters.items()})


def as_pytree(value: Any) -> Any:
    """Wrap a plain function so that it may be part of a pytree (without leaves)."""
    is_plain_function = callable(value) and jax.tree_util.all_leaves([value])
    return Partial(value) if is_plain_function and not hasattr(value, "dtype") else value


def unbound(function: Any) -> list[str]:
    """Return the names of the parameters that a function of two arguments still waits for.

    >>> from attention_jax import scores
    >>> unbound(scores.bilinear), unbound(scores.dot)
    (['weight'], [])
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())[2:]
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
    if isinstance(function, Partial):
        answer = getattr(function.func, f"__{name}__", None)
        return answer and answer(*function.args, **function.keywords)
    answer = getattr(function, f"__{name}__", None)
    return answer and answer()


@jax.tree_util.register_pytree_node_class
class PerHead:
    """Marks a bound function whose parameters carry a leading axis N, one slice per query head."""

    def __init__(self, function: Any):
        self.function = function

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        return (self.function,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any]) -> PerHead:
        return cls(*children)


def per_head(function: Any) -> PerHead:
    """Give every query head its own slice of a bound function's parameters.

    Every leaf of the bound score, bias or normalizer must have a leading axis N.

    >>> import jax.numpy as jnp
    >>> from attention_jax import scores
    >>> score = per_head(bind(scores.bilinear, weight=jnp.zeros((8, 16, 16))))  # N=8, Hq=Hk=16
    """
    return PerHead(as_pytree(function))
