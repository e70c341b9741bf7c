"""Kernels compiled for accelerators that are not there: that they compile, and what they cost."""

import functools

import jax
import jax.numpy as jnp
import pytest

from attention_jax import attend, bind, masks, scores
from experiments.benchmark import accelerators, compilers

pytestmark = pytest.mark.aot

LENGTH, HEADS, DEPTH, FEATURES = 1024, 2, 128, 16
SECONDS = 20.0
"""Of processor time, to compile one program."""


def scores_by_name():
    weights = jnp.full((DEPTH, FEATURES), 1.0 / DEPTH)
    of_features = {"value": jnp.ones(FEATURES), "bias": jnp.zeros(FEATURES)}
    return {
        "scaled dot": scores.scaled_dot,
        "cosine": bind(scores.cosine, temperature=0.1),
        "additive": bind(scores.additive, query_weight=weights, key_weight=weights, **of_features),
        "bilinear": bind(scores.bilinear, weight=jnp.eye(DEPTH)),
        "soft cap": scores.soft_capped(scores.scaled_dot, 30.0),
        "a user's own": accelerators.log_square,
    }


SMALL = 2**18
"""Bytes for lists of tiles, and what a compiler reserves whatever the program."""

MAPPED_ROWS = {"cosine": 2, "additive": 2, "bilinear": 1}
"""Scores that give the kernel other queries and keys than they were given: how many of both."""

MASKS = {
    "none": lambda ids: None,
    "causal": lambda ids: masks.Causal(),
    "window": lambda ids: masks.Causal() & masks.Window(200, 0),
    "segments": masks.Segment,
    "prefix or window": lambda ids: masks.Prefix(100) | masks.Window(200, 0),
}


def cost_of(target, score, mask, is_gradient=False):
    """Compile attention for a target, of operands as its kernels take them."""
    missing = compilers.lacks(target)
    if missing:
        pytest.skip(missing)
    platform = compilers.TARGETS[target].platform
    shape = (1, HEADS, LENGTH, DEPTH) if platform == "tpu" else (1, LENGTH, HEADS, DEPTH)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3
    ids = jax.ShapeDtypeStruct((LENGTH,), jnp.int32)

    def attended(query, key, value, ids):
        # A TPU holds heads outside of positions; the transposed view costs nothing.
        swapped = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
        arrays = [swapped(x) if platform == "tpu" else x for x in (query, key, value)]
        context = attend(
            *arrays,
            score=scores_by_name()[score],
            mask=MASKS[mask](ids),
            tile_sizes=accelerators.TILES[platform],
            implementation="pallas",
        )
        return swapped(context) if platform == "tpu" else context

    function = accelerators.gradient(attended) if is_gradient else attended
    return compilers.cost(function, [*arrays, ids], target)


def check(target, score, mask, is_gradient):
    cost = cost_of(target, score, mask, is_gradient)
    assert cost.seconds < SECONDS
    if is_gradient or compilers.TARGETS[target].platform != "tpu":
        return
    log_sums = 4 * HEADS * LENGTH
    mapped = MAPPED_ROWS.get(score, 0) * 4 * HEADS * LENGTH * DEPTH
    assert cost.temporaries <= log_sums + SMALL + mapped
    assert cost.traffic is not None
    # What maps of rows make is written once and read once.
    assert cost.traffic <= 1.3 * (cost.operands + cost.results) + 2 * mapped


@pytest.mark.parametrize(
    ("target", "score", "mask", "is_gradient"),
    [
        ("v5e", "scaled dot", "causal", False),
        ("v5e", "scaled dot", "segments", True),
        ("v6e", "additive", "window", False),
        ("H100", "scaled dot", "causal", True),
    ],
)
def test_a_few_compile_and_cost_what_they_should(target, score, mask, is_gradient):
    check(target, score, mask, is_gradient)


@pytest.mark.slow
@pytest.mark.parametrize("is_gradient", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("score", sorted(scores_by_name()))
@pytest.mark.parametrize("target", compilers.TARGETS)
def test_every_score_and_mask_compiles_for_every_accelerator(target, score, mask, is_gradient):
    check(target, score, mask, is_gradient)


def test_a_kernel_needs_no_more_than_those_of_jax():
    missing = compilers.lacks("v5e")
    if missing:
        pytest.skip(missing)
    length = 1024
    programs = accelerators.programs("tpu", length)
    shapes = accelerators.operands("tpu", length)
    ours, flash = (
        compilers.cost(programs[name, "causal"], shapes, "v5e")
        for name in ("attend, scaled dot", "flash")
    )
    assert ours.traffic is not None
    assert flash.traffic is not None
    assert ours.traffic <= 1.05 * flash.traffic
