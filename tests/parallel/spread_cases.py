"""Programs that automatic axes spread over eight devices: compile them, and print what was read.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.parallel.spread_cases GROUP

prints a line of JSON for each case of the group.
"""

import functools
import json
import math
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attention_jax import attend, bind, cache, linear, masks, normalizers, per_head, scores
from attention_jax import linen as attention_linen
from attention_jax import nnx as attention_nnx
from attention_jax.implementations import choice
from attention_jax.linear import feature_maps, linformer, performer
from attention_jax.masks import batch_axes
from tests.contract import examples
from tests.contract.test_modules import EXAMPLES, TOKENS
from tests.parallel.programs import collectives, product_flops

B, N, K, T, H = 8, 4, 2, 8, 6
TILED = {"implementation": "tiled", "tile_sizes": (4, 4)}
DENSE = {"implementation": "dense"}
HOW = {"tiled": TILED, "dense": DENSE}
QUERY = P("data", None, "heads")
# Of every kind one, with its gradients too: the backward pass asks masks as the forward pass does.
DERIVED = ("Causal", "Segment", "Table", "Heads", "scaled_dot", "additive")
# What is looked at is decided before machine code is made.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Case(NamedTuple):
    """A function of arrays, the arrays, and how each is sharded.

    `parameters` are the sizes of the parameters, whose gradients may be summed over devices, and
    `gathered` those of results that devices hold the same of, though each computes a part;
    `sharded` how each result has to be. A case that `tells_mesh` has it on its arrays, others
    only as `in_shardings`, which are not known while tracing.
    """

    function: Any
    arrays: tuple[Any, ...]
    specs: tuple[P, ...]
    sharded: tuple[P, ...]
    parameters: tuple[int, ...] = ()
    gathered: tuple[int, ...] = ()
    mesh: tuple[int, int] = (4, 2)
    tells_mesh: bool = False


