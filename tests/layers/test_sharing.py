"""What layers and both sides of a model share, smaller tables and other sources, in both APIs."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax import linen as attention_linen
from attention_jax import masks, positions
from attention_jax import nnx as attention_nnx
from attention_jax.layers import by_layer

TOKENS = jnp.array([[1, 5, 2, 7], [3, 3, 0, 6]])
LAYERS = {"num_heads": 2, "num_layers": 3}


def drawn_anew(module):
    keys = nnx.Rngs(1)
    state = nnx.state(module, nnx.Param)
    nnx.update(module, jax.tree.map(lambda p: 0.5 * jax.random.normal(keys(), p.shape), state))
    return module


def params(module):
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def trees(build, twin, *inputs):
    """Return the shapes of the parameters in NNX, which are those in Linen."""
    tree = jax.tree.map(jnp.shape, params(nnx.eval_shape(build)))
    drawn = jax.eval_shape(twin.init, jax.random.key(0), *inputs)["params"]
    assert jax.tree.map(jnp.shape, drawn) == tree
    return tree


def test_layers_that_are_one():
    options = {**LAYERS, "share_layers": True}
    build = functools.partial(attention_nnx.CausalDecoder, 9, 8, **options)
    twin = attention_linen.CausalDecoder(9, 8, **options)
    tree = trees(lambda: build(rngs=nnx.Rngs(0)), twin, TOKENS)
    assert sorted(tree["stack"]) == ["block_0", "norm"]
    for own in ([1, 2, 3], by_layer(lambda n: n + 1)):
        message = r"TransformerStack: with share_layers .* and hidden_features must be one for all"
        with pytest.raises(ValueError, match=message):
            build(hidden_features=own, rngs=nnx.Rngs(0))
    assert not nnx.eval_shape(lambda: build(num_layers=0, rngs=nnx.Rngs(0))).stack.blocks


@pytest.mark.slow
def test_a_layer_again_and_again():
    """Under a mask of its own each time, and with a cache for each."""
    options = {**LAYERS, "share_layers": True}
    model = drawn_anew(attention_nnx.CausalDecoder(9, 8, **options, rngs=nnx.Rngs(0)))
    mask = by_layer(lambda n: masks.Window(n, 0))
    twin = attention_linen.CausalDecoder(9, 8, **options)

    @nnx.jit
    def run(model):
        x = model.embedding(TOKENS)
        for n in range(3):
            x = model.stack.block_0(x, mask=masks.Window(n, 0))
        first, caches = model.decode(TOKENS[:, :2], model.init_cache(2, 4), mask=mask)
        second, _ = model.decode(TOKENS[:, 2:], caches, mask=mask)
        found = twin.apply({"params": params(model)}, TOKENS, mask)
        return model.logits(model.stack.norm(x)), found, jnp.concatenate([first, second], axis=1)

    expected, *others = run(model)
    for other in others:
        chex.assert_trees_all_close(other, expected, atol=1e-5)


def test_one_table_of_tokens():
    options = {**LAYERS, "features": 8, "share_tokens": True}
    build = functools.partial(attention_nnx.EncoderDecoder, **options)
    own = {"position": positions.learned_table(5, 8)}
    twin = attention_linen.EncoderDecoder(9, 9, **options, **own)
    tree = trees(lambda: build(9, 9, **own, rngs=nnx.Rngs(0)), twin, TOKENS, TOKENS)
    assert tree["source"] == {"token": {"embedding": (9, 8)}, "position": {"table": (5, 8)}}
    assert tree["target"] == {"position": {"table": (5, 8)}}
    message = r"shared tokens must have \(vocabulary, features\) = \(7, 8\), got \(9, 8\)"
    with pytest.raises(ValueError, match=message):
        build(9, 7, rngs=nnx.Rngs(0))
    twin = attention_linen.EncoderDecoder(9, 7, **options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(twin.init, jax.random.key(0), TOKENS, TOKENS)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_writing_with_one_table_of_tokens():
    options = {**LAYERS, "features": 8, "share_tokens": True}
    model = drawn_anew(attention_nnx.EncoderDecoder(9, 9, **options, rngs=nnx.Rngs(0)))
    separate = attention_nnx.EncoderDecoder(
        9, 9, **{**options, "share_tokens": False}, rngs=nnx.Rngs(0)
    )
    tree = params(model)
    nnx.update(separate, nnx.State({**tree, "target": tree["source"]}))
    expected = separate(TOKENS, TOKENS)
    twin = attention_linen.EncoderDecoder(9, 9, **options)
    chex.assert_trees_all_close(model(TOKENS, TOKENS), expected, atol=1e-5)
    chex.assert_trees_all_close(twin.apply({"params": tree}, TOKENS, TOKENS), expected, atol=1e-5)
    written = separate.generate(TOKENS, TOKENS[:, :1], 4)
    generate = functools.partial(twin.apply, {"params": tree}, method="generate")
    np.testing.assert_array_equal(model.generate(TOKENS, TOKENS[:, :1], 4), written)
    np.testing.assert_array_equal(generate(TOKENS, TOKENS[:, :1], 4), written)


def test_smaller_tables():
    options = {**LAYERS, "max_length": 5}
    own = {"table_features": 4, "num_types": 2}
    build = functools.partial(attention_nnx.TokenEncoder, 9, 8, **options)
    twin = attention_linen.TokenEncoder(
        9, 8, **options, head=nn.Dense, embedding_options={**own, "norm": nn.LayerNorm}
    )
    given = {"embedding_options": {**own, "norm": nnx.LayerNorm}}
    tree = trees(lambda: build(**given, head=nnx.Linear, rngs=nnx.Rngs(0)), twin, TOKENS)
    assert tree["embedding"] == {
        "token": {"embedding": (9, 4)},
        "token_type": {"embedding": (2, 4)},
        "position": {"table": (5, 4)},
        "norm": {"scale": (4,), "bias": (4,)},
        "projection": {"kernel": (4, 8), "bias": (8,)},
    }
    message = r"Embedding: with table_features .* they give no logits; build the model with a head"
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: build(**given, rngs=nnx.Rngs(0))(TOKENS))
    twin = attention_linen.TokenEncoder(9, 8, **options, embedding_options=own)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(twin.init, jax.random.key(0), TOKENS)


class Reader(nnx.Module):
    def __init__(self, features, *, rngs, **dtypes):
        self.linear = nnx.Linear(3, features, rngs=rngs, **dtypes)

    def __call__(self, sound):
        return self.linear(sound)


class LinenReader(nn.Module):
    features: int
    dtype: object = None
    param_dtype: object = jnp.float32

    @nn.compact
    def __call__(self, sound):
        return nn.Dense(self.features, name="linear")(sound)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_memory_for_some_layers():
    """Those without attention to it are given none, in the full pass and token by token."""
    options = {"memory_features": by_layer(lambda n: 6 if n == 1 else None)}
    build = functools.partial(attention_nnx.TransformerStack, 2, 8, num_heads=2, **options)
    stack = drawn_anew(build(rngs=nnx.Rngs(0)))
    twin = attention_linen.TransformerStack(2, 8, num_heads=2, **options)
    x, memory = (jax.random.normal(jax.random.key(n), (2, 4, 8 - 2 * n)) for n in range(2))

    @nnx.jit
    def run(stack):
        mask = masks.Causal()
        expected = stack.norm(stack.block_1(stack.block_0(x, mask=mask), memory, mask=mask))
        decoded, _ = stack.decode(x, stack.init_cache(2, 4), stack.keys(memory))
        found = twin.apply({"params": params(stack)}, x, memory, mask=mask)
        return expected, decoded, found, stack(x, memory, mask=mask)

    expected, *others = run(stack)
    for other in others:
        chex.assert_trees_all_close(other, expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"it attends to a memory, and none was given"):
        stack(x)
    none = attention_nnx.TransformerStack(2, 8, num_heads=2, rngs=nnx.Rngs(0))
    for use in (lambda: none(x, memory), lambda: none.keys(memory)):
        with pytest.raises(ValueError, match=r"it was built without attention to a memory"):
            use()


SOUND = jax.random.normal(jax.random.key(0), (2, 6, 3))


@pytest.mark.slow
def test_a_reader_of_the_source():
    build = functools.partial(attention_nnx.EncoderDecoder, features=8, **LAYERS)
    twin = functools.partial(attention_linen.EncoderDecoder, features=8, **LAYERS)
    tree = trees(
        lambda: build(None, 9, reader=Reader, rngs=nnx.Rngs(0)),
        twin(None, 9, reader=LinenReader),
        SOUND,
        TOKENS,
    )
    assert tree["source"] == {"linear": {"kernel": (3, 8), "bias": (8,)}}
    for options, message in (
        ({}, r"give source_vocabulary_size, or None and a reader .*, got None and no reader"),
        (
            {"reader": Reader, "share_tokens": True},
            r"share_tokens is for a source of tokens; leave it out with a reader",
        ),
    ):
        with pytest.raises(ValueError, match=f"EncoderDecoder: {message}"):
            build(None, 9, **options, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=f"EncoderDecoder: {message}"):
            jax.eval_shape(twin(None, 9, **options).init, jax.random.key(0), SOUND, TOKENS)
    with pytest.raises(ValueError, match=r"got 9 and a reader"):
        build(9, 9, reader=Reader, rngs=nnx.Rngs(0))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_writing_of_what_a_reader_read():
    options = {"features": 8, **LAYERS, "dropout_rate": 0.5}
    model = attention_nnx.EncoderDecoder(None, 9, reader=Reader, **options, rngs=nnx.Rngs(0))
    drawn_anew(model).eval()
    memory = model.encoder(model.source(SOUND))
    expected = model.logits(model.decoder(model.target(TOKENS), memory, mask=masks.Causal()))
    chex.assert_trees_all_close(model(SOUND, TOKENS), expected, atol=1e-5)
    twin = attention_linen.EncoderDecoder(None, 9, reader=LinenReader, **options)
    variables = {"params": params(model)}
    found = twin.apply(variables, SOUND, TOKENS, deterministic=True)
    chex.assert_trees_all_close(found, expected, atol=1e-5)
    found = model.generate(SOUND, TOKENS[:, :1], 3)
    assert found.shape == (2, 3)
    twins = twin.apply(variables, SOUND, TOKENS[:, :1], 3, method="generate")
    np.testing.assert_array_equal(twins, found)


@pytest.mark.slow
def test_vectors_of_patches():
    sizes = {"num_channels": 1, "num_classes": 3, "features": 8, "num_heads": 2, "num_layers": 1}
    model = drawn_anew(attention_nnx.PatchEncoder((4, 4), 2, **sizes, rngs=nnx.Rngs(0)))
    images = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    twin = attention_linen.PatchEncoder((4, 4), 2, **sizes)

    @nnx.jit
    def run(model):
        x = model.encode(images)
        found = twin.apply({"params": params(model)}, images, method="encode")
        return x, found, model.classifier(x[:, 0]), model(images)

    x, found, classes, logits = run(model)
    assert x.shape == (2, 5, 8)
    chex.assert_trees_all_close(found, x, atol=1e-5)
    chex.assert_trees_all_close(classes, logits, atol=1e-5)


@pytest.mark.slow
def test_scaled_logits():
    build = functools.partial(attention_nnx.CausalDecoder, 9, 8, num_heads=2, num_layers=0)
    model, scaled = build(rngs=nnx.Rngs(0)), build(logit_scale=0.5, rngs=nnx.Rngs(0))
    chex.assert_trees_all_close(scaled(TOKENS), 0.5 * model(TOKENS), atol=1e-6)
    twin = attention_linen.CausalDecoder(9, 8, num_heads=2, num_layers=0, logit_scale=0.5)
    found = twin.apply({"params": params(model)}, TOKENS)
    chex.assert_trees_all_close(found, scaled(TOKENS), atol=1e-6)
