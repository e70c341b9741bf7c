"""Tiled attention that searches a row or walks along it, against the dense oracle in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attend, bind, explain, masks, normalizers, per_head, scores, statistics
from attention_jax.base.matmul import PLAIN
from attention_jax.implementations import searching, tiled, tiles
from attention_jax.implementations.head import Head
from attention_jax.masks import FULL
from tests.implementations.derivatives import of_squares
from tests.implementations.test_tiled import largest_intermediate

pytestmark = pytest.mark.usefixtures("x64")

T, S, N, K = 21, 26, 2, 1
TILE = (8, 8)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape))


def inputs():
    return 2 * normal(2, T, N, 5), normal(2, S, K, 5, seed=1), normal(2, S, K, 3, seed=2)


def segments(length, seed):
    return jnp.sort(jnp.asarray(np.random.default_rng(seed).integers(0, 4, (2, length))))


CASES = {
    "sparsemax": lambda: (
        bind(normalizers.sparsemax),
        {
            "mask": masks.Causal(-5),
            "dropout_rate": 0.3,
            "dropout_key": jax.random.key(0),
        },
    ),
    "entmax15": lambda: (
        bind(normalizers.entmax15),
        {"mask": masks.Segment(segments(T, 0), segments(S, 1))},
    ),
    "stick_breaking": lambda: (
        bind(normalizers.stick_breaking),
        {"mask": masks.Causal(-1) & masks.Segment(segments(T, 0), segments(S, 1))},
    ),
    "top_k": lambda: (
        bind(normalizers.top_k, k=3),
        {
            "mask": masks.Causal(-5),
            "dropout_rate": 0.3,
            "dropout_key": jax.random.key(0),
            "bias": normal(N, 1, S),
        },
    ),
    "top_p": lambda: (
        bind(normalizers.top_p, p=0.7),
        {"mask": masks.Segment(segments(T, 0), segments(S, 1))},
    ),
    "entmax": lambda: (
        per_head(bind(normalizers.entmax, alpha=jnp.array([1.2, 1.7]))),
        {"bias": normal(N, T, S)},
    ),
}


def loss(arrays, normalizer, implementation, options):
    tile = TILE if implementation == "tiled" else None
    context = attend(
        *arrays,
        normalizer=normalizer,
        implementation=implementation,
        tile_sizes=tile,
        **options,
    )
    return jnp.sum(jnp.sin(context)), context


def gradients(options, implementation, arrays, normalizer):
    """The context and all gradients."""
    of = functools.partial(loss, implementation=implementation, options=options)
    return jax.grad(of, (0, 1), has_aux=True)(arrays, normalizer)


def second_derivatives(options, implementation, arrays, normalizer):
    """The same, and derivatives of the squares of the gradients."""
    return of_squares(functools.partial(gradients, options, implementation), arrays, normalizer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "derivatives"),
    [
        pytest.param("sparsemax", gradients, marks=pytest.mark.exhaustive),
        pytest.param("entmax15", gradients, marks=pytest.mark.exhaustive),
        ("top_k", gradients),
        pytest.param("top_p", gradients, marks=pytest.mark.exhaustive),
        pytest.param("entmax", gradients, marks=pytest.mark.exhaustive),
        pytest.param("top_k", second_derivatives, marks=pytest.mark.exhaustive),
        pytest.param("entmax", second_derivatives, marks=pytest.mark.exhaustive),
        pytest.param("stick_breaking", second_derivatives, marks=pytest.mark.exhaustive),
    ],
)
def test_values_and_derivatives_are_the_dense_ones(name, derivatives):
    normalizer, options = CASES[name]()
    ours, theirs = (
        jax.jit(functools.partial(derivatives, options, implementation))(inputs(), normalizer)
        for implementation in ("tiled", "dense")
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def tied_inputs():
    """Logits of few numbers, many of them equal, and the same in whatever order they are summed."""
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.integers(-2, 3, (2, size, 2, 3))) for size in (T, S))
    return query.astype(float), key.astype(float), normal(2, S, 2, 3, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "normalizer",
    [
        pytest.param(
            per_head(bind(normalizers.top_k, k=np.array([4, 40]))),
            marks=pytest.mark.exhaustive,
        ),
        per_head(bind(normalizers.top_p, p=np.array([0.37, 1.0]))),
        pytest.param(normalizers.hard, marks=pytest.mark.exhaustive),
    ],
    ids=["top_k", "top_p", "hard"],
)
def test_of_equal_logits_the_same_keys_are_kept_as_in_dense(normalizer):
    query, key, value = tied_inputs()
    of_nobody = key.at[0, -1, 0].set(jnp.nan)
    options = {"score": scores.dot, "mask": masks.Causal(-3)}
    ours, theirs = (
        jax.jit(functools.partial(gradients_of_arrays, options, implementation, normalizer))(
            (query, of_nobody, value)
        )
        for implementation in ("tiled", "dense")
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def gradients_of_arrays(options, implementation, normalizer, arrays):
    """The context and its gradients with respect to query, key and value."""
    of = functools.partial(
        loss, normalizer=normalizer, implementation=implementation, options=options
    )
    return jax.grad(of, has_aux=True)(arrays)


@pytest.mark.slow
@pytest.mark.parametrize(
    "normalizer",
    [
        pytest.param(normalizers.entmax15, marks=pytest.mark.exhaustive),
        bind(normalizers.top_k, k=5),
    ],
    ids=["entmax15", "top_k"],
)
def test_statistics_and_their_gradients_are_the_dense_ones(normalizer):
    def loss(way, query, key, value):
        asked = {name: getattr(statistics, name) for name in ("entropy", "received_mass")}
        found = attend(query, key, value, normalizer=normalizer, statistics=asked, **way).statistics
        return sum(jnp.sum(jnp.sin(x)) for x in found.values()), found

    ways = {"implementation": "tiled", "tile_sizes": (8, 8)}, {"implementation": "dense"}
    ours, theirs = (
        jax.jit(jax.grad(functools.partial(loss, way), (0, 1), has_aux=True))(*inputs())
        for way in ways
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_tiles_below_the_threshold_are_skipped_from_then_on():
    """Each block of queries asks for one block of keys, and adds nothing to others."""
    blocks = jnp.repeat(jnp.eye(4), 8, axis=0)
    head = Head(
        9 * blocks,
        blocks + 0.01 * normal(32, 4),
        normal(32, 3),
        scores.separate(scores.dot),
        masks.as_mask(None),
        None,
        bind(normalizers.sparsemax),
        None,
    )
    plan = tiles.make_plan(head.mask, (32, 32), (8, 8), is_static=False)
    search = jax.jit(lambda: searching.Search(*tiled.prepared(head, plan, plan.visits, PLAIN))())
    np.testing.assert_array_equal(search().states.reshape(4, 4), FULL * np.eye(4))


@pytest.mark.slow
def test_no_array_is_as_large_as_the_plane():
    x = jnp.zeros((1, 96, 1, 2))

    def of(normalizer):
        return lambda x: jnp.sum(
            attend(x, x, x, normalizer=normalizer, implementation="tiled", tile_sizes=(8, 8))
        )

    for normalizer in (normalizers.entmax15, normalizers.stick_breaking):
        assert largest_intermediate(jax.grad(of(normalizer)), x) <= 96 * 96 / 8
    x = jax.ShapeDtypeStruct((1, 4096, 1, 64), "float32")
    for normalizer, words in (
        (normalizers.softmax, "one pass"),
        (normalizers.sparsemax, "several passes over the held logits of a row of tiles"),
        (normalizers.stick_breaking, "one pass, along the keys in order"),
    ):
        assert str(explain(x, x, x, normalizer=normalizer)).endswith(f"forward; {words}")


@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_alpha_out_of_range_is_refused(alpha):
    message = rf"^entmax: alpha must be above 1 and at most 2, got {alpha}\.$"
    with pytest.raises(ValueError, match=message):
        attend(*inputs(), normalizer=bind(normalizers.entmax, alpha=alpha))


@pytest.mark.slow
@pytest.mark.parametrize("normalizer", [normalizers.sparsemax, normalizers.stick_breaking])
def test_a_row_of_many_tiles_is_one_program(normalizer):
    x = normal(1, 96, 1, 2)

    @functools.partial(jax.jit, static_argnums=0)
    def of(implementation, x):
        tile = (8, 8) if implementation == "tiled" else None
        how = {"implementation": implementation, "tile_sizes": tile}
        return attend(x, x, x, normalizer=normalizer, mask=masks.Causal(-1), **how)

    np.testing.assert_allclose(of("tiled", x), of("dense", x), rtol=1e-12, atol=1e-12)
