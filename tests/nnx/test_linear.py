"""The layers of linear attention and Linformer: what they learn, decode and refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax import attend, bind, masks, positions
from attention_jax import linen as attention_linen
from attention_jax.layers.heads import apply_position
from attention_jax.linear import feature_maps, linear_attention, linformer, performer
from attention_jax.linear.linformer import linformer_attention
from attention_jax.nnx import (
    CausalDecoder,
    LinearAttention,
    LinformerAttention,
    MultiHeadAttention,
    TransformerBlock,
)


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


@pytest.mark.slow
def test_the_parameters_are_those_of_multi_head_attention():
    ours = LinearAttention(
        4, 12, memory_features=10, out_features=7, num_key_heads=2, rngs=nnx.Rngs(0)
    )
    theirs = MultiHeadAttention(
        4, 12, memory_features=10, out_features=7, num_key_heads=2, rngs=nnx.Rngs(0)
    )
    assert shapes(ours) == shapes(theirs)
    assert jax.eval_shape(lambda x, y: ours(x, y), inputs(), inputs(9, 10)).shape == (2, 5, 7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["favor", "hedgehog"])
def test_linear_attention_is_the_function_between_projections(name):
    feature_map = favor(4) if name == "favor" else feature_maps.hedgehog
    module = LinearAttention(
        4,
        12,
        num_key_heads=2,
        query_depth=4,
        value_depth=5,
        feature_map=feature_map,
        rngs=nnx.Rngs(0),
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rotary", "favor"])
def test_decoding_is_the_causal_pass(name):
    """Prompts of 4 and 2 tokens, then pieces of any length, where keys and queries are masked."""
    options = {"feature_map": favor(4)} if name == "favor" else {"chunk_size": 2}
    position = positions.rotary if name == "rotary" else None
    module = LinearAttention(3, 12, position=position, rngs=nnx.Rngs(0), **options)
    x, lengths = inputs(7), jnp.array([4, 2])
    holes = jnp.arange(7)[None, None, None] != jnp.array([1, 3])[:, None, None, None]
    mask = masks.Causal() & masks.Lengths(jnp.array([6, 7]), jnp.array([7, 4])) & holes

    @nnx.jit
    def run(module, x):
        padded = jnp.where(jnp.arange(4)[None, :, None] < lengths[:, None, None], x[:, :4], jnp.nan)
        state = module.init_cache(2)
        prompt, state = module.decode(padded, state, mask=mask, count=lengths)
        at, following = lengths, []
        for size in (1, 2):
            where = at[:, None] + jnp.arange(size)[None]
            rows = jnp.take_along_axis(x, where[:, :, None], axis=1)
            output, state = module.decode(rows, state, mask=mask)
            following.append(output)
            at = at + size
        return module(x, mask=mask), prompt, jnp.concatenate(following, axis=1), state.length

    full, prompt, following, length = run(module, x)
    np.testing.assert_array_equal(length, [7, 5])
    for n, of_prompt in enumerate(lengths):
        np.testing.assert_allclose(prompt[n, :of_prompt], full[n, :of_prompt], atol=1e-5)
        np.testing.assert_allclose(following[n], full[n, of_prompt : of_prompt + 3], atol=1e-5)


@pytest.mark.slow
def test_positions_turn_queries_and_keys_before_the_feature_map():
    """So FAVOR+ estimates what softmax attention says of turned queries and keys."""
    at = jnp.array([0, 3, 4, 9, 11])
    module = LinearAttention(
        3, 12, position=positions.rotary, feature_map=favor(4, 4096), rngs=nnx.Rngs(0)
    )

    @nnx.jit
    def run(module, x):
        query, key, value = heads(module, x)
        turned = [apply_position(positions.rotary, heads, at) for heads in (query, key)]
        context = linear_attention(*turned, value, feature_map=favor(4, 4096))
        exact = [attend(*pair, value) for pair in (turned, (query, key))]
        return module(x, positions=at), *map(module.out, (context, *exact))

    output, expected, *exact = run(module, 0.5 * inputs())
    np.testing.assert_allclose(output, expected, atol=1e-5)
    errors = [jnp.linalg.norm(output - one) for one in exact]
    assert errors[0] < 0.1 * errors[1], errors


def decoders(**options):
    """Return a decoder of linear attention, its twin and the parameters, drawn far from zero."""
    attention = {"feature_map": favor(4), "position": positions.rotary} | options
    build = functools.partial(LinearAttention, **attention)
    model = CausalDecoder(9, 8, num_heads=2, num_layers=2, attention=build, rngs=nnx.Rngs(0))
    keys = nnx.Rngs(1)
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p: 0.5 * jax.random.normal(keys(), p.shape), state))
    build = functools.partial(attention_linen.LinearAttention, **attention)
    twin = attention_linen.CausalDecoder(9, 8, num_heads=2, num_layers=2, attention=build)
    return model, twin, {"params": parameters(model)}


@pytest.mark.slow
def test_a_decoder_of_linear_attention_generates_from_a_state_of_constant_size():
    """Tokens are drawn as the full pass says, in both APIs, after prompts of 4 and 2 tokens."""
    model, twin, variables = decoders()
    prompt, lengths = jnp.array([[1, 5, 2, 7], [3, 3, 0, 6]]), jnp.array([4, 2])
    options = {"num_steps": 4, "lengths": lengths, "rng": jax.random.key(2)}
    generated = np.asarray(nnx.jit(lambda model: model.generate(prompt, **options))(model))
    assert len(np.unique(generated)) > 2
    run = functools.partial(twin.apply, **options, method="generate")
    np.testing.assert_array_equal(jax.jit(run)(variables, prompt), generated)

    tokens = np.zeros((2, 8), np.int32)
    for n, length in enumerate(lengths):
        tokens[n, : length + 4] = np.concatenate([prompt[n, :length], generated[n]])
    logits = jax.jit(twin.apply)(variables, tokens)
    for step in range(4):
        of_step = logits[jnp.arange(2), lengths - 1 + step]
        drawn = jax.random.categorical(jax.random.fold_in(options["rng"], step), of_step)
        np.testing.assert_array_equal(drawn, generated[:, step])

    small, large = (jax.eval_shape(lambda n=n: model.init_cache(2, n)) for n in (1, 10**9))
    assert small == large


@pytest.mark.slow
def test_a_block_decodes_linear_attention_to_a_memory():
    """Whose padding, of keys and of queries, is masked as in the full pass."""
    module = TransformerBlock(
        8,
        2,
        memory_features=6,
        attention=LinearAttention,
        cross_attention=functools.partial(LinearAttention, num_key_heads=1),
        rngs=nnx.Rngs(0),
    )
    x, memory = inputs(5, 8), inputs(7, 6, seed=2)
    options = {
        "mask": masks.Causal(),
        "memory_mask": masks.Lengths(jnp.array([7, 3]), jnp.array([4, 5])),
    }

    @nnx.jit
    def run(module, x, memory):
        keys, state, outputs = module.keys(memory), module.init_cache(2, 5), []
        for piece in (x[:, :3], x[:, 3:]):
            output, state = module.decode(piece, state, keys, **options)
            outputs.append(output)
        return module(x, memory, **options), jnp.concatenate(outputs, axis=1)

    full, decoded = run(module, x, memory.at[1, 3:].set(jnp.nan))
    assert np.all(np.isfinite(full))
    np.testing.assert_allclose(decoded, full, atol=1e-5)


@pytest.mark.slow
def test_random_features_get_no_gradient_and_hedgehog_does():
    x = inputs()
    module = LinearAttention(4, 12, feature_map=feature_maps.hedgehog, rngs=nnx.Rngs(0))
    gradient = nnx.jit(nnx.grad(lambda module: jnp.sum(module(x, mask=masks.Causal()) ** 2)))(
        module
    )
    assert np.all(np.abs(gradient["feature_map"]["weight"][...]).max((1, 2)) > 1e-6)
    fixed = LinearAttention(4, 12, feature_map=favor(3), rngs=nnx.Rngs(0))
    assert "feature_map" not in parameters(fixed)


@pytest.mark.slow
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


@pytest.mark.slow
def test_linformer_drops_weights_of_projected_keys():
    module = LinformerAttention(4, 12, length=9, rank=3, dropout_rate=0.5, rngs=nnx.Rngs(0))
    run = nnx.jit(lambda module, x: (module(x), module(x), module(x, deterministic=True)))
    first, other, exact = run(module, inputs())
    assert not np.allclose(first, other)
    module.eval()
    np.testing.assert_array_equal(run(module, inputs())[0], exact)

    @jax.jit
    def mean(seeds):
        def one(seed):
            stream = nnx.RngStream(jax.random.key(seed), tag="dropout")
            return module(inputs(), deterministic=False, rngs=stream)

        return jnp.mean(jax.vmap(one)(seeds), axis=0)

    np.testing.assert_allclose(mean(jnp.arange(2000)), exact, atol=0.1)


@pytest.mark.slow
def test_a_block_drops_what_its_sublayers_add_where_attention_has_no_weights():
    build = functools.partial(TransformerBlock, 8, 2, dropout_rate=0.5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"LinearAttention: dropout_rate = 0.5 .* no weight of a"):
        build(attention=LinearAttention)
    block = build(attention=LinearAttention, attention_dropout_rate=0.0)
    run = nnx.jit(lambda block, x: (block(x), block(x), block(x, deterministic=True)))
    first, other, exact = run(block, inputs(5, 8))
    assert not np.allclose(first, other)
    assert build(attention_dropout_rate=0.1).attention.dropout_rate == 0.1
    assert build().attention.dropout_rate == 0.5

    twin = attention_linen.TransformerBlock(
        8, 2, attention=attention_linen.LinearAttention, dropout_rate=0.5
    )
    with pytest.raises(ValueError, match=r"LinearAttention: dropout_rate = 0.5 cannot be"):
        jax.eval_shape(twin.init, jax.random.key(0), inputs(5, 8))
    twin = twin.clone(attention_dropout_rate=0.0, deterministic=True)
    result = jax.jit(twin.apply)({"params": parameters(block)}, inputs(5, 8))
    np.testing.assert_allclose(result, exact, atol=1e-6)


@pytest.mark.slow
def test_what_cannot_be_is_refused_by_name():
    x = inputs()
    linear = LinearAttention(4, 12, rngs=nnx.Rngs(0))
    low_rank = LinformerAttention(4, 12, length=9, rank=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="linear_attention: the mask Window cannot be honoured"):
        linear(x, mask=masks.Window(2, 0))
    with pytest.raises(ValueError, match="linformer_attention: the mask Causal cannot be honoured"):
        low_rank(x, mask=masks.Causal())
    with pytest.raises(ValueError, match=r"LinearAttention: bias, return_weights cannot be hono.*"):
        linear(x, return_weights=True, bias=1)
    with pytest.raises(ValueError, match=r"LinformerAttention: positions cannot .* no pairs"):
        low_rank(x, positions=jnp.arange(5))
    with pytest.raises(ValueError, match=r"LinformerAttention: a position .* mixes all positions"):
        LinformerAttention(4, 12, length=9, rank=3, position=positions.rotary, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"query_depth and key_depth must be equal, .* 3 and 5"):
        LinearAttention(4, 12, key_depth=5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"window = 3 cannot be honoured, .* a sum forgets no key"):
        linear.init_cache(2, 8, window=3)
    state = linear.init_cache(2)
    with pytest.raises(ValueError, match=r"decode: the mask must be masks.Causal\(\) with off"):
        linear.decode(x, state, mask=masks.Causal(-1))
    with pytest.raises(ValueError, match=r"causal=False cannot be honoured, .* no later token"):
        linear.decode(x, state, causal=False)
    with pytest.raises(ValueError, match="decode: the mask Window cannot be honoured"):
        linear.decode(x, state, mask=masks.Causal() & masks.Window(2, 0))
    with pytest.raises(ValueError, match=r"LinearAttention: the mask Causal .* one sum over the m"):
        linear.decode_memory(x, x, state, mask=masks.Causal())
    block = functools.partial(LinformerAttention, length=9, rank=3)
    with pytest.raises(TypeError, match=r"LinformerAttention keeps nothing .* or LinearAttention"):
        TransformerBlock(12, 4, attention=block, rngs=nnx.Rngs(0)).init_cache(2, 8)
    with pytest.raises(ValueError, match="LinearAttention: the last axis of query must be 12"):
        linear(inputs(5, 11))
    with pytest.raises(ValueError, match="serves up to 9 keys, its last axis, got S = 10"):
        low_rank(inputs(10))
    with pytest.raises(ValueError, match="LinformerAttention: rank must be 1 or more and at most"):
        LinformerAttention(4, 12, length=9, rank=10, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"fixed must have the shape \(3, 9\) .* got \(9, 3\)"):
        LinformerAttention(4, 12, length=9, rank=3, fixed=jnp.ones((9, 3)), rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match="LinearAttention: num_heads must be a multiple of num_key"
    ):
        LinearAttention(4, 12, num_key_heads=3, rngs=nnx.Rngs(0))
