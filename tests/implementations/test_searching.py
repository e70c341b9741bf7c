"""Tiled attention that searches a row or walks along it, against the dense oracle in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attend, bind, masks, normalizers, per_head, statistics

T, S, N, K = 21, 26, 2, 1
TILE = (8, 8)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


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

    def squares(arrays, normalizer):
        found, context = gradients(options, implementation, arrays, normalizer)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(found)), (found, context)

    return jax.grad(squares, (0, 1), has_aux=True)(arrays, normalizer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "derivatives"),
    [
        ("sparsemax", gradients),
        ("entmax15", gradients),
        ("entmax", second_derivatives),
        ("stick_breaking", second_derivatives),
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


@pytest.mark.slow
def test_statistics_and_their_gradients_are_the_dense_ones():
    def loss(way, query, key, value):
        asked = {name: getattr(statistics, name) for name in ("entropy", "received_mass")}
        found = attend(
            query, key, value, normalizer=normalizers.entmax15, statistics=asked, **way
        ).statistics
        return sum(jnp.sum(jnp.sin(x)) for x in found.values()), found

    ways = {"implementation": "tiled", "tile_sizes": (8, 8)}, {"implementation": "dense"}
    ours, theirs = (
        jax.jit(jax.grad(functools.partial(loss, way), (0, 1), has_aux=True))(*inputs())
        for way in ways
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_alpha_out_of_range_is_refused(alpha):
    message = rf"^entmax: alpha must be above 1 and at most 2, got {alpha}\.$"
    with pytest.raises(ValueError, match=message):
        attend(*inputs(), normalizer=bind(normalizers.entmax, alpha=alpha))
