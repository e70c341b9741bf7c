"""Recipes of models that read: published encoders in the lines that a user writes."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax import bind, masks, per_head, positions, scores
from attention_jax.layers import by_layer
from attention_jax.nnx import LongformerAttention, MultiHeadAttention, TokenEncoder
from attention_jax.positions import sinusoidal
from tests.reference.sizes import SIZES, WORDS, D, gated, halves, layer_norm

norm_of_bert = functools.partial(layer_norm, epsilon=1e-12)


def bert(**options):
    return TokenEncoder(
        WORDS,
        D,
        **SIZES,
        hidden_features=24,
        **{
            "norm": norm_of_bert,
            "max_length": 64,
            "embedding_options": {"num_types": 2, "norm": norm_of_bert},
            **options,
        },
        rngs=nnx.Rngs(0),
    )


def longformer():
    return bert(attention=LongformerAttention)


def mask_of_longformer(lengths, is_global):
    return masks.longformer(4, tokens=is_global) & masks.Lengths(lengths)


def mask_of_bigbird(lengths, chosen):
    """Of blocks of 2: near ones, the first, the last, and `chosen` [layers, N, blocks, 1]."""
    seen = masks.Lengths(lengths)
    near = masks.Window(1, 1) | masks.GlobalTokens(1)
    near |= masks.GlobalTokens([False] * (chosen.shape[2] - 1) + [True])
    return by_layer(lambda n: masks.Block(near | masks.Edges(chosen[None, n]), 2) & seen)


def roformer():
    attention = functools.partial(MultiHeadAttention, position=positions.rotary)
    return bert(attention=attention, max_length=None)


def albert():
    """Layers are one, and the tables smaller."""
    embedding = {"num_types": 2, "norm": norm_of_bert, "table_features": 6}
    activation = functools.partial(jax.nn.gelu, approximate=True)
    return bert(share_layers=True, activation=activation, embedding_options=embedding)


def modernbert():
    """Every other layer is local and turns faster; the first has no norm before its attention."""
    norm = functools.partial(layer_norm, epsilon=1e-5, use_bias=False)
    turned = [functools.partial(halves, base=base) for base in (160_000.0, 10_000.0)]
    return bert(
        attention=[
            functools.partial(MultiHeadAttention, use_bias=False, position=position)
            for position in turned
        ],
        feed_forward=gated,
        norm=norm,
        norm_placement=[{"attention": "none"}, "before"],
        max_length=None,
        embedding_options={"norm": norm},
    )


def mask_of_modernbert(lengths):
    seen = masks.Lengths(lengths)
    return by_layer(lambda n: seen if n % 2 == 0 else masks.Window(2, 2) & seen)


class Fourier(nnx.Module):
    """The real part of the Fourier transform along tokens and features, instead of attention."""

    def __init__(self, num_heads, features, **options):
        pass

    def __call__(self, x, *, mask=None):
        return jnp.fft.fft2(x).real


def fnet():
    embedding = {"num_types": 4, "norm": norm_of_bert, "table_features": D}
    activation = functools.partial(jax.nn.gelu, approximate=True)
    return bert(attention=Fourier, activation=activation, embedding_options=embedding)


def log_bucket(distance, half, longest):
    """Distances, beyond half of the buckets on a side in steps that grow."""
    middle = half // 2
    steps = jnp.log(jnp.maximum(abs(distance), middle) / middle) / jnp.log((longest - 1) / middle)
    far = jnp.ceil(steps * (middle - 1)) + middle
    near = abs(distance) <= middle
    return jnp.where(near, distance, (far * jnp.sign(distance)).astype(distance.dtype))


@scores.positional
def disentangled(query, key, of_queries, of_keys, *, q_idx, kv_idx):
    """What query and key say of each other, and each of the distance between them."""
    half = len(of_keys) // 2
    at = log_bucket(q_idx[:, None] - kv_idx[None, :], half, 64) + half
    at = jnp.clip(at, 0, 2 * half - 1)
    to_position = jnp.take_along_axis(query @ of_keys.T, at, axis=1)
    to_content = jnp.take_along_axis(key @ of_queries.T, at.T, axis=1).T
    return (query @ key.T + to_position + to_content) * (3 * query.shape[1]) ** -0.5


class Disentangled(nnx.Module):
    """Attention whose queries and keys of distances come from one table of all layers."""

    def __init__(self, num_heads, features, *, table, norm, rngs, **options):
        self.inner = MultiHeadAttention(num_heads, features, rngs=rngs, **options)
        self.table, self.norm = table, norm

    def __call__(self, x, *, mask=None):
        distances = self.norm(self.table.embedding[...])
        of_queries, of_keys, _ = self.inner.heads(distances[None])
        tables = {"of_queries": of_queries[0], "of_keys": of_keys[0]}
        tables = {name: jnp.swapaxes(table, 0, 1) for name, table in tables.items()}
        return self.inner(x, mask=mask, score=per_head(bind(disentangled, **tables)))


def deberta():
    options = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
    table, norm = nnx.Embed(16, D, **options), norm_of_bert(D, **options)
    attention = functools.partial(Disentangled, table=table, norm=norm)
    own = {"max_length": None, "embedding_options": {"norm": norm_of_bert}}
    return bert(attention=attention, **own)


@scores.positional
def with_distances(query, key, of_keys, content, place, *, q_idx, kv_idx):
    """(q_i + u) k_j + (q_i + v) r_(i - j), over the root of the depth."""
    at = q_idx[:, None] - kv_idx[None, :] + len(of_keys) // 2
    of_place = jnp.take_along_axis((query + place[None, :]) @ of_keys.T, at, axis=1)
    return ((query + content[None, :]) @ key.T + of_place) * query.shape[1] ** -0.5


class RelativeAttention(nnx.Module):
    """Attention of Transformer-XL and XLNet: distances as sinusoids, projected as keys are."""

    def __init__(self, num_heads, features, *, rngs, **options):
        self.inner = MultiHeadAttention(num_heads, features, use_bias=False, rngs=rngs, **options)
        shape, dtype = (num_heads, self.inner.sizes.key_depth), options["param_dtype"]
        self.of_distance = nnx.LinearGeneral(features, shape, use_bias=False, rngs=rngs, **options)
        self.content, self.place = (nnx.Param(jnp.zeros(shape, dtype)) for _ in range(2))

    def __call__(self, x, *, mask=None):
        distances = jnp.arange(-x.shape[1], x.shape[1] + 1)
        of_keys = self.of_distance(sinusoidal(distances, x.shape[2], dtype=x.dtype))
        tables = {"content": self.content[...], "place": self.place[...]}
        score = bind(with_distances, of_keys=jnp.swapaxes(of_keys, 0, 1), **tables)
        return self.inner(x, mask=mask, score=per_head(score))


def xlnet():
    return bert(attention=RelativeAttention, max_length=None, embedding_options={})
