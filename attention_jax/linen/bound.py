"""A score, bias or normalizer together with the parameters that it learns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attention_jax.base import checks
from attention_jax.base.binding import as_pytree
from attention_jax.base.parameters import (
    Initializer,
    bind_parameters,
    flat_names,
    parameters_of,
    with_initializers,
)


class Bound(nn.Module):
    """Creates the parameters that a function declares; called, it returns the bound function.

    The twin of `attention_jax.nnx.Bound`, where its fields are described.

    >>> from attention_jax import scores
    >>> module = Bound(scores.bilinear, query_depth=4, key_depth=6)
    >>> score, variables = module.init_with_output(jax.random.key(0))
    >>> score(jnp.ones((1, 4)), jnp.ones((2, 6))).shape
    (1, 2)
    """

    function: Any
    _: dataclasses.KW_ONLY
    query_depth: int | None = None
    key_depth: int | None = None
    attention_size: int | Sequence[int] | None = None
    num_heads: int | None = None
    initializers: Mapping[str, Initializer] | None = None
    param_dtype: Any = jnp.float32

    def __call__(self) -> Any:
        """Return the function with its parameters bound, a pytree."""
        return as_pytree(self.resolve())

    @nn.compact
    def resolve(self) -> Any:
        """Return the function with its parameters bound; the function itself if it has none."""
        depths = {"query_depth": self.query_depth, "key_depth": self.key_depth}
        checks.sizes("Bound", **depths, num_heads=self.num_heads)
        declared = parameters_of(
            self.function, self.query_depth, self.key_depth, self.attention_size
        )
        flat = with_initializers(flat_names(declared), self.initializers)
        values = [
            self.param(name, parameter.create, self.param_dtype, self.num_heads)
            for name, parameter in flat.items()
        ]
        tree = jax.tree.unflatten(jax.tree.structure(declared), values)
        return bind_parameters(self.function, tree, self.num_heads is not None)
