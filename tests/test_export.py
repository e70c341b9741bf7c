"""Programs exported once for every batch and every length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from attention_jax import attend, bind, masks, normalizers, positions, scores, statistics
from attention_jax.linear import linear_attention
from attention_jax.nnx import CausalDecoder, MultiHeadAttention

TILED = {"implementation": "tiled", "tile_sizes": (8, 8)}


def attended(**options):
    return lambda x: attend(x, x, x, **options)


def lengths_of(x):
    return masks.Lengths((3 * jnp.abs(x[:, 0, 0, 0])).astype(jnp.int32) + 1)


def of_tokens(x):
    model = CausalDecoder(11, 8, num_heads=2, num_layers=1, rngs=nnx.Rngs(0))
    return model((3 * jnp.abs(x[:, :, 0, 0])).astype(jnp.int32))


def of_features(x):
    layer = MultiHeadAttention(2, 8, rngs=nnx.Rngs(0))
    return layer(x.reshape(*x.shape[:2], 8), mask=masks.Causal())


def later(x):
    """A mask as an array: the first feature of the query is below that of the key."""
    return x[:, None, :, None, 0, 0] <= x[:, None, None, :, 0, 0]


def tangent(x):
    return jax.jvp(lambda x: attend(x, x, x, mask=masks.Causal(), **TILED), (x,), (x,))[1]


EYE = jnp.eye(4)
ADDITIVE = bind(
    scores.additive, query_weight=EYE, key_weight=EYE, value=jnp.ones(4), bias=jnp.zeros(4)
)
ANY_BATCH = {
    "tiled": attended(mask=masks.Causal(), **TILED),
    "gradient": jax.grad(lambda x: jnp.sum(attend(x, x, x, mask=masks.Causal(), **TILED) ** 2)),
    "lengths of the batch": lambda x: attend(x, x, x, mask=lengths_of(x), **TILED),
    "linear": lambda x: linear_attention(x, x, x, mask=masks.Causal()),
}
ANY_LENGTH = {
    "tiled": attended(mask=masks.Causal() & masks.Window(6, 0), **TILED),
    "tiled gradient": jax.grad(
        lambda x: jnp.sum(attend(x, x, x, mask=lengths_of(x), score=ADDITIVE, **TILED) ** 2)
    ),
    "tiled by arrays": lambda x: attend(
        x, x, x, mask=later(x), bias=jnp.einsum("bsnh,btnh->bnst", x, x), **TILED
    ),
    "tiled second order": jax.grad(lambda x: jnp.sum(tangent(x) ** 2)),
    "one token": lambda x: attend(x[:, :1], x, x, bias=positions.alibi_bias(2), **TILED),
    "chosen": attended(mask=masks.Causal(), bias=positions.alibi_bias(2)),
    "gradient": jax.grad(lambda x: jnp.sum(attend(x, x, x, mask=lengths_of(x)) ** 2)),
    "dropout": attended(dropout_rate=0.5, dropout_key=jax.random.key(0), implementation="dense"),
    "layer": of_features,
    "model": of_tokens,
    "linear": lambda x: linear_attention(x, x, x),
}
QUICK: tuple[str, ...] = ()
DEAR = {
    ("tiled second order", "b, t"),
    ("tiled by arrays", "b, t"),
    ("linear", "b, 12"),
    ("model", "b, t"),
    ("gradient", "b, t"),
    ("one token", "b, t"),
    ("gradient", "b, 12"),
}


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        pytest.param(
            function,
            shape,
            id=f"{name}-{shape}",
            marks=[pytest.mark.slow] * (name not in QUICK)
            + [pytest.mark.exhaustive] * ((name, shape) in DEAR),
        )
        for cases, shape in ((ANY_BATCH, "b, 12"), (ANY_LENGTH, "b, t"))
        for name, function in cases.items()
    ],
)
def test_one_program_for_all_sizes(function, shape):
    x = jax.ShapeDtypeStruct((*export.symbolic_shape(shape), 2, 4), jnp.float32)
    program = export.export(jax.jit(function))(x)
    for batch, length in ((1, 12), (3, 12), (2, 21 if "t" in shape else 12)):
        given = jnp.asarray(np.random.default_rng(batch).normal(size=(batch, length, 2, 4)), "f4")
        np.testing.assert_allclose(program.call(given), function(given), atol=2e-5, rtol=1e-4)


def test_what_needs_a_number_says_so():
    x = jax.ShapeDtypeStruct((*export.symbolic_shape("b, t"), 2, 4), jnp.float32)
    for function, message in (
        (
            attended(implementation="pallas"),
            "attend: implementation 'pallas' needs the numbers of queries and keys, got [T, S] = "
            "[t, t]; export for numbers, or use implementation='tiled'.",
        ),
        (
            attended(implementation="tiled", normalizer=normalizers.sparsemax),
            "attend: implementation 'tiled' computes sparsemax from the numbers of queries and "
            "keys, got [T, S] = [t, t]; export for numbers, or use implementation='dense'.",
        ),
        (
            attended(implementation="tiled", statistics={"entropy": statistics.entropy}),
            "attend: implementation 'tiled' computes statistics from the numbers of queries and "
            "keys, got [T, S] = [t, t]; export for numbers, or use implementation='dense'.",
        ),
        (
            ANY_BATCH["linear"],
            "linear_attention: a causal mask is computed chunk by chunk, and their number must be "
            "known, got T = t; export for a number of queries.",
        ),
    ):
        with pytest.raises(ValueError) as error:
            export.export(jax.jit(function))(x)
        assert str(error.value) == message
