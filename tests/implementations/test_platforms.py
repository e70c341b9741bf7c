"""Choices follow the platform that a program is lowered for, not the process that traces it."""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from attention_jax import attend, bind, explain, masks, scores, statistics
from attention_jax.base.placement import Where
from attention_jax.implementations import cudnn, temporaries
from attention_jax.implementations.lifting import Elsewhere, lift
from attention_jax.implementations.pallas import choosing
from experiments.benchmark import compilers

RNG = np.random.default_rng(0)


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def lowered(function, *arguments, platform):
    """Return the text of a program for another platform."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def halves(length, heads=8, depth=64):
    return [jax.ShapeDtypeStruct((1, length, heads, depth), jnp.bfloat16)] * 3


def tiled(**options):
    return functools.partial(attend, implementation="tiled", **options)


def products(text):
    """Return the types of both operands of the products in a program."""
    return re.findall(r"stablehlo.dot_general.*: \(tensor<(.*?)>, tensor<(.*?)>\)", text)


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", "f32"), ("tpu", "bf16"), ("cuda", "bf16")])
def test_tiles_heads_and_products_of_a_program_for_each_platform(platform, dtype):
    text = lowered(tiled(mask=masks.Causal()), *halves(4096), platform=platform)
    rows = "512x512" if platform == "cpu" else "8x1024x1024"  # of heads, queries and keys
    of_weights = [left for left, _ in products(text) if left.endswith(f"{rows}x{dtype}")]
    assert of_weights


@pytest.mark.slow
def test_a_program_for_several_platforms_at_once():
    x = normal(1, 640, 2, 8)
    function = jax.jit(tiled(mask=masks.Causal(), tile_sizes=(128, 128)))
    exported = jax.export.export(function, platforms=["cpu", "tpu", "cuda"])(x, x, x)
    assert exported.platforms == ("cpu", "tpu", "cuda")
    np.testing.assert_allclose(exported.call(x, x, x), function(x, x, x), rtol=1e-6)


def test_explain_counts_what_a_tpu_reserves_for_a_loop_over_features():
    told = functools.partial(explain, platform="tpu", implementation="tiled")
    found = jax.eval_shape(functools.partial(additive, attend=told), *of_additive(4096, 8))
    assert found.bytes == temporaries.RESERVED
    assert told(*halves(4096)).bytes < temporaries.RESERVED


def test_features_of_additive_scores_are_added_within_one_kernel_off_cpu():
    parameters = {"query_weight": normal(8, 24), "key_weight": normal(8, 24)}
    parameters |= {"value": normal(24), "bias": jnp.zeros(24)}
    function = tiled(score=bind(scores.additive, **parameters), tile_sizes=(64, 64))
    x = normal(1, 128, 1, 8)
    platforms = ("cpu", "tpu", "cuda")
    assert [_has_loop_over(24, function, x, of) for of in platforms] == [True, False, False]


def _has_loop_over(number, function, x, platform):
    """Tell whether a program has a loop of so many turns."""
    text = lowered(function, x, x, x, platform=platform)
    return re.search(rf"dense<{number}> : tensor<i32>", text) is not None


GROUPS = {
    "all fit": ({"B": 2, "K": 4, "G": 2}, "", 16, {}),
    "some heads": ({"B": 2, "K": 4, "G": 2}, "", 4, {"K": 2, "B": 1}),
    "one head": ({"B": 2, "K": 4, "G": 2}, "", 1, {"G": 1, "K": 1, "B": 1}),
    "no divisor": ({"B": 1, "K": 7, "G": 1}, "", 4, {"K": 1}),
    "a mask of each example": ({"B": 2, "K": 4, "G": 2}, "B", 16, {"B": 1}),
}


@pytest.mark.parametrize("name", GROUPS)
def test_as_many_heads_at_once_as_fit(name):
    sizes, sequential, most, expected = GROUPS[name]
    assert Elsewhere(None, sequential, most).at_once(sizes, "BKG", "BKG") == expected


@pytest.mark.parametrize("most", [pytest.param(1, marks=pytest.mark.slow), 6])
def test_groups_of_heads_compute_what_all_heads_do(most, x64):
    x, weight = (jnp.asarray(RNG.normal(size=shape)) for shape in ((2, 5, 4, 3, 2), (4, 3)))
    axes, result = ["BTKG", "KG"], ("BTKG", "BKG")

    def one(x, weight):
        return x * weight, jnp.sum(x) * weight

    def computed(lifted):
        def total(*operands):
            return sum(jnp.sum(jnp.sin(y)) for y in lifted(*operands))

        program = jax.jit(lambda *operands: (lifted(*operands), jax.grad(total, (0, 1))(*operands)))
        return jax.tree.leaves(program(x, weight))

    where = Where(spread=False, platform="tpu")
    grouped = lift(one, axes, result, elsewhere=Elsewhere(None, "", most), where=where)
    whole = lift(one, axes, result)
    for ours, theirs in zip(computed(grouped), computed(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_explain_answers_for_another_platform():
    found = {
        name: explain(*halves(4096, heads=16), platform=name) for name in ("cpu", "gpu", "tpu")
    }
    assert [each.implementation for each in found.values()] == ["tiled", "cudnn", "pallas"]
    assert found["cpu"].tile == (512, 512) and found["tpu"].tile == (512, 512)
    with pytest.raises(ValueError, match="platform must be None or one of cpu, gpu, tpu, got 'v5"):
        explain(*halves(4096), platform="v5e")
    with pytest.raises(ValueError, match="'cudnn' needs an NVIDIA GPU; this program runs on tpu"):
        explain(*halves(4096), platform="tpu", implementation="cudnn")
    told = explain(*halves(4096, heads=16), platform="tpu", implementation="tiled")
    assert [each.at_once for each in (*found.values(), told)] == [1, 16, 16, 8]
    assert "16 heads, 8 at once, tiles of 1024 x 1024" in str(told)


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v5e", "H100"])
@pytest.mark.parametrize("mask", [None, masks.Causal()], ids=["every pair", "causal"])
def test_explain_tells_the_temporaries_of_the_compiler(target, mask):
    missing = compilers.lacks(target)
    if missing:
        pytest.skip(missing)
    platform = {"tpu": "tpu", "cuda": "gpu"}[compilers.TARGETS[target].platform]
    for shape in ((1, 4096, 8, 64), (4, 8192, 16, 128)):
        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3
        cost = compilers.cost(tiled(mask=mask), arrays, target)
        told = explain(*arrays, mask=mask, implementation="tiled", platform=platform).bytes
        assert told == pytest.approx(cost.temporaries, rel=0.25), shape


def additive(query, key, value, query_weight, key_weight, weight, attend=attend, **options):
    bound = {"query_weight": query_weight, "key_weight": key_weight}
    bound |= {"value": weight, "bias": jnp.zeros_like(weight)}
    return attend(query, key, value, score=bind(scores.additive, **bound), **options)


def of_additive(length, heads):
    shapes = [(1, length, heads, 64)] * 3 + [(64, 64)] * 2 + [(64,)]
    return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v5e", "H100"])
@pytest.mark.parametrize(("length", "heads"), [(4096, 8), (2048, 8)])
def test_explain_tells_the_temporaries_of_additive_scores(target, length, heads):
    missing = compilers.lacks(target)
    if missing:
        pytest.skip(missing)
    arrays = of_additive(length, heads)
    platform = {"tpu": "tpu", "cuda": "gpu"}[compilers.TARGETS[target].platform]
    of_platform = functools.partial(explain, platform=platform)
    ways = attend, of_platform
    run, told = (functools.partial(additive, attend=way, implementation="tiled") for way in ways)
    found = jax.eval_shape(told, *arrays).bytes
    assert found == pytest.approx(compilers.cost(run, arrays, target).temporaries, rel=0.25)


@pytest.mark.aot
def test_additive_attention_takes_no_tile_through_the_memory_of_a_tpu():
    missing = compilers.lacks("v5e")
    if missing:
        pytest.skip(missing)

    tile = 4 * 1024 * 1024  # of float32 logits, of one head
    assert compilers.cost(additive, of_additive(4096, 8), "v5e").temporaries < tile / 2


def kernels(text):
    """Count the kernels of TPU and GPU in a program."""
    return len(re.findall(r"@tpu_custom_call|@__gpu\$xla.gpu.triton", text))


def user_score(query, key):
    return jnp.log1p((query @ key.T) ** 2)


def counted(function):
    """Lower for a CPU, a TPU and a GPU, and count kernels."""
    program = jax.jit(function).trace(*halves(640, heads=2))
    return [
        kernels(program.lower(lowering_platforms=(name,)).as_text())
        for name in ("cpu", "tpu", "cuda")
    ]


def test_none_chooses_kernels_where_they_are_lowered_and_nowhere_else():
    found = counted(functools.partial(attend, score=user_score))
    assert found == [0, 1, int(choosing.can_lower_for_gpu())]


def test_a_program_for_a_gpu_has_tiles_where_pallas_must_know_which_gpu(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    assert counted(functools.partial(attend, score=user_score)) == [0, 1, 0]
    assert "kernels of" in str(explain(*halves(640), score=user_score, platform="gpu"))


@pytest.mark.slow
def test_a_program_for_several_platforms_has_kernels_for_one_and_tiles_for_the_other():
    x = normal(1, 320, 2, 16)
    function = jax.jit(functools.partial(attend, mask=masks.Causal()))
    exported = jax.export.export(function, platforms=["cpu", "tpu"])(x, x, x)
    assert kernels(exported.mlir_module()) == 1
    np.testing.assert_allclose(exported.call(x, x, x), function(x, x, x), rtol=1e-6)


@pytest.mark.slow
def test_derivatives_of_what_none_chooses_are_kernels_too():
    def total(*arrays):
        context = attend(*arrays, mask=masks.Causal(), score=user_score)
        return jnp.sum(context.astype(jnp.float32))

    # A TPU has one backward kernel, a GPU one of queries and one of keys.
    assert counted(jax.grad(total, (0, 1, 2))) == [0, 2, 3 * choosing.can_lower_for_gpu()]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"mask": masks.Causal() & masks.Segment(jnp.zeros(4096, jnp.int32))},
            "kernels of score scaled_dot, mask (Causal(offset=0) & Segment(query_ids=int32[4096],",
        ),
        (
            {"score": lambda query, key: jax.lax.erfc(query @ key.T)},
            "no kernels: the primitive erfc is not known to be one of kernels",
        ),
        (
            {"score": lambda query, key: jnp.tanh(query[:, None] + key[None]).sum(-1)},
            "no kernels: a tile would hold 128 MiB at once",
        ),
        (
            {"mask": jnp.ones((4096, 4096), bool)},
            "kernels of score scaled_dot, mask Table(allowed=bool[4096,4096]",
        ),
        (
            {"bias": lambda q_idx, kv_idx: jnp.zeros(8191)[q_idx - kv_idx + 4095]},
            "no kernels: a table of 8,191 entries is read by query and key at once, and kernels "
            "read at most 1,024, or one for each pair",
        ),
        (
            {"statistics": {"entropy": statistics.entropy}},
            "no kernels: computes no statistics of the weights; use implementation='tiled'",
        ),
    ],
)
def test_explain_says_what_is_a_kernel_or_why_there_is_none(options, told):
    found = explain(*halves(4096), platform="tpu", **options)
    assert found.implementation == ("pallas" if told.startswith("kernels") else "tiled")
    assert str(found).splitlines()[-1].startswith(told)
    assert explain(*halves(4096), platform="cpu", **options).why == ""


def test_kernels_are_chosen_for_sizes_that_they_suit():
    cases = {
        "padded": (halves(300, depth=64), "gpu", "pallas"),
        "a decoder": ([halves(1)[0], *halves(2**17)[:2]], "tpu", "tiled"),
        "no power of two": (halves(4096, depth=40), "gpu", "tiled"),
        "the same on a TPU": (halves(4096, depth=40), "tpu", "pallas"),
    }
    options = {"mask": masks.Window(99, 0), "score": scores.dot, "bias": jnp.zeros(())}
    found = {
        name: explain(*arrays, platform=platform, **options).implementation
        for name, (arrays, platform, _) in cases.items()
    }
    assert found == {name: expected for name, (_, _, expected) in cases.items()}


def test_cudnn_is_left_to_the_platform_that_a_program_is_lowered_for(monkeypatch):
    """As in a process with a GPU whose program runs on a mesh of CPUs."""
    monkeypatch.setattr(cudnn, "lacks", lambda request, platform: None)
    monkeypatch.setattr(cudnn, "attend", lambda request: 7.0 * jnp.tan(request.query))
    x = normal(1, 288, 1, 8)
    program = jax.jit(attend).trace(x, x, x)
    texts = {of: program.lower(lowering_platforms=(of,)).as_text() for of in ("cpu", "cuda")}
    assert {name: "tan" in re.findall(r"\b(tan)\b", text) for name, text in texts.items()} == {
        "cpu": False,
        "cuda": True,
    }
    expected = attend(x, x, x, implementation="dense")
    np.testing.assert_allclose(jax.jit(attend)(x, x, x), expected, rtol=1e-5, atol=1e-6)


def test_heads_that_fit_at_once_are_traced_in_two_ways():
    x = jax.ShapeDtypeStruct((1, 2048, 8, 64), jnp.float32)
    (chosen,) = equations_named("cond", jax.make_jaxpr(tiled())(x, x, x).jaxpr, depth=2)
    assert len(chosen.params["branches"]) == 2


def equations_named(name, jaxpr, depth):
    """Return the equations of a primitive, within so many levels of others."""
    found = [equation for equation in jaxpr.eqns if equation.primitive.name == name]
    if found or not depth:
        return found
    inner = [x for e in jaxpr.eqns for x in jaxprs_in_params(e.params)]
    return [equation for each in inner for equation in equations_named(name, each, depth - 1)]
