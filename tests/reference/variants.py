"""Recipes of decoders that differ from Llama in their norms, residuals, positions and scales."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax import masks, positions, scores
from attention_jax.layers import by_layer
from attention_jax.nnx import CausalDecoder, MultiHeadAttention
from attention_jax.positions import rotary
from tests.reference.sizes import (
    SIZES,
    WORDS,
    D,
    K,
    N,
    gated,
    halves,
    layer_norm,
    no_bias,
    rms_norm,
)

norm_with_bias = functools.partial(layer_norm, epsilon=1e-5)
norm_without_bias = functools.partial(layer_norm, epsilon=1e-5, use_bias=False)


def decoder(attention=MultiHeadAttention, **options):
    """A decoder of gated layers, as most are; `attention` builds that of each layer."""
    own = {
        "hidden_features": 24,
        "feed_forward": gated,
        "activation": jax.nn.silu,
        "norm": rms_norm,
    }
    return CausalDecoder(
        WORDS, D, **SIZES, attention=attention, **{**own, **options}, rngs=nnx.Rngs(0)
    )


def heads(**options):
    own = {"num_key_heads": K, "use_bias": False, "position": halves, **options}
    return functools.partial(MultiHeadAttention, **own)


def gemma3():
    """Every other layer is local, and those that are not turn slower."""
    wide = functools.partial(halves, base=1e6, scale=1 / 8)
    score = scores.scaled(scores.dot, 5**-0.5)
    own = {"query_depth": 6, "qk_norm": rms_norm, "score": score}
    return decoder(
        by_layer(lambda n: heads(position=halves if n % 2 == 0 else wide, **own)),
        activation=jax.nn.gelu,
        norm_placement="both",
        embedding_options={"scale": D**0.5},
    )


def phi3(factors=(1.5, 3.0), times=16, length=4):
    """For sequences 16 times as long as the 4 tokens trained on at first."""
    frequencies = positions.longrope_frequencies(factors)
    gain = positions.longrope_gain(times, length)
    turned = functools.partial(halves, frequencies=frequencies, gain=gain)
    return decoder(heads(position=turned), head=no_bias)


def olmo2():
    attention = heads(qk_norm=rms_norm, joint_qk_norm=True)
    return decoder(attention, norm_placement="branch", head=no_bias)


def stablelm():
    turned = functools.partial(halves, rotated=2)
    attention = heads(position=turned, use_bias={"out": False})
    return decoder(attention, norm=norm_with_bias, head=no_bias)


def granite():
    """Scales of tokens, scores, residuals and logits."""
    return decoder(
        heads(score=scores.scaled(scores.dot, 0.4)),
        norm_placement="both",
        branch_norm=lambda *sizes, **options: lambda x: 0.3 * x,
        embedding_options={"scale": 5.0},
        head=no_bias,
        logit_scale=1 / 3,
    )


def cohere():
    attention = heads(position=rotary)
    own = {"parallel": True, "share_norm": True, "norm": norm_without_bias}
    return decoder(attention, **own, logit_scale=0.5)


def falcon():
    """One head of keys and values for all queries."""
    attention = heads(num_key_heads=1)
    own = {"parallel": True, "share_norm": True, "norm": norm_with_bias}
    plain = functools.partial(gated, gated=False)
    exact = functools.partial(jax.nn.gelu, approximate=False)
    return decoder(attention, feed_forward=plain, activation=exact, **own)


def neox():
    turned = functools.partial(halves, rotated=2)
    return decoder(
        heads(num_key_heads=N, position=turned, use_bias=True),
        feed_forward=None,
        activation=functools.partial(jax.nn.gelu, approximate=False),
        norm=norm_with_bias,
        parallel=True,
        head=no_bias,
    )


def gelu_of_bloom(x):
    """The approximate GELU with a constant that BLOOM's code cuts off after eight digits."""
    return 0.5 * x * (1 + jnp.tanh(0.79788456 * x * (1 + 0.044715 * x**2)))


def bloom():
    return decoder(
        feed_forward=None,
        hidden_features=4 * D,
        activation=gelu_of_bloom,
        norm=norm_with_bias,
        shared_bias=positions.alibi_bias(N),
        embedding_options={"norm": norm_with_bias},
    )


def turned_and_normed(x, positions):
    """Rotary, then a norm that learns nothing."""
    x = rotary(x, positions)
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=1, keepdims=True) + 1e-5)


@scores.positional
def tempered(query, key, *, q_idx, kv_idx):
    """Scaled dots that grow with the logarithm of the query's position."""
    chunk = ((q_idx[:, None] + 1) // 4).astype(query.dtype)
    return scores.scaled_dot(query, key) * (1 + 0.5 * jnp.log1p(chunk))


def llama4():
    """Every other layer sees chunks; the others know no positions but as a temperature."""
    local, wide = heads(position=turned_and_normed), heads(position=None, score=tempered)
    return decoder([local, wide], head=no_bias)


CHUNKS = by_layer(lambda n: masks.Chunked(4) if n % 2 == 0 else None)


def llama3():
    """For sequences 8 times as long as the 32 tokens trained on at first."""
    frequencies = positions.llama3_frequencies(4, base=500.0, factor=8.0, length=32)
    attention = heads(position=functools.partial(halves, frequencies=frequencies))
    return decoder(attention, head=no_bias)


def smollm3():
    """Every other layer knows no positions."""
    return decoder(by_layer(lambda n: heads(position=None if n % 2 else halves)))


LOCAL = by_layer(lambda n: masks.Window(3, 0) if n % 2 == 0 else None)
