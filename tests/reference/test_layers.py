"""Single layers of joeynmt, Keras and PyG: values and gradients."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax import masks
from attention_jax.interop import to_heads
from tests.reference import layers, trees
from tests.reference.sizes import D, N

torch = pytest.importorskip("torch")
comparing = pytest.importorskip("tests.reference.comparing")
pytestmark = pytest.mark.slow

LENGTHS = np.array([7, 4])
SEEN = np.arange(7) < LENGTHS[:, None]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


class Attention(torch.nn.Module):
    """An attention of joeynmt as one call."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, state, memory):
        self.attention.compute_proj_keys(memory)
        seen = comparing.tensor(SEEN[:, None])
        return self.attention(state[:, None], seen, memory)[0][:, 0]


def of_bahdanau(state, offset=0.0):
    names = ("query", "key", "energy")
    query, key, energy = (np.asarray(state[f"attention.{x}_layer.weight"]) for x in names)
    return {"score": {"query_weight": query.T, "key_weight": key.T, "value": energy[0]}}


def of_luong(state, offset=0.0):
    return {"score": {"weight": np.asarray(state["attention.key_layer.weight"])}}


@pytest.mark.parametrize("name", ["Bahdanau", "Luong"])
def test_joeynmt(name):
    attention = pytest.importorskip("joeynmt.attention")
    sizes = {"hidden_size": 6 if name == "Bahdanau" else D, "key_size": 24}
    sizes |= {"query_size": D} if name == "Bahdanau" else {}
    other = comparing.drawn(Attention(getattr(attention, f"{name}Attention")(**sizes)))
    build, parameters = {
        "Bahdanau": (layers.bahdanau, of_bahdanau),
        "Luong": (layers.luong, of_luong),
    }[name]
    state, memory = normal(2, D), normal(2, 7, 24, seed=1)
    comparing.agree(
        f"joeynmt {name}",
        other,
        build(),
        parameters,
        lambda: other(comparing.tensor(state), comparing.tensor(memory)),
        lambda ours: ours(state, memory, masks.Lengths(LENGTHS))[0],
    )


def test_multi_head_of_joeynmt():
    transformer = pytest.importorskip("joeynmt.transformer_layers")
    other = comparing.drawn(transformer.MultiHeadedAttention(N, D))
    names = [f"{x}_layer" for x in ("q", "k", "v", "output")]
    parameters = lambda state, offset=0.0: trees.State("joeynmt", state, "").attention(names)  # noqa: E731
    query, memory = normal(2, 5, D), normal(2, 7, D, seed=1)
    q, m, seen = (comparing.tensor(x) for x in (query, memory, SEEN[:, None]))
    comparing.agree(
        "joeynmt multi-head",
        other,
        layers.multi_head(),
        parameters,
        lambda: other(m, m, q, seen)[0],
        lambda ours: ours(query, memory, mask=masks.Lengths(LENGTHS)),
    )


def of_keras(name, *sizes, **options):
    """Return a layer of Keras that runs on PyTorch, in float64; on JAX it has tanh in float32."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "torch":
        pytest.skip("Keras is there already with another backend.")
    keras.config.set_floatx("float64")
    return getattr(keras.layers, name)(*sizes, **options)


def agree_with_keras(name, layer, ours, inputs, **options):
    """Compare outputs, and gradients of a random sum of them, given a function of weights."""
    inputs = jax.tree.map(comparing.tensor, inputs)
    layer(*inputs, **options)  # builds it
    variables = layer.trainable_variables
    weights = [0.3 * normal(*w.shape, seed=n) for n, w in enumerate(variables)]
    layer.set_weights(weights)
    expected = layer(*inputs, **options)
    factors = normal(*expected.shape, seed=9)
    torch.sum(expected * comparing.tensor(factors)).backward()

    def loss(weights):
        output = ours(weights)
        return jnp.sum(output * factors), output

    (_, output), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights)
    comparing.close(f"Keras {name}", output, expected)
    for slope, variable in zip(slopes, variables, strict=True):
        np.testing.assert_allclose(slope, variable.value.grad.numpy(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["MultiHeadAttention", "GroupQueryAttention"])
def test_heads_of_keras(name):
    build, sizes = {
        "MultiHeadAttention": (layers.multi_head, (N, D // N)),
        "GroupQueryAttention": (layers.grouped, (6, N, layers.K)),
    }[name]
    query, memory = normal(2, 5, D), normal(2, 7, D, seed=1)
    graph = nnx.graphdef(build())

    def ours(weights):
        names = [f"{x}.{y}" for x in ("query", "key", "value", "out") for y in ("kernel", "bias")]
        tree = {x: {} for x in ("query", "key", "value", "out")}
        for at, weight in zip(names, weights, strict=True):
            tree[at.split(".")[0]][at.split(".")[1]] = weight
        return nnx.merge(graph, nnx.State(tree))(query, memory, mask=masks.Lengths(LENGTHS))

    layer = of_keras(name, *sizes, flash_attention=False)
    seen = comparing.tensor(np.broadcast_to(SEEN[:, None], (2, 5, 7)))
    agree_with_keras(name, layer, ours, (query, memory), attention_mask=seen)


def test_additive_of_keras():
    query, memory = normal(2, 5, D), normal(2, 7, D, seed=1)

    def ours(weights):
        return layers.additive_of_vectors(query, memory, memory, weights[0])

    agree_with_keras("AdditiveAttention", of_keras("AdditiveAttention"), ours, ([query, memory],))


EDGES = np.array([(0, 0), (0, 3), (1, 1), (1, 4), (2, 2), (3, 3), (3, 0), (3, 5), (4, 4), (5, 5)])


@pytest.mark.parametrize("name", ["GATConv", "GATv2Conv"])
def test_graphs_of_pyg(name):
    """Edges are (target, source), those of each node to itself among them."""
    convolutions = pytest.importorskip("torch_geometric.nn")
    options = {"heads": N, "add_self_loops": False, "bias": False}
    other = comparing.drawn(getattr(convolutions, name)(D, 5, **options))
    nodes = normal(6, D)
    expected = other(comparing.tensor(nodes), comparing.tensor(EDGES.T[::-1]))
    factors = normal(*expected.shape, seed=9)
    torch.sum(expected * comparing.tensor(factors)).backward()
    run, names = {
        "GATConv": (layers.gat, ("lin.weight", "att_src", "att_dst")),
        "GATv2Conv": (layers.gat2, ("lin_l.weight", "lin_r.weight", "att")),
    }[name]
    parameters = dict(other.named_parameters())

    def loss(weights):
        output = run(nodes, EDGES, *weights).reshape(6, -1)
        return jnp.sum(output * factors), output

    def as_ours(arrays):
        arrays = [array.numpy() for array in arrays]
        return [to_heads({"kernel": a.T}, N)["kernel"] if a.ndim == 2 else a[0] for a in arrays]

    weights = as_ours([parameters[x].detach() for x in names])
    (_, output), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights)
    comparing.close(f"PyG {name}", output, expected)
    for slope, of_other in zip(slopes, as_ours([parameters[x].grad for x in names]), strict=True):
        np.testing.assert_allclose(slope, of_other, rtol=1e-9, atol=1e-10)
