"""A score, bias or normalizer together with the parameters that it learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.base import checks
from attention_jax.base.binding import as_pytree
from attention_jax.base.parameters import (
    Initializer,
    Learned,
    bind_parameters,
    flat_names,
    parameters_of,
    with_initializers,
)


class Declaration(NamedTuple):
    """The tree of the declared parameters, the attributes that hold them, and if heads differ."""

    structure: Any
    attributes: tuple[str, ...]
    per_head: bool


class Bound(nnx.Module):
    """Creates the parameters that a function declares; called, it returns the bound function.

    A function without parameters, one that is bound already (its numbers stay as they are) and
    a Module that is itself the function stay what they are. A parameter is the attribute of its
    name; an underscore is added to a name that NNX itself uses, such as `train`.

    Args:
      function: a score, bias or normalizer; see `attention_jax.base.parameters_of`.
      query_depth: Hq, where the shapes depend on it.
      key_depth: Hk, where the shapes depend on it.
      attention_size: A, where the function has a size to choose.
      num_heads: give each of N heads its own parameters; None shares one set.
      initializers: by parameter name, instead of the declared ones.
      param_dtype: of the parameters.
      rngs: the stream `params` draws them.

    Raises:
      ValueError: an initialiser for an unknown parameter, or a missing depth.

    >>> from attention_jax import scores
    >>> score = Bound(scores.bilinear, query_depth=4, key_depth=6, rngs=nnx.Rngs(0))
    >>> score.weight.shape, score()(jnp.ones((1, 4)), jnp.ones((2, 6))).shape
    ((4, 6), (1, 2))
    """

    def __init__(
        self,
        function: Callable[..., Any] | Any,
        *,
        query_depth: int | None = None,
        key_depth: int | None = None,
        attention_size: int | Sequence[int] | None = None,
        num_heads: int | None = None,
        initializers: Mapping[str, Initializer] | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        checks.sizes("Bound", query_depth=query_depth, key_depth=key_depth, num_heads=num_heads)
        declared = parameters_of(function, query_depth, key_depth, attention_size)
        flat = with_initializers(flat_names(declared), initializers)
        self._function = held(function.function if isinstance(function, Learned) else function)
        self._declaration = Declaration(jax.tree.structure(declared), (), num_heads is not None)
        attributes = []
        for name, parameter in flat.items():
            attributes.append(self._free_attribute(name))
            value = parameter.create(rngs.params(), param_dtype, num_heads)
            setattr(self, attributes[-1], nnx.Param(value))
        self._declaration = self._declaration._replace(attributes=tuple(attributes))

    def __call__(self) -> Any:
        """Return the function with its parameters bound, a pytree."""
        return as_pytree(self.resolved)

    @property
    def resolved(self) -> Any:
        """The function with its parameters bound; the function itself if it has none.

        A property, because `nnx.tabulate` compiles every method, and `jit` returns no function.
        """
        structure, attributes, per_head = self._declaration
        values = structure.unflatten([getattr(self, name)[...] for name in attributes])
        return bind_parameters(self._function, values, per_head)

    def _free_attribute(self, name: str) -> str:
        """Return the name, with underscores if it is an attribute or set by `train` and `eval`."""
        while name in dir(self) or name in ("deterministic", "use_running_average"):
            name += "_"
        return name


def held(function: Any) -> Any:
    """Return a function as a module keeps it: its numbers as data, the rest compared by value.

    Two modules of equal arguments then have equal graphs, and `nnx.jit` traces once for both.
    """
    if isinstance(function, nnx.Module):
        return function
    if callable(function) and jax.tree_util.all_leaves([function]):
        function = as_pytree(function)
    return nnx.data(function) if jax.tree.leaves(function) else function
