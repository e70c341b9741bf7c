"""Transformer layers against their formulas in NumPy: norms, residuals, memory, dropout, remat."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from attention_jax import masks, positions, scores
from attention_jax.layers import models
from attention_jax.nnx import (
    Embedding,
    FeedForward,
    MultiHeadAttention,
    TransformerBlock,
    TransformerStack,
)

X = jax.random.normal(jax.random.key(1), (2, 5, 8))
MEMORY = jax.random.normal(jax.random.key(2), (2, 7, 6))
TOKENS = jnp.array([[1, 2, 3], [4, 0, 9]])


class Norm(nnx.LayerNorm):
    """The norm of Flax, which itself relies on promotion where dtypes are not float32."""

    def __call__(self, x):
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x)


def moved(module):
    """Move the parameters away from zeros and ones, that hide what is done with them."""
    state = nnx.state(module, nnx.Param)
    wave = jax.tree.map(lambda p: p + 0.3 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), state)
    nnx.update(module, wave)
    return module


def numbers(module):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return p["scale"] * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) + p["bias"]


def attention(x, memory, p, allowed):
    query, key, value = (
        np.einsum("btd,dnh->btnh", y, p[name]["kernel"]) + p[name]["bias"]
        for name, y in (("query", x), ("key", memory), ("value", memory))
    )
    logits = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(query.shape[-1])
    weights = np.where(allowed, np.exp(logits), 0)
    weights = weights / weights.sum(-1, keepdims=True)
    context = np.einsum("bnts,bsnh->btnh", weights, value)
    return np.einsum("btnh,nhd->btd", context, p["out"]["kernel"]) + p["out"]["bias"]


def feed_forward(x, p):
    hidden = np.maximum(x @ p["hidden"]["kernel"] + p["hidden"]["bias"], 0)
    return hidden @ p["out"]["kernel"] + p["out"]["bias"]


PLACEMENTS = {
    "before": lambda x, f, norm, _: x + f(norm(x)),
    "after": lambda x, f, norm, _: norm(x + f(x)),
    "both": lambda x, f, norm, branch_norm: x + branch_norm(f(norm(x))),
    "branch": lambda x, f, norm, _: x + norm(f(x)),
}


def block_in_numpy(x, memory, p, placement):
    """The formula of the placement for each of the three f; causal."""
    allowed = np.tri(x.shape[1], dtype=bool)
    sublayers = {
        "attention": lambda x: attention(x, x, p["attention"], allowed),
        "cross_attention": lambda x: attention(x, memory, p["cross_attention"], True),
        "feed_forward": lambda x: feed_forward(x, p["feed_forward"]),
    }
    for name, function in sublayers.items():
        norms = [
            functools.partial(norm, p=p.get(f"{name}_{kind}")) for kind in ("norm", "branch_norm")
        ]
        x = PLACEMENTS[placement](x, function, *norms)
    return x


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_block_is_its_formula(placement, x64):
    options = {"norm": Norm, "norm_placement": placement, "param_dtype": jnp.float64}
    module = moved(
        TransformerBlock(8, 2, hidden_features=12, memory_features=6, **options, rngs=nnx.Rngs(0))
    )
    x, memory = X.astype(jnp.float64), MEMORY.astype(jnp.float64)
    result = nnx.jit(lambda module, *xs: module(*xs, mask=masks.Causal()))(module, x, memory)
    expected = block_in_numpy(np.asarray(x), np.asarray(memory), numbers(module), placement)
    assert result.dtype == jnp.float64
    np.testing.assert_allclose(result, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_gradients_of_a_block(x64):
    options = {"norm": Norm, "activation": jnp.tanh, "param_dtype": jnp.float64}
    module = moved(TransformerBlock(4, 2, hidden_features=5, **options, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(module)
    x = X[:1, :3, :4].astype(jnp.float64)

    @jax.jit
    def run(state, x):
        return nnx.merge(graph, state)(x, mask=masks.Causal())

    check_grads(run, (state, x), order=1, modes=("rev",), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_stack_is_its_blocks_and_a_last_norm():
    first = moved(TransformerStack(2, 8, num_heads=2, rngs=nnx.Rngs(0)))
    expected = first.norm(first.block_1(first.block_0(X)))
    np.testing.assert_array_equal(first(X), expected)
    last = moved(TransformerStack(1, 8, num_heads=2, norm_placement="after", rngs=nnx.Rngs(0)))
    assert last.norm is None
    np.testing.assert_array_equal(last(X), last.block_0(X))


@pytest.mark.slow
def test_each_block_gets_the_memory_or_its_own_keys():
    stack = moved(TransformerStack(2, 8, num_heads=2, memory_features=6, rngs=nnx.Rngs(0)))
    keys = stack.keys(MEMORY)
    assert not np.allclose(keys[0].key, keys[1].key)
    np.testing.assert_array_equal(stack(X, keys), stack(X, MEMORY))


@pytest.mark.slow
def test_padding_of_either_side_reaches_nothing():
    module = moved(TransformerBlock(8, 2, memory_features=6, rngs=nnx.Rngs(0)))
    own, of_memory = masks.Lengths(jnp.array([3, 5])), masks.Lengths(jnp.array([0, 4]))
    run = nnx.jit(lambda module, x, memory: module(x, memory, mask=own, memory_mask=of_memory))
    expected = run(module, X, MEMORY)
    spoiled = run(
        module, X.at[0, 3:].set(jnp.nan), MEMORY.at[0].set(jnp.inf).at[1, 4:].set(jnp.nan)
    )
    np.testing.assert_array_equal(spoiled[0, :3], expected[0, :3])
    np.testing.assert_array_equal(spoiled[1], expected[1])
    assert np.all(np.isfinite(expected))


@pytest.mark.slow
def test_dropout_is_on_what_each_sublayer_adds():
    module = TransformerBlock(8, 2, dropout_rate=0.5, rngs=nnx.Rngs(0, dropout=1))
    assert module.attention.dropout_rate == 0.5
    assert not np.allclose(module(X), module(X))
    plain = TransformerBlock(8, 2, rngs=nnx.Rngs(0))
    nnx.update(plain, nnx.state(module, nnx.Param))
    np.testing.assert_array_equal(module(X, deterministic=True), plain(X))
    module.eval()
    np.testing.assert_array_equal(module(X), plain(X))
    module.train()
    module.dropout.rate = 1.0
    np.testing.assert_array_equal(module(X), X)
    last = TransformerBlock(8, 2, norm_placement="after", dropout_rate=0.5, rngs=nnx.Rngs(0))
    last.dropout.rate = 1.0
    twice = last.feed_forward_norm(last.attention_norm(X))
    np.testing.assert_array_equal(last(X), twice)


@pytest.mark.slow
def test_remat_keeps_less_and_gives_the_same_numbers():
    results, kept = [], []
    for remat in (False, True):
        rngs = nnx.Rngs(0, dropout=1)
        stack = TransformerStack(1, 8, num_heads=2, dropout_rate=0.3, remat=remat, rngs=rngs)
        graph, params, rest = nnx.split(stack, nnx.Param, ...)

        def run(params, graph=graph, rest=rest):
            return nnx.merge(graph, params, rest, copy=True)(X)

        pullback = jax.eval_shape(lambda params, run=run: jax.vjp(run, params)[1], params)
        sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (pullback, params)]
        kept.append(sizes[0] - sizes[1])  # beside the parameters
        results.append(jax.jit(jax.value_and_grad(lambda p, run=run: jnp.sum(run(p) ** 2)))(params))
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-4)
    assert kept[1] < 0.15 * kept[0], kept


@pytest.mark.slow
def test_weights_are_returned_and_sown():
    stack = TransformerStack(2, 8, num_heads=2, memory_features=6, remat=True, rngs=nnx.Rngs(0))
    options = {"mask": masks.Causal(), "memory_mask": masks.Lengths(jnp.array([7, 3]))}
    output, weights = stack(X, MEMORY, **options, return_weights=True)
    assert [w.attention.shape for w in weights] == 2 * [(2, 2, 5, 5)]
    np.testing.assert_allclose(weights[0].attention.sum(-1), 1.0, rtol=1e-5)
    assert not np.any(weights[1].cross_attention[1, ..., 3:])
    run = nnx.capture(lambda stack: stack(X, MEMORY, **options, sow_weights=True), nnx.Intermediate)
    result, sown = run(stack)
    np.testing.assert_array_equal(result, output)
    for n in range(2):
        for name in ("attention", "cross_attention"):
            (left,) = sown[f"block_{n}"][name]["attention_weights"]
            np.testing.assert_array_equal(left, getattr(weights[n], name))
    assert isinstance(stack(X, MEMORY), jax.Array)


KINDS = {
    "turned and biased": {"position": positions.rotary, "bias": positions.alibi_bias(2)},
    "relative": {"score": positions.relative_key, "attention_size": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ragged"), [*zip(KINDS, (True, False), strict=True)])
def test_decoding_is_the_full_pass(kind, ragged):
    """Also to a memory, under a mask, bias, score and rotation that know where queries stand."""
    layer = functools.partial(MultiHeadAttention, **KINDS[kind])
    build = functools.partial(
        TransformerStack, 1, 8, num_heads=2, memory_features=6, rngs=nnx.Rngs(0)
    )
    stack = moved(build(attention=layer, cross_attention=layer))
    options = {"mask": masks.Causal(), "memory_mask": masks.Window(1, 2)}

    @nnx.jit
    def run(stack):
        caches, memory = stack.init_cache(2, 6, ragged=ragged), stack.keys(MEMORY)
        outputs = []
        for piece in (X[:, :3], X[:, 3:4], X[:, 4:]):
            output, caches = stack.decode(piece, caches, memory, **options)
            outputs.append(output)
        return jnp.concatenate(outputs, axis=1), stack(X, MEMORY, **options)

    decoded, full = run(stack)
    chex.assert_trees_all_close(decoded, full, atol=1e-5)


@pytest.mark.slow
def test_mixed_precision():
    exact = TransformerBlock(8, 2, rngs=nnx.Rngs(0))(X)
    module = TransformerBlock(8, 2, norm=Norm, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    for x in (X, X.astype(jnp.bfloat16)):  # the residual keeps the precision that it came with
        output = module(x)
        assert output.dtype == x.dtype
        np.testing.assert_allclose(output.astype(jnp.float32), exact, atol=0.1)
    assert {leaf.dtype for leaf in jax.tree.leaves(numbers(module))} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_embedding_adds_what_says_where_tokens_stand():
    sinusoids = Embedding(
        10,
        8,
        position=functools.partial(positions.sinusoidal, depth=8),
        scale=8**0.5,
        rngs=nnx.Rngs(0),
    )
    learned = Embedding(10, 8, position=positions.learned_table(8, 8), rngs=nnx.Rngs(0))
    at = jnp.array([[3, 4, 0], [0, 1, 7]])
    for module, table, scale in (
        (sinusoids, positions.sinusoidal(jnp.arange(8), 8), np.sqrt(8)),
        (learned, learned.position.table[...], 1.0),
    ):
        table = np.asarray(table)
        vectors = scale * np.asarray(module.token.embedding[...])[TOKENS]
        np.testing.assert_allclose(module(TOKENS), vectors + table[:3], rtol=1e-5)
        np.testing.assert_allclose(module(TOKENS, at), vectors + table[at], rtol=1e-5)
    none = Embedding(10, 8, dropout_rate=0.5, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(none(TOKENS, at, True), none.token.embedding[...][TOKENS])
    assert np.any(none(TOKENS) == 0)
    expected = X @ none.token.embedding[...].T
    np.testing.assert_allclose(none.attend(X), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_feed_forward_takes_any_activation():
    module = moved(FeedForward(8, hidden_features=3, activation=jnp.tanh, rngs=nnx.Rngs(0)))
    hidden = jnp.tanh(module.hidden(X))
    assert hidden.shape == (2, 5, 3)
    np.testing.assert_array_equal(module(X), module.out(hidden))


@pytest.mark.slow
def test_a_block_takes_any_attention():
    class Mean(nnx.Module):
        def __init__(self, num_heads, features, *, dtype, param_dtype, rngs):
            self.heads = num_heads

        def __call__(self, x, *, mask):
            assert mask is None
            return jnp.broadcast_to(x.mean(1, keepdims=True), x.shape)

    block = TransformerBlock(8, 2, attention=Mean, rngs=nnx.Rngs(0))
    y = X + jnp.broadcast_to(block.attention_norm(X).mean(1, keepdims=True), X.shape)
    expected = y + block.feed_forward(block.feed_forward_norm(y))
    np.testing.assert_allclose(block(X, deterministic=True), expected, rtol=1e-6)
    with pytest.raises(TypeError, match=r"TransformerBlock: Mean keeps nothing of the past"):
        block.init_cache(2, 3)
    additive = functools.partial(MultiHeadAttention, score=scores.additive)
    stack = TransformerStack(
        1, 8, num_heads=2, norm=nnx.RMSNorm, attention=additive, rngs=nnx.Rngs(0)
    )
    assert stack.block_0.attention.score.key_weight.shape == (2, 4, 4)
    assert isinstance(stack.norm, nnx.RMSNorm) and stack(X).shape == X.shape


def test_bad_arguments_are_explained():
    without = TransformerBlock(8, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"TransformerBlock: it was built without .* memory_feat"):
        without(X, MEMORY)
    with_memory = TransformerBlock(8, 2, memory_features=6, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"it attends to a memory, and none was given"):
        with_memory(X)
    with pytest.raises(ValueError, match=r"in_features must be a multiple of num_heads"):
        TransformerBlock(8, 3, rngs=nnx.Rngs(0))
    embedding = Embedding(10, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"Embedding: tokens must have the 2 axes \[B, T\]"):
        embedding(TOKENS[0])
    with pytest.raises(ValueError, match=r"give a position, or max_length = 3 .* not both"):
        models.position_or_table(positions.sinusoidal, 3, 8)
