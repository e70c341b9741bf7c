"""Positions against hand-computed values, their papers' identities, and attention itself."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax import attend, bind, masks, per_head, positions, scores
from attention_jax.base.parameters import bind_parameters, initialize, parameters_of
from attention_jax.nnx import MultiHeadAttention


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_sinusoids_in_halves_by_hand():
    p, frequencies = np.array([0, 3]), 100.0 ** -np.linspace(0, 1, 3)
    found = positions.sinusoidal(p, 6, halves=True, frequencies=frequencies)
    angles = p[:, None] * np.array([1.0, 0.1, 0.01])
    np.testing.assert_allclose(found, np.hstack([np.sin(angles), np.cos(angles)]), atol=1e-6)


def test_sinusoids_by_hand():
    table = positions.sinusoidal(jnp.arange(3), 4)
    expected = [[math.sin(p), math.cos(p), math.sin(p / 100), math.cos(p / 100)] for p in range(3)]
    np.testing.assert_allclose(table, expected, atol=1e-6)
    assert positions.sinusoidal(jnp.zeros((2, 5), jnp.int32), 6).shape == (2, 5, 6)
    np.testing.assert_array_equal(positions.sinusoidal([0, 1, 2], 4), table)


@pytest.mark.slow
@pytest.mark.parametrize("step", [-7, 0, 1, 40])
def test_a_step_is_one_rotation_whatever_the_position(step, x64):
    places = jnp.array([0, 1, 5, 127, 1000])
    rotation = positions.sinusoidal_step(step, 16, dtype=jnp.float64)
    table = positions.sinusoidal(places, 16, dtype=jnp.float64)
    moved = positions.sinusoidal(places + step, 16, dtype=jnp.float64)
    np.testing.assert_allclose(table @ rotation.T, moved, atol=1e-12)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(16), atol=1e-12)


def test_learned_positions_look_up_and_refuse_what_is_not_there():
    table = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(
        positions.embedded(jnp.array([[2, 0]]), table), [[[4.0, 5.0], [0.0, 1.0]]]
    )
    np.testing.assert_array_equal(positions.embedded([2, 0], table), table[np.array([2, 0])])
    assert np.all(np.isnan(positions.embedded(jnp.array([3, -1]), table)))


def test_rotary_by_hand():
    x = jnp.array([[1.0, 2.0, 3.0, 4.0]])
    turned = positions.rotary(x, jnp.array([5]), base=100.0)
    expected = []
    for (a, b), angle in (((1.0, 2.0), 5.0), ((3.0, 4.0), 0.5)):
        expected += [
            a * math.cos(angle) - b * math.sin(angle),
            a * math.sin(angle) + b * math.cos(angle),
        ]
    np.testing.assert_allclose(turned[0], expected, atol=1e-6)
    halves = positions.rotary(x[:, jnp.array([0, 2, 1, 3])], jnp.array([5]), 100.0, halves=True)
    np.testing.assert_allclose(halves[0, jnp.array([0, 2, 1, 3])], expected, atol=1e-6)
    np.testing.assert_array_equal(positions.rotary(x, jnp.array([0])), x)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"rotated": 4}, {"halves": True}, {"scale": 0.25}])
def test_rotated_products_depend_on_distance_alone(options, x64):
    query, key = normal(0, 7, 8), normal(1, 7, 8)
    assert query.dtype == jnp.float64
    here = jnp.arange(7)
    logits = [
        scores.dot(
            positions.rotary(query, here + shift, **options),
            positions.rotary(key, here + shift, **options),
        )
        for shift in (0, 1000)
    ]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-10)
    np.testing.assert_allclose(np.diag(logits[0]), np.sum(query * key, axis=1), atol=1e-10)
    assert not np.allclose(logits[0], query @ key.T, atol=1e-3)


@pytest.mark.slow
def test_partial_rotation_leaves_the_rest():
    x = normal(0, 5, 8)
    turned = positions.rotary(x, jnp.arange(5), rotated=4)
    np.testing.assert_array_equal(turned[:, 4:], x[:, 4:])
    chex.assert_trees_all_close(turned[:, :4], positions.rotary(x[:, :4], jnp.arange(5)))
    np.testing.assert_array_equal(positions.rotary(x, jnp.arange(5), rotated=0), x)


def test_stretched_base_slows_the_slowest_pair_by_the_factor():
    base, factor, depth = 10_000.0, 8.0, 64
    stretched = positions.stretched_base(base, factor, depth)
    slowest = -(depth - 2) / depth
    np.testing.assert_allclose(stretched**slowest, base**slowest / factor, rtol=1e-12)


def test_interpolated_positions():
    x = normal(0, 3, 8)
    np.testing.assert_allclose(
        positions.rotary(x, jnp.array([0, 4, 8]), scale=0.25),
        positions.rotary(x, jnp.array([0, 1, 2])),
        atol=1e-6,
    )


def test_rotary_in_half_precision_turns_in_float32():
    x, far = normal(0, 3, 8), jnp.array([1000, 4001, 30_003])
    exact = positions.rotary(x, far)
    half = positions.rotary(x.astype(jnp.bfloat16), far)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=0.03)


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16])
def test_sinusoids_in_half_precision_turn_in_float32(dtype):
    places = jnp.arange(30_000)
    for narrow, exact in (
        (positions.sinusoidal(places, 8, dtype=dtype), positions.sinusoidal(places, 8)),
        (positions.sinusoidal_step(4001, 8, dtype=dtype), positions.sinusoidal_step(4001, 8)),
    ):
        assert narrow.dtype == dtype
        np.testing.assert_array_equal(narrow, exact.astype(dtype))


def test_alibi_slopes_of_the_paper():
    np.testing.assert_array_equal(positions.alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_array_equal(positions.alibi_slopes(1), [2.0**-8])
    np.testing.assert_allclose(
        positions.alibi_slopes(12), [*2.0 ** -np.arange(1.0, 9.0), *2.0 ** -np.arange(0.5, 4)]
    )
    slopes = positions.alibi_slopes(16)
    np.testing.assert_allclose(slopes[1:] / slopes[:-1], 2**-0.5, rtol=1e-6)


def t5_bucket_of_the_paper(distance, num_buckets, max_distance, bidirectional):
    """The rule in the reference code, on one number, with float64 logarithms."""
    bucket, n = 0, -distance
    if bidirectional:
        num_buckets //= 2
        bucket, n = (num_buckets, -n) if n < 0 else (0, n)
    n = max(n, 0)
    exact = num_buckets // 2
    if n < exact:
        return bucket + n
    share = math.log(n / exact) / math.log(max_distance / exact)
    return bucket + min(exact + math.floor(share * (num_buckets - exact) + 1e-9), num_buckets - 1)


@pytest.mark.parametrize(
    ("num_buckets", "max_distance"), [(32, 128), (64, 128), (8, 20), (4, 3), (32, 9)]
)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_buckets(num_buckets, max_distance, bidirectional):
    if max_distance <= num_buckets // (4 if bidirectional else 2):
        pytest.skip("max_distance lies within the exact buckets")
    distance = np.arange(-300, 301)
    arguments = (num_buckets, max_distance, bidirectional)
    buckets = positions.t5_bucket(jnp.asarray(distance), *arguments)
    expected = [t5_bucket_of_the_paper(int(d), *arguments) for d in distance]
    np.testing.assert_array_equal(buckets, expected)
    assert buckets.dtype == jnp.int32


def test_sizes_may_be_of_any_integer_type():
    np.testing.assert_array_equal(positions.alibi_slopes(np.int64(3)), positions.alibi_slopes(3))
    distance = jnp.arange(-200, 200)
    buckets = positions.t5_bucket(distance, np.int64(32), np.int64(128))
    np.testing.assert_array_equal(buckets, positions.t5_bucket(distance))
    table = positions.learned_buckets(np.int64(8), np.int64(20)).parameters["table"]
    assert table.shape == (8,)


def test_t5_buckets_known_from_the_reference_implementation():
    distance = jnp.array([-128, -91, -64, -46, -32, -23, -16, -12, -8, -7, 0, 1, 8, 16, 64, 128])
    expected = [15, 15, 14, 13, 12, 11, 10, 9, 8, 7, 0, 17, 24, 26, 30, 31]
    np.testing.assert_array_equal(positions.t5_bucket(distance), expected)


def swin_table_index(size):
    """The relative position index of the Swin code, for a window of size x size."""
    coordinates = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij")).reshape(
        2, -1
    )
    offset = (coordinates[:, None, :] - coordinates[:, :, None]).transpose(1, 2, 0) + size - 1
    return offset[..., 0] * (2 * size - 1) + offset[..., 1]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_grid_bias_of_one_window_is_the_table_of_swin(size):
    table = normal(0, 2 * size - 1, 2 * size - 1)
    tokens = jnp.arange(size * size)
    bias = positions.grid_bias(tokens[:, None], tokens[None, :], table, width=size)
    np.testing.assert_array_equal(bias, table.reshape(-1)[swin_table_index(size)])


@pytest.mark.slow
def test_grid_bias_is_the_same_in_every_window_of_a_larger_grid():
    table, width = normal(0, 3, 3), 6
    tokens = jnp.arange(36)
    bias = positions.grid_bias(tokens[:, None], tokens[None, :], table, width)
    corner = np.array([0, 1, 6, 7])
    for shift in (0, 2, 14, 28):
        window = corner + shift
        np.testing.assert_array_equal(bias[np.ix_(window, window)], bias[np.ix_(corner, corner)])


BIASES = {
    "alibi": positions.alibi_bias(3),
    "t5": per_head(bind(positions.t5_bias, table=normal(1, 3, 16))),
    "causal t5": per_head(
        bind(
            functools.partial(positions.t5_bias, max_distance=20, bidirectional=False),
            table=normal(1, 3, 9),
        )
    ),
    "grid": per_head(
        bind(functools.partial(positions.grid_bias, width=5), table=normal(2, 3, 5, 3))
    ),
}


def dense_bias(bias, length):
    index = jnp.arange(length)
    return jax.vmap(lambda bias: bias(index[:, None], index[None, :]))(bias.function)


@pytest.mark.slow
@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("length", [pytest.param(1, marks=pytest.mark.exhaustive), 33])
def test_a_bias_in_tiles_is_the_dense_bias(name, length):
    bias = BIASES[name]
    query, key, value = (normal(seed, 2, length, 3, 4) for seed in range(3))

    def total(bias, **options):
        return jnp.sum(attend(query, key, value, bias=bias, mask=masks.Causal(), **options) ** 2)

    def from_array(bias):
        return total(dense_bias(bias, length)[None], implementation="dense")

    expected = jax.jit(jax.value_and_grad(from_array))(bias)
    for options in (
        {"implementation": "dense"},
        {"implementation": "tiled", "tile_sizes": (8, 16)},
    ):
        result = jax.jit(jax.value_and_grad(functools.partial(total, **options)))(bias)
        chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-5)


def relative_logits(query, key, table):
    """Shaw's equation 5, entry by entry."""
    furthest = len(table) // 2
    logits = np.zeros((len(query), len(key)))
    for i, q in enumerate(query):
        for j, k in enumerate(key):
            a = table[np.clip(j - i, -furthest, furthest) + furthest]
            logits[i, j] = q @ (k + a) / np.sqrt(len(q))
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("furthest", [0, 2, 50])
def test_relative_keys(furthest, x64):
    query, key = normal(0, 7, 4), normal(1, 9, 4)
    table = normal(2, 2 * furthest + 1, 4)
    score = bind(positions.relative_key, table=table)
    logits = score(query, key, q_idx=jnp.arange(7), kv_idx=jnp.arange(9))
    np.testing.assert_allclose(
        logits, relative_logits(*(np.asarray(x) for x in (query, key, table))), atol=1e-12
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"implementation": "tiled", "tile_sizes": (4, 8)}])
def test_relative_keys_in_attention(options):
    table = normal(2, 7, 4)
    query, key, value = (normal(seed, 2, 13, 3, 4) for seed in range(3))
    score = bind(positions.relative_key, table=table)
    context = attend(query, key, value, score=score, mask=masks.Causal(), **options)
    for b in range(2):
        for n in range(3):
            logits = relative_logits(query[b, :, n], key[b, :, n], table)
            logits = np.where(np.tri(13, dtype=bool), logits, -np.inf)
            weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            np.testing.assert_allclose(context[b, :, n], weights @ value[b, :, n], atol=1e-5)


