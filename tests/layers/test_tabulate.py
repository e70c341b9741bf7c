"""Flax's own tools look into the modules: tables, and what every module returned."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from attention_jax import linen as attention_linen
from attention_jax import masks, positions, scores
from attention_jax import nnx as attention_nnx

X = jnp.ones((2, 5, 8))
TOKENS = jnp.ones((2, 5), int)
OPTIONS = {"score": scores.additive, "bias": positions.learned_buckets()}


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.slow
def test_nnx_draws_a_table_of_a_layer():
    layer = attention_nnx.MultiHeadAttention(2, 8, **OPTIONS, rngs=nnx.Rngs(0))
    wide = {"width": 200}
    table = nnx.tabulate(layer, X, mask=masks.Causal(), console_kwargs=wide)
    assert "MultiHeadAttention" in table and "Causal(offset=0)" in table


@pytest.mark.slow
def test_nnx_draws_a_table_of_a_model():
    model = attention_nnx.CausalDecoder(
        10, 8, num_heads=2, num_layers=1, max_length=8, rngs=nnx.Rngs(0)
    )
    assert "CausalDecoder" in nnx.tabulate(model, TOKENS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:shape requires ndarray:DeprecationWarning")  # of Flax
@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (attention_linen.MultiHeadAttention(2, 8), X),
        (attention_linen.CausalDecoder(10, 8, num_heads=2, num_layers=1, max_length=8), TOKENS),
    ],
    ids=["layer", "model"],
)
def test_linen_draws_a_table_and_captures_what_modules_return(module, inputs):
    assert type(module).__name__ in module.tabulate(jax.random.key(0), inputs)
    variables = module.init(jax.random.key(0), inputs)
    capture = jax.jit(lambda v, x: module.apply(v, x, capture_intermediates=True))
    output, state = capture(variables, inputs)
    (captured,) = state["intermediates"]["__call__"]
    assert captured.shape == output.shape


@pytest.mark.parametrize("function", [scores.dot, lambda query, key: query @ key.T])
def test_a_bound_function_is_a_pytree_in_both(function):
    module = attention_nnx.Bound(function, rngs=nnx.Rngs(0))
    of_twin = attention_linen.Bound(function).apply({})
    for bound in (module(), of_twin):
        result = jax.jit(lambda bound: bound)(bound)
        assert result(X[0], X[0]).shape == (5, 5)
