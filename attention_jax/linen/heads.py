"""The base of every multi-head layer: projections to heads and back, and dropout of weights."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from attention_jax.layers.heads import (
    HeadOptions,
    HeadsMethods,
    LinearShape,
    Projections,
    cache_dtype,
    head_sizes,
    linear_shapes,
)


class MultiHeadLayer(nn.Module, HeadsMethods, HeadOptions):
    """A layer that cuts features into heads and joins the heads' contexts.

    The fields are those of `attention_jax.layers.HeadOptions`, where they are described.
    """

    @nn.compact
    def _projections(self) -> Projections:
        """Return the projections with this module's parameters."""
        operation = type(self).__name__
        sizes = head_sizes(operation, self)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shapes = linear_shapes(self, sizes).items()
        linear = {name: self.linear(shape, name) for name, shape in shapes}
        norm = self.qk_norm
        return Projections(
            name=operation,
            sizes=sizes,
            query=linear.get("query"),
            key=linear.get("query" if self.share_query_key else "key"),
            value=linear.get("value"),
            out=linear.get("out"),
            query_ln=norm(**dtypes, name="query_ln") if norm else None,
            key_ln=norm(**dtypes, name="key_ln") if norm else None,
            position=self.position,
            combine=self.combine,
            dtype=cache_dtype(self.dtype, self.param_dtype),
            context_ln=self.context_norm(**dtypes, name="context_ln")
            if self.context_norm
            else None,
            context_scale=self.context_scale,
            joint_qk_norm=self.joint_qk_norm,
        )

    def linear(self, shape: LinearShape, name: str) -> nn.DenseGeneral:
        """Return a projection with a name, inside of a compact method."""
        return nn.DenseGeneral(
            shape.outputs,
            axis=shape.axis,
            use_bias=shape.use_bias,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )


def dropout_options(module: Any, deterministic: bool | None) -> dict[str, Any]:
    """Return the arguments of `attend` for a module's dropout: none where it drops nothing."""
    deterministic = module.deterministic if deterministic is None else deterministic
    if deterministic or not module.dropout_rate:
        return {}
    return {"dropout_rate": module.dropout_rate, "dropout_key": module.make_rng("dropout")}
