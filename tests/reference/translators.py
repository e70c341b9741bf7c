"""Recipes of models that read one sequence and write another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax import positions
from attention_jax.nnx import EncoderDecoder, MultiHeadAttention
from tests.reference.sizes import SIZES, WORDS, D, layer_norm

norm = functools.partial(layer_norm, epsilon=1e-5)
exact_gelu = functools.partial(jax.nn.gelu, approximate=False)
waves = functools.partial(
    positions.sinusoidal,
    depth=D,
    dtype=jnp.float64,
    halves=True,
    frequencies=10_000.0 ** -np.linspace(0, 1, D // 2),
)


def translator(source=WORDS, **options):
    own = {"features": D, **SIZES, "hidden_features": 24, "norm": norm, "share_tokens": True}
    return EncoderDecoder(source, WORDS, **{**own, **options}, rngs=nnx.Rngs(0))


def bart():
    return translator(
        position=positions.learned_table(32, D),
        activation=exact_gelu,
        embedding_options={"scale": 1.0, "norm": norm},
    )


def after_padding(p):
    """Sinusoids of positions that count from 1, as 0 is that of padding."""
    return waves(p + 1)


def m2m():
    return translator(position=after_padding, norm_placement="before")


class Spectrogram(nnx.Module):
    """Two convolutions along time, the second of which halves it, and positions."""

    def __init__(self, features, *, rngs, **dtypes):
        conv = functools.partial(nnx.Conv, kernel_size=3, padding=1, rngs=rngs, **dtypes)
        self.first, self.second = conv(3, features), conv(features, features, strides=2)

    def __call__(self, sound):
        x = exact_gelu(self.second(exact_gelu(self.first(sound))))
        return x + waves(jnp.arange(x.shape[1]))


def whisper():
    attention = functools.partial(MultiHeadAttention, use_bias={"key": False})
    return translator(
        None,
        share_tokens=False,
        reader=Spectrogram,
        position=positions.learned_table(32, D),
        embedding_options={"scale": 1.0},
        attention=attention,
        cross_attention=attention,
        activation=exact_gelu,
        norm_placement="before",
    )
