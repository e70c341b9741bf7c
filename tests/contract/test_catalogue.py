"""Every exported score, mask and normalizer together, under every implementation.

Values are compared with float64 loops, gradients with finite differences of those loops.
"""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attend, attention, head_maps, masks, normalizers, positions, scores
from attention_jax.base.parameters import parameters_of
from attention_jax.linear import feature_maps
from attention_jax.normalizers import streaming
from tests import oracle
from tests.contract import examples

BATCH, QUERY_LENGTH, KEY_LENGTH, HEADS, KEY_HEADS, DEPTH, VALUE_DEPTH = 2, 5, 7, 2, 1, 4, 3
PORTABLE = set(attention.IMPLEMENTATIONS) - {"pallas", "cudnn"}  # kernels have no float64
SLOW_TO_COMPILE = {"additive", "concat", "gaussian", "normalized_additive"}
STEP = 1e-6
NOT_LEARNED = {"activation", "after_sum", "q_idx", "kv_idx"}
BUILT_FROM_SCORES = {
    "Separated",
    "TanhBySines",
    "positional",
    "projected",
    "row_normalized",
    "scaled",
    "separate",
    "soft_capped",
}


@pytest.mark.parametrize(
    ("exported", "examples_of", "others"),
    [
        (scores, examples.SCORES, examples.NOT_SCORES),
        (masks, examples.MASKS, examples.NOT_MASKS),
        (normalizers, examples.NORMALIZERS, examples.NOT_NORMALIZERS),
        (head_maps, examples.HEAD_MAPS, examples.NOT_HEAD_MAPS),
    ],
)
def test_every_export_has_an_example(exported, examples_of, others):
    missing = set(exported.__all__) - set(examples_of) - others
    assert not missing, f"add to tests/contract/examples.py: {sorted(missing)}"


def combinations():
    """Under dense every score with every mask, normalizers in turn; under others each once.

    What takes long to compile meets less: other implementations and scores of several layers are
    given different masks and normalizers each, and other gradients than dense ones less often.
    All are run with the slow tests, every 29th with the others too: a number without a factor in
    common with the cycles, so that these few meet every normalizer. Of those under dense, in which
    every score meets many masks, four of five are exhaustive.
    """
    for turn, combination in enumerate(_all_combinations()):
        marks = [] if turn % 29 == 0 else [pytest.mark.slow]
        if marks and combination[0] == "dense" and turn % 5:
            marks.append(pytest.mark.exhaustive)
        yield pytest.param(*combination, marks=marks)


def _all_combinations():
    masks_in_turn, normalizers_in_turn = (
        itertools.cycle(sorted(names)) for names in (examples.MASKS, examples.NORMALIZERS)
    )
    for score in examples.SCORES:
        meets = examples.MASKS
        if score in SLOW_TO_COMPILE:
            meets = itertools.islice(masks_in_turn, 3)
        for mask in meets:
            yield "dense", score, mask, next(normalizers_in_turn), True
    scores_in_turn = itertools.cycle(examples.SCORES)
    streamable = itertools.cycle(
        name for name, example in examples.NORMALIZERS.items() if streaming(example.normalizer)
    )
    for name in PORTABLE - {"dense"}:
        for turn in range(max(len(examples.SCORES), len(examples.MASKS))):
            mask = next(masks_in_turn)
            yield name, next(scores_in_turn), mask, next(streamable), turn % 4 == 0


@pytest.mark.parametrize(
    ("name", "score", "mask", "normalizer", "with_gradient"), list(combinations())
)
def test_values_and_gradients(name, score, mask, normalizer, with_gradient, x64):
    rng = np.random.default_rng(7)
    key_depth = DEPTH + 1 if score in examples.DIFFERENT_DEPTHS else DEPTH
    inputs = (
        rng.normal(size=(BATCH, QUERY_LENGTH, HEADS, DEPTH)),
        rng.normal(size=(BATCH, KEY_LENGTH, KEY_HEADS, key_depth)),
        rng.normal(size=(BATCH, KEY_LENGTH, KEY_HEADS, VALUE_DEPTH)),
    )
    step = tuple(rng.normal(size=x.shape) for x in inputs)
    bound, formula = examples.score_example(
        score, lambda *shape: rng.normal(size=shape), DEPTH, key_depth
    )
    mask, allowed = examples.mask_example(mask, BATCH, HEADS, QUERY_LENGTH, KEY_LENGTH)
    normalizer, of_row = examples.NORMALIZERS[normalizer]

    def attended(query, key, value):
        return attend(
            query,
            key,
            value,
            score=bound,
            mask=mask,
            normalizer=normalizer,
            implementation=name,
            tile_sizes=(3, 4),
        )

    def expected(query, key, value):
        return oracle.attention(query, key, value, formula, allowed, normalizer=of_row)[0]

    if not with_gradient:
        context = attended(*map(jnp.asarray, inputs))
        np.testing.assert_allclose(context, expected(*inputs), rtol=1e-10, atol=1e-12)
        return
    cotangent = rng.normal(size=inputs[0].shape[:-1] + (VALUE_DEPTH,))
    context, gradients = _value_and_pullback(attended, inputs, cotangent)
    np.testing.assert_allclose(context, expected(*inputs), rtol=1e-10, atol=1e-12)
    derivative = sum(np.vdot(g, dx) for g, dx in zip(gradients, step, strict=True))
    ahead, behind = (
        expected(*(x + sign * STEP * dx for x, dx in zip(inputs, step, strict=True)))
        for sign in (1, -1)
    )
    slope = np.vdot(cotangent, (ahead - behind) / (2 * STEP))
    np.testing.assert_allclose(derivative, slope, rtol=1e-6, atol=1e-7)