@pytest.mark.slow
def test_relative_values(x64):
    weights = jax.nn.softmax(normal(0, 5, 6))
    table = normal(1, 7, 3)
    expected = np.zeros((5, 3))
    for i in range(5):
        for j in range(6):
            expected[i] += weights[i, j] * table[np.clip(j - i, -3, 3) + 3]
    result = positions.relative_values(weights, jnp.arange(5), jnp.arange(6), table)
    np.testing.assert_allclose(result, expected, atol=1e-12)


@pytest.mark.slow
def test_multi_head_attention_creates_what_positions_learn():
    x = normal(0, 2, 9, 12)
    for options, where, shape in (
        ({"bias": positions.learned_buckets(8, 20)}, "bias", (3, 8)),
        ({"bias": positions.learned_grid((3, 3), 3)}, "bias", (3, 5, 5)),
        ({"score": positions.relative_key, "attention_size": 2}, "score", (3, 5, 4)),
    ):
        module = MultiHeadAttention(3, 12, rngs=nnx.Rngs(0), **options)
        gradient = nnx.jit(nnx.grad(lambda module: jnp.sum(module(x) ** 2)))(module)
        assert gradient[where]["table"][...].shape == shape
        assert np.abs(gradient[where]["table"][...]).max() > 1e-6
    alibi = MultiHeadAttention(3, 12, bias=positions.alibi_bias(3), rngs=nnx.Rngs(0))
    rotary = MultiHeadAttention(3, 12, position=positions.rotary, rngs=nnx.Rngs(0))
    plain = MultiHeadAttention(3, 12, rngs=nnx.Rngs(0))
    assert not np.allclose(alibi(x), plain(x), atol=1e-3)
    assert not np.allclose(rotary(x), plain(x), atol=1e-3)


