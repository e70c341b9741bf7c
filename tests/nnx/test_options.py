"""What differs between published Transformers is an option: norms, gates, heads, layers, masks."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax import attend, masks, positions, scores
from attention_jax.layers import by_layer, generate
from attention_jax.nnx import (
    CausalDecoder,
    Embedding,
    EncoderDecoder,
    FeedForward,
    LinearAttention,
    LongformerAttention,
    MultiHeadAttention,
    PatchEncoder,
    TokenEncoder,
    TransformerBlock,
    TransformerStack,
)

X = jax.random.normal(jax.random.key(1), (2, 5, 8))
TOKENS = jnp.array([[1, 5, 2, 7], [3, 3, 0, 6]])
SMALL = {"num_heads": 2, "num_layers": 1}


def drawn_anew(model):
    """Draw all parameters far from where training begins, so that every one counts."""
    keys = nnx.Rngs(1)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p: 0.5 * jax.random.normal(keys(), p.shape), params))
    return model


def shapes(build):
    """Return the shapes of all parameters by path, without drawing them."""
    state = nnx.state(nnx.eval_shape(build), nnx.Param)
    return {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(state)}


def continued(model, prompt, num_steps, mask):
    """Return the most likely tokens, by full passes alone."""
    run = nnx.jit(lambda model, tokens: model(tokens, mask))
    tokens = np.pad(prompt, ((0, 0), (0, num_steps)))
    for n in range(prompt.shape[1], tokens.shape[1]):
        tokens[:, n] = run(model, tokens)[:, n - 1].argmax(-1)
    return tokens[:, prompt.shape[1] :]


@pytest.mark.slow
def test_masks_of_layers():
    stack = drawn_anew(TransformerStack(2, 8, num_heads=2, rngs=nnx.Rngs(0)))
    own = [masks.Causal(), masks.Window(1, 0)]
    expected = stack.norm(stack.block_1(stack.block_0(X, mask=own[0]), mask=own[1]))
    for mask in (own, tuple(own), by_layer(lambda n: own[n])):
        np.testing.assert_array_equal(stack(X, mask=mask), expected)
    assert np.any(stack(X, mask=own[::-1]) != expected)


def test_options_of_layers():
    kinds = [LinearAttention, functools.partial(MultiHeadAttention, num_key_heads=1)]
    build = functools.partial(TransformerStack, 2, 8, num_heads=2)
    stack = nnx.eval_shape(
        lambda: build(attention=kinds, hidden_features=by_layer(lambda n: n + 3), rngs=nnx.Rngs(0))
    )
    assert [type(block.attention) for block in stack.blocks] == [
        LinearAttention,
        MultiHeadAttention,
    ]
    assert stack.block_1.attention.key.kernel.shape == (8, 1, 4)
    assert [block.feed_forward.hidden.kernel.shape[1] for block in stack.blocks] == [3, 4]


def test_a_list_has_one_entry_for_each_layer():
    build = functools.partial(TransformerStack, 2, 8, num_heads=2, rngs=nnx.Rngs(0))
    message = (
        r"TransformerStack: {} must have one entry for each of the 2 layers, got 3; .* by_layer"
    )
    with pytest.raises(ValueError, match=message.format("attention")):
        build(attention=3 * [MultiHeadAttention])
    stack = build()
    with pytest.raises(ValueError, match=message.format("mask")):
        nnx.eval_shape(lambda: stack(X, mask=3 * [masks.Causal()]))


@pytest.mark.slow
def test_decoding_with_windows_of_layers():
    """Gemma 2 and GPT-OSS: every other layer is local and forgets what is far."""
    model = drawn_anew(CausalDecoder(9, 8, num_heads=2, num_layers=2, rngs=nnx.Rngs(0)))
    mask, window = [masks.Window(1, 0), None], [1, None]
    tokens = jnp.array([[1, 5, 2, 7, 8, 3, 0]])

    @nnx.jit
    def run(model):
        caches = model.init_cache(1, [2, 7], window=window)
        pieces = []
        for n in range(7):
            logits, caches = model.decode(tokens[:, n : n + 1], caches, mask=mask)
            pieces.append(logits)
        generated = model.generate(tokens, 3, mask=mask, window=window)
        return jnp.concatenate(pieces, axis=1), model(tokens, mask), generated

    decoded, full, generated = run(model)
    chex.assert_trees_all_close(decoded, full, atol=1e-5)
    np.testing.assert_array_equal(generated, continued(model, tokens, 3, mask))


@pytest.mark.slow
def test_a_gated_feed_forward_layer():
    module = drawn_anew(
        FeedForward(
            8,
            hidden_features=3,
            activation=jax.nn.silu,
            gated=True,
            use_bias=False,
            rngs=nnx.Rngs(0),
        )
    )
    gate, hidden, out = (getattr(module, name).kernel[...] for name in ("gate", "hidden", "out"))
    np.testing.assert_allclose(
        module(X), (jax.nn.silu(X @ gate) * (X @ hidden)) @ out, rtol=1e-4, atol=1e-4
    )
    swiglu = functools.partial(FeedForward, gated=True, use_bias=False)
    found = shapes(
        lambda: CausalDecoder(
            9, 8, **SMALL, feed_forward=swiglu, hidden_features=3, rngs=nnx.Rngs(0)
        )
    )
    inside = {
        name.split("feed_forward.")[1]: x for name, x in found.items() if "feed_forward." in name
    }
    assert inside == {"gate.kernel": (8, 3), "hidden.kernel": (8, 3), "out.kernel": (3, 8)}


def test_norms_have_names_by_placement():
    def norms(**options):
        found = shapes(lambda: TransformerStack(1, 8, num_heads=2, rngs=nnx.Rngs(0), **options))
        return sorted({name.rsplit(".", 1)[0] for name in found if "norm" in name})

    inside = ["block_0.attention_norm", "block_0.feed_forward_norm"]
    assert norms(norm_placement="after") == inside
    assert norms(norm_placement="branch") == norms() == [*inside, "norm"]
    both = ["block_0.attention_branch_norm", "block_0.feed_forward_branch_norm"]
    assert norms(norm_placement="both", norm=nnx.RMSNorm) == sorted([*inside, *both, "norm"])
    with pytest.raises(ValueError, match=r"norm_placement must be one of 'before', .* got 'first'"):
        norms(norm_placement="first")


@pytest.mark.slow
def test_the_default_norm_keeps_precision():
    """On a residual stream far from zero, where Flax's fast variance loses float32's digits."""
    block = TransformerBlock(256, 2, rngs=nnx.Rngs(0))
    stack = TransformerStack(0, 256, num_heads=2, rngs=nnx.Rngs(0))
    x = 300 + jax.random.normal(jax.random.key(0), (1, 4, 256))
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    for norm in (block.attention_norm, block.feed_forward_norm, stack.norm):
        assert np.abs(norm(x) - exact).max() < 1e-3
    fast = nnx.LayerNorm(256, rngs=nnx.Rngs(0))
    assert np.abs(fast(x) - exact).max() > 1e-2


@pytest.mark.slow
def test_a_head_of_its_own():
    head = functools.partial(nnx.Linear, use_bias=False)
    model = CausalDecoder(
        9, 8, num_heads=2, num_layers=0, head=head, logit_cap=2.0, rngs=nnx.Rngs(0)
    )
    x = model.encode(TOKENS)
    expected = 2.0 * jnp.tanh(x @ model.output.kernel[...] / 2.0)
    np.testing.assert_allclose(model(TOKENS), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model.logits(x), model(TOKENS))
    tied = CausalDecoder(9, 8, num_heads=2, num_layers=0, rngs=nnx.Rngs(0))
    table = tied.embedding.token.embedding[...]
    np.testing.assert_allclose(tied(TOKENS), tied.encode(TOKENS) @ table.T, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_embeddings_of_types_and_their_norm():
    options = {"num_types": 2, "norm": nnx.LayerNorm, "scale": 3.0}
    model = TokenEncoder(
        9, 8, num_heads=2, num_layers=0, max_length=4, embedding_options=options, rngs=nnx.Rngs(0)
    )
    drawn_anew(model)
    own = model.embedding
    token, kind, place = (
        x[...] for x in (own.token.embedding, own.token_type.embedding, own.position.table)
    )
    types = jnp.array([[0, 1, 1, 0], [1, 1, 1, 0]])
    added = 3.0 * token[TOKENS] + kind[types] + jnp.broadcast_to(place[:4], (2, 4, 8))
    np.testing.assert_allclose(model.encode(TOKENS, types=types), own.norm(added), rtol=1e-5)
    np.testing.assert_array_equal(model.encode(TOKENS), model.encode(TOKENS, types=0 * types))
    plain = Embedding(9, 8, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"without token types; give num_types, or leave out types"
    ):
        plain(TOKENS, types=types)
    with pytest.raises(
        ValueError, match=r"axis B \(number 0\) of types \[B, T\] must be 2 as in tokens"
    ):
        own(TOKENS, types=types[:1])


def test_biases_of_each_projection():
    def biases(use_bias):
        found = shapes(lambda: MultiHeadAttention(2, 8, use_bias=use_bias, rngs=nnx.Rngs(0)))
        return {name.split(".")[0] for name in found if name.endswith("bias")}

    assert biases({"key": False}) == {"query", "value", "out"}
    assert biases({"query": True, "key": True, "value": True, "out": False}) == {
        "query",
        "key",
        "value",
    }
    assert not biases(False)
    message = r"use_bias must be True, False or a dict .* query, key, value and out, got {}"
    with pytest.raises(ValueError, match=message.format("False for 'keys'")):
        biases({"keys": False})
    with pytest.raises(ValueError, match=message.format("'no' for 'key'")):
        biases({"key": "no"})


@pytest.mark.slow
def test_from_features_to_heads_and_back():
    layer = drawn_anew(
        MultiHeadAttention(2, 8, num_key_heads=1, position=positions.rotary, rngs=nnx.Rngs(0))
    )
    query, key, value = layer.heads(X)
    assert query.shape == (2, 5, 2, 4) and key.shape == value.shape == (2, 5, 1, 4)
    context = attend(query, key, value, mask=masks.Causal())
    np.testing.assert_array_equal(layer.join(context), layer(X, mask=masks.Causal()))


@pytest.mark.slow
def test_a_score_and_tiles_at_the_call():
    layer = drawn_anew(MultiHeadAttention(2, 8, rngs=nnx.Rngs(0)))
    other = drawn_anew(MultiHeadAttention(2, 8, score=scores.dot, rngs=nnx.Rngs(0)))
    np.testing.assert_array_equal(layer(X, score=scores.dot), other(X))
    assert np.any(layer(X) != other(X))
    tiled = drawn_anew(MultiHeadAttention(2, 8, implementation="tiled", rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"tile_sizes"):
        tiled(X, tile_sizes=(0, 2))
    chex.assert_trees_all_close(tiled(X, tile_sizes=(2, 2)), layer(X), atol=1e-5)


@pytest.mark.slow
def test_encoding_of_a_causal_decoder_is_causal():
    model = drawn_anew(CausalDecoder(9, 8, **SMALL, rngs=nnx.Rngs(0)))
    first, changed = model.encode(TOKENS), model.encode(TOKENS.at[:, 2].set(8))
    np.testing.assert_array_equal(first[:, :2], changed[:, :2])
    assert np.all(np.any(first[:, 2:] != changed[:, 2:], axis=-1))
    np.testing.assert_array_equal(model.logits(first), model(TOKENS))


@pytest.mark.slow
def test_a_prefix_that_sees_itself():
    """In the full pass, and with a cache."""
    model = drawn_anew(CausalDecoder(9, 8, **SMALL, rngs=nnx.Rngs(0)))
    mask = masks.Prefix(2) | masks.Causal()
    options = {"mask": mask, "causal": False}

    @nnx.jit
    def run(model):
        full = model(TOKENS, **options)
        first, caches = model.decode(TOKENS[:, :3], model.init_cache(2, 4), **options)
        second, _ = model.decode(TOKENS[:, 3:], caches, **options)
        return full, jnp.concatenate([first, second], axis=1), model(TOKENS, mask)

    full, decoded, causal = run(model)
    chex.assert_trees_all_close(decoded, full, atol=1e-5)
    assert np.abs(causal - full)[0, 0].max() > 1e-3


@pytest.mark.slow
def test_an_encoder_decoder_without_positions():
    build = functools.partial(EncoderDecoder, 9, 9, features=8, num_heads=2, num_layers=0)
    model = build(position=None, rngs=nnx.Rngs(0))
    vectors = 8**0.5 * model.source.token.embedding[...][TOKENS]
    np.testing.assert_allclose(model.encode(TOKENS), vectors, rtol=1e-6)
    sinusoids = positions.sinusoidal(jnp.arange(4), 8)
    np.testing.assert_allclose(
        build(rngs=nnx.Rngs(0)).encode(TOKENS) - vectors, 2 * [sinusoids], atol=1e-6
    )


def test_the_sides_of_an_encoder_decoder_have_their_own_options():
    relative = positions.learned_buckets
    model = nnx.eval_shape(
        lambda: EncoderDecoder(
            9,
            9,
            features=8,
            **SMALL,
            shared_bias=relative(8, 7),
            encoder_options={"attention": LinearAttention, "num_layers": 2, "shared_bias": None},
            decoder_options={"shared_bias": relative(4, 7, bidirectional=False)},
            rngs=nnx.Rngs(0),
        )
    )
    kinds = [[type(b.attention) for b in s.blocks] for s in (model.encoder, model.decoder)]
    assert kinds == [2 * [LinearAttention], [MultiHeadAttention]]
    assert model.encoder.bias is None and model.decoder.bias.table.shape == (2, 4)
    assert model.encoder.block_0.cross_attention is None
    assert model.decoder.block_0.cross_attention is not None


@pytest.mark.slow
def test_a_bias_that_all_layers_share():
    def build():
        bias = positions.learned_buckets(8, 7)
        return TransformerStack(2, 8, num_heads=2, shared_bias=bias, rngs=nnx.Rngs(0))

    stack, names = drawn_anew(build()), shapes(build)
    assert names["bias.table"] == (2, 8) and sum("table" in name for name in names) == 1
    bias, x = stack.bias(), X
    for block in stack.blocks:
        x = block(x, mask=masks.Causal(), bias=bias)
    np.testing.assert_array_equal(stack(X, mask=masks.Causal()), stack.norm(x))
    other = stack(X, mask=masks.Causal(), bias=jnp.zeros((1, 1, 5, 5)))
    assert np.any(np.abs(other - stack(X, mask=masks.Causal())) > 1e-3)


@pytest.mark.slow
def test_decoding_with_a_shared_bias():
    bias = positions.learned_buckets(8, 7, bidirectional=False)
    model = drawn_anew(CausalDecoder(9, 8, **SMALL, shared_bias=bias, rngs=nnx.Rngs(0)))

    @nnx.jit
    def run(model):
        first, caches = model.decode(TOKENS[:, :2], model.init_cache(2, 4))
        second, _ = model.decode(TOKENS[:, 2:], caches)
        return jnp.concatenate([first, second], axis=1), model(TOKENS)

    chex.assert_trees_all_close(*run(model), atol=1e-5)


def test_gelu_of_published_shapes_is_exact():
    image = functools.partial(PatchEncoder, (4, 4), 2, num_channels=1, num_classes=3, features=8)
    tokens = functools.partial(TokenEncoder, 9, 8)
    x = jnp.linspace(-3, 3, 50)
    for build, approximate in (
        (image, False),
        (tokens, False),
        (functools.partial(CausalDecoder, 9, 8), True),
    ):
        model = nnx.eval_shape(lambda build=build: build(**SMALL, rngs=nnx.Rngs(0)))
        activation = model.stack.block_0.feed_forward.activation
        np.testing.assert_array_equal(activation(x), jax.nn.gelu(x, approximate=approximate))
    assert np.abs(jax.nn.gelu(x) - jax.nn.gelu(x, approximate=False)).max() > 1e-4


FORGETTING = {
    "none": None,
    "causal": masks.Causal(),
    "padding": masks.Lengths(jnp.array([3, 2])),
    "documents": masks.Segment(jnp.zeros((2, 6), int)),
    "wider": masks.Window(4, 0),
    "first tokens": masks.Window(3, 0) | masks.Prefix(1),
    "array": jnp.ones((6, 6), bool),
    "one head": masks.Heads([masks.Window(3, 0), masks.Causal()]),
}
REMEMBERING = {
    "window": masks.Window(3, 0),
    "narrower": masks.Window(2, None),
    "chunks": masks.Chunked(4),
    "both": masks.Causal() & masks.Window(3, 3) & FORGETTING["padding"],
    "documents": FORGETTING["documents"] & masks.Window(3, 0),
    "heads": masks.Heads([masks.Window(3, 0), masks.Window(1, 0)]),
    "function": lambda q_idx, kv_idx: q_idx - kv_idx <= 3,
}


@pytest.mark.parametrize("name", FORGETTING)
def test_a_window_does_not_forget_what_the_mask_allows(name):
    layer = MultiHeadAttention(2, 8, rngs=nnx.Rngs(0))
    message = r"MultiHeadAttention: a cache with window = 3 forgets .* masks.Window\(3, 0\)"
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(
            lambda: layer.decode(X, layer.init_cache(2, 6, window=3), mask=FORGETTING[name])
        )


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_window_under_a_mask_that_needs_no_more(name):
    layer = MultiHeadAttention(2, 8, rngs=nnx.Rngs(0))

    def decode(mask):
        return layer.decode(X, layer.init_cache(2, 6, window=3), mask=mask)[0]

    mask = REMEMBERING[name]
    assert nnx.eval_shape(lambda: decode(mask)).shape == X.shape
    if isinstance(mask, masks.Mask):  # known only inside `jit`, as an argument
        assert jax.eval_shape(decode, mask).shape == X.shape


@pytest.mark.slow
def test_generation_ends():
    """Tokens count upward from the prompt; after the end there is nothing else."""

    def decode(tokens, caches, count):
        del count
        return jax.nn.one_hot(tokens + 1, 10), caches + 1

    prompt = jnp.array([[0, 3], [0, 6], [0, 7]])
    found = generate(decode, jnp.array(0), prompt, 4, end=8)
    np.testing.assert_array_equal(found, [[4, 5, 6, 7], [7, 8, 8, 8], [8, 8, 8, 8]])
    np.testing.assert_array_equal(generate(decode, jnp.array(0), prompt[:1], 4), [[4, 5, 6, 7]])
    with pytest.raises(ValueError, match=r"generate: end must be a token, 0 to 9, got 10"):
        generate(decode, jnp.array(0), prompt, 4, end=10)


def test_generation_takes_no_step_after_the_last_end():
    steps = []

    def decode(tokens, caches, count):
        del count
        jax.debug.callback(lambda: steps.append(None))
        return jax.nn.one_hot(tokens + 1, 10), caches

    generate(decode, (), jnp.array([[3], [5]]), 50, end=6)
    jax.effects_barrier()
    assert len(steps) == 3  # 4 and 6, 5, 6


@pytest.mark.slow
def test_models_generate_under_a_mask_until_an_end():
    model = drawn_anew(CausalDecoder(9, 8, **SMALL, rngs=nnx.Rngs(0)))
    mask = masks.Window(1, 0)
    run = nnx.jit(
        lambda model, end: model.generate(TOKENS, 5, mask=mask, end=end), static_argnames="end"
    )
    free = np.asarray(run(model, end=None))
    np.testing.assert_array_equal(free, continued(model, TOKENS, 5, mask))
    end = int(free[0, 1])
    ended = np.asarray(run(model, end=end))
    for row, kept in zip(ended, free, strict=True):
        at = np.argmax(kept == end) if end in kept else 5
        np.testing.assert_array_equal(row, [*kept[:at], *([end] * (5 - at))])


def test_unknown_options_are_named():
    with pytest.raises(
        TypeError, match=r"TransformerStack: there is no option 'norm_first'; it .* norm"
    ):
        TransformerStack(1, 8, num_heads=2, norm_first=True, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"CausalDecoder: there is no option 'dropout'"):
        CausalDecoder(9, 8, **SMALL, dropout=0.1, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_global_tokens_have_projections_of_their_own():
    """As two layers: one for all rows, and one with the other projections for the global rows."""
    layer = drawn_anew(LongformerAttention(2, 8, rngs=nnx.Rngs(0)))
    marks = jnp.array([[True, False, False, True, False], [False, True, False, False, False]])
    at = jnp.array([[0, 3], [1, -1]])
    mask = masks.longformer(2, tokens=marks) & masks.Lengths(jnp.array([5, 4]))
    local, wide = (MultiHeadAttention(2, 8, rngs=nnx.Rngs(0)) for _ in "ab")
    for name in ("query", "key", "value", "out"):
        setattr(local, name, getattr(layer, name))
        setattr(wide, name, layer.out if name == "out" else getattr(layer, f"{name}_global"))
    expected = jnp.where(marks[..., None], wide(X, mask=mask), local(X, mask=mask))
    run = jax.jit(lambda mask, at: layer(X, mask=mask, global_tokens=at))
    chex.assert_trees_all_close(run(mask, at), expected, atol=1e-5)
    chex.assert_trees_all_close(layer(X, mask=mask), local(X, mask=mask), atol=1e-5)
    assert np.all(np.any(np.abs(expected - local(X, mask=mask)) > 1e-3, -1) == np.asarray(marks))
    stack = drawn_anew(
        TransformerStack(1, 8, num_heads=2, attention=LongformerAttention, rngs=nnx.Rngs(0))
    )
    others = stack(X, mask=mask, global_tokens=at), stack(X, mask=mask)
    assert np.any(np.abs(others[0] - others[1]) > 1e-3)
    with pytest.raises(ValueError, match=r"LongformerAttention: axis B .* of global_tokens"):
        layer(X, mask=mask, global_tokens=at[:1])
