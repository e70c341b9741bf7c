"""What an implementation of one head is given and returns, and which pairs dropout keeps."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp

from attention_jax.base.typing import AnyNormalizer, Bias
from attention_jax.masks import Mask
from attention_jax.scores import Separated
from attention_jax.statistics import Statistics

Array = jax.Array


SAVED = ("context", "logsumexp", "statistics")
"""Names of the results that the backward pass of one head needs, besides its operands."""


class Head(NamedTuple):
    """The operands of one head: query [T, Hq], key [S, Hk], value [S, V], and how they meet.

    `bias` is None, an array that broadcasts to [T, S] or a function of (q_idx, kv_idx);
    `dropout` is None, or the two words (uint32 [2]) and the rate that decide which pairs are kept.
    `statistics` are those that are asked for, by name, with what they hold of this head.
    """

    query: Array
    key: Array
    value: Array
    score: Separated
    mask: Mask
    bias: Bias | Array | None
    normalizer: AnyNormalizer
    dropout: tuple[Array, Array] | None
    statistics: Statistics | None = None


class Attended(NamedTuple):
    """What attention returns where more than the context is asked for; None where a part is absent.

    Attributes:
      context: [B, T, N, V].
      weights: [B, N, T, S], after dropout.
      logsumexp: log of the softmax normalizer, [B, T, N]; -inf where nothing may be attended.
      statistics: by name, of queries [B, T, N], of keys [B, S, N] and of heads [B, N], with
        further axes where a statistic has them.

    Of one head: [T, V], [T, S], [T], and statistics without B and N.
    """

    context: Array
    weights: Array | None = None
    logsumexp: Array | None = None
    statistics: dict[str, Any] | None = None


def kept(dropout: tuple[Array, Array], q_idx: Array, kv_idx: Array, dtype: Any) -> Array:
    """Return the factor of each pair: 0 where dropped, 1 / (1 - rate) where kept.

    A hash of (words, q_idx, kv_idx) alone (Threefry-2x32, Salmon et al. 2011), so the size of
    a tile does not change the answer.
    """
    words, rate = dropout
    shape = jnp.broadcast_shapes(q_idx.shape, kv_idx.shape)
    counter = jnp.stack([jnp.broadcast_to(index, shape) for index in (q_idx, kv_idx)])
    bits = jax.extend.random.threefry_2x32(words, counter.astype(jnp.uint32).ravel())
    uniform = jax.lax.shift_right_logical(bits[: counter[0].size], jnp.uint32(8)).reshape(shape)
    threshold = jnp.ceil(rate * 2**24).astype(jnp.uint32)
    scale = (1.0 / (1.0 - rate)).astype(dtype)
    return jnp.where(uniform >= threshold, scale, jnp.zeros((), dtype))
