"""Every Linen module has the parameters of its NNX twin, and with them gives the same results."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax import linen as attention_linen
from attention_jax import masks, normalizers, positions, scores, statistics
from attention_jax import nnx as attention_nnx
from attention_jax.base.parameters import Parameter, learned
from attention_jax.linear import feature_maps

SINK = learned(normalizers.softmax_with_sink, sink=Parameter((), jax.nn.initializers.constant(0.5)))


def distance(q_idx, kv_idx, slope):
    return -slope * jnp.abs(q_idx - kv_idx).astype(slope.dtype)


DISTANCE = learned(distance, slope=Parameter((), jax.nn.initializers.constant(0.3)))

MULTI_HEAD = {
    "default": {},
    "grouped": {"num_key_heads": 2},
    "summed": {"combine": "sum", "out_features": 7},
    "depths": {"query_depth": 5, "key_depth": 3, "value_depth": 2, "score": scores.bilinear},
    "additive": {"score": scores.additive, "attention_size": 6},
    "deep concat": {"score": scores.concat, "attention_size": (6, 5), "share_score": True},
    "cosine": {"score": scores.cosine},
    "shared": {"share_query_key": True, "score": scores.key_normalized_dot},
    "raw": {"projections": False},
    "bias": {"bias": DISTANCE, "use_bias": False},
    "sink": {"normalizer": SINK},
    "contextual positions": {"normalizer": normalizers.contextual_positions},
}
LINEAR = {
    "turned": ("LinearAttention", {"position": positions.rotary, "query_depth": 4}),
    "features": ("LinearAttention", {"feature_map": feature_maps.hedgehog, "combine": "sum"}),
    "each head": (
        "LinformerAttention",
        {"length": 9, "rank": 3, "share_heads": False, "num_key_heads": 2, "use_bias": False},
    ),
}
DECODER = {
    score.__name__: score
    for score in (scores.dot, scores.bilinear, scores.additive, scores.concat, scores.cosine)
}


def inputs(length, features, seed):
    return jax.random.normal(jax.random.key(seed), (2, length, features))


def same(twin, module, *arguments, **options):
    """Compare the trees, and the results with the parameters of the NNX module."""
    tree = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    drawn = twin.init(jax.random.key(3), *arguments, **options).get("params", {})
    chex.assert_trees_all_equal_shapes_and_dtypes(drawn, tree)
    expected = module(*arguments, **options)
    result = twin.apply({"params": tree}, *arguments, **options)
    chex.assert_trees_all_equal(result, expected)
    return expected


@pytest.mark.parametrize(
    ("name", "options", "call"),
    [
        ("LongformerAttention", {}, {"global_tokens": jnp.array([0, 2])}),
        ("LongformerAttention", {"share_query_key": True}, {"global_tokens": jnp.array([1])}),
        ("MultiHeadAttention", {"score": scores.bilinear}, {"score": scores.dot}),
        ("MultiHeadAttention", {"bias": DISTANCE}, {"bias": jnp.zeros((5, 5))}),
    ],
)
def test_parameters_are_the_same_however_the_first_call_is_made(name, options, call):
    layer, x = getattr(attention_linen, name)(2, 8, **options), jnp.ones((2, 5, 8))
    plain, other = (
        jax.eval_shape(lambda key, own=own: layer.init(key, x, **own), jax.random.key(0))
        for own in ({}, call)
    )
    twin = getattr(attention_nnx, name)(2, 8, **options, rngs=nnx.Rngs(0))
    tree = nnx.to_pure_dict(nnx.state(twin, nnx.Param))
    chex.assert_trees_all_equal_shapes_and_dtypes(plain["params"], tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(other["params"], tree)


@pytest.mark.slow
@pytest.mark.parametrize("options", MULTI_HEAD.values(), ids=MULTI_HEAD)
def test_multi_head(options):
    one_width = "share_query_key" in options or "projections" in options
    options = options if one_width else {"memory_features": 8, **options}
    module = attention_nnx.MultiHeadAttention(4, 12, rngs=nnx.Rngs(0), **options)
    twin = attention_linen.MultiHeadAttention(4, 12, **options)
    x, memory = inputs(5, 12, 1), inputs(7, module.sizes.memory_features, 2)
    same(twin, module, x, memory, mask=masks.Window(2, 3), return_weights=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", LINEAR.values(), ids=LINEAR)
def test_linear_and_linformer(options):
    kind, options = options
    module = getattr(attention_nnx, kind)(4, 12, memory_features=8, rngs=nnx.Rngs(0), **options)
    twin = getattr(attention_linen, kind)(4, 12, memory_features=8, **options)
    mask = masks.Lengths(jnp.array([7, 3]))
    same(twin, module, inputs(5, 12, 1), inputs(7, 8, 2), mask=mask)


@pytest.mark.slow
@pytest.mark.parametrize("norms", [(nnx.LayerNorm, nn.LayerNorm), (nnx.RMSNorm, nn.RMSNorm)])
def test_norm_of_query_and_key(norms):
    module = attention_nnx.MultiHeadAttention(4, 12, qk_norm=norms[0], rngs=nnx.Rngs(0))
    twin = attention_linen.MultiHeadAttention(4, 12, qk_norm=norms[1])
    same(twin, module, inputs(5, 12, 1), mask=masks.Causal())


@pytest.mark.slow
@pytest.mark.parametrize("score", DECODER.values(), ids=DECODER)
def test_decoder_attention(score):
    sizes = {"memory_features": 8, "attention_size": 5}
    module = attention_nnx.DecoderAttention(score, 8, **sizes, rngs=nnx.Rngs(0))
    twin = attention_linen.DecoderAttention(score, 8, **sizes)
    state, memory = inputs(1, 8, 1)[:, 0], inputs(7, 8, 2)
    mask = masks.Lengths(jnp.array([7, 3]))
    expected = same(twin, module, state, memory, mask)
    tree = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    source = twin.apply({"params": tree}, memory, method="keys")
    again = twin.apply({"params": tree}, state, source, mask)
    chex.assert_trees_all_equal(again, expected)


@pytest.mark.slow
def test_additive_and_global_attention():
    state, memory = inputs(3, 8, 1), inputs(7, 6, 2)
    same(
        attention_linen.AdditiveAttention(8, 6, attention_size=5),
        attention_nnx.AdditiveAttention(8, 6, attention_size=5, rngs=nnx.Rngs(0)),
        state,
        memory,
    )
    for score in (scores.bilinear, scores.concat):
        same(
            attention_linen.GlobalAttention(
                score, 8, memory_features=6, out_features=4, attention_size=5
            ),
            attention_nnx.GlobalAttention(
                score, 8, memory_features=6, out_features=4, attention_size=5, rngs=nnx.Rngs(0)
            ),
            state,
            memory,
        )


@pytest.mark.slow
def test_keys_once_inside_a_linen_decoder():
    class Decoder(nn.Module):
        def setup(self):
            self.attention = attention_linen.AdditiveAttention(8, 6)

        def __call__(self, states, memory):
            source = self.attention.keys(memory)
            return jnp.stack([self.attention(s, source)[0] for s in states.swapaxes(0, 1)], axis=1)

    states, memory = inputs(3, 8, 1), inputs(7, 6, 2)
    output, variables = Decoder().init_with_output(jax.random.key(0), states, memory)
    alone = attention_linen.AdditiveAttention(8, 6)
    tree = {"params": variables["params"]["attention"]}
    chex.assert_trees_all_close(output, alone.apply(tree, states, memory)[0], atol=1e-6)


@pytest.mark.slow
def test_dropout_and_sown_weights():
    twin = attention_linen.MultiHeadAttention(4, 12, dropout_rate=0.5)
    x = inputs(5, 12, 1)
    variables = twin.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
    rngs = {"dropout": jax.random.key(2)}
    first, other = (twin.apply(variables, x, rngs={"dropout": jax.random.key(n)}) for n in (2, 3))
    np.testing.assert_array_equal(first, twin.apply(variables, x, rngs=rngs))
    assert not np.allclose(first, other)
    exact, sown = twin.apply(
        variables, x, deterministic=True, sow_weights=True, mutable=["intermediates"]
    )
    _, weights = twin.apply(variables, x, deterministic=True, return_weights=True)
    np.testing.assert_array_equal(sown["intermediates"]["attention_weights"][0], weights)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    assert not np.allclose(first, exact)
    asked = {"deterministic": True, "statistics": {"largest": statistics.largest_weight}}
    _, found = twin.apply(variables, x, **asked)
    np.testing.assert_allclose(found["largest"], weights.max(-1).swapaxes(1, 2), rtol=1e-5)
    _, sown = twin.apply(variables, x, **asked, sow_statistics=True, mutable=["intermediates"])
    (left,) = sown["intermediates"]["attention_statistics"]
    np.testing.assert_array_equal(left["largest"], found["largest"])


@pytest.mark.slow
def test_gradients_reach_the_parameters_of_the_score():
    twin = attention_linen.MultiHeadAttention(4, 12, score=scores.bilinear, bias=DISTANCE)
    x = inputs(5, 12, 1)
    variables = twin.init(jax.random.key(0), x)
    gradient = jax.grad(lambda v: jnp.sum(twin.apply(v, x) ** 2))(variables)["params"]
    assert gradient["score"]["weight"].shape == (4, 3, 3)
    assert np.all(np.abs(gradient["score"]["weight"]).max((1, 2)) > 0)
    assert np.all(np.abs(gradient["bias"]["slope"]) > 0)


def test_bad_arguments_are_explained():
    x = inputs(5, 12, 1)
    with pytest.raises(ValueError, match=r"MultiHeadAttention: in_features must be a multiple"):
        attention_linen.MultiHeadAttention(5, 12).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"last axis of query must be 16, .* shape \(2, 5, 12\)"):
        attention_linen.MultiHeadAttention(4, 16).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"the last axis of state must be 8"):
        attention_linen.AdditiveAttention(8, 12).init(jax.random.key(0), x, x)
