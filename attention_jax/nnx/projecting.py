"""What every multi-head layer has: projections to heads and back, and dropout of its weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers as standard

from attention_jax.base.parameters import Initializer
from attention_jax.layers.heads import HeadSizes, Projections, check_combine, kept_dtype

Array = jax.Array


class Projecting(nnx.Module):
    """A layer that cuts features into heads and joins the heads' contexts.

    Args:
      num_heads: N.
      in_features: D of the queries' input.
      memory_features: D of the input of keys and values; `in_features` unless given.
      out_features: of the result; `in_features` unless given.
      num_key_heads: K, a divisor of N (grouped-query; 1 is multi-query); N unless given.
      query_depth: Hq; in_features / N unless given.
      key_depth: Hk; Hq unless given.
      value_depth: V; Hq unless given.
      position: `position(x [T, H], positions [T])` applied to queries and keys (rotary).
      qk_norm: `nnx.RMSNorm` or `nnx.LayerNorm`, applied to the depth of queries and of keys.
      share_query_key: one projection for query and key.
      projections: False attends to the input as it is, cut into heads.
      combine: "concat" or "sum" of the heads.
      use_bias: of the four projections.
      kernel_init: of the four projections.
      bias_init: of the four projections.
      dtype: of the computation; that of inputs and parameters unless given.
      param_dtype: of the parameters.
      rngs: the stream `params` draws the parameters.

    Raises:
      ValueError: heads that do not divide, or options that exclude each other.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        memory_features: int | None = None,
        out_features: int | None = None,
        *,
        num_key_heads: int | None = None,
        query_depth: int | None = None,
        key_depth: int | None = None,
        value_depth: int | None = None,
        position: Callable[[Array, Array], Array] | None = None,
        qk_norm: Callable[..., Any] | None = None,
        share_query_key: bool = False,
        projections: bool = True,
        combine: str = "concat",
        use_bias: bool = True,
        kernel_init: Initializer = standard.glorot_uniform(),  # noqa: B008
        bias_init: Initializer = standard.zeros,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        name = type(self).__name__
        memory_features = in_features if memory_features is None else memory_features
        self.in_features, self.memory_features = in_features, memory_features
        self.sizes = sizes = HeadSizes.of(
            name,
            in_features,
            memory_features,
            num_heads=num_heads,
            num_key_heads=num_key_heads,
            query_depth=query_depth,
            key_depth=key_depth,
            value_depth=value_depth,
            projections=projections,
            share_query_key=share_query_key,
        )
        self.combine = check_combine(name, combine)
        self.kept_dtype = kept_dtype(dtype, param_dtype)
        self.position = position
        self.share_query_key = share_query_key

        numbers: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        inits: dict[str, Any] = {"kernel_init": kernel_init, "bias_init": bias_init}
        linear = functools.partial(nnx.LinearGeneral, use_bias=use_bias, **inits, **numbers)
        self.query = self.key = self.value = self.out = nnx.data(None)
        if projections:
            self.query = linear(in_features, (num_heads, sizes.query_depth))
            if not share_query_key:
                self.key = linear(memory_features, (sizes.num_key_heads, sizes.key_depth))
            self.value = linear(memory_features, (sizes.num_key_heads, sizes.value_depth))
            joined = (num_heads, sizes.value_depth) if combine == "concat" else sizes.value_depth
            axes = (-2, -1) if combine == "concat" else -1
            self.out = linear(joined, out_features or in_features, axis=axes)
        self.query_ln = qk_norm(sizes.query_depth, **numbers) if qk_norm else nnx.data(None)
        self.key_ln = qk_norm(sizes.key_depth, **numbers) if qk_norm else nnx.data(None)

    def _ways(self) -> Projections:
        """Return the way to heads and back with this module's parameters."""
        return Projections(
            name=type(self).__name__,
            in_features=self.in_features,
            memory_features=self.memory_features,
            sizes=self.sizes,
            query=self.query,
            key=self.query if self.share_query_key else self.key,
            value=self.value,
            out=self.out,
            query_ln=self.query_ln,
            key_ln=self.key_ln,
            position=self.position,
            combine=self.combine,
            dtype=self.kept_dtype,
        )


def dropout_of_weights(module: Any, deterministic: bool | None, rngs: Any) -> dict[str, Any]:
    """Return what `attend` is told of dropout: nothing where a module drops nothing."""
    deterministic = module.deterministic if deterministic is None else deterministic
    if deterministic or not module.dropout_rate:
        return {}
    rngs = module.rngs if rngs is None else rngs
    stream = rngs.dropout if isinstance(rngs, nnx.Rngs) else rngs
    return {"dropout_rate": module.dropout_rate, "dropout_key": stream()}
