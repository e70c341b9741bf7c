"""Linen Transformers against their NNX twins beyond the defaults, on the same parameters."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax import linen as attention_linen
from attention_jax import masks, positions, scores
from attention_jax import nnx as attention_nnx
from attention_jax.layers import by_layer

pytestmark = pytest.mark.slow

X = jax.random.normal(jax.random.key(1), (2, 5, 8))
MEMORY = jax.random.normal(jax.random.key(2), (2, 7, 6))
PROMPT = jnp.array([[1, 5, 2, 7], [3, 3, 0, 6]])
LENGTHS = jnp.array([4, 2])
LAYER = {"position": positions.rotary, "bias": positions.alibi_bias(2), "qk_norm": None}


def parameters(module):
    """Draw all parameters anew, far from zeros and ones."""
    keys = nnx.Rngs(1)
    state = nnx.state(module, nnx.Param)
    nnx.update(module, jax.tree.map(lambda p: 0.5 * jax.random.normal(keys(), p.shape), state))
    return {"params": nnx.to_pure_dict(nnx.state(module, nnx.Param))}


def stacks(norm="LayerNorm", **options):
    """Build a stack in both APIs; the attention has positions of its own."""
    built = []
    for api, flax, rngs in ((attention_nnx, nnx, {"rngs": nnx.Rngs(0)}), (attention_linen, nn, {})):
        attention = functools.partial(api.MultiHeadAttention, **LAYER)
        own = {"attention": attention, "norm": getattr(flax, norm), **options, **rngs}
        built.append(api.TransformerStack(2, 8, num_heads=2, **own))
    return built


@pytest.mark.parametrize(
    "options",
    [
        {"norm_placement": "after", "memory_features": 6, "remat": True},
        {"norm": "RMSNorm", "hidden_features": 3, "activation": jnp.tanh},
    ],
    ids=["last", "other"],
)
def test_stacks_and_their_weights(options):
    module, twin = stacks(**options)
    variables = parameters(module)
    inputs = (X, MEMORY) if "memory_features" in options else (X,)
    call = {"mask": masks.Causal(), "return_weights": True}
    expected = nnx.jit(lambda module, *inputs: module(*inputs, **call))(module, *inputs)
    run = functools.partial(twin.apply, **call, sow_weights=True, mutable=["intermediates"])
    result, sown = jax.jit(run)(variables, *inputs)
    chex.assert_trees_all_close(result, expected, atol=1e-5)
    for n, weights in enumerate(result[1]):
        of_block = sown["intermediates"][f"block_{n}"]
        (left,) = of_block["attention"]["attention_weights"]
        np.testing.assert_array_equal(left, weights.attention)
        if weights.cross_attention is not None:
            (left,) = of_block["cross_attention"]["attention_weights"]
            np.testing.assert_array_equal(left, weights.cross_attention)


@pytest.mark.exhaustive
def test_decoding_of_stacks():
    module, twin = stacks(memory_features=6)
    variables = parameters(module)
    options = {"mask": masks.Causal(), "memory_mask": masks.Window(1, 2)}

    def decode(stack):
        memory, caches = stack.keys(MEMORY), stack.init_cache(2, 6, ragged=True)
        first, caches = stack.decode(X[:, :3], caches, memory, **options)
        second, _ = stack.decode(X[:, 3:], caches, memory, **options)
        return jnp.concatenate([first, second], axis=1)

    result, expected = jax.jit(
        lambda variables: (
            twin.apply(variables, method=decode),
            twin.apply(variables, X, MEMORY, **options),
        )
    )(variables)
    chex.assert_trees_all_close(result, expected, atol=1e-5)
    chex.assert_trees_all_close(nnx.jit(decode)(module), expected, atol=1e-5)


@pytest.mark.exhaustive
def test_remat_gives_the_same_gradients():
    gradients = []
    for remat in (False, True):
        module, twin = stacks(remat=remat, dropout_rate=0.2)
        rngs = {"dropout": jax.random.key(3)}

        def loss(variables, twin=twin, rngs=rngs):
            return jnp.sum(twin.apply(variables, X, mask=masks.Causal(), rngs=rngs) ** 2)

        gradients.append(jax.jit(jax.grad(loss))(parameters(module)))
    chex.assert_trees_all_close(*gradients, rtol=1e-4, atol=1e-3)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients[0]))


def test_dropout():
    twin = attention_linen.TransformerBlock(8, 2, dropout_rate=0.5)
    plain = attention_linen.TransformerBlock(8, 2)
    variables = plain.init(jax.random.key(0), X)
    run = jax.jit(lambda key: twin.apply(variables, X, rngs={"dropout": key}))
    first, other, again = (run(jax.random.key(n)) for n in (2, 3, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    without = twin.apply(variables, X, deterministic=True)
    np.testing.assert_array_equal(without, plain.apply(variables, X))
    with pytest.raises(Exception, match="dropout"):
        twin.apply(variables, X)


def test_generation():
    sizes = {"num_heads": 2, "num_layers": 1, "max_length": 8}
    sizes |= {"embedding_options": {"num_types": 2}}
    module = attention_nnx.CausalDecoder(9, 8, **sizes, rngs=nnx.Rngs(0))
    twin = attention_linen.CausalDecoder(9, 8, **sizes)
    options = {"lengths": LENGTHS, "types": PROMPT % 2}
    run = nnx.jit(lambda module: module.generate(PROMPT, 4, **options))
    variables = parameters(module)
    expected = run(module)
    generate = functools.partial(twin.apply, num_steps=4, **options, method="generate")
    np.testing.assert_array_equal(jax.jit(generate)(variables, PROMPT), expected)
    assert len(np.unique(expected)) > 1

    def decode(model):
        first, caches = model.decode(PROMPT[:, :3], model.init_cache(2, 4))
        return jnp.concatenate([first, model.decode(PROMPT[:, 3:], caches)[0]], axis=1)

    decoded = jax.jit(lambda variables: twin.apply(variables, method=decode))(variables)
    full = jax.jit(twin.apply)(variables, PROMPT)
    chex.assert_trees_all_close(decoded, full, atol=1e-5)


@pytest.mark.exhaustive
def test_generation_from_a_source():
    sizes = {"features": 8, "num_heads": 2, "num_layers": 1}
    sizes |= {"embedding_options": {"num_types": 2}}
    module = attention_nnx.EncoderDecoder(9, 9, **sizes, rngs=nnx.Rngs(0))
    twin = attention_linen.EncoderDecoder(9, 9, **sizes)
    variables = parameters(module)
    begin, mask = PROMPT[:, :1], masks.Lengths(LENGTHS)
    options = {"rng": jax.random.key(0), "source_types": PROMPT % 2, "types": begin % 2}
    run = nnx.jit(lambda module: module.generate(PROMPT, begin, 4, mask, **options))
    expected = run(module)
    generate = functools.partial(twin.apply, num_steps=4, method="generate", **options)
    result = jax.jit(generate)(variables, PROMPT, begin, source_mask=mask)
    np.testing.assert_array_equal(result, expected)
    assert len(np.unique(expected)) > 1

    def decode(model):
        memory, caches = model.keys(model.encode(PROMPT, mask)), model.init_cache(2, 4)
        first, caches = model.decode(PROMPT[:, :3], caches, memory, source_mask=mask)
        second, _ = model.decode(PROMPT[:, 3:], caches, memory, source_mask=mask)
        return jnp.concatenate([first, second], axis=1)

    decoded = jax.jit(lambda variables: twin.apply(variables, method=decode))(variables)
    full = jax.jit(twin.apply)(variables, PROMPT, PROMPT, mask)
    chex.assert_trees_all_close(decoded, full, atol=1e-5)

    def last(model):
        return model.target.attend(model.write(PROMPT, PROMPT, mask)[:, 3])

    written = jax.jit(lambda variables: twin.apply(variables, method=last))(variables)
    chex.assert_trees_all_close(written, full[:, 3], atol=1e-5)


def test_bad_arguments_are_explained():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"TransformerBlock: it was built without .* memory_feat"):
        attention_linen.TransformerBlock(8, 2).init(key, X, MEMORY)
    with pytest.raises(ValueError, match=r"positions: 4 tokens .* has 3 positions"):
        attention_linen.TokenEncoder(9, 8, num_heads=2, num_layers=1, max_length=3).init(
            key, PROMPT
        )
    with pytest.raises(ValueError, match=r"patches: the width must be a multiple of"):
        attention_linen.PatchEncoder(
            (8, 6), 4, num_channels=3, num_classes=10, features=8, num_heads=2, num_layers=1
        ).init(key, jnp.zeros((1, 8, 6, 3)))


def test_models_with_every_option():
    """Each option has one name, and one meaning, in both APIs."""
    sizes = {"num_heads": 2, "num_layers": 2}

    def build(api, flax, dense, **rngs):
        gated = functools.partial(api.FeedForward, gated=True, use_bias=False)
        grouped = functools.partial(
            api.MultiHeadAttention, num_key_heads=1, use_bias={"key": False, "out": False}
        )
        return api.CausalDecoder(
            9,
            8,
            **sizes,
            max_length=6,
            embedding_options={"num_types": 2, "norm": flax.LayerNorm, "scale": 3.0},
            head=functools.partial(dense, use_bias=False),
            logit_cap=5.0,
            attention=[grouped, api.MultiHeadAttention],
            feed_forward=gated,
            hidden_features=by_layer(lambda n: 3 + n),
            norm=flax.RMSNorm,
            norm_placement="both",
            activation=jax.nn.silu,
            shared_bias=positions.learned_buckets(8, 7),
            **rngs,
        )

    module = build(attention_nnx, nnx, nnx.Linear, rngs=nnx.Rngs(0))
    twin = build(attention_linen, nn, nn.Dense)
    variables = parameters(module)
    drawn = jax.eval_shape(lambda key: twin.init(key, PROMPT), jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(drawn, variables)
    call = {"mask": [masks.Window(1, 0), None], "types": PROMPT % 2}
    expected = nnx.jit(lambda module: module(PROMPT, **call))(module)
    result = jax.jit(lambda variables: twin.apply(variables, PROMPT, **call))(variables)
    chex.assert_trees_all_close(result, expected, atol=1e-5)


def test_sides_with_options_of_their_own():
    sizes = {"features": 8, "num_heads": 2, "num_layers": 1}

    def build(api, dense, **rngs):
        return api.EncoderDecoder(
            9,
            9,
            **sizes,
            position=None,
            head=dense,
            encoder_options={"num_layers": 2, "shared_bias": positions.learned_buckets(8, 7)},
            decoder_options={"norm_placement": "branch", "attention": api.LinearAttention},
            **rngs,
        )

    module = build(attention_nnx, nnx.Linear, rngs=nnx.Rngs(0))
    twin = build(attention_linen, nn.Dense)
    variables = parameters(module)
    expected = nnx.jit(lambda module: module(PROMPT, PROMPT))(module)
    result = jax.jit(lambda variables: twin.apply(variables, PROMPT, PROMPT))(variables)
    chex.assert_trees_all_close(result, expected, atol=1e-5)


def test_heads_and_back():
    options = {"position": positions.rotary, "num_key_heads": 1}
    module = attention_nnx.MultiHeadAttention(2, 8, **options, rngs=nnx.Rngs(0))
    twin = attention_linen.MultiHeadAttention(2, 8, **options)
    variables = parameters(module)
    heads = twin.apply(variables, X, method="heads")
    chex.assert_trees_all_equal(heads, module.heads(X))
    joined = twin.apply(variables, heads[0], method="join")
    np.testing.assert_array_equal(joined, module.join(heads[0]))
    call = {"score": scores.dot, "tile_sizes": (2, 2)}
    result = twin.apply(variables, X, **call)
    np.testing.assert_array_equal(result, module(X, **call))
