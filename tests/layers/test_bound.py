"""Parameters of any name, in both APIs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax import Parameter, learned
from attention_jax import linen as attention_linen
from attention_jax import nnx as attention_nnx
from attention_jax.base.parameters import parameters_of


def weighted(query, key, **parameters):
    """Add every parameter, each with its own weight."""
    weights = 1.0 + jnp.arange(len(parameters), dtype=query.dtype)
    values = jnp.stack([parameters[name] for name in sorted(parameters)])
    return query @ key.T + jnp.dot(weights, values)


def constant(number):
    return lambda key, shape, dtype: jnp.full(shape, number, dtype)


def names_of(module):
    """Return the name of every attribute and method, and what `train` and `eval` set."""
    others = {"structure", "names", "function", "has_heads", "deterministic", "use_running_average"}
    deprecated = {"_object__nodes", "_object__state"}
    return sorted(({*dir(module), *vars(module)} | others) - deprecated)


def declared(names):
    numbers = {name: Parameter((), constant(float(n))) for n, name in enumerate(names)}
    return learned(weighted, **numbers)


ONE = jnp.ones((1, 2))


@pytest.mark.parametrize("num_heads", [None, 3])
def test_a_parameter_may_have_the_name_of_any_attribute(num_heads):
    plain = attention_nnx.Bound(declared(["weight"]), rngs=nnx.Rngs(0))
    names = names_of(plain)
    assert {"train", "eval", "sow", "resolved", "__class__", "_declaration"} <= set(names)
    score = declared(names)
    module = attention_nnx.Bound(score, num_heads=num_heads, rngs=nnx.Rngs(0))
    twin = attention_linen.Bound(score, num_heads=num_heads)
    expected = 2.0 + sum((n + 1.0) * n for n in range(len(names)))

    def logits(bound):
        head = bound if num_heads is None else jax.tree.map(lambda x: x[0], bound.function)
        return head(ONE, ONE)

    assert len(jax.tree.leaves(nnx.state(module, nnx.Param))) == len(names)
    module.eval()
    module.train()
    graph, state = nnx.split(module)
    for each in (module, nnx.merge(graph, state)):
        np.testing.assert_array_equal(logits(each()), np.full((1, 1), expected, np.float32))
    bound, _ = twin.init_with_output(jax.random.key(0))
    np.testing.assert_array_equal(logits(bound), logits(module()))


def test_a_parameter_is_the_attribute_of_its_name():
    names = ["structure", "names", "function", "has_heads", "weight", "train", "train_"]
    module = attention_nnx.Bound(declared(names), rngs=nnx.Rngs(0))
    tree = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    assert set(tree) == {*names[:5], "train_", "train__"}
    assert set(parameters_of(declared(names))) == set(names)
    assert module.function[...] == 2.0
