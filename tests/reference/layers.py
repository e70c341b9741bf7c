"""Recipes of single layers of other libraries, in the lines that a user writes."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax import attend, bind, masks, per_head, scores
from attention_jax.nnx import AdditiveAttention, DecoderAttention, MultiHeadAttention
from tests.reference.sizes import SIZES, D, K, N

leaky = functools.partial(jax.nn.leaky_relu, negative_slope=0.2)
DTYPES = {"param_dtype": SIZES["param_dtype"]}


def bahdanau():
    model = AdditiveAttention(D, 24, attention_size=6, **DTYPES, rngs=nnx.Rngs(0))
    model.score.bias = nnx.Variable(model.score.bias[...])  # zeros, and not learned: no bias
    return model


def luong():
    return DecoderAttention(scores.bilinear, D, memory_features=24, **DTYPES, rngs=nnx.Rngs(0))


def multi_head(**options):
    return MultiHeadAttention(N, D, **DTYPES, **options, rngs=nnx.Rngs(0))


def grouped():
    return multi_head(num_key_heads=K, query_depth=6)


def additive_of_vectors(query, memory, value, scale):
    """Additive attention without projections: query, memory and value [B, S, D], scale [D]."""
    weight, zeros = jnp.eye(len(scale), dtype=scale.dtype), jnp.zeros_like(scale)
    weights = {"query_weight": weight, "key_weight": weight, "value": scale, "bias": zeros}
    heads = (x[:, :, None] for x in (query, memory, value))
    return attend(*heads, score=bind(scores.additive, **weights))[:, :, 0]


def gat(x, pairs, weight, of_source, of_target):
    """Nodes [S, D] attend along pairs (target, source): weight [D, N, H], vectors [N, H]."""
    nodes = jnp.einsum("sd,dnh->snh", x, weight)[None]
    ones = jnp.ones((len(of_source), 1), x.dtype)
    score = functools.partial(scores.additive, activation=None, after_sum=leaky)
    weights = {"query_weight": of_target[..., None], "key_weight": of_source[..., None]}
    score = per_head(bind(score, **weights, value=ones, bias=0 * ones))
    return attend(nodes, nodes, nodes, score=score, mask=masks.edges(pairs, len(x)))[0]


def gat2(x, pairs, of_source, of_target, vector):
    """As `gat`, the activation before the sum: weights [D, N, H], vector [N, H]."""
    nodes = jnp.repeat(x[None, :, None], len(vector), axis=2)
    weights = {"query_weight": of_target, "key_weight": of_source}
    weights = {name: jnp.moveaxis(weight, 1, 0) for name, weight in weights.items()}
    score = functools.partial(scores.additive, activation=leaky)
    score = per_head(bind(score, **weights, value=vector, bias=jnp.zeros_like(vector)))
    value = jnp.einsum("sd,dnh->snh", x, of_source)[None]
    return attend(nodes, nodes, value, score=score, mask=masks.edges(pairs, len(x)))[0]
