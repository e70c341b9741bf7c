"""The layers of linear attention and Linformer: what they learn, decode and refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax import bind, feature_maps, linformer, masks, performer
from attention_jax.linear import linear_attention
from attention_jax.linformer import linformer_attention
from attention_jax.nnx import LinearAttention, LinformerAttention, MultiHeadAttention


def inputs(length=5, features=12, seed=1):
    return jax.random.normal(jax.random.key(seed), (2, length, features))


def parameters(module):
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def shapes(module):
    return jax.tree.map(jnp.shape, parameters(module))


def favor(depth, num_features=8):
    projection = performer.random_features(jax.random.key(5), num_features, depth)
    return bind(performer.positive, projection=projection)


def heads(module, x):
    return module.query(x), module.key(x), module.value(x)


def test_the_parameters_are_those_of_multi_head_attention():
    ours = LinearAttention(4, 12, 10, 7, num_key_heads=2, rngs=nnx.Rngs(0))
    theirs = MultiHeadAttention(4, 12, 10, 7, num_key_heads=2, rngs=nnx.Rngs(0))
    assert shapes(ours) == shapes(theirs)
    assert jax.eval_shape(lambda x, y: ours(x, y), inputs(), inputs(9, 10)).shape == (2, 5, 7)


@pytest.mark.parametrize("name", ["favor", "hedgehog"])
def test_linear_attention_is_the_function_between_projections(name):
    feature_map = favor(4) if name == "favor" else feature_maps.hedgehog
    module = LinearAttention(
        4, 12, num_key_heads=2, depth=4, value_depth=5, feature_map=feature_map, rngs=nnx.Rngs(0)
    )
    if name == "hedgehog":
        assert shapes(module)["feature_map"] == {"weight": (2, 4, 4), "bias": (2, 4)}
        bound = bind(feature_maps.hedgehog, weight=jnp.eye(4), bias=jnp.zeros(4))
    else:
        assert set(shapes(module)) == {"query", "key", "value", "out"}, "nothing else is learned"
        bound = feature_map
    x, mask = inputs(), masks.Causal() & masks.Lengths(jnp.array([5, 3]))
    context = linear_attention(*heads(module, x), feature_map=bound, mask=mask)
    output = nnx.jit(lambda module: module(x, mask=mask))(module)
    np.testing.assert_allclose(output, module.out(context), atol=1e-5)


@pytest.mark.parametrize("name", ["elu", "favor"])
def test_decoding_is_the_causal_pass(name):
    options = {"feature_map": favor(3)} if name == "favor" else {"chunk_size": 2}
    module = LinearAttention(4, 12, rngs=nnx.Rngs(0), **options)
    x = inputs(7)
    full = nnx.jit(lambda module: module(x, mask=masks.Causal()))(module)
    decode = nnx.jit(lambda module, x, state, count: module.decode(x, state, count=count))
    state, outputs = module.init_state(2), []
    for part in (x[:, :4], x[:, 4:5], x[:, 5:6], x[:, 6:]):
        output, state = decode(module, part, state, jnp.full(2, part.shape[1]))
        outputs.append(output)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), full, atol=1e-5)
    prompt, state = decode(module, x[:, :4], module.init_state(2), jnp.array([4, 2]))
    np.testing.assert_allclose(prompt[1, :2], full[1, :2], atol=1e-5)
    following, _ = decode(module, x[:, 4:5], state, jnp.ones(2, int))
    np.testing.assert_allclose(following[0, 0], full[0, 4], atol=1e-5)


def test_random_features_get_no_gradient_and_hedgehog_does():
    x = inputs()
    module = LinearAttention(4, 12, feature_map=feature_maps.hedgehog, rngs=nnx.Rngs(0))
    gradient = nnx.jit(nnx.grad(lambda module: jnp.sum(module(x, mask=masks.Causal()) ** 2)))(
        module
    )
    assert np.all(np.abs(gradient["feature_map"]["weight"][...]).max((1, 2)) > 1e-6)
    fixed = LinearAttention(4, 12, feature_map=favor(3), rngs=nnx.Rngs(0))
    assert "feature_map" not in parameters(fixed)


@pytest.mark.parametrize(
    ("options", "learned"),
    [
        ({}, {"key_projection": (3, 9), "value_projection": (3, 9)}),
        ({"share_key_value": True}, {"key_projection": (3, 9)}),
        (
            {"share_heads": False, "num_key_heads": 2},
            {"key_projection": (2, 3, 9), "value_projection": (2, 3, 9)},
        ),
        ({"fixed": linformer.mean_pooling(3, 9)}, {}),
    ],
    ids=["shared by heads", "shared by keys and values", "each head", "fixed"],
)
def test_linformer_is_the_function_between_projections(options, learned):
    module = LinformerAttention(4, 12, length=9, rank=3, rngs=nnx.Rngs(0), **options)
    found = {name: shape for name, shape in shapes(module).items() if name.endswith("projection")}
    assert found == learned
    x, mask = inputs(7), masks.Lengths(jnp.array([7, 4]))
    values = parameters(module)
    fixed = options.get("fixed")
    projections = values.get("key_projection", fixed), values.get("value_projection")
    context = linformer_attention(*heads(module, x), *projections, mask=mask)
    np.testing.assert_allclose(module(x, mask=mask), module.out(context), atol=1e-5)


def test_learned_projections_keep_the_size_of_keys():
    module = LinformerAttention(1, 8, length=400, rank=100, rngs=nnx.Rngs(0))
    projection = module.key_projection[...]
    np.testing.assert_allclose(np.std(projection), 500**-0.5, rtol=0.02)
    assert not np.allclose(projection, module.value_projection[...])


def test_what_cannot_be_is_refused_by_name():
    x = inputs()
    linear = LinearAttention(4, 12, rngs=nnx.Rngs(0))
    low_rank = LinformerAttention(4, 12, length=9, rank=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="linear_attention: the mask Window cannot be honoured"):
        linear(x, mask=masks.Window(2, 0))
    with pytest.raises(ValueError, match="linformer_attention: the mask Causal cannot be honoured"):
        low_rank(x, mask=masks.Causal())
    with pytest.raises(ValueError, match="LinearAttention: the last axis of query must be 12"):
        linear(inputs(5, 11))
    with pytest.raises(ValueError, match="serves up to 9 keys, its last axis, got S = 10"):
        low_rank(inputs(10))
    with pytest.raises(ValueError, match="LinformerAttention: rank must be 1 or more and at most"):
        LinformerAttention(4, 12, length=9, rank=10, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"fixed must have the shape \(3, 9\) .* got \(9, 3\)"):
        LinformerAttention(4, 12, 9, 3, fixed=jnp.ones((9, 3)), rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match="LinearAttention: num_heads must be a multiple of num_key"
    ):
        LinearAttention(4, 12, num_key_heads=3, rngs=nnx.Rngs(0))