def array(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def with_gradients(function, *primals):
    result, backward = jax.vjp(function, *primals)
    return result, backward(result)


def attention(function, *more, sizes=(B, N, K, T), mesh=(4, 2), derived=True):
    """Return a case of `function(query, key, value, *more)`, with its gradients if `derived`."""
    batch, heads, key_heads, length = sizes
    query, key = array(batch, length, heads, H), array(batch, length, key_heads, H)

    def run(query, key, value, *rest):
        of_arrays = lambda *arrays: function(*arrays, *rest)  # noqa: E731
        run = with_gradients if derived else _called
        return run(of_arrays, query, key, value)

    arrays, specs = zip(*more, strict=True) if more else ((), ())
    return Case(
        run,
        (query, key, key, *arrays),
        (QUERY, QUERY, QUERY, *specs),
        (QUERY,) * (4 if derived else 1),
        mesh=mesh,
    )


def _called(function, *arguments):
    return function(*arguments)


def of_mask(name, how):
    """Attend with the example of a mask, whose arrays differ between examples and heads."""
    mask = masks.as_mask(examples.mask_example(name, B, N, T, T).mask)
    _, letters = batch_axes.of_mask("test", mask, {"B": B, "N": N, "T": T, "S": T})
    leaves, structure = jax.tree.flatten(mask)
    late = ["B" in axes for axes in letters]

    def function(query, key, value, *given):
        given = iter(given)
        parts = [next(given) if is_late else x for x, is_late in zip(leaves, late, strict=True)]
        return attend(query, key, value, mask=structure.unflatten(parts), **how)

    more = [
        (
            array(*x.shape, dtype=jnp.asarray(x).dtype),
            P("data", *["heads"] * (x.shape[1:2] == (N,))),
        )
        for x, is_late in zip(map(np.asarray, leaves), late, strict=True)
        if is_late
    ]
    return attention(function, *more, derived=name in DERIVED)


def of_score(name, how):
    sample = lambda *shape: np.random.default_rng(0).normal(size=shape).astype("float32")  # noqa: E731
    score = examples.score_example(name, sample, H, H).score
    function = lambda *arrays: attend(*arrays, score=score, **how)  # noqa: E731
    return attention(function, derived=name in DERIVED)


def segments(query, key, value, segment):
    mask = masks.Causal() & masks.Segment(segment)
    return attend(query, key, value, mask=mask, **TILED)


def options(how):
    """Return what `attend` takes besides scores and masks."""
    rng = jax.random.key(0)

    def own(*arrays):
        score = per_head(bind(scores.bilinear, weight=arrays[3]))
        return attend(*arrays[:3], score=score, **how)

    def sink(*arrays):
        normalizer = per_head(bind(normalizers.softmax_with_sink, sink=arrays[3]))
        return attend(*arrays[:3], normalizer=normalizer, **how)

    biased = lambda *arrays: attend(*arrays[:3], bias=arrays[3], **how)  # noqa: E731
    plain = functools.partial(attend, mask=masks.Causal(), **how)
    return {
        "dropout": attention(functools.partial(attend, dropout_rate=0.5, dropout_key=rng, **how)),
        "bias per example": attention(biased, (array(B, N, T, T), P("data", "heads"))),
        "bias per head": attention(biased, (array(1, N, T, T), P(None, "heads"))),
        "bilinear per head": attention(own, (array(N, H, H), P("heads"))),
        "sink per head": attention(sink, (array(N), P("heads"))),
        "log-sum-exp": attention(lambda *x: attend(*x, return_logsumexp=True, **how).context),
        "as many key heads": attention(plain, sizes=(B, N, N, T)),
        "fewer key heads than devices": fewer_key_heads(plain),
        "examples alone": attention(plain, mesh=(8, 1)),
        "heads alone": attention(plain, sizes=(2, 8, 8, T), mesh=(1, 8)),
    }


def fewer_key_heads(function):
    """Return a case whose gradients of keys are summed over devices, once for all tiles."""
    shape, whole = (4, T, 2, H), P("data")
    run = functools.partial(with_gradients, function)
    return Case(
        run,
        (array(4, T, 8, H), array(*shape), array(*shape)),
        (QUERY, whole, whole),
        (QUERY, QUERY, whole, whole),
        parameters=(math.prod(shape) // 4,),  # of half the examples and one key head
        gathered=(math.prod(shape) // 2,),
        mesh=(2, 4),
    )


def linear_cases():
    weights = performer.random_features(jax.random.key(0), 4, H)
    positive = bind(performer.positive, projection=weights)
    lengths = (array(B, dtype="int32"), P("data"))

    def masked(*arrays, **options):
        return linear.linear_attention(*arrays[:3], mask=masks.Lengths(arrays[3]), **options)

    def causal(*arrays, **options):
        mask = masks.Causal() & masks.Lengths(arrays[3])
        return linear.linear_attention(*arrays[:3], mask=mask, chunk_size=3, **options)

    def projected(query, key, value, projection):
        return linformer.linformer_attention(query, key, value, projection, **TILED_ONLY)

    def decoded(query, key, value, state_of):
        state = linear.init(B, K, H)
        context, state = linear.decode(query, key, value, state)
        return context + linear.read(query, linear.extend(state, key, value, count=state_of))

    found = {
        f"linear {name} {how}": attention(functools.partial(function, feature_map=feature), lengths)
        for how, function in (("causal", causal), ("masked", masked))
        for name, feature in {
            **{name: getattr(feature_maps, name) for name in FEATURE_MAPS},
            "positive": positive,
            "per head": per_head(bind(feature_maps.hedgehog, **HEDGEHOG)),
        }.items()
    }
    found["linformer"] = attention(projected, (array(3, T), P()))
    found["linformer per head"] = attention(projected, (array(K, 3, T), P("heads")))
    found["linear decode"] = attention(decoded, lengths)
    return found


TILED_ONLY = {"implementation": "tiled"}
OF_DENSE = ("dropout", "bias per example", "bilinear per head", "fewer key heads than devices")
FEATURE_MAPS = ("elu_plus_one",)
HEDGEHOG = {"weight": np.ones((K, H, H), "float32"), "bias": np.zeros((K, H), "float32")}


def cache_cases():
    def decoded(ragged, window, query, key, value, count):
        kept = cache.init(B, 16, K, H, ragged=ragged, window=window)
        shard = functools.partial(_constrained, P("data", None, "heads"))
        kept = type(kept)(shard(kept.key), shard(kept.value), kept.positions, kept.length, window)
        kept, _ = cache.extend(kept, key, value, count if ragged else None)
        kept, view = cache.extend(kept, key, value, count if ragged else None)
        mask = masks.Window(window, 0) if window else None
        return cache.attend_cached(query, view, mask=mask, **TILED)

    counts = (array(B, dtype="int32"), P("data"))
    return {
        f"cache ragged={ragged} window={window}": attention(
            functools.partial(decoded, ragged, window), counts
        )
        for ragged in (False, True)
        for window in (None, 3)
    }


def _constrained(spec, x):
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh_of((4, 2)), spec))


def module_cases(api):
    choice.DENSE_PAIRS = 0  # so that None is "tiled" where it can be
    return {f"{api} {name}": of_module(api, name) for name in EXAMPLES if EXAMPLES[name].inputs}


def of_module(api, name):
    """Return a module's result and the gradients of its parameters, examples spread over two."""
    sizes, inputs, _, options, call = EXAMPLES[name]
    call = {key: x for key, x in call.items() if key != "return_weights"}
    if api == "nnx":
        build = functools.partial(getattr(attention_nnx, name), *sizes, **options)
        graph, state, others = nnx.split(
            nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))), nnx.Param, ...
        )

        def apply(state, others, inputs):
            return nnx.merge(graph, state, others)(*inputs, **call)
    else:
        module = getattr(attention_linen, name)(*sizes, **options)
        of_key = functools.partial(_initialized, module, inputs, call)
        state, others = jax.eval_shape(of_key, jax.random.key(0)), None

        def apply(state, others, inputs):
            return module.apply(state, *inputs, **call)

    def run(state, others, inputs):
        return with_gradients(lambda state: apply(state, others, inputs), state)

    leaves = jax.tree.leaves(state)
    rows = [TOKENS.shape[1] * 8] if inputs[0] is TOKENS else []  # of a table of positions
    arrays = (state, others, jax.tree.map(lambda x: array(*jnp.shape(x), dtype=x.dtype), inputs))
    result = jax.eval_shape(apply, *arrays)
    sharded = tuple(P("data") for _ in jax.tree.leaves(result))
    of_parameters = (*(leaf.size for leaf in leaves), *rows)
    return Case(
        run,
        arrays,
        (P(), P(), P("data")),
        (*sharded, *(P() for _ in leaves)),
        of_parameters,
        mesh=(2, 1),
    )


