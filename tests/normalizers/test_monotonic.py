"""Monotonic attention against loops over its definition, and tiled against dense in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attend, explain, masks, normalizers, scores, statistics
from attention_jax.cache import attend_cached, extend, init
from attention_jax.scores.prepared import attend_prepared, prepare
from tests.implementations.derivatives import of_squares

T, S = 11, 14
KINDS = ["monotonic", "hard_monotonic"]


def plane(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(T, S)) - 0.7, rng.random((T, S)) < 0.8


def expected(stop):
    """The chance that query i stops at key j, in the words of the paper: loops over its process."""
    weights, before = np.zeros(stop.shape), np.eye(1, stop.shape[1])[0]
    for i, row in enumerate(stop):
        for start, chance in enumerate(before):
            for j in range(start, len(row)):  # from where the query before stopped
                weights[i, j] += chance * np.prod(1.0 - row[start:j]) * row[j]
        before = weights[i]
    return weights


@pytest.mark.parametrize("kind", KINDS)
def test_equals_its_definition(kind, x64):
    logits, allowed = plane()
    stop = 1.0 / (1.0 + np.exp(-logits)) if kind == "monotonic" else logits > 0.0
    weights = getattr(normalizers, kind)(jnp.asarray(logits), jnp.asarray(allowed))
    np.testing.assert_allclose(weights, expected(np.where(allowed, stop, 0.0)), atol=1e-15)
    sums = np.asarray(weights).sum(axis=1)
    assert (np.diff(sums) <= 1e-12).all() and sums[0] <= 1.0


def test_the_soft_one_is_the_hard_one_where_logits_are_far_from_zero():
    logits, allowed = plane()
    far = jnp.asarray(np.sign(logits) * 200, jnp.float32), jnp.asarray(allowed)
    np.testing.assert_array_equal(normalizers.monotonic(*far), normalizers.hard_monotonic(*far))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_masked_changes_nothing_and_a_nan_is_not_hidden(kind):
    normalizer = jax.jit(getattr(normalizers, kind))
    logits, allowed = (jnp.asarray(x) for x in plane())
    logits = logits.astype(jnp.float32)
    weights = normalizer(logits, allowed)
    for poison in (jnp.nan, jnp.inf, -jnp.inf):
        spoiled = jnp.where(allowed, logits, poison)
        np.testing.assert_array_equal(normalizer(spoiled, allowed), weights)
    assert jnp.isnan(normalizer(logits.at[3, 4].set(jnp.nan), allowed.at[3, 4].set(True))[3]).any()
    assert normalizer(jnp.zeros((0, 3)), jnp.zeros((0, 3), bool)).shape == (0, 3)
    assert normalizer(jnp.zeros((3, 0)), jnp.zeros((3, 0), bool)).shape == (3, 0)


def inputs(length=T, keys=S):
    rng = np.random.default_rng(1)
    shapes = (2, length, 2, 3), (2, keys, 1, 3), (2, keys, 1, 2)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def loss(arrays, offset, kind, implementation):
    context = attend(
        *arrays,
        score=scores.dot,
        bias=offset[None, :, None, None],
        mask=masks.Window(9, 4) & ~masks.Causal(-7),  # tiles that are passed without a visit
        normalizer=getattr(normalizers, kind),
        implementation=implementation,
        tile_sizes=(4, 4) if implementation == "tiled" else None,
    )
    return jnp.sum(jnp.sin(context)), context


def gradients(arrays, offset, kind, implementation):
    """The context and its gradients."""
    of = functools.partial(loss, kind=kind, implementation=implementation)
    return jax.grad(of, (0, 1), has_aux=True)(arrays, offset)


def second(arrays, offset, kind, implementation):
    """The same, and the gradients of their squares."""
    first = functools.partial(gradients, kind=kind, implementation=implementation)
    return of_squares(first, arrays, offset)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "derivatives"),
    [
        ("monotonic", gradients),
        pytest.param("monotonic", second, marks=pytest.mark.exhaustive),
        pytest.param("hard_monotonic", gradients, marks=pytest.mark.exhaustive),
    ],
)
def test_tiled_has_the_values_and_derivatives_of_dense(kind, derivatives, x64):
    ours, theirs = (
        jax.jit(functools.partial(derivatives, kind=kind, implementation=implementation))(
            inputs(), jnp.array([0.3, -0.6])
        )
        for implementation in ("tiled", "dense")
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_explain_says_how_it_goes_over_the_tiles():
    x = jax.ShapeDtypeStruct((1, 4096, 1, 64), "float32")
    words = "one pass, along the keys in order, a row of tiles after the one above"
    assert str(explain(x, x, x, normalizer=normalizers.monotonic)).endswith(words)


@pytest.mark.parametrize("kind", KINDS)
def test_queries_without_those_before_them_are_refused(kind):
    normalizer = getattr(normalizers, kind)
    cause = f"{kind} goes on from the weights of the query before, which are not known here; give "
    x = jnp.ones((1, 3, 1, 4))
    _, view = extend(init(1, 8, 1, 4), x, x)
    with pytest.raises(ValueError, match=f"^attend_cached: {cause}"):
        attend_cached(x, view, normalizer=normalizer)
    memory = prepare(scores.dot, x[:, :, 0])
    with pytest.raises(ValueError, match=f"^attend_prepared: {cause}"):
        attend_prepared(scores.dot, x[:, 0, 0], memory, normalizer=normalizer)
    message = f"computes no statistics of {kind}, whose weights depend on the keys before them"
    asked = {"entropy": statistics.entropy}
    with pytest.raises(ValueError, match=message):
        attend(x, x, x, normalizer=normalizer, implementation="tiled", statistics=asked)
