"""What every multi-head layer has: projections to heads and back, and dropout of its weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers as standard

from attention_jax.base.parameters import Initializer
from attention_jax.layers.heads import HeadSizes, Projections, check_combine, kept_dtype

Array = jax.Array


class Projecting(nn.Module):
    """A layer that cuts features into heads and joins the heads' contexts.

    The twin of `attention_jax.nnx.projecting.Projecting`, where its fields are described;
    `qk_norm` is `nn.RMSNorm` or `nn.LayerNorm`.
    """

    num_heads: int
    in_features: int
    memory_features: int | None = None
    out_features: int | None = None
    num_key_heads: int | None = None
    query_depth: int | None = None
    key_depth: int | None = None
    value_depth: int | None = None
    position: Callable[[Array, Array], Array] | None = None
    qk_norm: Callable[..., Any] | None = None
    share_query_key: bool = False
    projections: bool = True
    combine: str = "concat"
    use_bias: bool = True
    kernel_init: Initializer = standard.glorot_uniform()
    bias_init: Initializer = standard.zeros
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def _ways(self) -> Projections:
        """Return the way to heads and back with this module's parameters."""
        name = type(self).__name__
        check_combine(name, self.combine)
        memory_features = self.memory_features or self.in_features
        sizes = HeadSizes.of(
            name,
            self.in_features,
            memory_features,
            num_heads=self.num_heads,
            num_key_heads=self.num_key_heads,
            query_depth=self.query_depth,
            key_depth=self.key_depth,
            value_depth=self.value_depth,
            projections=self.projections,
            share_query_key=self.share_query_key,
        )
        numbers = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        inits = {"kernel_init": self.kernel_init, "bias_init": self.bias_init}
        linear = functools.partial(nn.DenseGeneral, use_bias=self.use_bias, **inits, **numbers)
        query = key = value = out = query_ln = key_ln = None
        if self.projections:
            query = key = linear((self.num_heads, sizes.query_depth), name="query")
            if not self.share_query_key:
                key = linear((sizes.num_key_heads, sizes.key_depth), name="key")
            value = linear((sizes.num_key_heads, sizes.value_depth), name="value")
            axis = (-2, -1) if self.combine == "concat" else -1
            out = linear(self.out_features or self.in_features, axis=axis, name="out")
        if self.qk_norm:
            query_ln = self.qk_norm(**numbers, name="query_ln")
            key_ln = self.qk_norm(**numbers, name="key_ln")
        return Projections(
            name=name,
            in_features=self.in_features,
            memory_features=memory_features,
            sizes=sizes,
            query=query,
            key=key,
            value=value,
            out=out,
            query_ln=query_ln,
            key_ln=key_ln,
            position=self.position,
            combine=self.combine,
            dtype=kept_dtype(self.dtype, self.param_dtype),
        )


def dropout_of_weights(module: Any, deterministic: bool | None) -> dict[str, Any]:
    """Return what `attend` is told of dropout: nothing where a module drops nothing."""
    deterministic = module.deterministic if deterministic is None else deterministic
    if deterministic or not module.dropout_rate:
        return {}
    return {"dropout_rate": module.dropout_rate, "dropout_key": module.make_rng("dropout")}
