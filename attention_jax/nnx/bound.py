"""A score, bias or normalizer together with the parameters that it learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.base.binding import as_pytree
from attention_jax.base.parameters import (
    Initializer,
    bind_parameters,
    flat_names,
    parameters_of,
    with_initializers,
)


class Bound(nnx.Module):
    """Creates the parameters that a function declares; called, it returns the bound function.

    A function without parameters, one that is bound already (its numbers stay as they are) and
    a Module that is itself the function stay what they are.

    Args:
      function: a score, bias or normalizer; see `attention_jax.parameters.parameters_of`.
      query_depth: Hq, where the shapes depend on it.
      key_depth: Hk, where the shapes depend on it.
      attention_size: A, where the function has a size to choose.
      num_heads: give each of N heads its own parameters; None shares one set.
      initializers: by parameter name, instead of the declared ones.
      param_dtype: of the parameters.
      rngs: the stream `params` draws them.

    Raises:
      ValueError: an initialiser for a parameter that is not there, or a missing depth.

    >>> from attention_jax import scores
    >>> score = Bound(scores.bilinear, 4, 6, rngs=nnx.Rngs(0))
    >>> score.weight.shape, score()(jnp.ones((1, 4)), jnp.ones((2, 6))).shape
    ((4, 6), (1, 2))
    """

    def __init__(
        self,
        function: Callable[..., Any] | Any,
        query_depth: int | None = None,
        key_depth: int | None = None,
        attention_size: int | Sequence[int] | None = None,
        *,
        num_heads: int | None = None,
        initializers: Mapping[str, Initializer] | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        declared = parameters_of(function, query_depth, key_depth, attention_size)
        flat = with_initializers(flat_names(declared), initializers)
        for name, parameter in flat.items():
            setattr(self, name, nnx.Param(parameter.create(rngs.params(), param_dtype, num_heads)))
        self.structure = jax.tree.structure(declared)
        self.names = tuple(flat)
        self.has_heads = num_heads is not None
        is_plain = not jax.tree.leaves(function) or jax.tree_util.all_leaves([function])
        self.function = function if is_plain else nnx.data(function)

    def _values(self) -> Any:
        """Return the values of the parameters, in the tree that was declared."""
        return self.structure.unflatten([getattr(self, name)[...] for name in self.names])

    def __call__(self) -> Any:
        """Return the function with its parameters bound, a pytree."""
        return as_pytree(self._function())

    def _function(self) -> Any:
        """Return the function as it is where it has no parameters, which `attend` may know."""
        return bind_parameters(self.function, self._values(), self.has_heads)
