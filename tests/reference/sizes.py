"""The toy sizes of the comparisons, and the parts that several recipes use."""

import functools

import jax.numpy as jnp
from flax import nnx

from attention_jax import positions
from attention_jax.nnx import FeedForward

WORDS, D, N, K, LAYERS = 37, 16, 4, 2, 2
SIZES = {"num_heads": N, "num_layers": LAYERS, "param_dtype": jnp.float64}

layer_norm = functools.partial(nnx.LayerNorm, use_fast_variance=False)
rms_norm = functools.partial(nnx.RMSNorm, epsilon=1e-5)
no_bias = functools.partial(nnx.Linear, use_bias=False)
plain = functools.partial(FeedForward, use_bias=False)
gated = functools.partial(plain, gated=True)
halves = functools.partial(positions.rotary, halves=True)
