import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from attention_jax import attend, normalizers, positions, scores
from attention_jax.base import binding
from attention_jax.base.binding import as_pytree, ask, bind, per_example, per_head, rule
from attention_jax.base.parameters import bind_parameters, initialize, parameters_of


def affine(x, weight, activation=jnp.tanh):
    return activation(weight * x)


def test_bound_parameters_are_the_leaves():
    bound = bind(affine, weight=jnp.float32(2.0), activation=jax.nn.relu)
    chex.assert_trees_all_equal(jax.tree.leaves(bound), [jnp.float32(2.0)])
    chex.assert_trees_all_close(bound(jnp.float32(3.0)), jnp.float32(6.0))


def test_a_bound_function_goes_through_jit_vmap_and_grad():
    bound = bind(affine, weight=jnp.float32(0.5))
    apply = jax.jit(lambda function, x: function(x))
    chex.assert_trees_all_close(apply(bound, jnp.float32(1.0)), jnp.tanh(jnp.float32(0.5)))

    slope = jax.grad(lambda function: function(jnp.float32(0.0)))(bound)
    assert jax.tree.structure(slope) == jax.tree.structure(bound)
    chex.assert_trees_all_close(slope.keywords["weight"], jnp.float32(0.0))

    many = bind(affine, weight=jnp.arange(3.0))
    mapped = jax.vmap(lambda function: function(jnp.float32(1.0)))(many)
    chex.assert_trees_all_close(mapped, jnp.tanh(jnp.arange(3.0)))


def test_rebinding_the_same_function_does_not_recompile():
    apply = jax.jit(chex.assert_max_traces(lambda function, x: function(x), n=1))
    for weight in (1.0, 2.0, 3.0):
        apply(bind(affine, weight=jnp.float32(weight), activation=jax.nn.relu), jnp.float32(1.0))


def test_an_optimizer_updates_a_bound_function():
    score = bind(scores.bilinear, weight=jnp.eye(2))
    query, key = jnp.ones((1, 2)), jnp.ones((1, 2))
    optimizer = optax.sgd(0.25)
    gradient = jax.grad(lambda score: score(query, key)[0, 0])(score)
    updates, _ = optimizer.update(gradient, optimizer.init(score), score)
    updated = optax.apply_updates(score, updates)
    chex.assert_trees_all_close(updated.keywords["weight"], jnp.eye(2) - 0.25)
    chex.assert_trees_all_close(updated(query, key), jnp.array([[1.0]]))


def test_as_pytree_wraps_plain_functions_only():
    assert jax.tree.leaves(as_pytree(jnp.tanh)) == []
    assert as_pytree(1.5) == 1.5
    array = jnp.ones(2)
    assert as_pytree(array) is array
    bound = bind(affine, weight=1.0)
    assert as_pytree(bound) is bound


def grouped(query, key, groups, weight, signed=True, sort="sum"):
    """Score with arguments that decide shapes and branches."""
    query, key = (x.reshape(len(x), groups, -1).sum(1) for x in (query, key))
    logits = weight * (query @ key.T if sort == "sum" else query @ key.T[:, ::-1])
    return logits if signed else jnp.abs(logits)


@pytest.mark.slow
def test_what_shapes_a_program_is_no_leaf():
    options = {"groups": 2, "signed": False, "sort": "sum"}
    bound = bind(grouped, weight=jnp.float32(0.5), **options)
    assert len(jax.tree.leaves(bound)) == 1 and bound.keywords["groups"] == 2
    again = bind(grouped, weight=jnp.float32(0.25), **options)
    assert jax.tree.structure(again) == jax.tree.structure(bound)
    assert jax.tree.structure(bind(grouped, weight=0.5)) != jax.tree.structure(bound)
    x = jax.random.normal(jax.random.key(0), (1, 9, 1, 4))

    @jax.jit
    def run(score):
        small = {"implementation": "tiled", "tile_sizes": (4, 4)}
        return [attend(x, x, x, score=score, **how) for how in (small, {})]

    tiled, dense = run(bound)
    chex.assert_trees_all_close(tiled, dense, atol=1e-6)
    expected = attend(x, x, x, score=lambda q, k: grouped(q, k, weight=jnp.float32(0.5), **options))
    chex.assert_trees_all_close(dense, expected, atol=1e-6)


@pytest.mark.slow
def test_partial_applications_of_python_keep_the_rules():
    sink = functools.partial(normalizers.softmax_with_sink, sink=0.5)
    assert normalizers.streaming(sink).sink == 0.5
    assert normalizers.streaming(as_pytree(sink)).sink == 0.5
    table = jax.random.normal(jax.random.key(0), (5, 4))
    x = jax.random.normal(jax.random.key(1), (1, 3, 1, 4))
    bound, partial = (
        attend(x, x, x, score=how(positions.relative_key, table=table))
        for how in (bind, functools.partial)
    )
    chex.assert_trees_all_equal(bound, partial)


def test_modules_create_what_a_partial_application_of_python_still_waits_for():
    partial = functools.partial(scores.additive, activation=jax.nn.relu)
    declared, of_bound = (
        parameters_of(score, 4, 4, 3)
        for score in (partial, bind(scores.additive, activation=jax.nn.relu))
    )
    assert declared.keys() == of_bound.keys() == {"query_weight", "key_weight", "value", "bias"}
    values = initialize(jax.random.key(0), declared)
    x = jnp.ones((2, 4))
    expected = scores.additive(x, x, **values, activation=jax.nn.relu)
    chex.assert_trees_all_equal(bind_parameters(partial, values)(x, x), expected)


def test_rules_are_found_on_bound_and_unbound_functions():
    def tenfold(x, factor=10.0):
        return factor * x

    @rule(tenfold, "inverse")
    def _(factor=10.0):
        return lambda y: y / factor

    assert ask(tenfold, "inverse")(50.0) == 5.0
    assert ask(bind(tenfold, factor=5.0), "inverse")(50.0) == 10.0
    assert ask(tenfold, "unheard_of") is None
    assert ask(bind(affine, weight=1.0), "inverse") is None


def test_per_head_is_a_pytree_around_the_function():
    marked = per_head(bind(affine, weight=jnp.arange(4.0)))
    assert isinstance(marked, binding.Sliced)
    doubled = jax.tree.map(lambda leaf: 2.0 * leaf, marked)
    chex.assert_trees_all_close(doubled.function.keywords["weight"], 2.0 * jnp.arange(4.0))
    assert jax.tree.leaves(per_head(jnp.tanh)) == []


def test_marks_are_put_on_once_and_in_one_order():
    marked = per_example(per_head(bind(affine, weight=jnp.ones((2, 4)))))
    assert marked.axes == "BN"
    assert marked.of_first.keywords["weight"].shape == ()
    with pytest.raises(TypeError, match=r"per_head: .* write per_example\(per_head\(function\)\)"):
        per_head(per_example(jnp.tanh))
    with pytest.raises(TypeError, match="per_example: the function is marked per_example already"):
        per_example(marked)


def test_binding_an_unknown_parameter_fails_on_the_call():
    with pytest.raises(TypeError, match="weigth"):
        bind(affine, weigth=1.0)(jnp.float32(1.0))
