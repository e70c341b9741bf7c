"""The base of every multi-head layer: projections to heads and back, and dropout of weights."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from attention_jax.layers.heads import (
    HeadOptions,
    HeadsMethods,
    Projections,
    cache_dtype,
    head_sizes,
    linear_shapes,
)
from attention_jax.nnx.bound import held

Array = jax.Array


class MultiHeadLayer(HeadsMethods, nnx.Module):
    """A layer that cuts features into heads and joins the heads' contexts.

    Args:
      num_heads: N.
      in_features: D of the queries' input.
      rngs: the stream `params` draws the parameters.
      **options: of `attention_jax.layers.HeadOptions`.

    Raises:
      ValueError: heads that do not divide, a size below 1, or options that exclude each other.
    """

    def __init__(self, num_heads: int, in_features: int, *, rngs: nnx.Rngs, **options: Any):
        given = HeadOptions(num_heads, in_features, **options)
        self.sizes = sizes = head_sizes(type(self).__name__, given)
        self.position = held(given.position)
        self.combine = given.combine
        self.share_query_key = given.share_query_key
        self.cache_dtype = cache_dtype(given.dtype, given.param_dtype)

        dtypes: dict[str, Any] = {"dtype": given.dtype, "param_dtype": given.param_dtype}
        self.query = self.key = self.value = self.out = nnx.data(None)
        for name, shape in linear_shapes(given, sizes).items():
            projection = nnx.LinearGeneral(
                shape.inputs,
                shape.outputs,
                axis=shape.axis,
                use_bias=shape.use_bias,
                kernel_init=given.kernel_init,
                bias_init=given.bias_init,
                **dtypes,
                rngs=rngs,
            )
            setattr(self, name, projection)
        self.query_ln = self.key_ln = nnx.data(None)
        if given.qk_norm:
            joined = (sizes.num_heads, sizes.num_key_heads) if given.joint_qk_norm else (1, 1)
            self.query_ln = given.qk_norm(joined[0] * sizes.query_depth, **dtypes, rngs=rngs)
            self.key_ln = given.qk_norm(joined[1] * sizes.key_depth, **dtypes, rngs=rngs)
        self.context_ln = nnx.data(None)
        if given.context_norm:
            self.context_ln = given.context_norm(sizes.value_depth, **dtypes, rngs=rngs)
        self.context_scale = given.context_scale
        self.joint_qk_norm = given.joint_qk_norm

    def _projections(self) -> Projections:
        """Return the projections with this module's parameters."""
        return Projections(
            name=type(self).__name__,
            sizes=self.sizes,
            query=self.query,
            key=self.query if self.share_query_key else self.key,
            value=self.value,
            out=self.out,
            query_ln=self.query_ln,
            key_ln=self.key_ln,
            position=self.position,
            combine=self.combine,
            dtype=self.cache_dtype,
            context_ln=self.context_ln,
            context_scale=self.context_scale,
            joint_qk_norm=self.joint_qk_norm,
        )


def dropout_options(module: Any, deterministic: bool | None, rngs: Any) -> dict[str, Any]:
    """Return the arguments of `attend` for a module's dropout: none where it drops nothing."""
    deterministic = module.deterministic if deterministic is None else deterministic
    if deterministic or not module.dropout_rate:
        return {}
    rngs = module.rngs if rngs is None else rngs
    stream = rngs.dropout if isinstance(rngs, nnx.Rngs) else rngs
    return {"dropout_rate": module.dropout_rate, "dropout_key": stream()}
