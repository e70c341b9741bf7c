import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attend
from attention_jax.masks import EMPTY, Block, Causal, Edges, Full, Predicate, Shift, edges
from tests.oracle import assert_sound, states_of


def random_pairs(nodes, count, seed=0):
    return np.random.default_rng(seed).integers(0, nodes, (count, 2))


def adjacency(pairs, nodes):
    dense = np.zeros((nodes, nodes), bool)
    dense[tuple(np.asarray(pairs).T)] = True
    return dense


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "count"), [(1, 1), (7, 0), (7, 20), (129, 400), (5, 25)])
def test_edges_are_the_adjacency_matrix(nodes, count):
    """Also with edges named twice, and nodes without any."""
    pairs = random_pairs(nodes, count)
    pairs = np.concatenate([pairs, pairs[: count // 2]])
    mask, expected = edges(pairs, nodes), adjacency(pairs, nodes)
    np.testing.assert_array_equal(mask.to_dense(nodes), expected)
    for sizes in ((1, 1), (4, 3), (32, 16), (nodes, nodes)):
        states = mask.tiles(nodes, nodes, *sizes)
        np.testing.assert_array_equal(states, states_of(expected, *sizes))


def test_neighbors_named_twice_count_once():
    mask = Edges([[0, 0], [0, 1]])
    np.testing.assert_array_equal(
        mask.tiles(2, 2, 2, 2), states_of(np.array([[1, 0], [1, 1]]), 2, 2)
    )


def test_memory_grows_with_the_edges():
    nodes = 4096
    ring = [(i, (i + 1) % nodes) for i in range(nodes)]
    assert edges(ring, nodes).neighbors.shape == (nodes, 1)
    states = edges(ring, nodes).tiles(nodes, nodes, 256, 256)
    assert (states != EMPTY).sum() == 2 * nodes // 256


def test_tiles_of_a_hub_and_of_many_edges_take_memory_for_the_edges():
    nodes = 2048
    hub = np.stack(np.broadcast_arrays(np.arange(nodes), 0), axis=1)
    pairs = np.concatenate([hub, hub[:, ::-1], np.repeat(np.arange(nodes), 2).reshape(-1, 2)])
    mask = edges(pairs, nodes)
    tracemalloc.start()
    states = mask.tiles(nodes, nodes, 128, 32)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2 * mask.neighbors.nbytes
    np.testing.assert_array_equal(states, states_of(adjacency(pairs, nodes), 128, 32))


@pytest.mark.slow
@pytest.mark.parametrize("transform", [lambda function: function, jax.jit], ids=["known", "traced"])
def test_tiles_that_overlap_and_reach_beyond_the_graph_are_counted(transform):
    pairs = [*random_pairs(9, 60), *[(i, j) for i in range(6) for j in range(6)]]
    cases = {"block": (30, 40, 6, 3), "shift": (12, 12, 4, 3), "transposed": (9, 12, 3, 4)}

    def read(neighbors):
        mask = Edges(neighbors)
        asked = {
            "block": Block(mask, 4),
            "shift": Shift(mask, query=-3, key=-2),
            "transposed": Predicate(lambda q_idx, kv_idx: mask(kv_idx, q_idx)),
        }
        return {
            name: (mask.tiles(*cases[name]), mask.to_dense(*cases[name][:2]))
            for name, mask in asked.items()
        }

    for name, (states, dense) in transform(read)(edges(pairs, 9).neighbors).items():
        np.testing.assert_array_equal(states, states_of(np.asarray(dense), *cases[name][2:]))


@pytest.mark.slow
def test_a_graph_known_only_inside_jit():
    neighbors = jnp.asarray(np.random.default_rng(0).integers(-1, 20, (20, 3), np.int32))

    @jax.jit
    def traced(neighbors):
        mask = Edges(neighbors)
        return mask.tiles(20, 20, 4, 4), mask.to_dense(20)

    states, dense = traced(neighbors)
    np.testing.assert_array_equal(states, Edges(neighbors).tiles(20, 20, 4, 4))
    assert_sound(states, dense, 4, 4)


def test_indices_beyond_the_graph_have_no_edges():
    mask = edges([(0, 0), (2, 2)], length=3)
    np.testing.assert_array_equal(mask.to_dense(5), adjacency([(0, 0), (2, 2)], 5))
    np.testing.assert_array_equal(
        mask.tiles(5, 5, 2, 2), states_of(adjacency([(0, 0), (2, 2)], 5), 2, 2)
    )
    assert not mask(jnp.array([[-1]]), jnp.array([[-1]])).any()


@pytest.mark.slow
def test_attention_over_a_graph_mixes_neighbors_only(implementation):
    """A message travels one edge a layer."""
    path = [(i, i) for i in range(6)] + [(i + 1, i) for i in range(5)]
    x = jnp.eye(6)[None, :, None]
    mask = edges(path, 6)
    once = attend(x, x, x, mask=mask, **implementation)[0, :, 0]
    np.testing.assert_array_equal(np.asarray(once) > 0, adjacency(path, 6))
    twice = attend(x, x, once[None, :, None], mask=mask & (Causal() | Full()), **implementation)
    reached = np.linalg.matrix_power(adjacency(path, 6).astype(int), 2) > 0
    np.testing.assert_array_equal(np.asarray(twice[0, :, 0]) > 0, reached)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: edges([(0, 3)], 3), "edges: nodes are numbered from 0 to 2, got one of number 3."),
        (
            lambda: edges([(-1, 0)], 3),
            "edges: nodes are numbered from 0 to 2, got one of number -1.",
        ),
        (
            lambda: edges([(0, 1, 2)], 3),
            "edges: pairs must be [E, 2], (query, key), got shape (1, 3).",
        ),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError) as error:
        build()
    assert str(error.value) == message