def _initialized(module, inputs, call, key):
    return module.init(key, *inputs, **call)


def whole_programs():
    """Return layers under `scan`, with `jax.checkpoint` and without, and a partly manual mesh."""
    layers, features = 3, N * H
    batch = P("data")
    scanned = functools.partial(
        Case,
        arrays=(array(layers, features, features), array(B, T, features)),
        specs=(P(), batch),
        sharded=(batch, P(), batch),
        parameters=(features * features, layers * features * features),
    )
    kept, again = (functools.partial(with_gradients, layers_of(again)) for again in (False, True))
    return {
        "scan over layers": scanned(kept),
        "scan over layers, computed again": scanned(again),
        "scan over layers, a known mesh": scanned(again, tells_mesh=True),
        "partly manual": attention(partly_manual),
    }


def layers_of(again):
    """Return attention in layers under `scan`, computed again for the backward pass or not."""

    def layer(x, weight):
        heads = (x @ weight).reshape(B, T, N, H)
        heads = attend(heads, heads, heads, mask=masks.Causal(), **TILED)
        return x + heads.reshape(x.shape), None

    def stack(weights, x):
        return jax.lax.scan(jax.checkpoint(layer) if again else layer, x, weights)[0]

    return stack


def partly_manual(query, key, value):
    """Attend where examples are split by hand and heads by the compiler."""
    specs = (P("data"),) * 3
    function = functools.partial(attend, mask=masks.Causal(), **TILED)
    return jax.shard_map(
        function,
        mesh=mesh_of((4, 2)),
        in_specs=specs,
        out_specs=specs[0],
        axis_names={"data"},
    )(query, key, value)


def trained():
    """Take a step of training by `nnx.jit` and `nnx.Optimizer` with a mesh set; read and run it."""
    choice.DENSE_PAIRS = 0
    inputs = jax.random.normal(jax.random.key(1), (B, T, 16))

    def step(model, optimizer, x):
        loss = lambda model: jnp.mean(model(x, mask=masks.Causal()) ** 2)  # noqa: E731
        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    def run(place_model, place_inputs):
        model = attention_nnx.MultiHeadAttention(4, 16, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
        for part in (model, optimizer):
            nnx.update(part, jax.tree.map(place_model, nnx.state(part)))
        arguments = model, optimizer, place_inputs(inputs)
        text = nnx.jit(step).lower(*arguments).compile().as_text()
        nnx.jit(step)(*arguments)
        return text, [np.asarray(x) for x in jax.tree.leaves(nnx.state(model, nnx.Param))]

    _, expected = run(lambda x: x, lambda x: x)
    mesh = mesh_of((8, 1))
    with jax.set_mesh(mesh):
        text, found = run(
            lambda x: jax.device_put(x, NamedSharding(mesh, P())),
            lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))),
        )
    return {
        "name": "nnx.Optimizer",
        "collectives": collectives(text),
        "parameters": [*(x.size for x in expected), 1],
        "as wanted": [
            bool(np.allclose(*pair, atol=1e-6)) for pair in zip(expected, found, strict=True)
        ],
    }


