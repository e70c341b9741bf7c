"""The memory that `explain` tells of, beside what compilers allocate."""

import functools

import jax
import jax.numpy as jnp
import pytest

from attention_jax import attend, bind, explain, masks, normalizers, per_head, scores
from experiments.benchmark import accelerators, compilers

LENGTH, HEADS, DEPTH, FEATURES = 4096, 8, 128, 64
ROWS = HEADS * LENGTH
LOG_SUMS = 4 * ROWS


def score(name):
    weights = jnp.full((DEPTH, FEATURES), 1.0 / DEPTH)
    additive = {"query_weight": weights, "key_weight": 2 * weights}
    additive |= {"value": jnp.ones(FEATURES), "bias": jnp.zeros(FEATURES)}
    return {
        "scaled dot": scores.scaled_dot,
        "additive": bind(scores.additive, **additive),
        "a user's own": accelerators.log_square,
        "cosine": bind(scores.cosine, temperature=0.1),
        "bilinear": bind(scores.bilinear, weight=jnp.eye(DEPTH)),
    }[name]


MASKS = {
    "none": lambda ids: None,
    "causal": lambda ids: masks.Causal(),
    "segments": masks.Segment,
}


def computed(way, name, mask, query, key, value, ids, **options):
    bound = {"score": score(name), "mask": MASKS[mask](ids)}
    return way(query, key, value, **bound, **options)


def arrays(keys=HEADS, length=LENGTH):
    shapes = [(1, length, heads, DEPTH) for heads in (HEADS, keys, keys)]
    halves = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    return [*halves, jax.ShapeDtypeStruct((length,), jnp.int32)]


def told(platform, implementation, name, mask, given=None, **options):
    options |= {"platform": platform, "implementation": implementation}
    describe = functools.partial(computed, explain, name, mask, **options)
    return jax.eval_shape(describe, *(given or arrays()))


MAPPED = {
    "scaled dot": 0,
    "a user's own": 0,
    "additive": 2 * 4 * ROWS * FEATURES,
    "cosine": 2 * 2 * ROWS * DEPTH,
    "bilinear": 2 * ROWS * DEPTH,
}
"""Bytes of rows that a score maps, in half precision where their product rounds them."""


@pytest.mark.parametrize("name", MAPPED)
def test_kernels_of_a_gpu_keep_sums_mapped_rows_and_a_cotangent(name):
    found = told("gpu", "pallas", name, "causal")
    assert found.bytes == LOG_SUMS + MAPPED[name]
    assert found.gradient_bytes == 2 * LOG_SUMS + MAPPED[name] + 2 * ROWS * DEPTH


def test_a_tpu_keeps_rows_in_vector_memory_as_long_as_they_fit():
    found = told("tpu", "pallas", "cosine", "none")
    assert (found.bytes, found.gradient_bytes) == (LOG_SUMS, 2 * LOG_SUMS)
    longer = told("tpu", "pallas", "cosine", "none", arrays(length=16 * LENGTH))
    assert longer.bytes == 16 * (LOG_SUMS + MAPPED["cosine"])
    found = told("tpu", "tiled", "scaled dot", "none", arrays(length=LENGTH // 2))
    assert found.gradient_bytes < 2**20


def test_a_tpu_copies_rows_whose_heads_it_takes_some_at_a_time():
    halves = [jax.ShapeDtypeStruct((4, 2 * LENGTH, 2 * HEADS, DEPTH), jnp.bfloat16)] * 3
    given = [*halves, jax.ShapeDtypeStruct((2 * LENGTH,), jnp.int32)]
    found = told("tpu", "tiled", "scaled dot", "causal", given)
    copies = 3 * 2 * DEPTH * 16 * ROWS
    assert found.at_once < found.heads and copies < found.bytes < 1.1 * copies


def test_gradients_of_keys_that_heads_share_are_added_up():
    alone, shared = (told("gpu", "pallas", "scaled dot", "none", arrays(n)) for n in (HEADS, 2))
    assert shared.gradient_bytes - alone.gradient_bytes == 4 * 2 * ROWS * DEPTH


def test_a_score_of_each_head_and_other_normalizers():
    weights = per_head(bind(scores.bilinear, weight=jnp.ones((HEADS, DEPTH, DEPTH))))
    given = arrays()[:3]
    found = explain(*given, score=weights, implementation="pallas", platform="gpu")
    assert found.bytes == LOG_SUMS + MAPPED["bilinear"]
    several = explain(*given, normalizer=normalizers.sparsemax, platform="gpu")
    assert several.gradient_bytes is None


def test_gradients_are_told_in_words_and_not_on_a_cpu():
    found = told("gpu", "pallas", "scaled dot", "none")
    assert "0.125 MiB of temporaries forward, 8.25 MiB with gradients" in str(found)
    here = told("cpu", "tiled", "scaled dot", "none")
    assert here.gradient_bytes is None
    assert "with gradients" not in str(here)


ROWS_OF_TABLE = [
    ("H100", "tiled", "cosine", "segments", False),
    ("H100", "tiled", "scaled dot", "none", True),
    ("H100", "tiled", "additive", "causal", True),
    ("H100", "pallas", "additive", "none", True),
    ("H100", "pallas", "bilinear", "segments", True),
    ("v5e", "tiled", "bilinear", "none", True),
    ("v5e", "tiled", "additive", "causal", True),
    ("v5e", "pallas", "a user's own", "causal", True),
]


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "implementation", "name", "mask", "is_gradient"),
    [
        pytest.param(*row, marks=[pytest.mark.exhaustive] * (n % 4 > 0))
        for n, row in enumerate(ROWS_OF_TABLE)
    ],
)
def test_explain_tells_the_temporaries_of_programs_of_the_table(
    target, implementation, name, mask, is_gradient
):
    missing = compilers.lacks(target)
    if missing:
        pytest.skip(missing)
    is_tpu = target == "v5e"
    swapped = functools.partial(jnp.swapaxes, axis1=1, axis2=2)

    def run(query, key, value, ids):
        given = [swapped(x) if is_tpu else x for x in (query, key, value)]
        options = {"implementation": implementation}
        context = computed(attend, name, mask, *given, ids, **options)
        return swapped(context) if is_tpu else context

    shapes = arrays()
    if is_tpu:  # which holds heads outside of positions
        shapes[:3] = [jax.ShapeDtypeStruct((1, HEADS, LENGTH, DEPTH), x.dtype) for x in shapes[:3]]
    program = accelerators.gradient(run) if is_gradient else run
    found = compilers.cost(program, shapes, target).temporaries
    choice = told("tpu" if is_tpu else "gpu", implementation, name, mask)
    expected = choice.gradient_bytes if is_gradient else choice.bytes
    assert expected == pytest.approx(found, rel=0.25, abs=2**20)
