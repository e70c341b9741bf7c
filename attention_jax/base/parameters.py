"""Declare the parameters of scores, biases and normalizers: names, shapes and initialisers.

A function with parameters carries a rule that declares them for given depths of query and key. The
Flax modules, Linen and NNX alike, create what is declared; without Flax, `initialize` does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.base import checks
from attention_jax.base.binding import bind, per_head, taken_apart
from attention_jax.base.equality import ByValue

Array = jax.Array
Initializer = Callable[..., Array]


def luong_uniform(rng: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Draw from [-0.1, 0.1] (Luong, Pham and Manning 2015, section 4.1)."""
    return jax.random.uniform(rng, shape, dtype, minval=-0.1, maxval=0.1)


@functools.cache
def initializer(family: Callable[..., Initializer], *arguments: float) -> Initializer:
    """Return family(*arguments), the same function each time, so that `Parameter`s compare equal.

    >>> from jax.nn import initializers
    >>> initializer(initializers.normal, 0.02) is initializer(initializers.normal, 0.02)
    True
    """
    return family(*arguments)


@dataclasses.dataclass(frozen=True, eq=False)
class Parameter(ByValue):
    """The declaration of a parameter: its shape for one head, and its initialiser."""

    shape: tuple[int, ...]
    initializer: Initializer

    def create(self, rng: Array, dtype: Any = jnp.float32, num_heads: int | None = None) -> Array:
        """Draw the parameter, [*shape], or one for each head, [N, *shape]."""
        if num_heads is None:
            return self.initializer(rng, self.shape, dtype)
        rngs = jax.random.split(rng, num_heads)
        return jax.vmap(lambda rng: self.initializer(rng, self.shape, dtype))(rngs)


@dataclasses.dataclass(frozen=True, eq=False)
class Learned(ByValue):
    """A function, and the parameters that a module creates for it."""

    function: Callable[..., Any]
    parameters: Mapping[str, Any]


def learned(function: Callable[..., Any], /, **parameters: Any) -> Learned:
    """Declare the parameters of a function of your own, or others than it declares itself.

    >>> from jax.nn import initializers
    >>> def weighted_dot(query, key, weight):
    ...     return (query * weight[None, :]) @ key.T
    >>> score = learned(weighted_dot, weight=Parameter((8,), initializers.ones))
    >>> parameters_of(score)["weight"].shape
    (8,)
    """
    return Learned(function, parameters)


def parameters_of(
    function: Any,
    query_depth: int | None = None,
    key_depth: int | None = None,
    attention_size: int | Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return the declared parameters of a function that are not bound, a tree of `Parameter`.

    A function of your own declares them by the rule "parameters" of the same three sizes
    (`base.rule`), or where it is used by `learned`.

    Args:
      function: a score, bias or normalizer, possibly with some parameters bound.
      query_depth: Hq.
      key_depth: Hk.
      attention_size: A, where the function has a size to choose; one for each layer of `concat`.

    Returns:
      The parameters by name; empty if there are none.

    Raises:
      ValueError: the function has parameters and a depth is missing.

    >>> from attention_jax import scores
    >>> declared = parameters_of(scores.additive, query_depth=4, key_depth=6, attention_size=8)
    >>> {name: parameter.shape for name, parameter in declared.items()}
    {'query_weight': (4, 8), 'key_weight': (6, 8), 'value': (8,), 'bias': (8,)}
    >>> list(parameters_of(bind(scores.cosine, temperature=0.5), 4, 4))
    []
    """
    if isinstance(function, Learned):
        return dict(function.parameters)
    bare, _, bound = taken_apart(function)
    declare = getattr(bare, "__parameters__", None)
    if declare is None:
        return {}
    declared = declare(query_depth, key_depth, attention_size)
    return {name: value for name, value in declared.items() if name not in bound}


def across_heads(head_map: Any, num_heads: int, depth: int | None = None) -> Any:
    """Return a map across heads with the parameters that it declares for N heads of a depth.

    It declares them by the rule "head_parameters" of both numbers, or by `learned`.

    >>> from attention_jax import head_maps
    >>> parameters_of(across_heads(head_maps.talking, num_heads=4))["weight"].shape
    (4, 4)
    """
    if isinstance(head_map, Learned):
        return head_map
    bare, _, bound = taken_apart(head_map)
    declare = getattr(bare, "__head_parameters__", None)
    if declare is None:
        return head_map
    declared = declare(num_heads, depth)
    return Learned(head_map, {name: x for name, x in declared.items() if name not in bound})


def require_depths(operation: str, **depths: int | None) -> None:
    """Require the depths that the shapes of parameters follow from.

    Raises:
      ValueError: one of them is None.
    """
    for name, depth in depths.items():
        if depth is None:
            raise ValueError(f"{operation}: its parameters need to know {name}; give a number.")


def one_size(operation: str, attention_size: Any, default: int, smallest: int = 1) -> int:
    """Return the one size that a function has to choose, or its default.

    Raises:
      ValueError: several sizes, or one that is too small.

    >>> one_size("bilinear", None, default=8)
    8
    """
    if isinstance(attention_size, Sequence):
        raise ValueError(f"{operation}: attention_size must be one number, got {attention_size}.")
    if attention_size is None:
        return default
    checks.at_least(operation, smallest, attention_size=attention_size)
    return attention_size


def bind_parameters(function: Any, values: Mapping[str, Any], heads: bool = False) -> Any:
    """Bind values to what `parameters_of` declared; with `heads`, each has a leading axis N."""
    if isinstance(function, Learned):
        function = function.function
    if not values:
        return function
    bare, _, given = taken_apart(function)
    bound = bind(bare, **{**given, **values})
    return per_head(bound) if heads else bound


def initialize(
    rng: Array, declared: Any, dtype: Any = jnp.float32, num_heads: int | None = None
) -> Any:
    """Draw every declared parameter.

    >>> from attention_jax import scores
    >>> values = initialize(jax.random.key(0), parameters_of(scores.bilinear, 4, 6))
    >>> values["weight"].shape
    (4, 6)
    """
    leaves, structure = jax.tree.flatten(declared)
    rngs = jax.random.split(rng, max(len(leaves), 1))
    return structure.unflatten(
        [leaf.create(rng, dtype, num_heads) for leaf, rng in zip(leaves, rngs, strict=False)]
    )


def flat_names(declared: Any) -> dict[str, Any]:
    """Name every leaf of a tree by its path: the second of a list `weights` is `weights_1`."""
    leaves = jax.tree_util.tree_leaves_with_path(declared)
    return {jax.tree_util.keystr(path, simple=True, separator="_"): leaf for path, leaf in leaves}


def with_initializers(
    parameters: Mapping[str, Parameter], initializers: Mapping[str, Initializer] | None
) -> dict[str, Parameter]:
    """Replace the initialisers that are given by name.

    Raises:
      ValueError: there is no parameter of that name.
    """
    initializers = initializers or {}
    for name in initializers:
        if name not in parameters:
            raise ValueError(
                f"initializers: there is no parameter {name!r}; the names are {[*parameters]}."
            )
    return {
        name: Parameter(parameter.shape, initializers.get(name, parameter.initializer))
        for name, parameter in parameters.items()
    }
