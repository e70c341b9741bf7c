"""Every exported module: Linen and NNX have the same parameters, and with them the same results."""

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from attention_jax import linen as attention_linen
from attention_jax import masks, normalizers, positions, scores, statistics
from attention_jax import nnx as attention_nnx
from attention_jax.base.parameters import Parameter, learned
from attention_jax.layers import BlockOptions, HeadOptions, StackOptions
from attention_jax.linear import feature_maps


class Example(NamedTuple):
    """How a module is built and called, and how many numbers it learns."""

    sizes: tuple[Any, ...]
    inputs: tuple[Any, ...]
    parameters: int
    options: Mapping[str, Any] = {}
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
LAYERS = {"num_heads": 2, "num_layers": 1}

EXAMPLES = {
    "AdditiveAttention": Example(
        (8, 6), (STATE, MEMORY), 8 * 4 + 6 * 4 + 4 + 4, {"attention_size": 4}
    ),
    "Bound": Example((scores.bilinear,), (), 4 * 6, {"query_depth": 4, "key_depth": 6}),
    "CausalDecoder": Example(
        (10, 8), (TOKENS,), 10 * 8 + 5 * 8 + BLOCK + NORM, {**LAYERS, "max_length": 5}
    ),
    "DecoderAttention": Example((scores.bilinear, 8), (STATE, MEMORY), 8 * 6, WITH_MEMORY),
    "Embedding": Example(
        (10, 8), (TOKENS,), 10 * 8 + 5 * 8, {"position": positions.learned_table(5, 8)}
    ),
    "EncoderDecoder": Example(
        (10, 12),
        (TOKENS, TOKENS, LENGTHS),
        10 * 8 + 12 * 8 + BLOCK + BLOCK + ATTENTION + NORM,
        {"features": 8, **LAYERS},
    ),
    "FeedForward": Example((8,), (x(3),), FEED_FORWARD),
    "GlobalAttention": Example((scores.bilinear, 8), (STATE, MEMORY), 8 * 6 + 14 * 8, WITH_MEMORY),
    "LinearAttention": Example(
        (2, 8),
        (x(3), MEMORY),
        CROSS - NORM,
        WITH_MEMORY,
        call={"mask": masks.Lengths(jnp.array([5, 2]))},
    ),
    "LinformerAttention": Example(
        (2, 8),
        (x(3), MEMORY),
        CROSS - NORM + 2 * (3 * 5),
        {"length": 5, "rank": 3, **WITH_MEMORY},
        call={"mask": LENGTHS},
    ),
    "LongformerAttention": Example(
        (2, 8),
        (x(5),),
        7 * (8 * 8 + 8),
        call={"mask": masks.longformer(2, tokens=1), "global_tokens": jnp.array([0])},
    ),
    "MultiHeadAttention": Example(
        (2, 8),
        (x(3), MEMORY),
        CROSS - NORM,
        WITH_MEMORY,
        call={"return_weights": True, "statistics": {"entropy": statistics.entropy}},
    ),
    "PatchEncoder": Example(
        ((4, 6), 2),
        (jax.random.normal(jax.random.key(3), (2, 4, 6, 3)),),
        (12 * 8 + 8) + 8 + 7 * 8 + BLOCK + NORM + (8 * 5 + 5),
        {"num_channels": 3, "num_classes": 5, "features": 8, **LAYERS},
    ),
    "TokenEncoder": Example(
        (10, 8), (TOKENS, LENGTHS), 10 * 8 + 5 * 8 + BLOCK, {**LAYERS, "max_length": 5}
    ),
    "TransformerBlock": Example(
        (8, 2),
        (x(3), MEMORY),
        BLOCK + CROSS,
        WITH_MEMORY,
        call={
            "mask": masks.Causal(),
            "return_weights": True,
            "statistics": {"largest": statistics.head_largest_logit},
        },
    ),
    "TransformerStack": Example(
        (2, 8),
        (x(3), MEMORY),
        2 * (BLOCK + CROSS) + NORM,
        {"num_heads": 2, **WITH_MEMORY},
        call={"mask": masks.Causal()},
    ),
}


def test_every_export_has_a_twin_and_an_example():
    assert set(attention_nnx.__all__) == set(attention_linen.__all__)
    missing = set(attention_nnx.__all__) - set(EXAMPLES)
    assert not missing, f"add to tests/contract/test_modules.py: {sorted(missing)}"


