"""Decoding with a cache equals the full forward pass: every mask, position, prompt and batch."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax import (
    attend,
    bind,
    cache,
    linear,
    masks,
    per_example,
    per_head,
    positions,
    scores,
)
from attention_jax import linen as attention_linen
from attention_jax import nnx as attention_nnx
from attention_jax.nnx import MultiHeadAttention
from tests.contract import examples

LENGTH = 11
X = jax.random.normal(jax.random.key(0), (2, LENGTH, 12))
WINDOW = masks.Window(3, 0)


def slope_times_distance(q_idx, kv_idx, slope):
    return slope * (q_idx - kv_idx).astype(slope.dtype)


KINDS = {
    "none": {},
    "rotary": {"position": positions.rotary},
    "partial rotary": {"position": functools.partial(positions.rotary, rotated=2, base=50.0)},
    "alibi": {"bias": positions.alibi_bias(3)},
    "t5": {"bias": positions.learned_buckets(8, 7)},
    "grid": {"bias": positions.learned_grid((2, 3), 4)},
    "shaw": {"score": positions.relative_key, "attention_size": 3},
    "shared shaw": {"score": positions.relative_key, "attention_size": 3, "share_score": True},
    "additive": {"score": scores.additive, "initializers": {"value": jax.nn.initializers.ones}},
    "array": {"bias": per_head(bind(lambda q, k, table: table[q, k], table=jnp.ones((3, 11, 11))))},
}
KINDS["per example"] = {
    "score": per_example(
        per_head(bind(positions.relative_key, table=jnp.linspace(-1, 1, 120).reshape(2, 3, 5, 4)))
    ),
    "bias": per_example(bind(slope_times_distance, slope=jnp.array([0.1, 0.3]))),
}
DECODED_FIRST = {"MultiHeadAttention"}
STATIC = ("implementation", "tile_sizes")
CHUNKS = {"prompt": [9, 1, 1], "pieces": [5, 1, 5], "all": [11]}


def layer(**options):
    return MultiHeadAttention(3, 12, rngs=nnx.Rngs(0), **options)


def decode(module, chunks, state, x=X, **options):
    outputs, start = [], 0
    for size in chunks:
        output, state = module.decode(x[:, start : start + size], state, **options)
        outputs.append(output)
        start += size
    return jnp.concatenate(outputs, axis=1), state


def check_both_layouts(module, chunks, capacity=LENGTH, window=None, **options):
    """Compare with the full pass, where examples share their length and where each has its own."""

    @jax.jit
    def run(x):
        states = [
            module.init_cache(2, capacity, window=window, ragged=ragged) for ragged in (False, True)
        ]
        return module(x, **options), [decode(module, chunks, s, x, **options) for s in states]

    full, results = run(X)
    for output, state in results:
        chex.assert_trees_all_close(output, full, atol=1e-5)
        assert np.all(state.length == LENGTH)
    return [state for _, state in results]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.exhaustive] * (turn % 2))
        for turn, name in enumerate(examples.MASKS)
    ],
)
def test_every_exported_mask(name):
    """Pieces of a sequence, as long in all examples and not, are parts of one full pass."""
    size = {"batch": 2, "heads": 2, "query_length": 7, "key_length": 7}
    mask, allowed = examples.mask_example(name, **size)
    table = np.zeros((2, 2, 7, 7), bool)
    for b, n, i, j in np.ndindex(table.shape):
        table[b, n, i, j] = j <= i and allowed(b, n, i, j)
    query, key, value = jax.random.normal(jax.random.key(1), (3, 2, 7, 2, 4))
    bias = positions.alibi_bias(2)

    def decoded(mask, pieces, ragged):
        state, starts = cache.init(2, 7, 2, 4, ragged=ragged), np.zeros(2, int)
        contexts = [[], []]
        for counts in pieces:
            at = np.minimum(starts[:, None] + np.arange(max(counts)), 6)
            asked, *tokens = (x[np.arange(2)[:, None], at] for x in (query, key, value))
            state, view = cache.extend(state, *tokens, np.array(counts) if ragged else None)
            context = cache.attend_cached(asked, view, mask=mask, bias=bias)
            for b, count in enumerate(counts):
                contexts[b].append(context[b, :count])
            starts += counts
        return jnp.stack([jnp.concatenate(parts) for parts in contexts])

    @jax.jit
    def run(mask):
        together = decoded(mask, [(4, 4), (1, 1), (2, 2)], ragged=False)
        return together, decoded(mask, [(4, 2), (1, 2), (2, 3)], ragged=True)

    full = _of_table(query, key, value, bias, table)
    for result in run(masks.Causal() & masks.as_mask(mask)):
        chex.assert_trees_all_close(result, full, atol=1e-5)


@jax.jit
def _of_table(query, key, value, bias, table):
    """Compiled once for all masks, whose pairs are listed."""
    return attend(query, key, value, bias=bias, mask=table, implementation="dense")


@pytest.mark.slow
@pytest.mark.parametrize("name", examples.MASKS)
def test_slots_are_allowed_as_every_exported_mask_says(name):
    """Queries 4 to 6 of a sequence, in a ring of slots that has forgotten the first two keys."""
    mask, allowed = examples.mask_example(name, batch=2, heads=2, query_length=7, key_length=7)
    positions = np.array([5, 6, 2, 3, 4, cache.NO_TOKEN], np.int32)
    placed = cache.Placed(
        masks.Causal() & masks.as_mask(mask),
        start=np.int32(4),
        count=np.int32(3),
        positions=positions,
    )
    for b, n in np.ndindex(2, 2):
        expected = [
            [0 <= j <= i and bool(allowed(b, n, i, j)) for j in positions] for i in (4, 5, 6)
        ]
        np.testing.assert_array_equal(placed.of(b, n).to_dense(3, 6), expected)


PREFIX = masks.Prefix(3) | masks.Causal()
CAUSAL_CASES = {
    "no mask": ({}, masks.Causal()),
    "a mask is joined": ({"mask": masks.Window(1, 1)}, masks.Window(1, 0)),
    "a prefix too": ({"mask": PREFIX}, masks.Causal()),
    "all left to the mask": ({"mask": PREFIX, "causal": False}, PREFIX),
}


@pytest.mark.parametrize("ragged", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c == "no mask" else pytest.mark.slow) for c in CAUSAL_CASES],
)
def test_decoding_is_causal_whatever_the_mask(case, ragged):
    options, mask = CAUSAL_CASES[case]
    query, key, value = jax.random.normal(jax.random.key(1), (3, 2, 6, 2, 4))

    @jax.jit
    def run(query, key, value):
        state, contexts = cache.init(2, 6, 2, 4, ragged=ragged), []
        for start, stop in ((0, 4), (4, 6)):
            new = slice(start, stop)
            state, view = cache.extend(state, key[:, new], value[:, new])
            contexts.append(cache.attend_cached(query[:, new], view, **options))
        return jnp.concatenate(contexts, axis=1), attend(query, key, value, mask=mask)

    chex.assert_trees_all_close(*run(query, key, value), atol=1e-5)


DECODERS = {
    "MultiHeadAttention": ((3, 12), {}),
    "LinearAttention": ((3, 12), {}),
    "TransformerBlock": ((12, 3), {}),
    "TransformerStack": ((1, 12), {"num_heads": 3}),
    "CausalDecoder": ((10, 12), {"num_heads": 3, "num_layers": 1}),
    "EncoderDecoder": ((10, 10), {"features": 12, "num_heads": 3, "num_layers": 1}),
}


def test_every_module_that_decodes_is_tested_to_be_causal():
    decoders = {n for n in attention_nnx.__all__ if hasattr(getattr(attention_nnx, n), "decode")}
    assert decoders == set(DECODERS)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in DECODED_FIRST else pytest.mark.slow) for n in DECODERS],
)
def test_every_module_decodes_causally_by_default(name):
    """Without a mask, later tokens of the same call change nothing, in both APIs."""
    sizes, options = DECODERS[name]
    module = getattr(attention_nnx, name)(*sizes, **options, rngs=nnx.Rngs(0))
    twin = getattr(attention_linen, name)(*sizes, **options)
    of_tokens = hasattr(module, "generate")
    tokens = jnp.arange(10).reshape(2, 5) if of_tokens else X[:, :5]
    memory = (X[:, 5:7],) if name == "EncoderDecoder" else ()

    def decoded(module):
        state = module.init_cache(2, 5)
        return [module.decode(tokens[:, :n], state, *memory)[0] for n in (5, 2)]

    tree = {"params": nnx.to_pure_dict(nnx.state(module, nnx.Param))}
    whole, first = nnx.jit(decoded)(module)
    assert np.any(np.abs(whole[:, 0] - whole[:, 1]) > 1e-3)
    chex.assert_trees_all_close(whole[:, :2], first, atol=1e-5)
    of_twin = jax.jit(functools.partial(twin.apply, method=decoded))(tree)
    chex.assert_trees_all_close(of_twin, [whole, first], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=name, marks=[pytest.mark.exhaustive] * (turn % 2))
        for turn, (name, kind) in enumerate(KINDS.items())
    ],
)
def test_every_kind_of_position(kind):
    check_both_layouts(layer(**kind), [10, 1], mask=masks.Causal())


@pytest.mark.slow
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_a_prompt_of_any_length(chunks):
    module = layer(bias=positions.alibi_bias(3), num_key_heads=1)
    uniform, _ = check_both_layouts(module, chunks, mask=masks.Causal())
    np.testing.assert_array_equal(uniform.positions, np.arange(LENGTH))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capacity", "chunks"),
    [(3, [9, 1, 1]), (3, [11]), (4, [5, 1, 5]), (6, [3, 3, 5]), (11, [8, 3])],
)
def test_a_window_needs_no_more_than_its_tokens(capacity, chunks):
    module = layer(position=positions.rotary, bias=positions.learned_buckets(8, 7))
    states = check_both_layouts(module, chunks, capacity, window=3, mask=WINDOW)
    for state in states:
        assert state.key.shape == (2, capacity, 3, 4)
        slots = np.broadcast_to(state.positions, (2, capacity))
        np.testing.assert_array_equal(np.sort(slots[1]), np.arange(LENGTH - capacity, LENGTH))


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 3])
def test_examples_of_different_lengths_do_not_wait_for_each_other(window):
    """Prompts of 5 and 2 tokens, padded to 5; then both go on from where they stand."""
    module = layer(position=positions.rotary, score=positions.relative_key, attention_size=3)
    mask = masks.Causal() if window is None else WINDOW
    lengths = jnp.array([5, 2])
    padded = jnp.where(jnp.arange(5)[None, :, None] < lengths[:, None, None], X[:, :5], jnp.nan)

    @jax.jit
    def run(x, padded):
        state = module.init_cache(2, 8 if window is None else 4, window=window, ragged=True)
        prompt, state = module.decode(padded, state, mask=mask, count=lengths)
        steps, counts = [], state.length
        for step in range(3):
            token = x[jnp.arange(2), lengths + step][:, None]
            output, state = module.decode(token, state, mask=mask)
            steps.append(output[:, 0])
        return module(x, mask=mask), prompt, counts, steps

    full, prompt, counts, steps = run(X, padded)
    np.testing.assert_array_equal(counts, lengths)
    chex.assert_trees_all_close(prompt[0], full[0, :5], atol=1e-5)
    chex.assert_trees_all_close(prompt[1, :2], full[1, :2], atol=1e-5)
    for step, output in enumerate(steps):
        expected = full[jnp.arange(2), lengths + step]
        chex.assert_trees_all_close(output, expected, atol=1e-5)


def test_padding_gives_zeros_before_the_output_projection():
    module = layer(use_bias=False)
    state = module.init_cache(2, 8, ragged=True)
    count = jnp.array([4, 1])
    output, _ = jax.jit(lambda x: module.decode(x, state, mask=masks.Causal(), count=count))(
        X[:, :4]
    )
    assert not np.any(output[1, 1:]) and np.all(np.any(output[0] != 0, axis=-1))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(11, 11), (3, 11, 1), (2, 3, 11, 11)])
def test_a_bias_array_of_the_whole_sequence(shape):
    bias = jax.random.normal(jax.random.key(1), shape)
    check_both_layouts(layer(), [6, 5], 12, mask=masks.Causal(), bias=bias)


@pytest.mark.slow
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    "bias",
    [np.arange(5.0), np.float64(2.0), 2.0, [[0.0] * 5, *[[1.0, 2.0, 3.0, 4.0, 5.0]] * 4]],
    ids=["keys", "scalar", "number", "lists"],
)
def test_a_bias_of_any_numbers_that_attend_takes(bias, ragged):
    query, key, value = jax.random.normal(jax.random.key(1), (3, 2, 5, 2, 4))
    state, _ = cache.extend(cache.init(2, 5, 2, 4, ragged=ragged), key[:, :2], value[:, :2])
    _, view = cache.extend(state, key[:, 2:], value[:, 2:])
    context = cache.attend_cached(query[:, 2:], view, mask=masks.Causal(), bias=bias)
    expected = attend(query, key, value, mask=masks.Causal(), bias=bias)
    chex.assert_trees_all_close(context, expected[:, 2:], atol=1e-6)


@pytest.mark.slow
def test_dropout_is_that_of_the_full_pass_and_differs_between_examples():
    """Of a prompt, also where each example has its own length."""
    same = jnp.ones((2, 5, 2, 4))
    for dropout_key in (jax.random.key(1), jax.random.PRNGKey(1)):
        options = {"dropout_rate": 0.5, "dropout_key": dropout_key, "return_weights": True}
        full = attend(same, same, same, mask=masks.Causal(), **options).weights
        assert np.any(full[0] != full[1])
        for ragged in (False, True):
            _, view = cache.extend(cache.init(2, 5, 2, 4, ragged=ragged), same, same)
            weights = cache.attend_cached(same, view, mask=masks.Causal(), **options).weights
            chex.assert_trees_all_close(weights, full, atol=1e-6)


@pytest.mark.slow
def test_steps_inside_scan_compile_once_and_give_the_weights():
    module = layer(position=positions.rotary)
    full, full_weights = module(X, mask=masks.Causal(), return_weights=True)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(x):
        def step(state, x):
            output, state, weights = module.decode(
                x[:, None], state, mask=masks.Causal(), return_weights=True
            )
            return state, (output[:, 0], weights[:, :, 0])

        return jax.lax.scan(step, module.init_cache(2, LENGTH), x.swapaxes(0, 1))[1]

    output, weights = run(X)
    chex.assert_trees_all_close(output.swapaxes(0, 1), full, atol=1e-5)
    chex.assert_trees_all_close(jnp.moveaxis(weights, 0, 2), full_weights, atol=1e-5)
    run(X + 1)


@pytest.mark.slow
def test_tiled_decoding_is_dense_decoding():
    state = cache.init(2, 40, 2, 4)
    query = jax.random.normal(jax.random.key(1), (2, 9, 4, 4))
    key, value = jax.random.normal(jax.random.key(2), (2, 2, 9, 2, 4))
    state, _ = cache.extend(state, key, value)
    _, view = cache.extend(state, key + 1, value - 1)
    options = {"mask": masks.Causal() & masks.Window(12, 0), "bias": positions.alibi_bias(4)}
    dense = cache.attend_cached(query, view, implementation="dense", **options)
    tiled = cache.attend_cached(query, view, implementation="tiled", tile_sizes=(4, 8), **options)
    chex.assert_trees_all_close(tiled, dense, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_cache():
    module = layer()
    full = jax.jit(lambda x: module(x, mask=masks.Causal()))(X)
    state = module.init_cache(2, LENGTH, dtype=jnp.bfloat16)
    run = jax.jit(lambda x, state: decode(module, [6, 5], state, x, mask=masks.Causal()))
    output, state = run(X, state)
    assert state.key.dtype == jnp.bfloat16 and output.dtype == jnp.float32
    chex.assert_trees_all_close(output, full, atol=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["MultiHeadAttention", "LinearAttention"])
def test_a_module_in_float64_decodes_in_float64(kind):
    """Nothing is said of the cache, in either API."""
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, 5, 12), jnp.float64)
        numbers = {"param_dtype": jnp.float64}
        module = getattr(attention_nnx, kind)(3, 12, rngs=nnx.Rngs(0), **numbers)
        twin = getattr(attention_linen, kind)(3, 12, **numbers)
        tree = {"params": nnx.to_pure_dict(nnx.state(module, nnx.Param))}
        state = module.init_cache(2, 8)
        chex.assert_trees_all_equal(twin.apply(tree, 2, 8, method="init_cache"), state, strict=True)

        @jax.jit
        def both(x, state):
            decoded = decode(module, [5], state, x, mask=masks.Causal())
            return decoded[0], module(x, mask=masks.Causal())

        output, full = both(x, state)
    assert output.dtype == jnp.float64
    np.testing.assert_allclose(output, full, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, jnp.float32),
        ({"dtype": jnp.bfloat16}, jnp.bfloat16),
        ({"param_dtype": jnp.bfloat16}, jnp.float32),
    ],
)
def test_a_cache_has_the_dtype_of_the_computation(options, expected):
    assert layer(**options).init_cache(1, 4).key.dtype == expected
    assert layer(**options).init_cache(1, 4, dtype=jnp.float16).key.dtype == jnp.float16


@pytest.mark.slow
def test_linen_decodes_like_its_twin():
    module = layer(bias=positions.learned_buckets(8, 7))
    twin = attention_linen.MultiHeadAttention(3, 12, bias=positions.learned_buckets(8, 7))
    tree = {"params": nnx.to_pure_dict(nnx.state(module, nnx.Param))}
    state = twin.apply(tree, 2, 12, method="init_cache")
    chex.assert_trees_all_equal(state, module.init_cache(2, 12))

    def both(x, state):
        result = twin.apply(tree, x, state, mask=masks.Causal(), method="decode")
        return result, module.decode(x, state, mask=masks.Causal())

    (_, state), _ = jax.jit(both)(X[:, :6], state)
    chex.assert_trees_all_equal(*jax.jit(both)(X[:, 6:], state))


def test_projected_memory_for_cross_attention():
    module = layer()
    memory = jax.random.normal(jax.random.key(3), (2, 7, 12))
    once = module.keys(memory)
    chex.assert_trees_all_equal(module(X, once), module(X, memory))


@pytest.mark.slow
def test_overflow_is_an_error_or_nan_and_never_silent():
    state = cache.init(1, 4, 1, 2)
    new = jnp.ones((1, 3, 1, 2))
    state, view = cache.extend(state, new, new)
    with pytest.raises(
        ValueError, match=r"3 more tokens do not fit a cache of 4 slots that holds 3"
    ):
        cache.extend(state, new, new)
    with pytest.raises(ValueError, match=r"5 more tokens do not fit a cache of 4 slots;"):
        jax.jit(cache.extend)(state, *2 * [jnp.ones((1, 5, 1, 2))])

    @jax.jit
    def step(state):
        _, view = cache.extend(state, new, new)
        return cache.attend_cached(new, view, mask=masks.Causal())

    assert np.all(np.isnan(step(state)))
    assert np.all(np.isfinite(cache.attend_cached(new, view, mask=masks.Causal())))


def test_bad_arguments_are_explained():
    for options, message in (
        ({"capacity": 0}, r"init: capacity must be at least 1 .* got 0 and window None"),
        ({"capacity": 3, "window": 4}, r"at least the window, got 3 and window 4"),
        ({"capacity": 3, "window": -1}, r"init: window must be 0 or more tokens, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.init(1, options.pop("capacity"), 1, 2, **options)
    state = cache.init(1, 4, 2, 3)
    with pytest.raises(ValueError, match=r"extend: axis K .* of key \[B, T, K, H\] must be 2"):
        cache.extend(state, jnp.ones((1, 1, 1, 3)), jnp.ones((1, 1, 1, 3)))
    with pytest.raises(ValueError, match=r"extend: axis V .* of value \[B, T, K, V\] must be 3"):
        cache.extend(state, jnp.ones((1, 1, 2, 3)), jnp.ones((1, 1, 2, 4)))


NEW = jnp.ones((2, 3, 1, 2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: cache.extend(cache.init(2, 8, 1, 2), NEW, NEW, count=5),
            ValueError,
            "extend: count must be from 0 to the 3 tokens given, got 5.",
        ),
        (
            lambda: cache.extend(cache.init(2, 8, 1, 2, ragged=True), NEW, NEW, count=[1, -1]),
            ValueError,
            "extend: count must be from 0 to the 3 tokens given, got [ 1 -1].",
        ),
        (
            lambda: cache.extend(cache.init(2, 8, 1, 2), NEW, NEW, count=jnp.array([1, 2])),
            ValueError,
            "extend: count must be one integer for all examples, as they have one length; init "
            "with ragged=True for one each; got int32 of shape (2,).",
        ),
        (
            lambda: cache.extend(cache.init(2, 8, 1, 2, ragged=True), NEW, NEW, count=np.ones(2)),
            ValueError,
            "extend: count must be one integer, or one for each of the 2 examples; got float32 of "
            "shape (2,).",
        ),
        (
            lambda: linear.decode(NEW, NEW, NEW, linear.init(2, 1, 2), count=4),
            ValueError,
            "decode: count must be from 0 to the 3 tokens given, got 4.",
        ),
        (
            lambda: linear.extend(linear.init(2, 1, 2), NEW, NEW, count=jnp.arange(3)),
            ValueError,
            "extend: count must be one integer, or one for each of the 2 examples; got int32 of "
            "shape (3,).",
        ),
        (
            lambda: cache.attend_cached(
                NEW, cache.extend(cache.init(2, 8, 1, 2), NEW, NEW)[1], scale=3
            ),
            TypeError,
            "attend_cached: there is no option scale; it takes mask, causal, score, bias, "
            "normalizer, dropout_rate, dropout_key, implementation, tile_sizes, return_weights, "
            "return_logsumexp, mix_logits, mix_weights.",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
