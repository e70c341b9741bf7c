"""Layers in which heads are mixed, as options of `MultiHeadAttention` in either Flax API."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from attention_jax import head_maps
from attention_jax.base import checks
from attention_jax.base.binding import bind
from attention_jax.base.parameters import Parameter, learned
from attention_jax.head_maps.common import identity
from attention_jax.head_maps.neighbours import unit


def differential(
    num_heads: int,
    in_features: int,
    norm: Callable[..., Any] | None = None,
    *,
    layer: int = 1,
    num_key_heads: int | None = None,
) -> dict[str, Any]:
    r"""Return the options of differential attention: softmax(A_2n) - lambda softmax(A_{2n+1}).

    With lambda = exp(a . b) - exp(c . d) + initial, the vectors learned, and the context of each
    head normed and scaled by 1 - initial.

    Args:
      num_heads: N, of the context; queries have 2 N, of depth in_features / (2 N).
      in_features: D.
      norm: Flax's `RMSNorm` of either API, for the context of a head; None leaves it as it is.
      layer: the number of the layer, from 1: initial = 0.8 - 0.6 exp(-0.3 (layer - 1)).
      num_key_heads: heads of values, a divisor of N, and half those of keys; N unless given.

    Raises:
      ValueError: a number below 1.
      ShapeError: features that 2 N does not divide.

    Ye et al. 2024, "Differential Transformer", section 2.1.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from attention_jax.nnx import MultiHeadAttention
    >>> layer = MultiHeadAttention(**differential(2, 16, nnx.RMSNorm), rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 5, 16))).shape, layer.mix_weights.query_1.shape
    ((1, 5, 16), (4,))
    """
    num_value_heads = num_heads if num_key_heads is None else num_key_heads
    checks.sizes("differential", num_heads=num_heads, num_key_heads=num_key_heads, layer=layer)
    depth = checks.multiple("differential", "in_features", in_features, "2 heads", 2 * num_heads)
    initial = 0.8 - 0.6 * math.exp(-0.3 * (layer - 1))
    return {
        "num_heads": 2 * num_heads,
        "in_features": in_features,
        "num_key_heads": 2 * num_value_heads,
        "num_value_heads": num_value_heads,
        "num_context_heads": num_heads,
        "query_depth": depth,
        "value_depth": 2 * depth,
        "mix_weights": bind(head_maps.differential, initial=initial),
        "context_norm": norm,
        "context_scale": 1.0 if norm is None else 1.0 - initial,
        "use_bias": False,
    }


def multi_token(
    num_heads: int,
    in_features: int,
    norm: Callable[..., Any] | None = None,
    *,
    kernel: tuple[int, int] = (6, 11),
    group: int = 2,
) -> dict[str, Any]:
    """Return the options of multi-token attention: logits convolved, weights mixed in groups.

    Both begin as the identity, so that a new layer is plain attention.

    Args:
      num_heads: N.
      in_features: D.
      norm: Flax's `RMSNorm` or `LayerNorm` of either API, for the context of a head.
      kernel: queries and keys of the convolution of logits.
      group: heads of a group, a divisor of N.

    Raises:
      ValueError: a number below 1.
      ShapeError: heads that the size of a group does not divide.

    Golovneva et al. 2025, "Multi-token attention", sections 3.1 and 3.2.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from attention_jax.nnx import MultiHeadAttention
    >>> layer = MultiHeadAttention(**multi_token(4, 16, kernel=(2, 3)), rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 5, 16))).shape, layer.mix_logits.kernel.shape
    ((1, 5, 16), (4, 2, 3))
    """
    queries, keys = kernel
    sizes = {"num_heads": num_heads, "queries": queries, "keys": keys, "group": group}
    checks.sizes("multi_token", **sizes)
    groups = checks.multiple("multi_token", "num_heads", num_heads, "group", group)
    of_logits = Parameter((num_heads, queries, keys), unit)
    of_weights = Parameter((groups, group, group), identity)
    return {
        "num_heads": num_heads,
        "in_features": in_features,
        "mix_logits": learned(head_maps.neighbours, kernel=of_logits),
        "mix_weights": learned(head_maps.grouped, weight=of_weights),
        "context_norm": norm,
    }
