import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax.implementations.lifting import lift


def weighted(x, weight, table):
    return {"sum": (weight * x).sum(), "table": x * table}


AXES = ["BSKG", "KG", "BS"]
RESULT_AXES = {"sum": "BKG", "table": "BSKG"}
X = jnp.arange(2 * 5 * 3 * 4, dtype=jnp.float32).reshape(2, 5, 3, 4)
WEIGHT = jnp.arange(3 * 4 * 5, dtype=jnp.float32).reshape(3, 4, 5)
TABLE = jnp.arange(2 * 5, dtype=jnp.float32).reshape(2, 5)


@pytest.mark.slow
@pytest.mark.parametrize("sequential", ["", "B", "KG", "BKG"])
def test_every_axis_is_mapped_where_it_is_and_shared_where_it_is_not(sequential):
    result = lift(weighted, AXES, RESULT_AXES, sequential=sequential)(X, WEIGHT, TABLE)
    assert result["table"].shape == X.shape
    for b, k, g in np.ndindex(2, 3, 4):
        expected = weighted(X[b, :, k, g], WEIGHT[k, g], TABLE[b])
        found = {"sum": result["sum"][b, k, g], "table": result["table"][b, :, k, g]}
        chex.assert_trees_all_close(found, expected, rtol=1e-6)


@pytest.mark.parametrize("sequential", ["", "BKG"])
def test_axes_of_size_one(sequential):
    arrays = X[:1, :, :1, :1], WEIGHT[:1, :1], TABLE[:1]
    result = lift(weighted, AXES, RESULT_AXES, sequential=sequential)(*arrays)
    expected = weighted(X[0, :, 0, 0], WEIGHT[0, 0], TABLE[0])
    chex.assert_trees_all_close(result["sum"], expected["sum"].reshape(1, 1, 1))


@pytest.mark.parametrize("sequential", ["", "BKG"])
def test_axes_of_size_zero(sequential):
    result = lift(weighted, AXES, RESULT_AXES, sequential=sequential)(X[:0], WEIGHT, TABLE[:0])
    assert result["sum"].shape == (0, 3, 4)
    assert result["table"].shape == (0, 5, 3, 4)


def test_a_result_may_be_missing():
    lifted = lift(lambda x: (x, None), ["BS"], ("BS", "B"), "B", sequential="B")
    assert lifted(TABLE)[1] is None


def test_looping_traces_once():
    traced = []

    def function(x):
        traced.append(x)
        return x

    lift(function, ["BSKG"], "BSKG", sequential="BKG")(X)
    assert len(traced) == 1


@pytest.mark.slow
def test_gradients_of_a_loop_are_those_of_vectorisation():
    def gradient(sequential):
        def loss(*arrays):
            results = lift(weighted, AXES, RESULT_AXES, sequential=sequential)(*arrays)
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(results))

        return jax.grad(loss, (0, 1, 2))(X / 100, WEIGHT / 10, TABLE)

    chex.assert_trees_all_close(gradient("BKG"), gradient(""), rtol=1e-4, atol=1e-4)


def test_other_letters():
    lifted = lift(lambda x, y: x + y, ["A", "B"], "AB", order="AB")
    np.testing.assert_array_equal(lifted(jnp.arange(2), jnp.arange(3)), [[0, 1, 2], [1, 2, 3]])
