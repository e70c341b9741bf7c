"""Layers and models whose sequence a mesh axis splits, on a mesh of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from attention_jax import masks, parallel, positions
from attention_jax.linen import CausalDecoder as LinenDecoder
from attention_jax.nnx import CausalDecoder, MultiHeadAttention

ORDER = np.array([4, 5, 0, 1, 2, 3])
TOKENS = np.array([[3, 1, 4, 1, 5, 2]])
SIZES = {"num_heads": 2, "num_layers": 1, "max_length": 6}


@pytest.fixture
def mesh():
    mesh = jax.make_mesh((1, 1), ("data", "sp"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


def layer(axis):
    return MultiHeadAttention(2, 4, sequence_axis=axis, rngs=nnx.Rngs(0))


def rotary(api_layer):
    return functools.partial(api_layer, position=positions.rotary)


def logits_of(api, order, axis):
    """Return the logits of a model in their own order, all positions known to the model."""
    tokens = parallel.permute(jnp.asarray(TOKENS), order)
    mask, options = masks.Segment(np.array([0, 0, 1, 1, 1, 1])), {"sequence_axis": axis}
    call = {} if order is None else {"order": order}
    if api == "nnx":
        attention = rotary(MultiHeadAttention)
        model = CausalDecoder(7, 4, attention=attention, rngs=nnx.Rngs(0), **SIZES, **options)
        return parallel.restore(model(tokens, mask, **call), order)
    model = LinenDecoder(7, 4, **SIZES, **options)
    variables = LinenDecoder(7, 4, **SIZES).init(jax.random.key(0), TOKENS)
    return parallel.restore(model.apply(variables, tokens, mask, **call), order)


@pytest.mark.slow
@pytest.mark.parametrize("api", ["nnx", "linen"])
@pytest.mark.parametrize("order", [None, ORDER], ids=["in order", "dealt"])
def test_a_model_gives_what_it_gives_without_the_axis(mesh, api, order):
    np.testing.assert_allclose(
        logits_of(api, order, "sp"), logits_of(api, None, None), rtol=1e-5, atol=1e-6
    )


def decode(x):
    whole = layer(None)
    return layer("sp").decode(x, whole.init_cache(1, 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: layer("sp")(x, return_weights=True),
            "MultiHeadAttention: no device holds the weights of a sequence that the axis 'sp' "
            "splits; build the layer with sequence_axis=None to look at them.",
        ),
        (
            lambda x: layer("sp").init_cache(1, 8),
            "MultiHeadAttention: a cache is not split over the axis 'sp'; decode with a model of "
            "sequence_axis=None and the same parameters.",
        ),
        (
            decode,
            "MultiHeadAttention: a cache is not split over the axis 'sp'; decode with a model of "
            "sequence_axis=None and the same parameters.",
        ),
        (
            lambda x: layer(None)(x, order=ORDER),
            "MultiHeadAttention: an order was given, and the sequence is not split; build the "
            "layer with sequence_axis, or put the rows back with parallel.restore.",
        ),
        (
            lambda x: layer("sp")(x, order=(ORDER, ORDER)),
            "MultiHeadAttention: order must be one array [T], or a pair with that of the memory if "
            "there is one, got a tuple of 2.",
        ),
        (
            lambda x: layer("rows")(x),
            "parallel.attend: axis must be one of the mesh, which has 'data' of 1, 'sp' of 1; got "
            "'rows'.",
        ),
    ],
)
def test_what_a_split_sequence_cannot_do_is_refused(mesh, call, message):
    with pytest.raises(ValueError) as refused:
        call(jnp.ones((1, 6, 4)))
    assert str(refused.value) == message
