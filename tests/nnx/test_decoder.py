"""The attention of a decoder: any score, prepared keys, inside scan and under vmap."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attention_jax import attend, masks, normalizers, scores
from attention_jax.base.parameters import Parameter, learned
from attention_jax.nnx import AdditiveAttention, DecoderAttention, GlobalAttention

ALL = [
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
LARGE = {"value": jax.nn.initializers.normal(1.0), "query_weight": jax.nn.initializers.normal(1.0)}


def data(state_features=8, memory_features=8, length=7, batch=3):
    keys = jax.random.split(jax.random.key(1), 2)
    state = jax.random.normal(keys[0], (batch, state_features))
    return state, jax.random.normal(keys[1], (batch, length, memory_features))


@pytest.mark.slow
@pytest.mark.parametrize("score", ALL, ids=lambda score: score.__name__)
def test_equals_attend_with_the_same_bound_score(score):
    state, memory = data()
    states = jnp.stack([state, 2 * state, -state, state + 1], axis=1)
    module = DecoderAttention(score, 8, memory_features=8, attention_size=5, rngs=nnx.Rngs(0))
    mask = masks.Lengths(jnp.array([7, 0, 3]))
    context, weights = module(states, memory, mask)
    expected = attend(
        states[:, :, None],
        memory[:, :, None],
        memory[:, :, None],
        score=module.score(),
        mask=mask,
        return_weights=True,
    )
    chex.assert_trees_all_close(context, expected.context[:, :, 0], atol=1e-5)
    chex.assert_trees_all_close(weights, expected.weights[:, 0], atol=1e-5)
    assert not np.any(context[1]) and not np.any(weights[1])


@pytest.mark.slow
@pytest.mark.parametrize("score", ALL, ids=lambda score: score.__name__)
def test_one_state_is_several_states_one_at_a_time(score):
    state, memory = data()
    module = DecoderAttention(score, 8, memory_features=8, rngs=nnx.Rngs(0))
    source = module.keys(memory)
    context, weights = module(jnp.stack([state, -state], axis=1), source)
    for t, one in enumerate([state, -state]):
        step_context, step_weights = module(one, source)
        assert step_context.shape == (3, 8) and step_weights.shape == (3, 7)
        chex.assert_trees_all_close(context[:, t], step_context, atol=1e-5)
        chex.assert_trees_all_close(weights[:, t], step_weights, atol=1e-5)


@pytest.mark.slow
def test_additive_is_the_formula_of_the_paper():
    state, memory = data(8, 16)
    module = AdditiveAttention(8, 16, attention_size=5, initializers=LARGE, rngs=nnx.Rngs(0))
    p = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Param)))["score"]
    projected_query = (np.asarray(state) @ p["query_weight"])[:, None]
    projected_keys = np.asarray(memory) @ p["key_weight"] + p["bias"][None, None]
    energy = np.tanh(projected_query + projected_keys) @ p["value"]
    alpha = np.exp(energy) / np.exp(energy).sum(-1, keepdims=True)
    context, weights = module(state, memory)
    np.testing.assert_allclose(weights, alpha, atol=1e-5)
    np.testing.assert_allclose(context, np.einsum("bs,bsd->bd", alpha, memory), atol=1e-5)
    np.testing.assert_allclose(module.keys(memory).key, projected_keys, atol=1e-5)


@pytest.mark.slow
def test_starts_with_uniform_weights():
    state, memory = data()
    _, weights = AdditiveAttention(8, 8, rngs=nnx.Rngs(0))(state, memory)
    np.testing.assert_allclose(weights, 1 / 7, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mask",
    [
        jnp.arange(7)[None, :] < jnp.array([7, 0, 3])[:, None],
        masks.Lengths(jnp.array([7, 0, 3])),
        masks.Lengths(jnp.array([7, 0, 3])) & masks.Full(),
    ],
    ids=["array", "lengths", "composed"],
)
def test_padding(mask):
    state, memory = data()
    module = AdditiveAttention(8, 8, initializers=LARGE, rngs=nnx.Rngs(0))
    spoiled = memory.at[2, 3:].set(jnp.nan).at[1].set(jnp.inf)

    def total(state, memory):
        context, weights = module(state, memory, mask)
        return jnp.sum(context**2), (context, weights)

    gradients, (context, weights) = jax.grad(total, (0, 1), has_aux=True)(state, spoiled)
    assert not np.any(context[1]) and not np.any(weights[1])
    chex.assert_tree_all_finite((gradients, context, weights))
    alone, _ = module(state[2:], memory[2:, :3])
    np.testing.assert_allclose(context[2:], alone, atol=1e-6)
    assert not np.any(gradients[0][1]) and not np.any(gradients[1][1])
    assert not np.any(gradients[1][2, 3:])


@pytest.mark.slow
@pytest.mark.parametrize("make", [list, np.asarray, jnp.asarray], ids=["lists", "numpy", "jax"])
def test_a_mask_of_any_numbers_is_the_mask_of_attend(make):
    """Also one axis of size 1 for all examples, a table of each, and 64-bit numbers."""
    state, memory = data()
    module = DecoderAttention(scores.bilinear, 8, memory_features=8, rngs=nnx.Rngs(0))
    table = jax.random.bernoulli(jax.random.key(3), 0.7, (3, 1, 7))
    first = masks.Segment(make([1]), make([0, 1, 1, 1, 1, 0, 1]))
    mask = first & masks.Lengths(make([5, 3, 7])) & masks.Prefix(make([6]))
    with jax.enable_x64(make is not jnp.asarray):
        context, weights = module(state, memory, mask & table)
        expected = attend(
            *(x[:, :, None] for x in (state[:, None], memory, memory)),
            score=module.score(),
            mask=mask & table[:, None],
            return_weights=True,
        )
    chex.assert_trees_all_close(context, expected.context[:, 0, 0], atol=1e-6)
    chex.assert_trees_all_close(weights, expected.weights[:, 0, 0], atol=1e-6)


def test_a_mask_of_another_length_is_refused():
    state, memory = data()
    module = DecoderAttention(scores.dot, 8, memory_features=8, rngs=nnx.Rngs(0))
    for mask, message in (
        (
            masks.Segment([1], [0, 1]),
            "attend_prepared: Segment.key_ids must hold an entry for each of the S",
        ),
        (
            masks.Lengths([5, 3, 7]) & jnp.ones((3, 7), bool),
            "attend_prepared: Table.allowed must broadcast",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            module(state, memory, mask)


@pytest.mark.slow
def test_attended_nan_is_not_hidden():
    state, memory = data()
    context, _ = AdditiveAttention(8, 8, rngs=nnx.Rngs(0))(state, memory.at[0, 2, 1].set(jnp.nan))
    assert np.all(np.isnan(context[0])) and np.all(np.isfinite(context[1:]))


def scan(module, states, memory):
    source = module.keys(memory)

    def step(carry, state):
        context, weights = module(state + carry, source)
        return jnp.tanh(context), weights

    return jax.lax.scan(step, jnp.zeros_like(states[0]), states)


@pytest.mark.slow
@pytest.mark.parametrize("score", [scores.additive, scores.bilinear], ids=["additive", "bilinear"])
def test_inside_scan_and_under_vmap_over_seeds(score):
    states = jax.random.normal(jax.random.key(2), (5, 3, 8))
    memory = data()[1]
    modules = [
        DecoderAttention(score, 8, memory_features=8, rngs=nnx.Rngs(seed)) for seed in range(2)
    ]
    graph = nnx.graphdef(modules[0])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(nnx.state(module) for module in modules))

    def loss(state):
        final, weights = scan(nnx.merge(graph, state), states, memory)
        return jnp.sum(final**2), weights

    run = jax.jit(jax.vmap(jax.value_and_grad(loss, has_aux=True)))
    (values, weights), gradients = run(stacked)
    assert weights.shape == (2, 5, 3, 7)
    for seed, module in enumerate(modules):
        (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(nnx.state(module))
        np.testing.assert_allclose(values[seed], value, rtol=1e-5)
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, seed=seed: x[seed], gradients), gradient, atol=1e-5
        )


@pytest.mark.slow
def test_learns_to_find_the_key_that_the_state_names():
    keys = jax.random.split(jax.random.key(0), 3)
    state = jax.random.normal(keys[0], (64, 4))
    memory = jax.random.normal(keys[1], (64, 5, 4)).at[:, 2].set(state)
    module = AdditiveAttention(4, 4, attention_size=16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(module, optax.adam(0.03), wrt=nnx.Param)

    @nnx.jit
    def train(module, optimizer):
        def loss(module):
            _, weights = module(state, memory)
            return -jnp.mean(jnp.log(weights[:, 2] + 1e-9))

        value, gradients = nnx.value_and_grad(loss)(module)
        optimizer.update(module, gradients)
        return value

    with jax.numpy_dtype_promotion("standard"):
        first = train(module, optimizer)
        for _ in range(150):
            last = train(module, optimizer)
    np.testing.assert_allclose(first, np.log(5), atol=1e-3)
    assert last < 0.4


@pytest.mark.parametrize(
    "score",
    [pytest.param(scores.dot, marks=pytest.mark.slow), scores.bilinear, scores.concat],
    ids=["dot", "general", "concat"],
)
def test_luongs_attentional_vector(score):
    state, memory = data()
    module = GlobalAttention(score, 8, memory_features=8, out_features=6, rngs=nnx.Rngs(0))
    vector, weights = module(state, memory)
    context, expected_weights = module.attention(state, module.keys(memory))
    kernel = module.combine.kernel[...]
    expected = np.tanh(np.concatenate([context, state], axis=-1) @ kernel)
    np.testing.assert_allclose(vector, expected, atol=1e-6)
    np.testing.assert_array_equal(weights, expected_weights)
    assert module.combine.bias is None and kernel.shape == (16, 6)
    assert np.abs(kernel).max() <= 0.1


@pytest.mark.slow
def test_a_learned_sink_lets_a_state_attend_to_nothing():
    sink = Parameter((), jax.nn.initializers.constant(2.0))
    module = DecoderAttention(
        scores.dot,
        8,
        memory_features=8,
        normalizer=learned(normalizers.softmax_with_sink, sink=sink),
        rngs=nnx.Rngs(0),
    )
    state, memory = data()
    _, weights = module(0.0 * state, memory)
    np.testing.assert_allclose(weights, 1 / (7 + np.exp(2.0)), rtol=1e-5)
    gradient = nnx.grad(lambda module: jnp.sum(module(state, memory)[1]))(module)
    assert np.all(np.abs(gradient["normalizer"]["sink"][...]) > 1e-3)


def test_mixed_precision():
    state, memory = data()
    module = AdditiveAttention(8, 8, initializers=LARGE, rngs=nnx.Rngs(0))
    exact, exact_weights = module(state, memory)
    context, weights = module(state.astype(jnp.bfloat16), memory.astype(jnp.bfloat16))
    assert context.dtype == jnp.bfloat16 and weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, exact_weights, atol=0.05)
    np.testing.assert_allclose(context.astype(jnp.float32), exact, atol=0.1)


def test_bad_input_is_explained():
    module = AdditiveAttention(8, 16, rngs=nnx.Rngs(0))
    state, memory = data(8, 16)
    with pytest.raises(
        ValueError,
        match=r"DecoderAttention: the last axis of state must be 8, .* got shape \(3, 7, 16\)",
    ):
        module(memory, memory)
    with pytest.raises(ValueError, match=r"the last axis of memory must be 16, .* shape \(3, 8\)"):
        module(state, state)
    with pytest.raises(ValueError, match=r"axis B \(number 0\) of key \[B, S, A\] must be 3"):
        module(state, memory[:2])
    with pytest.raises(ValueError, match=r"mask must broadcast to \[B, T, S\] = \(3, 1, 7\)"):
        module(state, memory, jnp.ones((3, 5), bool))
    with pytest.raises(ValueError, match=r"may have one axis more .* size B = 3; got shape \(2,\)"):
        module(state, memory, masks.Lengths(jnp.array([1, 2])))
    with pytest.raises(ValueError, match=r"there is no parameter 'kernel'; the names are"):
        DecoderAttention(
            scores.bilinear,
            8,
            memory_features=8,
            initializers={"kernel": jax.nn.initializers.ones},
            rngs=nnx.Rngs(0),
        )