def made_anew(name):
    # New function objects each time: what the module is told is the same.
    options = {name: functools.partial(value) for name, value in FUNCTIONS.get(name, {}).items()}
    sizes, _, _, given, *_ = EXAMPLES[name]
    return getattr(attention_nnx, name)(*sizes, **{**given, **options}, rngs=nnx.Rngs(0))


def half(x):
    return x / 2


# Options that are functions, where a module has any.
FUNCTIONS = {
    "CausalDecoder": {"activation": half},
    "Embedding": {"position": functools.partial(positions.sinusoidal, depth=8)},
    "EncoderDecoder": {"position": functools.partial(positions.sinusoidal, depth=8)},
    "FeedForward": {"activation": half},
    "LinearAttention": {"position": functools.partial(positions.rotary, halves=True)},
    "MultiHeadAttention": {"position": functools.partial(positions.rotary, halves=True)},
    "TransformerStack": {"activation": half},
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_equal_arguments_make_equal_graphs(name):
    """So that `nnx.jit` traces once for both."""
    (first, _), (second, _) = (nnx.split(nnx.eval_shape(lambda: made_anew(name))) for _ in "ab")
    assert first == second and hash(first) == hash(second)


def test_layers_with_what_they_learn_trace_once():
    count = []

    @nnx.jit
    def run(layer, x):
        count.append(None)
        return layer.query.kernel.sum() + x.sum()

    for seed in range(2):
        sink = Parameter((), lambda key, shape, dtype: jnp.zeros(shape, dtype))
        layer = attention_nnx.MultiHeadAttention(
            2,
            8,
            bias=positions.learned_buckets(8, 7),
            normalizer=learned(normalizers.softmax_with_sink, sink=sink),
            position=functools.partial(positions.rotary, base=500.0),
            rngs=nnx.Rngs(seed),
        )
        run(layer, x(3))
    assert len(count) == 1


SIZE_TYPES = {"int", "int | None", "int | Sequence[int] | None"}
OPTIONS = (HeadOptions, BlockOptions, StackOptions)
MAY_BE_ZERO = {"num_layers"}
# A function with a size to choose, where the default has none.
WITH_SIZE = {
    "attention_size": {"score": scores.additive, "function": scores.additive},
    "feature_size": {"feature_map": feature_maps.hedgehog},
}


def sizes_of(name):
    """Return the names of the whole numbers that a module is built from."""
    module = getattr(attention_nnx, name)
    types = {p.name: p.annotation for p in inspect.signature(module.__init__).parameters.values()}
    types |= {
        field.name: field.type
        for kind in OPTIONS
        if issubclass(getattr(attention_linen, name), kind)
        for field in dataclasses.fields(kind)
    }
    return sorted({n for n, kind in types.items() if kind in SIZE_TYPES} - MAY_BE_ZERO)


SIZES = [(name, size) for name in EXAMPLES for size in sizes_of(name)]


@pytest.mark.parametrize(("name", "size"), SIZES, ids=lambda part: part)
def test_a_size_of_zero_is_refused(name, size):
    """It neither becomes another size in silence nor fails somewhere below."""
    sizes, inputs, _, options, call = EXAMPLES[name]
    build, twin = getattr(attention_nnx, name), getattr(attention_linen, name)
    names = list(inspect.signature(build.__init__).parameters)[1:]
    with_size = {n: x for n, x in WITH_SIZE.get(size, {}).items() if n in names}
    changed = {**dict(zip(names, sizes, strict=False)), **with_size, size: 0}
    message = rf"{size} must be (1 or more|a multiple|positive)"
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: build(**{**options, **changed}, rngs=nnx.Rngs(0))(*inputs, **call))
    module = twin(**{**options, **changed})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda key: module.init(key, *inputs, **call), jax.random.key(0))


def test_sizes_are_found():
    assert ("MultiHeadAttention", "num_key_heads") in SIZES and len(SIZES) > 40


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_twins(name):
    """The trees agree, so do the results on the parameters of NNX; `jit` changes neither."""
    sizes, inputs, parameters, options, call = EXAMPLES[name]
    module = getattr(attention_nnx, name)(*sizes, **options, rngs=nnx.Rngs(0))
    twin = getattr(attention_linen, name)(*sizes, **options)
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
