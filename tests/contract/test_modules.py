"""Every exported module: Linen and NNX have the same parameters, and with them the same results."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from attention_jax import linen as attention_linen
from attention_jax import masks, positions, scores
from attention_jax import nnx as attention_nnx


class Example(NamedTuple):
    """How a module is built and called, and how many numbers it learns.

    What NNX takes as keywords, a Linen twin may take as its field `options`.
    """

    sizes: tuple[Any, ...]
    inputs: tuple[Any, ...]
    parameters: int
    options: Mapping[str, Any] = {}
    linen_options: Mapping[str, Any] = {}
    call: Mapping[str, Any] = {}


def x(length, features=8, seed=0):
    return jax.random.normal(jax.random.key(seed), (2, length, features))


STATE, MEMORY = x(1)[:, 0], x(5, 6, seed=1)
TOKENS = jnp.array([[1, 2, 3], [4, 0, 9]])
LENGTHS = masks.Lengths(jnp.array([3, 2]))
ATTENTION = 4 * (8 * 8 + 8)
FEED_FORWARD = (8 * 32 + 32) + (32 * 8 + 8)
NORM = 2 * 8
BLOCK = ATTENTION + NORM + FEED_FORWARD + NORM
CROSS = 2 * (8 * 8 + 8) + 2 * (6 * 8 + 8) + NORM
WITH_MEMORY = {"memory_features": 6}

EXAMPLES = {
    "AdditiveAttention": Example((8, 6, 4), (STATE, MEMORY), 8 * 4 + 6 * 4 + 4 + 4),
    "Bound": Example((scores.bilinear, 4, 6), (), 4 * 6),
    "CausalDecoder": Example((10, 8, 2, 1, 5), (TOKENS,), 10 * 8 + 5 * 8 + BLOCK + NORM),
    "DecoderAttention": Example((scores.bilinear, 8, 6), (STATE, MEMORY), 8 * 6),
    "Embedding": Example(
        (10, 8), (TOKENS,), 10 * 8 + 5 * 8, {"position": positions.learned_table(5, 8)}
    ),
    "EncoderDecoder": Example(
        (10, 12, 8, 2, 1),
        (TOKENS, TOKENS, LENGTHS),
        10 * 8 + 12 * 8 + BLOCK + BLOCK + ATTENTION + NORM,
    ),
    "FeedForward": Example((8,), (x(3),), FEED_FORWARD),
    "GlobalAttention": Example((scores.bilinear, 8, 6), (STATE, MEMORY), 8 * 6 + 14 * 8),
    "LinearAttention": Example(
        (2, 8, 6), (x(3), MEMORY), CROSS - NORM, call={"mask": masks.Lengths(jnp.array([5, 2]))}
    ),
    "LinformerAttention": Example(
        (2, 8, 6),
        (x(3), MEMORY),
        CROSS - NORM + 2 * (3 * 5),
        {"length": 5, "rank": 3},
        call={"mask": LENGTHS},
    ),
    "MultiHeadAttention": Example(
        (2, 8, 6), (x(3), MEMORY), CROSS - NORM, call={"return_weights": True}
    ),
    "PatchEncoder": Example(
        ((4, 6), 2, 3, 5, 8, 2, 1),
        (jax.random.normal(jax.random.key(3), (2, 4, 6, 3)),),
        (12 * 8 + 8) + 8 + 7 * 8 + BLOCK + NORM + (8 * 5 + 5),
    ),
    "TokenEncoder": Example((10, 8, 2, 1, 5), (TOKENS, LENGTHS), 10 * 8 + 5 * 8 + BLOCK),
    "TransformerBlock": Example(
        (8, 2),
        (x(3), MEMORY),
        BLOCK + CROSS,
        WITH_MEMORY,
        call={"mask": masks.Causal(), "return_weights": True},
    ),
    "TransformerStack": Example(
        (2, 8, 2),
        (x(3), MEMORY),
        2 * (BLOCK + CROSS) + NORM,
        WITH_MEMORY,
        {"options": WITH_MEMORY},
        call={"mask": masks.Causal()},
    ),
}


def test_every_export_has_a_twin_and_an_example():
    assert set(attention_nnx.__all__) == set(attention_linen.__all__)
    missing = set(attention_nnx.__all__) - set(EXAMPLES)
    assert not missing, f"add to tests/contract/test_modules.py: {sorted(missing)}"


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_twins(name):
    """The trees agree, so do the results on the parameters of NNX; `jit` changes neither."""
    sizes, inputs, parameters, options, linen_options, call = EXAMPLES[name]
    module = getattr(attention_nnx, name)(*sizes, **options, rngs=nnx.Rngs(0))
    twin = getattr(attention_linen, name)(*sizes, **(linen_options or options))
    tree = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    # Away from their initial values, so that zeros and ones count for something.
    tree = jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), tree
    )
    nnx.update(module, nnx.State(tree))
    variables = {"params": tree}

    drawn = jax.eval_shape(lambda key: twin.init(key, *inputs, **call), jax.random.key(1))
    chex.assert_trees_all_equal_shapes_and_dtypes(drawn, variables)
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == parameters

    result = module(*inputs, **call)
    chex.assert_trees_all_close(twin.apply(variables, *inputs, **call), result, atol=1e-6)
    jitted = nnx.jit(lambda module, inputs: module(*inputs, **call))(module, inputs)
    chex.assert_trees_all_close(jitted, result, atol=1e-5)
    jitted = jax.jit(lambda variables, inputs: twin.apply(variables, *inputs, **call))
    chex.assert_trees_all_close(jitted(variables, inputs), result, atol=1e-5)
    assert all(jnp.all(jnp.isfinite(leaf)) and jnp.any(leaf) for leaf in jax.tree.leaves(result))
