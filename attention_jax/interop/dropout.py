"""Dropout as Flax broadcasts it: the same pairs in every example and head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl

Array = jax.Array


def same_in_every_head(key: Array) -> Array:
    """Return a key from which `attend` draws the same dropout for every example and head.

    `attend` folds the number of the head into the key and draws two words. This key is its two
    words, whatever is folded in.

    >>> key = same_in_every_head(jax.random.key(0))
    >>> bool(jnp.all(jax.random.key_data(jax.random.fold_in(key, 3)) == jax.random.key_data(key)))
    True
    """
    words = jax.random.bits(key, (2,), jnp.uint32)
    return jax.random.wrap_key_data(words, impl=_CONSTANT)


_CONSTANT = define_prng_impl(
    key_shape=(2,),
    seed=lambda seed: jnp.broadcast_to(seed.astype(jnp.uint32), (2,)),
    split=lambda key, shape: jnp.broadcast_to(key, (*shape, 2)),
    random_bits=lambda key, bit_width, shape: jnp.resize(key, shape).astype(f"uint{bit_width}"),
    fold_in=lambda key, number: key,
    name="constant",
    tag="constant",
)
