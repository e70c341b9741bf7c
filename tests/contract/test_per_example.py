"""Every exported score, bias and normalizer with parameters of its own for each example."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attend, bind, normalizers, per_example, positions, scores
from attention_jax.base.binding import as_pytree
from attention_jax.implementations import interpreted
from attention_jax.masks import Causal
from tests.contract import examples

BATCH, T, S, HEADS, KEY_HEADS, DEPTH = 2, 5, 7, 2, 1, 4
WAYS = {
    "dense": {"implementation": "dense"},
    "tiled": {"implementation": "tiled", "tile_sizes": (3, 4)},
}
OF_POSITIONS = {
    "alibi": "bias",
    "contextual_positions": "normalizer",
    "grid_bias": "bias",
    "relative_key": "score",
    "t5_bias": "bias",
}
UNLIKE = {"cosine", "t5_bias"}
UNLIKE_IN_KERNELS = {"bilinear", "entmax", "softmax_with_sink", "t5_bias", "top_p"}
IN_KERNELS = {"softmax_with_sink", "sigmoid"}
compiled = functools.partial(
    jax.jit,
    # Programs are large and numbers few: to compile takes the time.
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


def of_positions(name, rng):
    """What knows positions, with parameters of one example."""
    table = rng.normal(size=(5, DEPTH))
    return {
        "alibi": lambda: bind(positions.alibi, slope=rng.normal()),
        "contextual_positions": lambda: bind(normalizers.contextual_positions, table=table),
        "t5_bias": lambda: bind(positions.t5_bias, table=table[:, 0], bidirectional=False),
        "grid_bias": lambda: bind(positions.grid_bias, table=table[:, :3], width=3),
        "relative_key": lambda: bind(positions.relative_key, table=table),
    }[name]()


def of_example(option, name, seed):
    """The function of one example, with parameters of its own."""
    rng = np.random.default_rng(seed)
    if name in OF_POSITIONS:
        return of_positions(name, rng)
    if option == "score":
        depths = (DEPTH, DEPTH + (name in examples.DIFFERENT_DEPTHS))
        return examples.score_example(name, lambda *shape: rng.normal(size=shape), *depths).score
    normalizer = as_pytree(examples.NORMALIZERS[name].normalizer)
    return jax.tree.map(lambda leaf: leaf + 0.1 * seed, normalizer)


def test_every_exported_bias_is_here():
    others = {"alibi_bias", "learned_buckets", "learned_grid"}  # these in a module's hands
    biases = {name for name in positions.__all__ if name.endswith("_bias")} | {"alibi"}
    assert biases - others == {name for name, option in OF_POSITIONS.items() if option == "bias"}


WITH_PARAMETERS = [
    (option, name)
    for option, names in (("score", examples.SCORES), ("normalizer", examples.NORMALIZERS))
    for name in names
    if jax.tree.leaves(as_pytree(of_example(option, name, seed=1)))
] + [(option, name) for name, option in OF_POSITIONS.items()]


def setting(option, name, dtype):
    """Arrays and a cotangent of the context, the functions of both examples, and that of both."""
    rng = np.random.default_rng(5)
    wide = DEPTH + (option == "score" and name in examples.DIFFERENT_DEPTHS)
    shapes = (T, HEADS, DEPTH), (S, KEY_HEADS, wide), (S, KEY_HEADS, 3), (T, HEADS, 3)
    *arrays, wave = (rng.normal(size=(BATCH, *shape)) for shape in shapes)
    each = [as_pytree(of_example(option, name, seed)) for seed in (1, 2)]
    both = per_example(jax.tree.map(lambda *leaves: np.stack(leaves), *each))
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (arrays, wave, each, both))


def found(option, how, arrays, wave, function):
    """Return the context, and the gradients of arrays and parameters."""

    def loss(arrays, function):
        context = attend(*arrays, mask=Causal(offset=2), **{option: function}, **how)
        return jnp.sum(context * wave), context

    gradients, context = jax.grad(loss, (0, 1), has_aux=True)(arrays, function)
    return jax.tree.leaves((context, gradients))


def alone(option, arrays, wave, each):
    """Return what `found` does of each example in a call of its own, by the dense oracle."""
    call = compiled(functools.partial(found, option, WAYS["dense"]))
    calls = [
        call(*jax.tree.map(lambda x, b=b: x[b : b + 1], (arrays, wave)), function)
        for b, function in enumerate(each)
    ]
    of_arrays = 1 + len(arrays)
    return [
        (np.concatenate if n < of_arrays else np.stack)(leaves)
        for n, leaves in enumerate(zip(*calls, strict=True))
    ]


def assert_alike(ours, theirs, tolerance):
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def cases(few):
    """All with parameters; those that are like one of a few are exhaustive."""
    marks = {
        name: [pytest.mark.slow] + [pytest.mark.exhaustive] * (name not in few)
        for _, name in WITH_PARAMETERS
    }
    return [pytest.param(*case, marks=marks[case[1]]) for case in WITH_PARAMETERS]


@pytest.mark.parametrize(("option", "name"), cases(UNLIKE))
def test_each_example_is_as_if_called_alone(option, name, x64):
    """With gradients of queries, keys, values and parameters."""
    arrays, wave, each, both = setting(option, name, jnp.float64)
    expected = alone(option, arrays, wave, each)
    for how in WAYS.values():
        ours = compiled(functools.partial(found, option, how))(arrays, wave, both)
        assert_alike(ours, expected, 1e-11)


@pytest.mark.parametrize(("option", "name"), cases(UNLIKE_IN_KERNELS))
def test_kernels_do_so_or_refuse_it_by_name(option, name):
    arrays, wave, each, both = setting(option, name, jnp.float32)
    in_kernel = functools.partial(found, option, {"implementation": "pallas"})
    with interpreted():
        if option == "normalizer" and name not in IN_KERNELS:
            with pytest.raises(ValueError, match=f"^attend: implementation 'pallas' .*{name}"):
                in_kernel(arrays, wave, both)
            return
        ours = compiled(in_kernel)(arrays, wave, both)
    assert_alike(ours, alone(option, arrays, wave, each), 1e-4)


@pytest.mark.slow
def test_functions_without_parameters_may_be_marked():
    arrays, *_ = setting("score", "dot", jnp.float32)
    one = attend(*arrays, score=scores.dot, normalizer=normalizers.hard, **WAYS["dense"])
    marked = {"score": per_example(scores.dot), "normalizer": per_example(normalizers.hard)}
    assert_alike(attend(*arrays, **marked, **WAYS["tiled"]), one, 1e-6)
