"""Train GPT-shaped models on eight devices, split over data, sequence and heads; print the losses.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.parallel.training_cases nnx

prints a line of JSON for each case.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import attention_jax.linen
import attention_jax.nnx
from attention_jax import masks, parallel, positions

EXAMPLES, LENGTH, VOCABULARY, STEPS = 4, 32, 11, 3
DOCUMENTS = np.stack(
    [
        np.repeat([0, 1, 2], lengths)
        for lengths in ([5, 9, 18], [20, 2, 10], [1, 30, 1], [10, 11, 11])
    ]
)
MASK = masks.Causal() & masks.Segment(DOCUMENTS)
ORDER = parallel.deal(MASK, LENGTH, 2, block=4, tile_sizes=(4, 4))
MODEL = {
    "num_heads": 4,
    "num_layers": 1,
    "max_length": LENGTH,
    "attention_dropout_rate": 0.2,
    "param_dtype": jnp.float64,
}
# By the end of its path, over which axes of the mesh a parameter is sharded.
HEADS = {
    "query/kernel": P(None, "heads"),
    "key/kernel": P(None, "heads"),
    "value/kernel": P(None, "heads"),
    "attention/out/kernel": P("heads"),
    "hidden/kernel": P(None, "heads"),
    "feed_forward/out/kernel": P("heads"),
}
# The axis that splits the sequence, the method, and whether positions are dealt.
CASES = {"one device": (None, None, False), "ring, dealt": ("sequence", "ring", True)}


def attention_of(api, method):
    """Return what builds the attention: grouped heads, rotary positions beside learned ones."""
    return functools.partial(
        api.MultiHeadAttention,
        num_key_heads=2,
        position=positions.rotary,
        implementation=method,
    )


def batches():
    """Return tokens, and the token after each, for every step."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (STEPS, EXAMPLES, LENGTH + 1))
    return [(x[:, :-1], x[:, 1:]) for x in tokens]


def cross_entropy(logits, following):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, following)
    return losses.mean()


def sharded(tree, mesh):
    """Shard parameters over the heads; without a mesh, leave them."""

    def put(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        spec = next((spec for end, spec in HEADS.items() if name.endswith(end)), P())
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return tree if mesh is None else jax.tree_util.tree_map_with_path(put, tree)


def placed(array, mesh, *spec):
    """Return an array on the first device, or sharded over a mesh."""
    return jax.device_put(array, None if mesh is None else NamedSharding(mesh, P(*spec)))


def losses_of_nnx(axis, method, order, mesh):
    """Train with NNX's own `jit` and optimizer; the order is known while tracing."""
    api = attention_jax.nnx
    model = api.CausalDecoder(
        VOCABULARY,
        16,
        attention=attention_of(api, method),
        sequence_axis=axis,
        rngs=nnx.Rngs(0),
        **MODEL,
    )
    nnx.update(model, sharded(nnx.state(model, nnx.Param), mesh))
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens, following, documents):
        def loss_of(model):
            logits = model(tokens, masks.Segment(documents), order=order)
            return cross_entropy(logits, following)

        loss, gradient = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, gradient)
        return loss

    documents = placed(DOCUMENTS, mesh, "data")
    return [
        step(model, optimizer, *(placed(x, mesh, "data", "sequence") for x in batch), documents)
        for batch in dealt(order)
    ]


def losses_of_linen(axis, method, order, mesh):
    """Train with plain optax; the order is an argument of the program."""
    api = attention_jax.linen
    build = functools.partial(api.CausalDecoder, VOCABULARY, 16, remat=True, **MODEL)
    tokens = jnp.zeros((1, LENGTH), int)
    whole = build(attention=attention_of(api, None), deterministic=True)
    variables = whole.init(jax.random.key(0), tokens)
    parameters = sharded(variables["params"], mesh)
    optimizer = optax.adam(0.01)
    state = optimizer.init(parameters)
    model = build(attention=attention_of(api, method), sequence_axis=axis)

    @jax.jit
    def step(parameters, state, batch, documents, order):
        def loss_of(parameters):
            logits = model.apply(
                {"params": parameters},
                batch[0],
                masks.Segment(documents),
                order=order,
                rngs={"dropout": jax.random.key(1)},
            )
            return cross_entropy(logits, batch[1])

        loss, gradient = jax.value_and_grad(loss_of)(parameters)
        updates, state = optimizer.update(gradient, state, parameters)
        return loss, optax.apply_updates(parameters, updates), state

    documents, found = placed(DOCUMENTS, mesh, "data"), []
    for batch in dealt(order):
        batch = [placed(x, mesh, "data", "sequence") for x in batch]
        loss, parameters, state = step(parameters, state, batch, documents, order)
        found.append(loss)
    return found


def dealt(order):
    return [[parallel.permute(x, order) for x in batch] for batch in batches()]


def main(api):
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    names = ("data", "sequence", "heads")
    mesh = jax.make_mesh((2, 2, 2), names, axis_types=(AxisType.Auto,) * 3)
    losses_of = {"nnx": losses_of_nnx, "linen": losses_of_linen}[api]
    for name, (axis, method, is_dealt) in CASES.items():
        order = ORDER if is_dealt else None
        if axis is None:
            losses = losses_of(axis, method, order, None)
        else:
            with jax.set_mesh(mesh):
                losses = losses_of(axis, method, order, mesh)
        print(json.dumps({"case": name, "losses": [float(loss) for loss in losses]}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