def test_relative_key_declares_its_table():
    declared = parameters_of(positions.relative_key, 4, 4, 5)
    assert declared["table"].shape == (11, 4)
    values = initialize(jax.random.key(0), declared)
    score = bind_parameters(positions.relative_key, values)
    assert score(
        jnp.ones((2, 4)), jnp.ones((3, 4)), q_idx=jnp.arange(2), kv_idx=jnp.arange(3)
    ).shape


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: positions.sinusoidal(jnp.arange(3), 5), "sinusoidal: depth must be even, got 5"),
        (
            lambda: positions.sinusoidal(jnp.arange(3), 6, frequencies=np.ones(2)),
            r"sinusoidal: frequencies must have the shape \(3,\) for a depth of 6, got \(2,\)",
        ),
        (
            lambda: positions.rotary(jnp.ones((2, 5)), jnp.arange(2)),
            "rotary: depth must be even, got 5",
        ),
        (
            lambda: positions.rotary(jnp.ones((2, 4)), jnp.arange(2), rotated=6),
            "rotary: rotated must be at most H = 4, got 6",
        ),
        (
            lambda: positions.rotary(jnp.ones((2, 4)), jnp.arange(3)),
            r"axis T \(number 0\) of positions \[T\] must be 2 as in x, got 3",
        ),
        (lambda: positions.stretched_base(1e4, 2.0, 2), "rotated must be more than 2, got 2"),
        (lambda: positions.alibi_slopes(0), "num_heads must be 1 or more, got 0"),
        (lambda: positions.learned_buckets(3), "a multiple of 2"),
        (lambda: positions.learned_buckets(32, 8), "beyond the 8 exact ones, got 32 and 8"),
        (lambda: positions.learned_grid((0, 2), 4), r"window and width must be 1 or more"),
        (
            lambda: positions.grid_bias(
                jnp.zeros((1, 1), int), jnp.zeros((1, 1), int), jnp.ones((2, 3)), 2
            ),
            r"the axes of table must be odd, got \(2, 3\)",
        ),
    ],
)
def test_bad_arguments_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("frequencies", "expected"),
    [
        (
            positions.llama3_frequencies(32, 10_000.0, 8.0, 128),
            [1.0, 0.5623413, 0.3162278, 0.1582577, 0.0427512, 0.0094172, 0.0039528],
        ),
        (
            positions.yarn_frequencies(32, 10_000.0, 4.0, 128),
            [1.0, 0.4920486, 0.2371708, 0.1111425, 0.05, 0.0210878, 0.0079057],
        ),
        (
            positions.yarn_frequencies(32, 10_000.0, 4.0, 128, rounded=False),
            [1.0, 0.4817939, 0.2256375, 0.101414, 0.0427057, 0.0159604, 0.0079057],
        ),
    ],
    ids=["Llama 3", "YaRN", "YaRN, bounds as they are"],
)
def test_frequencies_of_longer_sequences_are_those_of_the_published_code(frequencies, expected):
    """As `modeling_rope_utils` of `transformers` computes them for 32 features."""
    np.testing.assert_allclose(frequencies[:7], expected, atol=1e-6)
    assert frequencies.shape == (16,)


def test_rotary_with_frequencies_and_gain():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)), jnp.float32)
    here = jnp.array([0, 2, 7])
    own = 100.0 ** (-np.arange(0, 6, 2) / 6)
    turned = positions.rotary(x, here, base=100.0, halves=True)
    given = positions.rotary(x, here, frequencies=own, gain=2.0, halves=True)
    chex.assert_trees_all_close(given, 2.0 * turned, rtol=1e-5)
    part = positions.rotary(x, here, frequencies=own[:2], gain=3.0)
    np.testing.assert_array_equal(part[:, 4:], x[:, 4:])
    with pytest.raises(ValueError, match="2 frequencies turn 4 features, got rotated 6; leave"):
        positions.rotary(x, here, frequencies=own[:2], rotated=6)


def test_alibi_slopes_are_exact_in_float64():
    with jax.enable_x64(True):
        x = jnp.ones((1, 3, 3, 2), jnp.float64)
        bias = attend(x, x, x, bias=positions.alibi_bias(3), return_weights=True).weights
        logits = -(2.0 ** -np.array([4.0, 8.0, 2.0]))[:, None] * np.arange(3)[::-1]
        expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(bias[0, :, 2], expected, rtol=1e-15)
