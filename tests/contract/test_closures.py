"""What functions close over, what differs within a batch and how arrays are sharded is no obstacle.

Every case is the gradient of a loss, compared with that of the dense oracle in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from attention_jax import attend, bind, masks, normalizers, positions, scores
from attention_jax.linear import linear_attention

pytestmark = pytest.mark.usefixtures("x64")

LENGTH, TILE = 9, (4, 3)
IDS = jnp.array([[0, 0, 0, 1, 1, 2, 2, 2, 2], [3, 3, 3, 3, 3, 3, 3, 1, 0], [0] * LENGTH])


def normal(*shape):
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape))


def loss_of(**options):
    tiles = TILE if options["implementation"] == "tiled" else None

    def loss(x):
        return jnp.sum(jnp.sin(attend(x, x, x, tile_sizes=tiles, **options)))

    return loss


def same_as_dense(gradient_of):
    """Compare `gradient_of(implementation)`."""
    ours, theirs = gradient_of("tiled"), gradient_of("dense")
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


CLOSING_OVER_INTEGERS = {
    "mask": lambda ids: {"mask": lambda q_idx, kv_idx: ids[q_idx] == ids[kv_idx]},
    "part of a mask": lambda ids: {
        "mask": masks.Causal() & masks.as_mask(lambda q_idx, kv_idx: ids[q_idx] == ids[kv_idx])
    },
    "bias": lambda ids: {"bias": lambda q_idx, kv_idx: (ids[q_idx] == ids[kv_idx]).astype(float)},
    "score": lambda ids: {
        "score": lambda query, key: scores.dot(query, key) * ids[3].astype(query.dtype)
    },
    "mask of a normalizer without sum": lambda ids: {
        "mask": lambda q_idx, kv_idx: ids[q_idx] == ids[kv_idx],
        "normalizer": normalizers.sigmoid,
    },
}


TRANSFORMED = {
    "jit of grad": lambda loss: jax.jit(lambda x, ids: jax.grad(loss)(x[0], ids[0])),
    "vmap of grad": lambda loss: jax.vmap(jax.grad(loss)),
    "grad of vmap": lambda loss: jax.grad(lambda x, ids: jnp.sum(jax.vmap(loss)(x, ids))),
    "jit of jvp": lambda loss: jax.jit(
        lambda x, ids: jax.jvp(lambda x: loss(x, ids[0]), (x[0],), (x[1],))[1]
    ),
    "Hessian-vector product": lambda loss: jax.jit(
        lambda x, ids: jax.jvp(lambda x: jax.grad(loss)(x, ids[0]), (x[0],), (x[1],))[1]
    ),
}


MEETS = {
    "mask": ("vmap of grad", "Hessian-vector product"),
    "score": ("grad of vmap", "jit of jvp"),
}
PAIRS = [
    pytest.param(
        options,
        transformed,
        id=f"{name}-{how}",
        marks=[pytest.mark.exhaustive] * (how not in ("jit of grad", *MEETS.get(name, ()))),
    )
    for name, options in CLOSING_OVER_INTEGERS.items()
    for how, transformed in TRANSFORMED.items()
]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "transformed"), PAIRS)
def test_functions_may_close_over_traced_integers(options, transformed):
    x = normal(3, 1, LENGTH, 2, 4)

    def gradient_of(implementation):
        def loss(x, ids):
            return loss_of(implementation=implementation, **options(ids))(x)

        return transformed(loss)(x, IDS)

    same_as_dense(gradient_of)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask_of", "known_late"),
    [
        (lambda lengths: masks.Lengths(lengths), jnp.array([3, 0, 8])),
        (lambda ids: masks.Segment(ids) & masks.Causal(), IDS),
    ],
)
@pytest.mark.parametrize("same_x", [False, True])
def test_gradient_of_a_batch_whose_masks_differ(mask_of, known_late, same_x):
    x = normal(1, LENGTH, 2, 4) if same_x else normal(3, 1, LENGTH, 2, 4)

    def gradient_of(implementation):
        def loss(x, known_late):
            return loss_of(implementation=implementation, mask=mask_of(known_late))(x)

        def of_batch(x):
            return jnp.sum(jax.vmap(loss, (None if same_x else 0, 0))(x, known_late))

        return jax.jit(jax.grad(of_batch))(x)

    same_as_dense(gradient_of)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mask", [masks.Lengths(jnp.ones(0, int)), masks.Segment(jnp.ones((0, LENGTH), int))]
)
def test_an_empty_batch_whose_mask_only_run_time_knows(mask):
    x = jnp.ones((0, LENGTH, 1, 4))
    chosen = {"implementation": "tiled", "tile_sizes": TILE}
    assert attend(x, x, x, mask=mask, **chosen).shape == x.shape


@pytest.mark.slow
def test_no_tile_is_live_though_run_time_has_a_say():
    x = normal(2, LENGTH, 1, 4)
    mask = masks.Shift(masks.Causal(), key=LENGTH) & masks.Lengths(jnp.array([3, 4]))
    same_as_dense(lambda name: jax.grad(loss_of(implementation=name, mask=mask))(x))


def test_values_without_features_where_tiles_are_visited_together():
    x = normal(1, 40, 1, 4)
    context = attend(x, x, x[..., :0], implementation="tiled", tile_sizes=(4, 8))
    assert context.shape == (1, 40, 1, 0)


@pytest.mark.slow
def test_gradient_of_values_without_features():
    x = normal(1, LENGTH, 1, 4)

    def gradient_of(implementation):
        def loss(x):
            tiles = TILE if implementation == "tiled" else None
            attended = attend(
                x,
                x,
                x[..., :0],
                implementation=implementation,
                tile_sizes=tiles,
                return_logsumexp=True,
            )
            return jnp.sum(jnp.sin(attended.logsumexp))

        return jax.grad(loss)(x)

    same_as_dense(gradient_of)


@pytest.mark.slow
def test_a_sink_that_is_none_where_no_key_may_be_seen():
    x = normal(1, LENGTH, 1, 4)

    def gradient_of(implementation):
        def loss(x, sink):
            normalizer = bind(normalizers.softmax_with_sink, sink=sink)
            options = {"mask": masks.Causal(-2), "normalizer": normalizer}
            return loss_of(implementation=implementation, **options)(x)

        of_x, of_sink = jax.grad(loss, (0, 1))(x, -jnp.inf)
        return jnp.append(of_x, of_sink)

    same_as_dense(gradient_of)


@pytest.mark.slow
def test_a_bias_of_integers():
    x = normal(1, LENGTH, 1, 4)
    bias = jnp.arange(LENGTH**2).reshape(LENGTH, LENGTH)
    same_as_dense(lambda name: jax.grad(loss_of(implementation=name, bias=bias))(x))


OVER_A_MESH = {
    "causal": lambda x, lengths: attend(x, x, x, mask=masks.Causal(), **TILED),
    "lengths": lambda x, lengths: attend(x, x, x, mask=masks.Lengths(lengths), **TILED),
    "array": lambda x, lengths: attend(x, x, x, bias=jnp.ones((2, LENGTH, LENGTH)), **TILED),
    "slopes": lambda x, lengths: attend(x, x, x, bias=positions.alibi_bias(2), **TILED),
    "heads": lambda x, lengths: attend(x, x, x, mask=masks.Heads(TWO_MASKS), **TILED),
    "dropout": lambda x, lengths: attend(
        x, x, x, dropout_rate=0.5, dropout_key=jax.random.key(0), **TILED
    ),
    "linear": lambda x, lengths: linear_attention(x, x, x, mask=masks.Lengths(lengths)),
    "causal linear": lambda x, lengths: linear_attention(x, x, x, mask=masks.Causal()),
}
TILED = {"implementation": "tiled", "tile_sizes": TILE}
TWO_MASKS = masks.Causal(), masks.Window(3, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        PartitionSpec("data"),
        pytest.param(PartitionSpec(None, None, "data"), marks=pytest.mark.exhaustive),
    ],
    ids=["examples", "heads"],
)
@pytest.mark.parametrize("function", OVER_A_MESH.values(), ids=OVER_A_MESH)
def test_axes_sharded_over_an_explicit_mesh_stay_sharded(function, spec):
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    x, lengths = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in (
            ((2, LENGTH, 2, 4), jnp.float64, spec),
            ((2,), jnp.int32, PartitionSpec(*spec[:1])),
        )
    )
    with jax.sharding.use_abstract_mesh(mesh):
        gradient = jax.grad(lambda x, lengths: jnp.sum(jnp.sin(function(x, lengths))))
        for result in (jax.eval_shape(function, x, lengths), jax.eval_shape(gradient, x, lengths)):
            assert result.shape == x.shape
            assert tuple(result.sharding.spec)[: len(spec)] == tuple(spec)
