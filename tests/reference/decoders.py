"""Recipes of models that write: published decoders in the lines that a user writes."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax import attend, cache, masks, normalizers, positions, scores
from attention_jax.layers import apply_position, by_layer
from attention_jax.nnx import CausalDecoder, EncoderDecoder, MultiHeadAttention
from tests.reference.sizes import (
    LAYERS,
    SIZES,
    WORDS,
    D,
    K,
    gated,
    halves,
    layer_norm,
    no_bias,
    plain,
    rms_norm,
)

LOCAL = masks.Window(3, 0)  # 4 tokens, the query among them
EVERY_OTHER = by_layer(lambda n: LOCAL if n % 2 == 0 else None)


def gpt2():
    norm = functools.partial(layer_norm, epsilon=1e-5)
    return CausalDecoder(WORDS, D, **SIZES, max_length=64, norm=norm, rngs=nnx.Rngs(0))


def llama(attention=MultiHeadAttention, **options):
    own = {"num_key_heads": K, "use_bias": False, "position": halves, **options}
    return CausalDecoder(
        WORDS,
        D,
        **SIZES,
        attention=functools.partial(attention, **own),
        feed_forward=gated,
        hidden_features=24,
        activation=jax.nn.silu,
        norm=rms_norm,
        head=no_bias,
        rngs=nnx.Rngs(0),
    )


def qwen3():
    return llama(query_depth=6, qk_norm=rms_norm)


def gemma2():
    score = scores.soft_capped(scores.scaled(scores.dot, 5**-0.5), 50.0)
    own = {"num_key_heads": K, "query_depth": 6, "use_bias": False, "position": halves}
    return CausalDecoder(
        WORDS,
        D,
        **SIZES,
        attention=functools.partial(MultiHeadAttention, score=score, **own),
        feed_forward=gated,
        hidden_features=24,
        activation=jax.nn.gelu,
        norm=rms_norm,
        norm_placement="both",
        embedding_options={"scale": D**0.5},
        logit_cap=30.0,
        rngs=nnx.Rngs(0),
    )


class Experts(nnx.Module):
    """The best of several gated layers for each token, weighted by a softmax."""

    def __init__(self, features, *, hidden_features, activation, param_dtype, rngs, dtype):
        experts = (4, features, 2 * hidden_features), (4, hidden_features, features)
        draw = functools.partial(nnx.initializers.normal(0.02), dtype=param_dtype)
        self.router = nnx.Linear(features, 4, param_dtype=param_dtype, rngs=rngs)
        self.hidden, self.out = (nnx.Param(draw(rngs.params(), shape)) for shape in experts)
        self.hidden_bias, self.out_bias = (
            nnx.Param(draw(rngs.params(), (4, shape[2]))) for shape in experts
        )

    def __call__(self, x):
        best, chosen = jax.lax.top_k(self.router(x), 2)
        hidden = jnp.einsum("btd,edh->bteh", x, self.hidden[...]) + self.hidden_bias[...]
        gate, hidden = jnp.minimum(hidden[..., ::2], 7.0), jnp.clip(hidden[..., 1::2], -7.0, 7.0)
        hidden = (hidden + 1) * gate * jax.nn.sigmoid(1.702 * gate)
        out = jnp.einsum("bteh,ehd->bted", hidden, self.out[...]) + self.out_bias[...]
        chosen = jnp.take_along_axis(out, chosen[..., None], axis=2)
        return jnp.sum(jax.nn.softmax(best)[..., None] * chosen, axis=2)


def gpt_oss():
    frequencies = positions.yarn_frequencies(12, 150_000.0, 32.0, length=4096, rounded=False)
    turned = functools.partial(halves, frequencies=frequencies, gain=positions.yarn_gain(32.0))
    return CausalDecoder(
        WORDS,
        D,
        **SIZES,
        attention=functools.partial(
            MultiHeadAttention,
            num_key_heads=K,
            query_depth=12,
            normalizer=normalizers.softmax_with_sink,
            position=turned,
        ),
        feed_forward=Experts,
        hidden_features=24,
        norm=rms_norm,
        head=no_bias,
        rngs=nnx.Rngs(0),
    )


class LatentAttention(nnx.Module):
    """Keys and values of all heads from one short vector a token, which is all that is cached."""

    def __init__(self, num_heads, features, *, rank, depth, turned, rngs, **options):
        linear = functools.partial(nnx.LinearGeneral, use_bias=False, rngs=rngs, **options)
        norm = functools.partial(nnx.RMSNorm, rngs=rngs, **options)
        self.query_down, self.query_norm = linear(features, rank), norm(rank)
        self.query_up = linear(rank, (num_heads, depth + turned))
        self.down, self.norm = linear(features, rank + turned), norm(rank)
        self.key_up = linear(rank, (num_heads, depth))
        self.value_up = linear(rank, (num_heads, depth))
        self.out = linear((num_heads, depth), features, axis=(-2, -1))
        self.rank, self.depth = rank, depth
        self.score = nnx.data(scores.scaled(scores.dot, (depth + turned) ** -0.5))

    def queries(self, x, at):
        query = self.query_up(self.query_norm(self.query_down(x)))
        still, turned = jnp.split(query, [self.depth], axis=-1)
        still = jnp.einsum("btnh,rnh->btnr", still, self.key_up.kernel[...])
        return jnp.concatenate([still, apply_position(positions.rotary, turned, at)], axis=-1)

    def latents(self, x, at):
        latent, turned = jnp.split(self.down(x)[:, :, None], [self.rank], axis=-1)
        turned = apply_position(positions.rotary, turned, at)
        return jnp.concatenate([self.norm(latent), turned], axis=-1)

    def join(self, context):
        return self.out(jnp.einsum("btnr,rnh->btnh", context, self.value_up.kernel[...]))

    def __call__(self, x, *, mask=None, positions=None):
        query, latent = self.queries(x, positions), self.latents(x, positions)
        value = latent[..., : self.rank]
        return self.join(attend(query, latent, value, score=self.score, mask=mask))

    def init_cache(self, batch, capacity, **options):
        width, dtype = self.down.kernel.shape[1], self.down.kernel.dtype
        return cache.init(batch, capacity, 1, width, 0, **{"dtype": dtype, **options})

    def decode(self, x, kept, *, mask=None, causal=True, count=None):
        at = cache.next_positions(kept, x.shape[1])
        query, latent = self.queries(x, at), self.latents(x, at)
        kept, view = cache.extend(kept, latent, latent[..., :0], count)
        view = view._replace(value=view.key[..., : self.rank])
        options = {"score": self.score, "mask": mask, "causal": causal}
        return self.join(cache.attend_cached(query, view, **options)), kept


def deepseek():
    return CausalDecoder(
        WORDS,
        D,
        **SIZES,
        attention=functools.partial(LatentAttention, rank=6, depth=3, turned=4),
        feed_forward=gated,
        hidden_features=24,
        activation=jax.nn.silu,
        norm=rms_norm,
        head=no_bias,
        rngs=nnx.Rngs(0),
    )


class Differential(nnx.Module):
    """The difference of two attentions with the same values: half of the heads from the others."""

    def __init__(self, num_heads, features, *, start, rngs, **options):
        self.inner = MultiHeadAttention(num_heads, features, rngs=rngs, **options)
        shape, dtype = (4, self.inner.sizes.query_depth), options["param_dtype"]
        self.rates = nnx.Param(nnx.initializers.normal(0.1)(rngs.params(), shape, dtype))
        self.start = start

    def values(self, value):
        return jnp.tile(jnp.concatenate(jnp.split(value, 2, axis=2), axis=3), (1, 1, 2, 1))

    def join(self, context):
        first, second, third, fourth = self.rates[...]
        rate = jnp.exp(first @ second) - jnp.exp(third @ fourth) + self.start
        kept, removed = jnp.split(context, 2, axis=2)
        x = kept - rate * removed
        x *= (1 - self.start) * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)
        return self.inner.join(x.reshape(*context.shape[:3], -1))

    def __call__(self, x, *, mask=None, positions=None):
        query, key, value = self.inner.heads(x, positions=positions)
        return self.join(attend(query, key, self.values(value), mask=mask))

    def init_cache(self, *sizes, **options):
        return self.inner.init_cache(*sizes, **options)

    def decode(self, x, kept, *, mask=None, causal=True, count=None):
        query, *heads = self.inner.heads(x, positions=cache.next_positions(kept, x.shape[1]))
        kept, view = cache.extend(kept, *heads, count)
        view = view._replace(value=self.values(view.value))
        return self.join(cache.attend_cached(query, view, mask=mask, causal=causal)), kept


def diffllama():
    starts = [0.8 - 0.6 * math.exp(-0.3 * n) for n in range(LAYERS)]
    own = {"num_key_heads": K, "use_bias": False, "position": halves}
    return CausalDecoder(
        WORDS,
        D,
        **SIZES,
        attention=[functools.partial(Differential, start=start, **own) for start in starts],
        feed_forward=gated,
        hidden_features=24,
        activation=jax.nn.silu,
        norm=rms_norm,
        head=no_bias,
        rngs=nnx.Rngs(0),
    )


def t5():
    own = {"query_depth": 6, "use_bias": False, "score": scores.dot}
    attention = functools.partial(MultiHeadAttention, **own)
    relative = functools.partial(positions.learned_buckets, 8, 12)
    return EncoderDecoder(
        WORDS,
        WORDS,
        features=D,
        **SIZES,
        position=None,
        attention=attention,
        cross_attention=attention,
        feed_forward=plain,
        hidden_features=24,
        norm=functools.partial(nnx.RMSNorm, epsilon=1e-6),
        norm_placement="before",
        share_tokens=True,
        embedding_options={"scale": 1.0},
        encoder_options={"shared_bias": relative()},
        decoder_options={"shared_bias": relative(bidirectional=False)},
        rngs=nnx.Rngs(0),
    )
