"""Recipes of models of images, in the lines that a user writes."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax import Parameter, bind, learned, masks, per_head, positions, scores
from attention_jax.layers import by_layer
from attention_jax.nnx import (
    FeedForward,
    MultiHeadAttention,
    PatchEncoder,
    TransformerBlock,
    TransformerStack,
)
from tests.reference.sizes import LAYERS, SIZES, D, layer_norm

ROWS, COLUMNS, SQUARE = 4, 6, 2  # of patches, and of a window
exact_gelu = functools.partial(jax.nn.gelu, approximate=False)
WINDOWS = by_layer(lambda n: masks.swin(ROWS, COLUMNS, SQUARE, shifted=n % 2 == 1))


def vit():
    return PatchEncoder(
        (8, 12),
        2,
        num_channels=3,
        num_classes=5,
        features=D,
        **SIZES,
        hidden_features=24,
        norm=functools.partial(layer_norm, epsilon=1e-12),
        rngs=nnx.Rngs(0),
    )


class LayerScale(nnx.Module):
    """A learned factor of each feature."""

    def __init__(self, features, *, param_dtype, rngs, dtype=None):
        self.scale = nnx.Param(jnp.full(features, 1e-5, param_dtype))

    def __call__(self, x):
        return x * self.scale[...]


def dinov2():
    return PatchEncoder(
        (8, 8),
        2,
        num_channels=3,
        num_classes=5,
        features=D,
        **SIZES,
        hidden_features=32,
        norm=functools.partial(layer_norm, epsilon=1e-6),
        norm_placement="both",
        branch_norm=LayerScale,
        rngs=nnx.Rngs(0),
    )


class Perceiver(nnx.Module):
    """A few latent vectors attend to inputs of any kind, and then to each other."""

    def __init__(self, num_latents, features, *, rngs):
        dtypes = {"param_dtype": jnp.float64, "rngs": rngs}
        norm = functools.partial(layer_norm, epsilon=1e-5)
        self.latents = nnx.Param(jnp.zeros((num_latents, D)))
        self.norms = nnx.List([norm(size, **dtypes) for size in (D, features, D)])
        sizes = {"memory_features": features, "query_depth": features // 2}
        self.attention = MultiHeadAttention(2, D, **sizes, **dtypes)
        own = {"hidden_features": D, "activation": exact_gelu, **dtypes}
        self.feed_forward = FeedForward(D, **own)
        blocks = (TransformerBlock(D, 4, norm=norm, **own) for _ in range(2))
        self.blocks = nnx.List(blocks)

    def __call__(self, inputs):
        x = jnp.broadcast_to(self.latents[...], (len(inputs), *self.latents.shape))
        x += self.attention(self.norms[0](x), self.norms[1](inputs))
        x += self.feed_forward(self.norms[2](x))
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return x


def perceiver():
    return Perceiver(5, 6, rngs=nnx.Rngs(0))


class QueryingTransformer(nnx.Module):
    """A few vectors attend to each other and, in every other layer, to those of an image."""

    def __init__(self, features, *, rngs):
        norm = functools.partial(layer_norm, epsilon=1e-12)
        self.norm = norm(D, param_dtype=jnp.float64, rngs=rngs)
        self.stack = TransformerStack(
            features=D,
            **SIZES,
            memory_features=by_layer(lambda n: features if n % 2 == 0 else None),
            hidden_features=24,
            activation=exact_gelu,
            norm=norm,
            norm_placement="after",
            rngs=rngs,
        )

    def __call__(self, queries, image):
        return self.stack(self.norm(queries), image)


def qformer():
    return QueryingTransformer(6, rngs=nnx.Rngs(0))


class Swin(nnx.Module):
    """Patches, and attention within windows of them that every other layer shifts."""

    def __init__(self, *, rngs, **options):
        norm = functools.partial(layer_norm, epsilon=1e-5)
        dtypes = {"param_dtype": jnp.float64, "rngs": rngs}
        self.patch = nnx.Conv(3, D, (2, 2), strides=2, padding="VALID", **dtypes)
        self.norm = norm(D, **dtypes)
        self.stack = TransformerStack(
            features=D,
            **SIZES,
            hidden_features=24,
            activation=exact_gelu,
            norm=norm,
            **options,
            rngs=rngs,
        )

    def __call__(self, images):
        x = self.patch(images)
        return self.stack(self.norm(x.reshape(len(x), -1, D)), mask=WINDOWS)


def swin():
    bias = positions.learned_grid((SQUARE, SQUARE), COLUMNS)
    return Swin(attention=functools.partial(MultiHeadAttention, bias=bias), rngs=nnx.Rngs(0))


def capped_cosine(query, key, log_scale):
    """Cosine times exp(log_scale), at most 100."""
    return scores.cosine(query, key) * jnp.exp(jnp.minimum(log_scale, jnp.log(100.0)))


class ContinuousBias(nnx.Module):
    """Cosine attention with a bias that a small network makes of the offset between patches."""

    def __init__(self, num_heads, features, *, rngs, **options):
        log_scale = Parameter((), nnx.initializers.constant(jnp.log(10.0)))
        score = learned(capped_cosine, log_scale=log_scale)
        own = {"score": score, "use_bias": {"key": False}, **options}
        self.inner = MultiHeadAttention(num_heads, features, rngs=rngs, **own)
        self.hidden = nnx.Linear(2, 512, rngs=rngs, **options)
        self.out = nnx.Linear(512, num_heads, use_bias=False, rngs=rngs, **options)

    def __call__(self, x, *, mask=None):
        offsets = 8 * jnp.arange(1 - SQUARE, SQUARE) / (SQUARE - 1)  # of query from key
        offsets = jnp.sign(offsets) * jnp.log2(abs(offsets) + 1) / 3
        grid = jnp.stack(jnp.meshgrid(offsets, offsets, indexing="ij"), axis=-1).astype(x.dtype)
        table = 16 * jax.nn.sigmoid(self.out(jax.nn.relu(self.hidden(grid))))
        table = jnp.moveaxis(jnp.flip(table, (0, 1)), -1, 0)
        bias = functools.partial(positions.grid_bias, width=COLUMNS)
        return self.inner(x, mask=mask, bias=per_head(bind(bias, table=table)))


def swin2():
    return Swin(attention=ContinuousBias, norm_placement="branch", rngs=nnx.Rngs(0))


assert LAYERS == 2  # one plain layer, one shifted
