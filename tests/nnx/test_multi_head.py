"""Multi-head attention: heads, scores, masks, positions, norms, dropout, precision."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax import (
    attend,
    bind,
    diagnostics,
    masks,
    normalizers,
    per_head,
    scores,
    statistics,
)
from attention_jax.base import Sliced
from attention_jax.base.parameters import Parameter, learned
from attention_jax.nnx import MultiHeadAttention

SCORES = [
    scores.dot,
    scores.scaled_dot,
    scores.key_normalized_dot,
    scores.cosine,
    scores.bilinear,
    scores.low_rank_bilinear,
    scores.shared_projection,
    scores.additive,
    scores.concat,
]


def inputs(length=5, features=12, batch=2, seed=1):
    return jax.random.normal(jax.random.key(seed), (batch, length, features))


def projected(module, x, memory=None):
    projections = module._projections()
    memory = x if memory is None else memory
    return projections.queries(x), projections.memory(memory)


def parameters(module):
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def shapes(module):
    return jax.tree.map(jnp.shape, parameters(module))


def count(module):
    return sum(leaf.size for leaf in jax.tree.leaves(parameters(module)))


@pytest.mark.slow
@pytest.mark.parametrize("num_key_heads", [None, 2, 1])
def test_default_is_the_module_of_flax(num_key_heads):
    ours = MultiHeadAttention(4, 12, num_key_heads=num_key_heads, rngs=nnx.Rngs(0))
    theirs = nnx.MultiHeadAttention(
        4, 12, num_kv_heads=num_key_heads, decode=False, rngs=nnx.Rngs(1)
    )
    chex.assert_trees_all_equal_shapes(parameters(ours), parameters(theirs))
    nnx.update(ours, nnx.state(theirs, nnx.Param))
    x, memory = inputs(), inputs(7, seed=2)
    mask = masks.Causal().to_dense(5)
    if num_key_heads is None:
        expected = theirs(x, mask=jnp.broadcast_to(mask, (2, 4, 5, 5)))
        chex.assert_trees_all_close(ours(x, mask=masks.Causal()), expected, atol=1e-5)
        chex.assert_trees_all_close(ours(x, memory), theirs(x, memory), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.__name__)
@pytest.mark.parametrize(
    "share_score", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["each", "shared"]
)
def test_any_score_equals_attention_of_each_head_alone(score, share_score):
    module = MultiHeadAttention(
        4, 12, num_key_heads=2, score=score, share_score=share_score, rngs=nnx.Rngs(0)
    )
    state = nnx.state(module.score, nnx.Param)
    nnx.update(module.score, jax.tree.map(lambda x: x + 0.3, state))
    x, memory = inputs(), inputs(7, seed=2)
    query, (key, value) = projected(module, x, memory)
    output, weights = module(x, memory, return_weights=True)
    bound = module.score()
    assert isinstance(bound, Sliced) == (not share_score and bool(jax.tree.leaves(bound)))
    for n in range(4):
        head = bound
        if isinstance(bound, Sliced):
            head = jax.tree.map(lambda leaf, n=n: leaf[n], bound.function)
        alone = attend(
            query[:, :, n : n + 1],
            key[:, :, n // 2 : n // 2 + 1],
            value[:, :, n // 2 : n // 2 + 1],
            score=head,
            return_weights=True,
        )
        chex.assert_trees_all_close(weights[:, n : n + 1], alone.weights, atol=1e-5)
    context = jnp.einsum("bnts,bsnv->btnv", weights, jnp.repeat(value, 2, axis=2))
    chex.assert_trees_all_close(output, module.out(context), atol=1e-5)


@pytest.mark.slow
def test_depths_of_query_key_and_value_may_differ():
    module = MultiHeadAttention(
        3,
        12,
        memory_features=10,
        out_features=8,
        query_depth=4,
        key_depth=5,
        value_depth=6,
        score=scores.additive,
        attention_size=7,
        rngs=nnx.Rngs(0),
    )
    assert shapes(module) == {
        "query": {"kernel": (12, 3, 4), "bias": (3, 4)},
        "key": {"kernel": (10, 3, 5), "bias": (3, 5)},
        "value": {"kernel": (10, 3, 6), "bias": (3, 6)},
        "out": {"kernel": (3, 6, 8), "bias": (8,)},
        "score": {
            "query_weight": (3, 4, 7),
            "key_weight": (3, 5, 7),
            "value": (3, 7),
            "bias": (3, 7),
        },
    }
    output, weights = module(inputs(), inputs(7, 10), return_weights=True)
    assert output.shape == (2, 5, 8) and weights.shape == (2, 3, 5, 7)


@pytest.mark.slow
def test_summed_heads_are_concatenated_heads_with_one_repeated_block():
    summed = MultiHeadAttention(3, 12, combine="sum", rngs=nnx.Rngs(0))
    concatenated = MultiHeadAttention(3, 12, rngs=nnx.Rngs(1))
    assert summed.out.kernel.shape == (4, 12)
    for name in ("query", "key", "value"):
        nnx.update(getattr(concatenated, name), nnx.state(getattr(summed, name)))
    concatenated.out.kernel[...] = jnp.broadcast_to(summed.out.kernel[...], (3, 4, 12))
    x = inputs()
    chex.assert_trees_all_close(summed(x), concatenated(x), atol=1e-5)
    assert count(concatenated) - count(summed) == 2 * 4 * 12


def test_parameters_do_not_grow_with_heads_at_constant_width():
    counts = {count(MultiHeadAttention(n, 12, rngs=nnx.Rngs(0))) for n in (1, 2, 3, 4, 6, 12)}
    assert counts == {4 * 12 * 13}


def test_shared_query_and_key_give_symmetric_logits():
    module = MultiHeadAttention(3, 12, share_query_key=True, rngs=nnx.Rngs(0))
    assert set(shapes(module)) == {"query", "value", "out"}
    query, (key, _) = projected(module, inputs())
    np.testing.assert_array_equal(query, key)
    logits = jnp.einsum("btnh,bsnh->bnts", query, key)
    chex.assert_trees_all_close(logits, logits.swapaxes(2, 3), atol=1e-5)


@pytest.mark.slow
def test_without_projections_it_is_softmax_x_xt_x():
    module = MultiHeadAttention(1, 12, projections=False, score=scores.dot, rngs=nnx.Rngs(0))
    assert shapes(module) == {}
    x = inputs()
    expected = jnp.einsum("bts,bsd->btd", jax.nn.softmax(jnp.einsum("btd,bsd->bts", x, x)), x)
    chex.assert_trees_all_close(module(x), expected, atol=1e-5)
    three = MultiHeadAttention(3, 12, projections=False, combine="sum", rngs=nnx.Rngs(0))
    assert three(x).shape == (2, 5, 4)


@pytest.mark.parametrize("norm", [nnx.LayerNorm, nnx.RMSNorm])
def test_norm_of_query_and_key_bounds_the_logits(norm):
    module = MultiHeadAttention(3, 12, qk_norm=norm, rngs=nnx.Rngs(0))
    query, (key, _) = projected(module, 1e4 * inputs())
    logits = jnp.einsum("btnh,bsnh->bnts", query, key)
    assert jnp.max(jnp.abs(logits)) <= 4.0 + 1e-3  # |q| |k| = sqrt(H) sqrt(H), H = 4
    assert shapes(module)["query_ln"]["scale"] == shapes(module)["key_ln"]["scale"] == (4,)


@pytest.mark.slow
def test_masks_of_every_kind_and_empty_rows():
    module = MultiHeadAttention(3, 12, use_bias=False, rngs=nnx.Rngs(0))
    x = inputs()
    for mask in (
        masks.Causal(),
        masks.Causal() & masks.Window(2, 0),
        masks.Lengths(jnp.array([5, 0])),
        lambda q_idx, kv_idx: q_idx != kv_idx,
        masks.Causal().to_dense(5),
    ):
        output, weights = module(x, mask=mask, return_weights=True)
        query, (key, value) = projected(module, x)
        expected = attend(query, key, value, mask=mask, return_weights=True)
        chex.assert_trees_all_close(weights, expected.weights, atol=1e-6)
        chex.assert_trees_all_close(output, module.out(expected.context), atol=1e-6)
    assert not np.any(module(x, mask=masks.Lengths(jnp.array([5, 0])))[1])


@pytest.mark.slow
def test_nothing_comes_from_the_future():
    module = MultiHeadAttention(3, 12, score=scores.additive, rngs=nnx.Rngs(0))
    jacobian = jax.jacrev(lambda x: module(x[None], mask=masks.Causal())[0])(inputs()[0])
    for i in range(5):
        assert not np.any(jacobian[i, :, i + 1 :])
        assert np.any(jacobian[i, :, i])


@pytest.mark.slow
def test_bias_as_function_as_learned_function_as_module_and_at_the_call():
    x = inputs()

    def distance(q_idx, kv_idx, slope):
        return -slope * jnp.abs(q_idx - kv_idx).astype(slope.dtype)

    slopes = jnp.array([0.5, 1.0, 2.0])

    class Distance(nnx.Module):
        def __init__(self):
            self.slope = nnx.Param(jnp.array(0.5))

        def __call__(self, q_idx, kv_idx):
            return distance(q_idx, kv_idx, self.slope[...])

    bound = per_head(bind(distance, slope=slopes))
    declared = learned(distance, slope=Parameter((), jax.nn.initializers.constant(0.5)))
    plain = MultiHeadAttention(3, 12, rngs=nnx.Rngs(0))
    fixed = MultiHeadAttention(3, 12, bias=bound, rngs=nnx.Rngs(0))
    trained = MultiHeadAttention(3, 12, bias=declared, rngs=nnx.Rngs(0))
    module = MultiHeadAttention(3, 12, bias=Distance(), rngs=nnx.Rngs(0))
    assert shapes(trained)["bias"] == {"slope": (3,)} and "bias" not in shapes(fixed)
    chex.assert_trees_all_close(fixed(x), plain(x, bias=bound), atol=1e-6)
    half = per_head(bind(distance, slope=jnp.full(3, 0.5)))
    chex.assert_trees_all_close(trained(x), plain(x, bias=half), atol=1e-6)
    chex.assert_trees_all_close(module(x), plain(x, bias=half), atol=1e-6)
    for learner in (trained, module):
        gradient = nnx.grad(lambda learner: jnp.sum(learner(x) ** 2))(learner)
        assert np.all(np.abs(jax.tree.leaves(gradient["bias"])[0]) > 0)
    assert len(jax.tree.leaves(nnx.state(fixed, nnx.Param))) == 8


def test_a_sink_of_each_head_is_learned():
    sink = Parameter((), jax.nn.initializers.zeros)
    module = MultiHeadAttention(
        3, 12, normalizer=learned(normalizers.softmax_with_sink, sink=sink), rngs=nnx.Rngs(0)
    )
    _, weights = module(inputs(), return_weights=True)
    assert shapes(module)["normalizer"] == {"sink": (3,)} and np.all(weights.sum(-1) < 1)


@pytest.mark.slow
def test_position_is_applied_to_queries_and_keys_where_they_stand():
    def turn(x, positions):
        angle = positions.astype(x.dtype)[:, None]
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate(
            [
                first * jnp.cos(angle) - second * jnp.sin(angle),
                first * jnp.sin(angle) + second * jnp.cos(angle),
            ],
            axis=-1,
        )

    module = MultiHeadAttention(3, 12, position=turn, rngs=nnx.Rngs(0))
    plain = MultiHeadAttention(3, 12, rngs=nnx.Rngs(0))
    x = inputs()
    assert not np.allclose(module(x), plain(x), atol=1e-3)
    shifted = jnp.arange(5) + 11  # only distances matter
    chex.assert_trees_all_close(module(x, positions=shifted), module(x), atol=1e-5)
    chex.assert_trees_all_equal(
        module(x, positions=[4, 2, 0, 1, 3]), module(x, positions=jnp.array([4, 2, 0, 1, 3]))
    )
    by_example = jnp.stack([jnp.arange(5), shifted])
    chex.assert_trees_all_close(module(x, positions=by_example), module(x), atol=1e-5)
    cross = module(x, inputs(7, seed=2), positions=shifted, memory_positions=jnp.arange(7) + 11)
    chex.assert_trees_all_close(cross, module(x, inputs(7, seed=2)), atol=1e-5)
    chex.assert_trees_all_close(module(x, positions=0 * shifted), plain(x), atol=1e-5)


@pytest.mark.slow
def test_dropout_follows_train_and_eval():
    module = MultiHeadAttention(3, 12, dropout_rate=0.5, rngs=nnx.Rngs(0, dropout=1))
    x = inputs()
    assert not np.allclose(module(x), module(x))
    key = nnx.Rngs(7)
    first = module(x, rngs=nnx.Rngs(7))
    np.testing.assert_array_equal(first, module(x, rngs=key))
    module.eval()
    plain = MultiHeadAttention(3, 12, rngs=nnx.Rngs(0))
    nnx.update(plain, nnx.state(module, nnx.Param))
    np.testing.assert_array_equal(module(x), plain(x))
    module.train()
    _, weights = module(x, return_weights=True)
    np.testing.assert_allclose(np.mean(weights == 0), 0.5, atol=0.15)
    np.testing.assert_array_equal(module(x, deterministic=True), plain(x))


def test_weights_are_returned_and_sown():
    module = MultiHeadAttention(3, 12, rngs=nnx.Rngs(0))
    x = inputs()
    output, weights = module(x, return_weights=True)
    run = nnx.capture(lambda module, x: module(x, sow_weights=True), nnx.Intermediate)
    result, sown = run(module, x)
    np.testing.assert_array_equal(result, output)
    np.testing.assert_array_equal(sown["attention_weights"][0], weights)
    assert isinstance(module(x), jax.Array)


@pytest.mark.slow
def test_mixed_precision():
    module = MultiHeadAttention(3, 12, dtype=jnp.bfloat16, score=scores.bilinear, rngs=nnx.Rngs(0))
    exact = MultiHeadAttention(3, 12, score=scores.bilinear, rngs=nnx.Rngs(0))
    x = inputs()
    output, weights = module(x.astype(jnp.bfloat16), return_weights=True)
    assert output.dtype == jnp.bfloat16 and weights.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters(module))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(output.astype(jnp.float32), exact(x), atol=0.1)
    half = MultiHeadAttention(3, 12, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters(half))} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.slow
def test_jit_and_vmap_over_seeds_agree_with_a_loop():
    x = inputs()
    modules = [
        MultiHeadAttention(3, 12, score=scores.additive, dropout_rate=0.1, rngs=nnx.Rngs(seed))
        for seed in range(2)
    ]
    graph = nnx.graphdef(modules[0])
    stacked = jax.tree.map(lambda *leaf: jnp.stack(leaf), *(nnx.state(m) for m in modules))

    @jax.jit
    @jax.vmap
    def run(state):
        return nnx.merge(graph, state)(x, deterministic=True)

    outputs = run(stacked)
    for seed, module in enumerate(modules):
        chex.assert_trees_all_close(outputs[seed], module(x, deterministic=True), atol=1e-5)
        jitted = nnx.jit(lambda module, x: module(x, deterministic=True))(module, x)
        chex.assert_trees_all_close(outputs[seed], jitted, atol=1e-5)


def test_bad_arguments_are_explained():
    build = functools.partial(MultiHeadAttention, rngs=nnx.Rngs(0))
    cases = [
        ((5, 12), {}, r"in_features must be a multiple of num_heads, got in_features = 12"),
        ((4, 12), {"num_key_heads": 3}, r"num_heads must be a multiple of num_key_heads"),
        ((4, 12), {"combine": "mean"}, r"combine must be 'concat' or 'sum', got 'mean'"),
        (
            (4, 12),
            {"memory_features": 8, "share_query_key": True},
            r"one shape for query and key, got .* \(8, 4, 3\)",
        ),
        ((4, 12), {"projections": False, "query_depth": 2}, r"without projections the depths"),
        ((4, 12), {"initializers": {"weight": None}}, r"there is no parameter 'weight'"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            build(*arguments, **options)
    module = build(3, 12)
    with pytest.raises(ValueError, match=r"the last axis of query must be 12, .* \(2, 5, 8\)"):
        module(inputs(features=8))
    with pytest.raises(ValueError, match=r"MultiHeadAttention: query must have the 3 axes"):
        module(inputs()[0])
    with pytest.raises(ValueError, match=r"axis B .* of key \[B, S, K, H\] must be 2"):
        module(inputs(), inputs(batch=1))
    given = {"value": inputs(), "memory_positions": jnp.arange(5)}
    with pytest.raises(ValueError) as error:
        module(inputs(), module.keys(inputs()), **given)
    assert str(error.value) == (
        "MultiHeadAttention: value and memory_positions cannot be honoured, because the memory is "
        "already projected; give the memory itself, or its positions to keys."
    )


def test_statistics_are_returned_and_sown():
    module = MultiHeadAttention(3, 12, rngs=nnx.Rngs(0))
    x, asked = inputs(), {"entropy": statistics.entropy}
    output, weights, found = module(x, return_weights=True, statistics=asked)
    np.testing.assert_allclose(
        found["entropy"], diagnostics.entropy(weights).swapaxes(1, 2), rtol=1e-5
    )
    run = nnx.capture(
        lambda module, x: module(x, statistics=asked, sow_statistics=True), nnx.Intermediate
    )
    result, sown = run(module, x)
    np.testing.assert_allclose(result, output, rtol=1e-6)
    (left,) = sown["attention_statistics"].get_value()
    np.testing.assert_allclose(left["entropy"], found["entropy"], rtol=1e-6)
    with pytest.raises(ValueError) as caught:
        module(x, sow_statistics=True)
    assert str(caught.value) == (
        "MultiHeadAttention: sow_statistics needs statistics, a dict of those to compute."
    )
