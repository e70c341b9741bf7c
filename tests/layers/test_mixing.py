"""Layers in which heads are mixed, in both Flax APIs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax import ShapeError, attend, head_maps, linen, masks, statistics
from attention_jax import nnx as attention_nnx
from attention_jax.layers import differential, multi_token

KINDS = {
    "talking": lambda norm: {
        "num_heads": 2,
        "in_features": 8,
        "mix_logits": head_maps.talking,
        "mix_weights": head_maps.talking,
    },
    "differential": lambda norm: differential(2, 8, norm, num_key_heads=1, layer=2),
    "multi-token": lambda norm: multi_token(2, 8, norm, kernel=(2, 3)),
}


def x(length=5):
    return jax.random.normal(jax.random.key(0), (2, length, 8))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_twins_and_what_they_compute(kind):
    layer = attention_nnx.MultiHeadAttention(**KINDS[kind](nnx.RMSNorm), rngs=nnx.Rngs(0))
    twin = linen.MultiHeadAttention(**KINDS[kind](nn.RMSNorm))
    tree = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    tree = jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), tree
    )
    nnx.update(layer, nnx.State(tree))
    output = layer(x(), mask=masks.Causal())
    drawn = jax.eval_shape(lambda key: twin.init(key, x()), jax.random.key(0))
    assert jax.tree.map(jnp.shape, drawn["params"]) == jax.tree.map(jnp.shape, tree)
    again = twin.apply({"params": tree}, x(), mask=masks.Causal())
    np.testing.assert_allclose(again, output, atol=1e-5)

    maps = {
        name: getattr(layer, name).resolved
        for name in ("mix_logits", "mix_weights")
        if getattr(layer, name) is not None
    }
    context = attend(*layer.heads(x()), mask=masks.Causal(), **maps, implementation="tiled")
    np.testing.assert_allclose(layer.join(context), output, atol=1e-5)

    asked = {"statistics": {"entropy": statistics.entropy, "logit": statistics.head_largest_logit}}
    call = {"mask": masks.Causal(), **asked}
    _, found = layer(x(), **call)
    _, of_twin = twin.apply({"params": tree}, x(), **call)
    wanted = attend(*layer.heads(x()), **call, **maps, implementation="tiled").statistics
    for name, expected in wanted.items():
        np.testing.assert_allclose(found[name], expected, atol=1e-5)
        np.testing.assert_allclose(of_twin[name], expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["talking", "differential"])
def test_decoding_is_the_full_pass(kind):
    layer = attention_nnx.MultiHeadAttention(**KINDS[kind](nnx.RMSNorm), rngs=nnx.Rngs(0))
    whole = layer(x(), mask=masks.Causal())
    cache, parts = layer.init_cache(2, 5), []
    for part in (slice(0, 3), slice(3, 5)):
        output, cache = layer.decode(x()[:, part], cache)
        parts.append(output)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)


def test_a_new_layer_with_other_heads_than_its_map_returns_is_refused():
    options = {"mix_weights": head_maps.difference, "num_value_heads": 1}
    layer = attention_nnx.MultiHeadAttention(2, 8, **options, rngs=nnx.Rngs(0))
    with pytest.raises(ShapeError) as error:
        nnx.eval_shape(lambda: layer(x()))
    assert str(error.value) == (
        "MultiHeadAttention: the context has 1 heads, and the layer is built for 2; give "
        "num_context_heads=1."
    )


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError) as error:
        differential(3, 8)
    assert str(error.value) == (
        "differential: in_features must be a multiple of 2 heads, got in_features = 8 and 2 heads "
        "= 6."
    )
    with pytest.raises(ShapeError) as error:
        multi_token(3, 6)
    assert str(error.value) == (
        "multi_token: num_heads must be a multiple of group, got num_heads = 3 and group = 2."
    )