def executed(name, function, *more):
    """Run on eight devices and on one, and compare results and gradients."""
    draw = lambda shape: np.random.default_rng(0).normal(size=shape).astype("float32")  # noqa: E731
    case = attention(function, *((array(*x.shape, dtype=x.dtype), spec) for x, spec in more))
    arrays = [draw(x.shape) for x in case.arrays[:3]] + [x for x, _ in more]
    expected = jax.jit(case.function)(*arrays)
    placed = [
        jax.device_put(x, NamedSharding(mesh_of(case.mesh), spec))
        for x, spec in zip(arrays, case.specs, strict=True)
    ]
    ways = {"jit": jax.jit(case.function)} | ({"": case.function} if more else {})
    return [
        {
            "name": f"{name} {way}",
            "collectives": [],
            "parameters": [],
            "as wanted": [
                bool(np.allclose(one, other, atol=1e-5))
                and other.sharding.is_equivalent_to(placed[0].sharding, 4)
                for one, other in zip(*map(jax.tree.leaves, (expected, run(*placed))), strict=True)
            ],
        }
        for way, run in ways.items()
    ]


def executions():
    segment = np.sort(np.random.default_rng(1).integers(0, 3, (B, T)))
    yield from executed("segments", segments, (segment.astype("int32"), P("data")))
    rng = jax.random.key(0)
    yield from executed(
        "dropout", functools.partial(attend, dropout_rate=0.5, dropout_key=rng, **TILED)
    )
    yield trained()


def shares():
    """Return what shows how many products each device computes."""
    causal = masks.Causal()
    additive = of_score("additive", TILED)
    return {
        "tiled": attention(functools.partial(attend, mask=causal, **TILED)),
        "tiled segments": attention(segments, (array(B, T, dtype="int32"), P("data"))),
        "tiled additive": additive,
        "dense": attention(functools.partial(attend, mask=causal, **DENSE)),
        "linear": attention(functools.partial(linear.linear_attention, mask=causal, chunk_size=4)),
    }


GROUPS = {
    "quick": lambda: {"segments": attention(segments, (array(B, T, dtype="int32"), P("data")))},
    "shares": shares,
    "masks": lambda: {f"tiled {name}": of_mask(name, TILED) for name in examples.MASKS},
    "scores": lambda: {f"tiled {name}": of_score(name, TILED) for name in examples.SCORES},
    "dense": lambda: {
        **{f"dense {name}": of_mask(name, DENSE) for name in ("Segment", "Prefix", "Table")},
        **{f"dense {name}": of_score(name, DENSE) for name in ("scaled_dot", "additive")},
        **{f"dense {name}": options(DENSE)[name] for name in OF_DENSE},
    },
    "options": lambda: {f"tiled {name}": case for name, case in options(TILED).items()},
    "linear": linear_cases,
    "cache": cache_cases,
    "whole": whole_programs,
    "nnx": lambda: module_cases("nnx"),
    "linen": lambda: module_cases("linen"),
}


@functools.cache
def mesh_of(sizes):
    devices = np.array(jax.devices()[: sizes[0] * sizes[1]]).reshape(sizes)
    return jax.sharding.Mesh(devices, ("data", "heads"), axis_types=(AxisType.Auto,) * 2)


def compiled(case, specs):
    """Compile a case for its mesh."""
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh_of(case.mesh), spec), specs)
    arrays = case.arrays
    if case.tells_mesh:
        pairs = zip(arrays, shardings, strict=True)
        arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in pairs]
    return jax.jit(case.function, in_shardings=shardings).lower(*arrays).compile(QUICK)


def record(name, case, is_counted):
    """Say what a case exchanges, how its results are sharded, and its share of the products."""
    program = compiled(case, case.specs)
    text = program.as_text()
    wanted = [NamedSharding(mesh_of(case.mesh), spec) for spec in case.sharded]
    results = jax.tree.leaves(program.output_shardings)
    shapes = jax.tree.leaves(jax.eval_shape(case.function, *case.arrays))
    found = {
        "name": name,
        "collectives": collectives(text),
        "parameters": case.parameters,
        "gathered": case.gathered,
        "results": [str(sharding.spec) for sharding in results],
        "as wanted": [
            sharding.is_equivalent_to(want, shape.ndim)
            for sharding, want, shape in zip(results, wanted, shapes, strict=True)
        ],
    }
    if is_counted:
        whole = compiled(case, tuple(P() for _ in case.specs))
        found["share"] = product_flops(text) / product_flops(whole.as_text())
    return found


def records(group):
    if group == "executed":
        yield from executions()
        return
    for name, case in GROUPS[group]().items():
        yield record(name, case, is_counted=group == "shares")


if __name__ == "__main__":
    for found in records(sys.argv[1]):
        print(json.dumps(found), flush=True)