@functools.partial(jax.jit, static_argnums=0)
def _value_and_pullback(function, inputs, cotangent):
    value, pullback = jax.vjp(function, *inputs)
    return value, pullback(cotangent)


def pairs():
    """Every implementation with every score and every mask at least once; most are exhaustive."""
    turns = range(max(len(examples.SCORES), len(examples.MASKS)))
    scores_in_turn, masks_in_turn = map(itertools.cycle, (examples.SCORES, examples.MASKS))
    for turn, score, mask in zip(turns, scores_in_turn, masks_in_turn, strict=False):
        for name in sorted(PORTABLE):
            marks = [pytest.mark.exhaustive] if (turn + (name == "tiled")) % 3 else []
            yield pytest.param(name, score, mask, marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "score", "mask"), list(pairs()))
def test_compiled_vectorised_and_in_half_precision(name, score, mask):
    """Also with more queries than keys: what the loops say of inputs rounded to that dtype."""
    rng = np.random.default_rng(8)
    query_length, key_length = KEY_LENGTH, QUERY_LENGTH
    inputs = [
        jnp.asarray(rng.normal(size=(2, BATCH, length, HEADS, DEPTH)), jnp.bfloat16)
        for length in (query_length, key_length, key_length)
    ]
    bound, formula = examples.score_example(
        score, lambda *shape: rng.normal(size=shape).astype(np.float32), DEPTH, DEPTH
    )
    mask, allowed = examples.mask_example(mask, BATCH, HEADS, query_length, key_length)
    attended = functools.partial(
        attend, score=bound, mask=mask, implementation=name, tile_sizes=(3, 4)
    )
    expected = np.stack(
        [oracle.attention(*each, formula, allowed)[0] for each in zip(*inputs, strict=True)]
    )
    for dtype, tolerance in ((jnp.float32, 1e-4), (jnp.bfloat16, 2**-7)):
        mapped = jax.jit(jax.vmap(attended))(*(x.astype(dtype) for x in inputs))
        assert mapped.dtype == dtype
        context = np.asarray(mapped, np.float64)
        np.testing.assert_allclose(context, expected, rtol=tolerance, atol=tolerance)


STREAMING = sorted(
    name for name, example in examples.NORMALIZERS.items() if streaming(example.normalizer)
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "sparsemax" else pytest.mark.exhaustive)
        for name in STREAMING
    ],
)
@pytest.mark.slow
def test_gradients_in_half_precision_are_those_of_the_rounded_numbers(name, x64):
    """Whatever a normalizer streams by: a tile is computed wider than its tangents come in."""
    rng = np.random.default_rng(9)
    halves = [jnp.asarray(rng.normal(size=(1, 7, 2, 4)), jnp.bfloat16) for _ in range(3)]
    weight = jnp.asarray(rng.normal(size=(1, 7, 2, 4)))
    normalizer = examples.NORMALIZERS[name].normalizer

    def gradients(arrays, **options):
        def total(arrays):
            context = attend(*arrays, normalizer=normalizer, mask=masks.Causal(), **options)
            return jnp.sum(weight * context.astype(jnp.float64))

        return jax.jit(jax.grad(total))(arrays)

    found = gradients(halves, implementation="tiled", tile_sizes=(3, 4))
    exact = gradients([x.astype(jnp.float64) for x in halves], implementation="dense")
    scale = max(float(jnp.max(jnp.abs(x))) for x in exact)
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        error = jnp.max(jnp.abs(ours.astype(jnp.float64) - theirs))
        assert float(error) <= 2.0 * float(jnp.finfo(jnp.bfloat16).eps) * scale


@pytest.mark.parametrize("name", sorted(set(scores.__all__) - BUILT_FROM_SCORES))
def test_every_score_declares_its_parameters(name):
    """A module can create what a score needs: every argument beside query and key."""
    score = getattr(scores, name)
    declared = parameters_of(score, query_depth=4, key_depth=4, attention_size=8)
    arguments = set(inspect.signature(score).parameters) - {"query", "key"} - NOT_LEARNED
    assert set(declared) == arguments


DECLARING = {
    name: getattr(exported, name)
    for exported in (scores, positions, normalizers, feature_maps)
    for name in exported.__all__
    if hasattr(getattr(exported, name), "__parameters__")
}
WITHOUT_SIZE = {"bilinear", "cosine", "entmax", "gaussian", "softmax_with_sink", "trilinear"}


@pytest.mark.parametrize("name", sorted(DECLARING.keys() - WITHOUT_SIZE))
@pytest.mark.parametrize("size", [-1, 0, 2.5, (2, 3), (2, 0), ()])
def test_every_size_is_taken_as_it_is_or_refused_in_one_sentence(name, size):
    if (name, size) in {("concat", (2, 3)), ("relative_key", 0)}:
        assert parameters_of(DECLARING[name], 4, 4, size)
        return
    message = rf"^{name}: attention_size must be [^.]+, got [^.]*(\.5)?\.$"
    with pytest.raises(ValueError, match=message):
        parameters_of(DECLARING[name], 4, 4, size)


@pytest.mark.parametrize(
    "name", sorted(DECLARING.keys() - {"cosine", "entmax", "softmax_with_sink"})
)
def test_a_depth_that_parameters_need_is_asked_for(name):
    message = rf"^{name}: its parameters need to know query_depth; give a number\.$"
    with pytest.raises(ValueError, match=message):
        parameters_of(DECLARING[name], attention_size=3)
