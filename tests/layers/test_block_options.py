"""Where a block reads and where its norms are, and norms of all heads together, in both APIs."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from attention_jax import linen as attention_linen
from attention_jax import masks
from attention_jax import nnx as attention_nnx
from attention_jax.layers import BlockOptions

X = jax.random.normal(jax.random.key(1), (2, 5, 8))


def drawn_anew(module):
    keys = nnx.Rngs(1)
    state = nnx.state(module, nnx.Param)
    nnx.update(module, jax.tree.map(lambda p: 0.5 * jax.random.normal(keys(), p.shape), state))
    return module


def params(module):
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def norms_of(**options):
    """Return the names of a block's norms, which are those of its twin."""
    build = functools.partial(attention_nnx.TransformerBlock, 8, 2, **options)
    block = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    tree = params(block)
    twin = attention_linen.TransformerBlock(8, 2, **options)
    drawn = jax.eval_shape(twin.init, jax.random.key(0), X)["params"]
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, tree)
    return sorted(name for name in tree if "norm" in name)


def test_norms_of_sublayers():
    first, second = "attention_norm", "feed_forward_norm"
    assert norms_of(parallel=True) == [first, second]
    assert norms_of(parallel=True, share_norm=True) == [first]
    assert norms_of(norm_placement="none") == []
    assert norms_of(norm_placement={"attention": "none"}) == [second]
    both = {"parallel": True, "share_norm": True, "norm_placement": "both"}
    branches = ["attention_branch_norm", "feed_forward_branch_norm"]
    assert norms_of(**both) == [branches[0], first, branches[1]]


def test_a_norm_of_the_branch_alone():
    def scale(features=None, **options):
        del features
        options.pop("rngs", None)
        return lambda x: 3 * x

    options = {"norm_placement": "both", "branch_norm": scale}
    assert norms_of(**options) == ["attention_norm", "feed_forward_norm"]


@pytest.mark.slow
@pytest.mark.parametrize("shared", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_sublayers_in_parallel(shared):
    options = {"parallel": True, "share_norm": shared}
    block = drawn_anew(attention_nnx.TransformerBlock(8, 2, **options, rngs=nnx.Rngs(0)))
    twin = attention_linen.TransformerBlock(8, 2, **options)
    mask = masks.Causal()

    @nnx.jit
    def run(block):
        norm = block.attention_norm if shared else block.feed_forward_norm
        attended = block.attention(block.attention_norm(X), mask=mask)
        expected = X + attended + block.feed_forward(norm(X))
        below, cache = block.decode(X[:, :3], block.init_cache(2, 5))
        above, _ = block.decode(X[:, 3:], cache)
        found = twin.apply({"params": params(block)}, X, mask=mask)
        return expected, block(X, mask=mask), found, jnp.concatenate([below, above], axis=1)

    expected, *others = run(block)
    for other in others:
        chex.assert_trees_all_close(other, expected, atol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_sublayers_without_a_norm():
    block = drawn_anew(
        attention_nnx.TransformerBlock(
            8, 2, norm_placement={"attention": "none", "feed_forward": "after"}, rngs=nnx.Rngs(0)
        )
    )
    y = X + block.attention(X)
    expected = block.feed_forward_norm(y + block.feed_forward(y))
    chex.assert_trees_all_close(block(X), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_placement": {"output": "before"}}, r"or a dict of these .* for 'output'"),
        ({"norm_placement": {"attention": "first"}}, r"got 'first' for 'attention'"),
        ({"parallel": True, "norm_placement": "after"}, r"in a parallel block no norm comes after"),
        ({"share_norm": True}, r"share_norm needs parallel=True and .* got parallel = False"),
        (
            {"parallel": True, "share_norm": True, "norm_placement": "branch"},
            r"share_norm needs .* norm_placement 'branch'",
        ),
    ],
)
def test_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=f"TransformerBlock: .*{message}"):
        attention_nnx.TransformerBlock(8, 2, **options, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"TransformerBlock: .*{message}"):
        jax.eval_shape(attention_linen.TransformerBlock(8, 2, **options).init, jax.random.key(0), X)


def test_options_are_described():
    fields = [name for name in vars(BlockOptions()) if f"      {name}:" not in BlockOptions.__doc__]
    assert not fields


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_norm_of_all_heads_together():
    options = {"num_key_heads": 1, "joint_qk_norm": True}
    build = functools.partial(attention_nnx.MultiHeadAttention, 2, 8, **options)
    layer = drawn_anew(build(qk_norm=nnx.RMSNorm, rngs=nnx.Rngs(0)))
    assert layer.query_ln.scale.shape == (8,) and layer.key_ln.scale.shape == (4,)
    query, key, _ = layer.heads(X)
    for heads, projected, norm in (
        (query, layer.query(X), layer.query_ln),
        (key, layer.key(X), layer.key_ln),
    ):
        size = jnp.sqrt(jnp.mean(projected**2, axis=(2, 3), keepdims=True) + 1e-6)
        scale = norm.scale[...].reshape(heads.shape[2:])
        chex.assert_trees_all_close(heads, projected / size * scale[None, None], atol=1e-5)
    twin = attention_linen.MultiHeadAttention(2, 8, **options, qk_norm=nn.RMSNorm)
    found = twin.apply({"params": params(layer)}, X)
    chex.assert_trees_all_close(found, layer(X), atol=1e-5)
    with pytest.raises(ValueError, match=r"joint_qk_norm needs a norm; give qk_norm"):
        build(rngs=nnx.Rngs(0))
