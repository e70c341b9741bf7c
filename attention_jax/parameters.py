"""What a score, bias or normalizer has to learn: names, shapes and the paper's initialisers.

A function with parameters carries a rule that declares them, given the depths it will meet.
The Flax modules, Linen and NNX alike, create what is declared; without Flax, `initialize` does.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from attention_jax import scores
from attention_jax.binding import bind, per_head, rule, taken_apart

Array = jax.Array
Initializer = Callable[..., Array]


def luong_uniform(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Draw from [-0.1, 0.1] (Luong, Pham and Manning 2015, section 4.1)."""
    return jax.random.uniform(key, shape, dtype, minval=-0.1, maxval=0.1)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter that is yet to be created: its shape for one head, and its initialiser."""

    shape: tuple[int, ...]
    initializer: Initializer

    def create(self, key: Array, dtype: Any = jnp.float32, num_heads: int | None = None) -> Array:
        """Draw the parameter, [*shape], or one for each head, [N, *shape]."""
        if num_heads is None:
            return self.initializer(key, self.shape, dtype)
        keys = jax.random.split(key, num_heads)
        return jax.vmap(lambda key: self.initializer(key, self.shape, dtype))(keys)


@dataclasses.dataclass(frozen=True)
class Learned:
    """A function together with the parameters that a module shall create for it."""

    function: Callable[..., Any]
    parameters: Mapping[str, Any]


def learned(function: Callable[..., Any], /, **parameters: Any) -> Learned:
    """Declare the parameters of a score, bias or normalizer of your own, or other ones than usual.

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
    """Return what a score, bias or normalizer still has to be given, as a tree of `Parameter`.

    A function of your own declares it by the rule "parameters" of the same three sizes
    (`attention_jax.binding.rule`), or at the place of use by `learned`.

    Args:
      function: the function; what is bound already is not a parameter any more.
      query_depth: Hq.
      key_depth: Hk.
      attention_size: A, where the function has a size to choose; one for each layer of `concat`.

    Returns:
      The parameters by name; empty if there are none.

    Raises:
      ValueError: the function has parameters and a depth is missing.

    >>> declared = parameters_of(scores.additive, query_depth=4, key_depth=6, attention_size=8)
    >>> {name: parameter.shape for name, parameter in declared.items()}
    {'query_weight': (4, 8), 'key_weight': (6, 8), 'value': (8,), 'bias': (8,)}
    >>> list(parameters_of(scores.bind(scores.cosine, temperature=0.5), 4, 4))
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
    key: Array, declared: Any, dtype: Any = jnp.float32, num_heads: int | None = None
) -> Any:
    """Draw every declared parameter.

    >>> values = initialize(jax.random.key(0), parameters_of(scores.bilinear, 4, 6))
    >>> values["weight"].shape
    (4, 6)
    """
    leaves, structure = jax.tree.flatten(declared)
    keys = jax.random.split(key, max(len(leaves), 1))
    return structure.unflatten(
        [leaf.create(key, dtype, num_heads) for leaf, key in zip(leaves, keys, strict=False)]
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


def _depths(operation: str, **sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is None:
            raise ValueError(f"{operation}: its parameters need to know {name}; give a number.")


@rule(scores.bilinear, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Parameter]:
    _depths("bilinear", query_depth=query_depth, key_depth=key_depth)
    return {"weight": Parameter((query_depth, key_depth), luong_uniform)}


@rule(scores.low_rank_bilinear, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Parameter]:
    """Give the logits of unit-variance rows variance one; the paper names no initialiser."""
    _depths("low_rank_bilinear", query_depth=query_depth, key_depth=key_depth)
    rank = _single("low_rank_bilinear", attention_size, min(query_depth, key_depth))
    by_depth_and_rank = initializers.normal((key_depth * rank) ** -0.5)
    return {
        "query_weight": Parameter((query_depth, rank), initializers.lecun_normal()),
        "key_weight": Parameter((key_depth, rank), by_depth_and_rank),
    }


@rule(scores.shared_projection, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Parameter]:
    _depths("shared_projection", query_depth=query_depth)
    size = _single("shared_projection", attention_size, query_depth)
    return {"weight": Parameter((query_depth, size), initializers.glorot_uniform())}


@rule(scores.additive, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Parameter]:
    """Bahdanau, Cho and Bengio 2015, appendix B.1: W of variance 0.001^2, v and b zero."""
    _depths("additive", query_depth=query_depth, key_depth=key_depth)
    size = _single("additive", attention_size, query_depth)
    return {
        "query_weight": Parameter((query_depth, size), initializers.normal(0.001)),
        "key_weight": Parameter((key_depth, size), initializers.normal(0.001)),
        "value": Parameter((size,), initializers.zeros),
        "bias": Parameter((size,), initializers.zeros),
    }


@rule(scores.concat, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Any]:
    _depths("concat", query_depth=query_depth, key_depth=key_depth)
    layers = attention_size if isinstance(attention_size, Sequence) else [attention_size]
    sizes = [query_depth + key_depth, *(size or query_depth for size in layers)]
    shapes = list(itertools.pairwise(sizes))
    return {
        "weights": [Parameter(shape, luong_uniform) for shape in shapes],
        "biases": [Parameter((size,), initializers.zeros) for size in sizes[1:]],
        "value": Parameter((sizes[-1],), luong_uniform),
    }


@rule(scores.normalized_additive, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Parameter]:
    """Raffel et al. 2017, section 2.4: the gain starts at 1 / sqrt(A); under softmax r is idle."""
    _depths("normalized_additive", query_depth=query_depth, key_depth=key_depth)
    size = _single("normalized_additive", attention_size, query_depth)
    return {
        "query_weight": Parameter((query_depth, size), initializers.lecun_normal()),
        "key_weight": Parameter((key_depth, size), initializers.lecun_normal()),
        "value": Parameter((size,), initializers.normal(1.0)),
        "bias": Parameter((size,), initializers.zeros),
        "gain": Parameter((), initializers.constant(size**-0.5)),
        "offset": Parameter((), initializers.zeros),
    }


@rule(scores.trilinear, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Parameter]:
    """Give the logits of unit-variance rows variance one; the paper names no initialiser."""
    _depths("trilinear", query_depth=query_depth)
    draw = initializers.normal((3 * query_depth) ** -0.5)
    names = ("query_weight", "key_weight", "product_weight")
    return {name: Parameter((query_depth,), draw) for name in names}


@rule(scores.gaussian, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Parameter]:
    """Give q . k the factor 1 / sqrt(H) that it has in the scaled dot product."""
    _depths("gaussian", query_depth=query_depth)
    return {"width": Parameter((), initializers.constant(query_depth**0.25))}


@rule(scores.location, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Parameter]:
    """Take `attention_size` as the number of positions that keys may have."""
    _depths("location", query_depth=query_depth, attention_size=attention_size)
    length = _single("location", attention_size, query_depth)
    return {"weight": Parameter((query_depth, length), luong_uniform)}


@rule(scores.cosine, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Parameter]:
    """Liu et al. 2022 (Swin v2), section 3.3: a learned scalar; theirs starts at 0.1."""
    return {"temperature": Parameter((), initializers.constant(0.1))}


def _single(operation: str, size: Any, default: int) -> int:
    if isinstance(size, Sequence):
        raise ValueError(f"{operation}: attention_size must be one number, got {size}.")
    return default if size is None else size
