import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from attention_jax import (
    Attended,
    attention,
    bind,
    explain,
    masks,
    normalizers,
    per_example,
    per_head,
    positions,
    scores,
)
from attention_jax.base.parameters import Parameter, learned
from attention_jax.implementations import choice
from attention_jax.linear import linear_attention
from attention_jax.masks import Causal, Full, GlobalTokens, Lengths, Prefix, Segment, Shift, Window
from tests import oracle

B, T, S, N, K, H, V = 2, 5, 7, 4, 2, 3, 6


def attend(query, key, value=None, **how):
    """Attend in one program; outside `jit` every primitive is compiled by itself."""
    return jax.jit(lambda *arrays: attention.attend(*arrays, **how))(query, key, value)


def operands(batch=B, queries=T, keys=S, heads=N, key_heads=K, depth=H, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (
        (batch, queries, heads, depth),
        (batch, keys, key_heads, depth),
        (batch, keys, key_heads, V),
    )
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def scaled_dot(q, k):
    return q @ k / np.sqrt(len(q))


def is_close(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


QUERY, KEY, VALUE = operands()
DENSE = np.random.default_rng(1).random((B, N, T, S)) < 0.6
LENGTHS = np.array([3, 7])
IDS, KEY_IDS = np.array([[0, 0, 1, 1, 1], [0, 1, 2, 2, 3]]), np.array([[0] * 3 + [1] * 4, [2] * 7])
STARTS = np.array([1, 4])

MASKS = {
    "causal": (Causal(), lambda b, n, i, j: j <= i),
    "function": (
        lambda q_idx, kv_idx: (q_idx + kv_idx) % 2 == 0,
        lambda b, n, i, j: (i + j) % 2 == 0,
    ),
    "window": (Window(1, 2), lambda b, n, i, j: i - 1 <= j <= i + 2),
    "lengths": (Lengths(LENGTHS), lambda b, n, i, j: j < LENGTHS[b]),
    "padded queries": (
        Lengths(LENGTHS, LENGTHS - 2),
        lambda b, n, i, j: j < LENGTHS[b] and i < LENGTHS[b] - 2,
    ),
    "segments": (Segment(IDS, KEY_IDS), lambda b, n, i, j: IDS[b, i] == KEY_IDS[b, j]),
    "prefix per head": (
        Prefix(np.array([[0, 1, 2, 3], [4, 5, 6, 7]])),
        lambda b, n, i, j: j < 4 * b + n,
    ),
    "decoding step": (Shift(Causal(), query=STARTS), lambda b, n, i, j: j <= i + STARTS[b]),
    "composition": (
        (Causal(offset=2) & Lengths(LENGTHS)) | Prefix(1),
        lambda b, n, i, j: (j <= i + 2 and j < LENGTHS[b]) or j < 1,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKS)
def test_masks_by_example_and_head(name, implementation):
    mask, allowed = MASKS[name]
    expected, _ = oracle.attention(QUERY, KEY, VALUE, scaled_dot, allowed)
    is_close(attend(QUERY, KEY, VALUE, mask=mask, **implementation), expected)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), (1, N, T, 1), (B, 1, 1, S), (B, N, T, S)])
def test_boolean_arrays_broadcast(shape, implementation):
    """Alone and in a composition they mean the same."""
    array = np.asarray(np.random.default_rng(2).random(shape) < 0.6)
    whole = np.broadcast_to(array, (B, N, T, S))
    expected, _ = oracle.attention(
        QUERY, KEY, VALUE, scaled_dot, lambda b, n, i, j: whole[b, n, i, j]
    )
    for mask in (array, Full() & array):
        is_close(attend(QUERY, KEY, VALUE, mask=mask, **implementation), expected)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), (N, T, 1), (B, 1, 1, S), (B, N, T, S)])
def test_bias_arrays_broadcast(shape, implementation):
    array = np.random.default_rng(3).normal(size=shape)
    whole = np.broadcast_to(array, (B, N, T, S))
    expected, _ = oracle.attention(
        QUERY, KEY, VALUE, scaled_dot, bias=lambda b, n, i, j: whole[b, n, i, j]
    )
    bias = jnp.asarray(array, jnp.float32)
    is_close(attend(QUERY, KEY, VALUE, bias=bias, **implementation), expected)


def slope_times_distance(q_idx, kv_idx, slope):
    return -slope * jnp.abs(q_idx - kv_idx).astype(jnp.float32)


@pytest.mark.slow
def test_bias_functions(implementation):
    slopes = 0.5 ** np.arange(N)
    cases = [
        (bind(slope_times_distance, slope=0.3), lambda b, n, i, j: -0.3 * abs(i - j)),
        (
            per_head(bind(slope_times_distance, slope=jnp.asarray(slopes, jnp.float32))),
            lambda b, n, i, j: -slopes[n] * abs(i - j),
        ),
        (
            lambda q_idx, kv_idx: jnp.where(q_idx == kv_idx, 2.0, 0.0),
            lambda b, n, i, j: 2.0 * (i == j),
        ),
    ]
    for bias, of_pair in cases:
        expected, _ = oracle.attention(QUERY, KEY, VALUE, scaled_dot, bias=of_pair)
        is_close(attend(QUERY, KEY, VALUE, bias=bias, **implementation), expected)


@pytest.mark.slow
def test_a_score_with_parameters_per_head(implementation):
    weights = np.random.default_rng(4).normal(size=(N, H, H))
    score = per_head(bind(scores.bilinear, weight=weights))
    formulas = [lambda q, k, weight=weight: q @ weight @ k for weight in weights]
    expected, _ = oracle.attention(QUERY, KEY, VALUE, formulas)
    is_close(attend(QUERY, KEY, VALUE, score=score, **implementation), expected)


def test_scores_and_biases_with_parameters_per_example(implementation):
    """Of each example alone, and of each of its heads."""
    random = np.random.default_rng(5)
    weights, slopes = random.normal(size=(B, N, H, H)), random.normal(size=(B,))
    score = per_example(per_head(bind(scores.bilinear, weight=weights)))
    slope = jnp.asarray(slopes, jnp.float32)
    bias = per_example(bind(slope_times_distance, slope=slope))
    found = attend(QUERY, KEY, VALUE, score=score, bias=bias, **implementation)
    for b in range(B):
        formulas = [lambda q, k, weight=weight: q @ weight @ k for weight in weights[b]]
        expected, _ = oracle.attention(
            *(x[b : b + 1] for x in (QUERY, KEY, VALUE)),
            formulas,
            bias=lambda _, n, i, j, b=b: -slopes[b] * abs(i - j),
        )
        is_close(found[b : b + 1], expected)


@pytest.mark.slow
def test_gradients_of_parameters_per_example_are_those_of_each_example(implementation):
    def loss(temperature, examples=slice(None)):
        score = per_example(bind(scores.cosine, temperature=temperature))
        arrays = (x[examples] for x in (QUERY, KEY, VALUE))
        return jnp.sum(attend(*arrays, score=score, **implementation) ** 2)

    temperature = jnp.linspace(0.5, 1.0, B)
    gradient = jax.grad(loss)(temperature)
    for b in range(B):
        one = slice(b, b + 1)
        is_close(gradient[one], jax.grad(loss)(temperature[one], one))


def test_a_normalizer_with_parameters_per_head():
    sinks = np.array([-1.0, 0.0, 1.0, 2.0])
    normalizer = per_head(bind(normalizers.softmax_with_sink, sink=sinks))
    weights = attend(QUERY, KEY, VALUE, normalizer=normalizer, return_weights=True).weights
    logsumexp = attend(QUERY, KEY, VALUE, return_logsumexp=True).logsumexp
    total = jnp.exp(logsumexp)
    share = total / (total + jnp.exp(jnp.asarray(sinks, jnp.float32))[None, None, :])
    is_close(weights.sum(axis=-1), share.swapaxes(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("key_heads", [1, 4])
def test_grouped_heads_equal_repeated_keys(key_heads, implementation):
    query, key, value = operands(key_heads=key_heads)
    repeated = (jnp.repeat(x, N // key_heads, axis=2) for x in (key, value))
    grouped = attend(query, key, value, mask=Causal(), **implementation)
    is_close(grouped, attend(query, *repeated, mask=Causal()))


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "keys"), [(1, 129), (129, 127)])
def test_odd_lengths(queries, keys, implementation):
    query, key, value = operands(1, queries, keys, 2, 1)
    expected, _ = oracle.attention(query, key, value, scaled_dot, lambda b, n, i, j: j <= i + 2)
    context = attend(query, key, value, mask=Causal(offset=2), **implementation)
    is_close(context, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"queries": 0}, {"keys": 0}, {"queries": 0, "keys": 0}, {"depth": 0}]
)
def test_nothing_in_nothing_out(sizes, implementation):
    query, key, value = operands(**sizes)
    context, _, logsumexp, _ = attend(
        query, key, value, mask=Causal(), **implementation, return_logsumexp=True
    )
    assert context.shape == (query.shape[0], query.shape[1], N, V)
    assert logsumexp.shape == context.shape[:-1]
    if sizes.get("keys") == 0:
        np.testing.assert_array_equal(context, 0.0)
        np.testing.assert_array_equal(logsumexp, -np.inf)
    if "depth" in sizes:
        running_mean = (
            np.cumsum(np.asarray(value), axis=1)[:, :T] / np.arange(1, T + 1)[:, None, None]
        )
        is_close(context, np.repeat(running_mean, N // K, axis=2))


def test_weights_and_logsumexp_are_those_of_the_formula():
    mask, allowed = MASKS["composition"]
    expected, weights = oracle.attention(QUERY, KEY, VALUE, scaled_dot, allowed)
    context, got_weights, logsumexp, _ = attend(
        QUERY, KEY, VALUE, mask=mask, return_weights=True, return_logsumexp=True
    )
    is_close(context, expected)
    is_close(got_weights, weights)
    logits = np.einsum("btnh,bsnh->bnts", QUERY, np.repeat(KEY, N // K, axis=2)) / np.sqrt(H)
    dense = np.array([allowed(*index) for index in np.ndindex(B, N, T, S)]).reshape(B, N, T, S)
    total = np.where(dense, np.exp(logits), 0.0).sum(axis=-1)
    is_close(logsumexp, np.log(total).swapaxes(1, 2))


def empty_rows(b, n, i, j):
    return i not in (0, 3) and j != 2


@pytest.mark.slow
def test_empty_rows_give_zeros_and_zero_gradients(implementation):
    mask = masks.Predicate(lambda q_idx, kv_idx: (q_idx != 0) & (q_idx != 3) & (kv_idx != 2))

    def attended(query, key, value):
        return attend(query, key, value, mask=mask, **implementation)

    context, pullback = jax.vjp(attended, QUERY, KEY, VALUE)
    gradients = pullback(jnp.ones_like(context))
    is_close(context, oracle.attention(QUERY, KEY, VALUE, scaled_dot, empty_rows)[0])
    np.testing.assert_array_equal(context[:, [0, 3]], 0.0)
    np.testing.assert_array_equal(gradients[0][:, [0, 3]], 0.0)
    np.testing.assert_array_equal(gradients[1][:, 2], 0.0)
    np.testing.assert_array_equal(gradients[2][:, 2], 0.0)
    chex.assert_tree_all_finite(gradients)

    found = attend(QUERY, KEY, VALUE, mask=mask, **implementation, return_logsumexp=True)
    logsumexp = found.logsumexp
    assert (logsumexp[:, [0, 3]] == -jnp.inf).all() and jnp.isfinite(logsumexp[:, 1:3]).all()


@pytest.mark.slow
@pytest.mark.parametrize("normalizer", [normalizers.softmax, normalizers.sigmoid])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_poison_stays_behind_the_mask(where, normalizer, implementation):
    """A spoiled row changes nothing that may not attend to it: no output, no gradient."""
    clean = {"query": QUERY, "key": KEY, "value": VALUE}
    mask = Full() & (lambda q_idx, kv_idx: q_idx != 3 if where == "query" else kv_idx != 3)

    def attended(inputs):
        return attend(**inputs, mask=mask, normalizer=normalizer, **implementation)

    @jax.jit
    def with_gradient(inputs):
        context, pullback = jax.vjp(attended, inputs)
        return context, pullback(jnp.ones_like(context))

    expected = with_gradient(clean)
    for poison in (np.nan, np.inf, -np.inf):
        spoiled = clean | {where: clean[where].at[:, 3].set(poison)}
        chex.assert_trees_all_close(with_gradient(spoiled), expected, rtol=1e-6, atol=1e-7)
    chex.assert_tree_all_finite(expected)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_poison_that_is_attended_shows(where, implementation):
    clean = {"query": QUERY, "key": KEY, "value": VALUE}
    spoiled = clean | {where: clean[where].at[1, 3, 0, 0].set(jnp.nan)}
    context = attend(**spoiled, mask=Causal(), **implementation)
    spoils = np.zeros((B, T, N), bool)
    spoils[1, 3, 0] = True
    if where != "query":
        spoils[1, 3:, : N // K] = True
    np.testing.assert_array_equal(np.isnan(context).all(axis=-1), spoils)
    np.testing.assert_array_equal(np.isnan(context).any(axis=-1), spoils)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_dtypes(dtype, implementation, x64):
    """Output in the dtype of the value, statistics in float32 or better, as is the accuracy."""
    inputs = operands(1, 7, 129, 2, 1, dtype=dtype)
    context, _, logsumexp, _ = attend(*inputs, **implementation, return_logsumexp=True)
    assert context.dtype == dtype
    assert logsumexp.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
    exact, _ = oracle.attention(*inputs, scaled_dot)
    is_close(np.asarray(context, np.float64), exact, 3 * float(jnp.finfo(dtype).eps))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_huge_logits(dtype, implementation):
    """Logits of 1e4 and more: the softmax is a maximum, and nothing overflows."""
    query = jnp.full((1, 1, 1, 4), 100.0, dtype)
    key = jnp.array([100.0, -100.0, 50.0], dtype)[None, :, None, None] * jnp.ones(
        (1, 3, 1, 4), dtype
    )
    value = jnp.array([1.0, 2.0, 3.0], dtype)[None, :, None, None]

    def attended(query, key, value):
        return attend(
            query,
            key,
            value,
            score=scores.dot,
            **implementation,
            return_logsumexp=True,
        )

    (context, _, logsumexp, _), pullback = jax.vjp(attended, query, key, value)
    np.testing.assert_array_equal(context, [[[[1.0]]]])
    np.testing.assert_array_equal(logsumexp, [[[4e4]]])
    gradients = pullback(Attended(jnp.ones_like(context), logsumexp=jnp.ones_like(logsumexp)))
    np.testing.assert_array_equal(gradients[2].ravel(), [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(gradients[0].ravel(), [100.0] * 4)


@pytest.mark.slow
def test_derivatives_against_finite_differences(implementation, x64):
    """Context and log-sum-exp; query, key, value, a parameter of the score, and the bias."""
    query, key, value = operands(1, 3, 4, 2, 1, dtype=jnp.float64)
    weight, bias = (jnp.asarray(np.random.default_rng(5).normal(size=(n, n))) for n in (H, 4))

    @jax.jit
    def attended(query, key, value, weight, bias):
        return attend(
            query,
            key,
            value,
            score=bind(scores.bilinear, weight=weight),
            bias=bias[:3],
            mask=Causal(),
            **implementation,
            return_logsumexp=True,
        )

    arguments = (query, key, value, weight, bias)
    check_grads(attended, arguments, order=1, rtol=1e-6, atol=1e-8)
    check_grads(attended, arguments, order=2, modes=("rev",), rtol=1e-5, atol=1e-6)


class TestCompilation(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_with_and_without_jit(self):
        mask, allowed = MASKS["composition"]
        attended = self.variant(
            lambda query, key, value, mask: attend(query, key, value, mask=mask)
        )
        expected, _ = oracle.attention(QUERY, KEY, VALUE, scaled_dot, allowed)
        is_close(attended(QUERY, KEY, VALUE, mask), expected)


@pytest.mark.slow
def test_new_values_do_not_recompile(implementation):
    """Parameters, lengths and biases are arguments: a new value runs the same program."""

    @jax.jit
    @chex.assert_max_traces(n=1)
    def attended(query, key, value, score, mask, bias, dropout_key):
        return attend(
            query,
            key,
            value,
            score=score,
            mask=mask,
            bias=bias,
            dropout_rate=0.1,
            dropout_key=dropout_key,
            **implementation,
        )

    for step in range(3):
        attended(
            *operands(seed=step),
            bind(scores.bilinear, weight=jnp.full((H, H), float(step))),
            Causal() & Lengths(jnp.full(B, step)),
            jnp.full((T, S), float(step)),
            jax.random.key(step),
        )


@pytest.mark.slow
def test_vmap_is_a_loop(implementation):
    """Over queries, lengths and the parameters of a score at once."""
    batches = [operands(seed=seed) for seed in range(3)]
    weights = jnp.asarray(np.random.default_rng(6).normal(size=(3, H, H)), jnp.float32)
    lengths = jnp.array([[7, 1], [3, 0], [5, 5]])

    def attended(inputs, weight, length):
        return attend(
            *inputs,
            score=bind(scores.bilinear, weight=weight),
            mask=Causal() & Lengths(length),
            **implementation,
        )

    mapped = jax.vmap(attended)(jax.tree.map(lambda *x: jnp.stack(x), *batches), weights, lengths)
    for index, inputs in enumerate(batches):
        is_close(mapped[index], attended(inputs, weights[index], lengths[index]))


RATE = 0.3
DROPPED = {"dropout_rate": RATE, "dropout_key": jax.random.key(0)}


@functools.partial(jax.jit, static_argnames="dropout_rate")
def keep_factors(query, key, value, dropout_rate, dropout_key):
    """Return what dropout multiplied each weight by."""
    weights = attend(query, key, value, return_weights=True).weights
    dropped = attend(
        query, key, value, dropout_rate=dropout_rate, dropout_key=dropout_key, return_weights=True
    )
    return dropped.weights / weights


def test_dropout_keeps_the_share_it_should():
    factors = np.asarray(keep_factors(*operands(2, 64, 64, 4, 4), **DROPPED))
    kept = factors > 0
    np.testing.assert_allclose(factors[kept], 1 / (1 - RATE), rtol=1e-4)
    assert abs(kept.mean() - (1 - RATE)) < 5 * np.sqrt(RATE * (1 - RATE) / kept.size)
    spread = kept.mean(axis=(2, 3)).ravel()
    assert (abs(spread - (1 - RATE)) < 5 * np.sqrt(RATE * (1 - RATE) / 64**2)).all()


@pytest.mark.slow
def test_dropout_differs_by_example_head_query_and_key_and_repeats():
    inputs = operands(2, 16, 16, 2, 2)
    kept = np.asarray(keep_factors(*inputs, **DROPPED)) > 0
    np.testing.assert_array_equal(kept, keep_factors(*inputs, **DROPPED) > 0)
    for one, other in (
        (kept[0], kept[1]),
        (kept[:, 0], kept[:, 1]),
        (kept[:, :, :-1], kept[:, :, 1:]),
        (kept[..., :-1], kept[..., 1:]),
        (kept, kept.swapaxes(2, 3)),
        (kept, keep_factors(*inputs, dropout_rate=RATE, dropout_key=jax.random.key(1)) > 0),
    ):
        agreement = (one == other).mean()
        assert abs(agreement - (RATE**2 + (1 - RATE) ** 2)) < 0.12


@pytest.mark.slow
def test_dropout_of_a_pair_depends_on_its_position_alone():
    """Longer sequences, other keys: the pairs that were there are dropped as before."""
    short = keep_factors(*operands(2, 5, 7, 2, 2), **DROPPED) > 0
    long = keep_factors(*operands(2, 9, 11, 2, 2, seed=1), **DROPPED) > 0
    np.testing.assert_array_equal(long[:, :, :5, :7], short)


@pytest.mark.slow
def test_dropout_acts_on_the_weights(implementation):
    inputs = operands()
    factors = keep_factors(*inputs, **DROPPED)
    expected, _ = oracle.attention(*inputs, scaled_dot, keep=factors)
    is_close(attend(*inputs, **implementation, **DROPPED), expected)


@pytest.mark.slow
def test_dropout_of_rate_zero_needs_no_key(implementation):
    without = attend(QUERY, KEY, VALUE, **implementation)
    rate_zero = attend(QUERY, KEY, VALUE, dropout_rate=0.0, **implementation)
    chex.assert_trees_all_equal(without, rate_zero)


@pytest.mark.slow
def test_dropped_weights_have_no_gradient(implementation):
    inputs = operands(1, 1, 7, 1, 1)
    kept = keep_factors(*inputs, **DROPPED)[0, 0, 0] > 0
    gradient = jax.grad(
        lambda value: attend(*inputs[:2], value, **implementation, **DROPPED).sum()
    )(inputs[2])
    np.testing.assert_array_equal((np.asarray(gradient[0, :, 0]) != 0).all(axis=-1), kept)
    assert 0 < kept.sum() < 7


def uniform(query, key):
    return jnp.zeros((query.shape[0], key.shape[0]), query.dtype)


@pytest.mark.slow
def test_a_score_of_the_user(implementation):
    context = attend(QUERY, KEY, VALUE, score=uniform, **implementation)
    mean = np.repeat(np.asarray(VALUE).mean(axis=1), N // K, axis=1)
    is_close(context, np.broadcast_to(mean[:, None], context.shape))


ERRORS = {
    "attend: query must have the 4 axes [B, T, N, Q], got shape (5, 4, 3); reshape it, or lift "
    "the function with jax.vmap.": lambda: attend(QUERY[0], KEY, VALUE),
    "attend: axis S (number 1) of value [B, S, K, V] must be 7 as in key, got 6; give both the "
    "same S.": lambda: attend(QUERY, KEY, VALUE[:, :6]),
    "attend: query heads N must be a multiple of key heads K, got query heads N = 3 and key "
    "heads K = 2.": lambda: attend(QUERY[:, :, :3], KEY, VALUE),
    "attend: query must be floating point, got int32; convert it with "
    "query.astype(jnp.float32).": lambda: attend(QUERY.astype(int), KEY, VALUE),
    "attend: value must have the dtype of query, float32, got float16; cast one of them.": lambda: (
        attend(QUERY, KEY, VALUE.astype(jnp.float16))
    ),
    "attend: dropout_rate must be in [0, 1), got 1.0.": lambda: attend(
        QUERY, KEY, VALUE, dropout_rate=1.0
    ),
    "attend: dropout_rate must be in [0, 1), got -0.1.": lambda: attend(
        QUERY, KEY, VALUE, dropout_rate=-0.1
    ),
    "attend: dropout_rate 0.5 needs a dropout_key; give a jax.random key, or rate 0.": lambda: (
        attend(QUERY, KEY, VALUE, dropout_rate=0.5)
    ),
    "attend: mask must broadcast to [B, N, T, S] = (2, 4, 5, 7), got (5, 6).": lambda: attend(
        QUERY, KEY, VALUE, mask=jnp.ones((5, 6), bool)
    ),
    "attend: bias must broadcast to [B, N, T, S] = (2, 4, 5, 7), got (3, 5, 7).": lambda: attend(
        QUERY, KEY, VALUE, bias=jnp.ones((3, 5, 7))
    ),
    "mask: an array must be boolean (True = may attend), got float32; for numbers that are added "
    "to the logits use bias=.": lambda: attend(QUERY, KEY, VALUE, mask=jnp.ones((5, 7))),
    "mask: expected a Mask, a boolean array or a function (q_idx, kv_idx) -> bool, got "
    "str.": lambda: attend(QUERY, KEY, VALUE, mask="causal"),
    "attend: every parameter of a per_head score must have axis 0 of size N = 4, got shape "
    "(3, 3).": lambda: attend(
        QUERY, KEY, VALUE, score=per_head(bind(scores.bilinear, weight=jnp.eye(3)))
    ),
    "attend: every parameter of a per_example score must have axis 0 of size B = 2, got shape "
    "(4,).": lambda: attend(
        QUERY, KEY, VALUE, score=per_example(bind(scores.cosine, temperature=jnp.ones(4)))
    ),
    "attend: every parameter of a per_head score must have axis 1 of size N = 4, got shape "
    "(2, 3).": lambda: attend(
        QUERY,
        KEY,
        VALUE,
        score=per_example(per_head(bind(scores.cosine, temperature=jnp.ones((2, 3))))),
    ),
    "attend: Lengths.key_length may have the leading axes [B, N] = (2, 4) beyond its 0 for one "
    "example, got shape (3,).": lambda: attend(
        QUERY, KEY, VALUE, mask=Causal() & Lengths(jnp.ones(3, int))
    ),
    "attend: Table.allowed must broadcast to [B, N, T, S] = (2, 4, 5, 7), got "
    "(2, 3, 5, 7).": lambda: attend(
        QUERY, KEY, VALUE, mask=Causal() & jnp.ones((2, 3, 5, 7), bool)
    ),
    "attend: Segment.query_ids must hold an entry for each of the T = 5 positions, got shape "
    "(7,); build the mask for this length.": lambda: attend(
        QUERY, KEY, VALUE, mask=Segment(jnp.zeros(7, int))
    ),
    "attend: Segment.query_ids must hold an entry for each of the S = 7 positions, got shape "
    "(2, 5); build the mask for this length.": lambda: attend(
        QUERY, KEY, VALUE, mask=Causal() & Segment(jnp.zeros((2, 5), int))
    ),
    "dot: axis H (number 1) of key [S, H] must be 3 as in query, got 2; give both the same "
    "H.": lambda: attend(QUERY, KEY[..., :2], VALUE, score=scores.dot),
    "bilinear: axis H (number 1) of weight [Q, H] must be 3 as in key, got 2; give both the same "
    "H.": lambda: attend(QUERY, KEY, VALUE, score=bind(scores.bilinear, weight=np.ones((3, 2)))),
    "concat: axis 0 of weights[0] must be Hq + Hk = 3 + 3, got 8.": lambda: attend(
        QUERY,
        KEY,
        VALUE,
        score=bind(
            scores.concat, weights=[jnp.ones((8, 2))], biases=[jnp.ones(2)], value=jnp.ones(2)
        ),
    ),
    "attend: score must return logits [T, S] = (5, 7), got shape (7, 5).": lambda: attend(
        QUERY, KEY, VALUE, score=lambda query, key: key @ query.T
    ),
    "attend: score still waits for query_weight, key_weight, bias; give them with bind(score, "
    "query_weight=...).": lambda: attend(
        QUERY, KEY, VALUE, score=bind(scores.additive, value=jnp.ones(2))
    ),
    "attend: return_logsumexp needs a normalizer of the softmax family; sigmoid has no "
    "log-sum-exp.": lambda: attend(
        QUERY, KEY, VALUE, normalizer=normalizers.sigmoid, return_logsumexp=True
    ),
    "attend: GlobalTokens.tokens must hold an entry for each of the max(T, S) = 7 positions, got "
    "shape (2,); build the mask for this length.": lambda: attend(
        QUERY, KEY, VALUE, mask=GlobalTokens([False, True])
    ),
    "attend: query heads N must be 1 or more, got 0.": lambda: attend(QUERY[:, :, :0], KEY, VALUE),
    "attend: query must be an array, got list; convert it with jnp.asarray(query).": lambda: attend(
        [[1.0]], KEY, VALUE
    ),
}

OPTION_ERRORS = {
    "mask: expected a Mask, got the class Causal; make one of it, as Causal().": {"mask": Causal},
    "mask: expected a Mask, got the class Window; make one of it, as Window(left, right).": {
        "mask": Window
    },
    "attend: mask must broadcast to [B, N, T, S] = (2, 4, 5, 7), got (2, 7); padding [B, S] is "
    "mask[:, None, None, :], or give masks.Lengths.": {"mask": jnp.ones((2, 7), bool)},
    "attend: Table.allowed must broadcast to [B, N, T, S] = (2, 4, 5, 7), got (2, 7); padding "
    "[B, S] is mask[:, None, None, :], or give masks.Lengths.": {
        "mask": Causal() & jnp.ones((2, 7), bool)
    },
    "attend: bias must broadcast to [B, N, T, S] = (2, 4, 5, 7), got (2, 7).": {
        "bias": jnp.ones((2, 7))
    },
    "attend: bias still waits for table, which modules create; give it to a module, or bind its "
    "function to arrays.": {"bias": positions.learned_buckets()},
    "attend: score still waits for weight, which modules create; give it to a module, or bind its "
    "function to arrays.": {
        "score": learned(scores.bilinear, weight=Parameter((3, 3), jax.nn.initializers.ones))
    },
    "attend: tile_sizes must be two positive numbers, got 4; give how many queries and how many "
    "keys, as integers.": {"tile_sizes": 4},
    "attend: tile_sizes must be two positive numbers, got (4.0, 4.0); give how many queries and "
    "how many keys, as integers.": {"tile_sizes": (4.0, 4.0)},
    "attend: tile_sizes must be two positive numbers, got (4, 4, 99); give how many queries and "
    "how many keys, as integers.": {"tile_sizes": (4, 4, 99)},
    "attend: score must be a function such as scores.scaled_dot, got 'dot'.": {"score": "dot"},
    "attend: score must be a function such as scores.scaled_dot, got 3.": {"score": 3},
    "attend: score must return logits [T, S] = (5, 7), got shape (5,).": {
        "score": lambda query, key: query[:, 0]
    },
    "attend: normalizer must be a function such as normalizers.softmax, got 'softmax'.": {
        "normalizer": "softmax"
    },
    "attend: normalizer must map (logits, allowed), both [T, S] = (5, 7), to weights [T, S], as "
    "normalizers.softmax does; this one fails: Abstract tracer value encountered where concrete "
    "value is expected: traced array with shape bool[5,7].": {"normalizer": jax.nn.softmax},
    "attend: normalizer must map (logits, allowed), both [T, S] = (5, 7), to weights [T, S], as "
    "normalizers.softmax does; this one returns shape (5,).": {
        "normalizer": lambda logits, allowed: logits[:, 0]
    },
    "attend: bias must return numbers that broadcast to its indices [T, S] = (1, 1), got shape "
    "(5, 7).": {"bias": lambda q_idx, kv_idx: jnp.ones((5, 7))},
    "attend: bias must return numbers that broadcast to its indices [T, S] = (5, 7), got shape "
    "(3, 3).": {"bias": lambda q_idx, kv_idx: jnp.ones((3, 3))},
    "attend: bias must broadcast to [B, N, T, S] = (2, 4, 5, 7), got (3, 3).": {
        "bias": jnp.ones((3, 3))
    },
    "attend: dropout_rate must be in [0, 1), got 2.0.": {"dropout_rate": 2.0},
    "attend: dropout_key must be one jax.random key, got key<fry> of shape (3,).": {
        "dropout_rate": 0.5,
        "dropout_key": jax.random.split(jax.random.key(0), 3),
    },
    "attend: dropout_key must be one jax.random key, got int.": {
        "dropout_rate": 0.5,
        "dropout_key": 0,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("message", ERRORS)
def test_errors_say_what_does_not_fit_and_what_to_do(message):
    with pytest.raises((ValueError, TypeError)) as error:
        ERRORS[message]()
    assert str(error.value) == message


@pytest.mark.parametrize("operation", [attend, explain])
@pytest.mark.parametrize("message", OPTION_ERRORS)
def test_what_attend_refuses_explain_refuses(message, operation):
    with pytest.raises((ValueError, TypeError)) as error:
        operation(QUERY, KEY, VALUE, **OPTION_ERRORS[message])
    assert str(error.value) == message


def test_heads_that_do_not_divide_are_not_explained_away():
    with pytest.raises(ValueError, match=r"attend: query heads N must be a multiple of key heads"):
        explain(QUERY[:, :, :3], KEY, VALUE)


def test_a_dropout_rate_known_only_inside_jit_is_refused():
    with pytest.raises(TypeError, match=r"attend: dropout_rate must .* name it in static_argnames"):
        jax.jit(lambda rate: attend(QUERY, KEY, VALUE, dropout_rate=rate))(0.5)


LATE_MASKS = {
    "right of a window": lambda n: Causal() & Window(3, n),
    "left of a window": lambda n: Window(n, 0) & Causal(),
    "window": lambda n: Window(n, n),
    "offset": lambda n: Causal(n),
    "window of an offset": lambda n: Causal(n) & Window(2, 0),
    "prefix": lambda n: Prefix(n) | Causal(),
    "lengths": lambda n: Lengths(n, n + 1) & Causal(),
    "shift": lambda n: Shift(Causal(), query=n) & Window(4, 1),
    "segments": lambda n: Segment(jnp.arange(T) // n, jnp.arange(S) // n),
    "predicate": lambda n: masks.Predicate(lambda q_idx, kv_idx: q_idx + n >= kv_idx),
}
LATE_TYPES = [np.int32, np.asarray, jnp.int32]


QUICK_LATE = ("window", "lengths", "segments", "predicate")


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.slow] * (x not in QUICK_LATE)) for x in LATE_MASKS],
)
def test_what_a_mask_holds_may_be_traced(name):
    for how in ({}, {"implementation": "tiled", "tile_sizes": (2, 3)}):

        def attended(n, how=how):
            mask = LATE_MASKS[name](n)
            explain(QUERY, KEY, VALUE, mask=mask, **how)
            return attention.attend(QUERY, KEY, VALUE, mask=mask, **how)

        assert jax.eval_shape(attended, 2).shape == (B, T, N, V)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.exhaustive] * (x not in QUICK_LATE)) for x in LATE_MASKS],
)
def test_what_a_mask_holds_may_be_an_array_or_known_inside_jit_alone(name):
    expected = attend(QUERY, KEY, VALUE, mask=LATE_MASKS[name](2), implementation="dense")
    tiled = {"implementation": "tiled", "tile_sizes": (2, 3)}
    for how in ({}, tiled):

        def attended(n, how=how):
            mask = LATE_MASKS[name](n)
            assert explain(QUERY, KEY, VALUE, mask=mask, **how).implementation in ("dense", "tiled")
            return attention.attend(QUERY, KEY, VALUE, mask=mask, **how)

        is_close(jax.jit(attended)(2), expected)
        for array_of in LATE_TYPES:
            is_close(attended(array_of(2)), expected)


def on_gpu(mask, **how):
    """Explain what a GPU would run for long sequences in half precision."""
    x = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16)
    return explain(x, x, x, mask=mask, platform="gpu", **how).implementation


BANDS = {
    "right of a window": lambda n: Causal() & Window(3, n),
    "left of a window": lambda n: Window(n, 0) & Causal(),
    "offset": lambda n: Causal(n),
}


@pytest.mark.parametrize("name", BANDS)
def test_cudnn_is_never_given_an_array_as_a_window(name):
    assert on_gpu(BANDS[name](0)) == "cudnn"
    refusal = "'cudnn' knows the masks .* with T = S, all of whose fields are numbers and no arrays"
    for array_of in LATE_TYPES[1:]:
        mask = BANDS[name](array_of(0))
        assert on_gpu(mask) != "cudnn"
        with pytest.raises(ValueError, match=refusal):
            on_gpu(mask, implementation="cudnn")

    def traced(n):
        assert on_gpu(BANDS[name](n)) != "cudnn"
        with pytest.raises(ValueError, match=refusal):
            on_gpu(BANDS[name](n), implementation="cudnn")
        return n

    jax.eval_shape(traced, 0)


def test_cudnn_is_not_asked_where_it_cannot_be_chosen(monkeypatch):
    monkeypatch.setattr(choice.cudnn, "lacks", None)
    attention.attend(QUERY, KEY, VALUE)
    explain(QUERY, KEY, VALUE, implementation="tiled")


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("operation", [attention.attend, explain, linear_attention])
def test_numpy_inputs_of_float64_are_taken_as_jax_takes_them(operation):
    operation(*(np.asarray(x, np.float64) for x in (QUERY, KEY, VALUE)))


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")
def test_a_score_in_another_dtype_is_computed_in_that_of_the_inputs(implementation, x64):
    def wide(query, key):
        return query @ key.T / np.sqrt(query.shape[1])

    narrow = (x.astype(jnp.float32) for x in (QUERY, KEY, VALUE))
    found = attend(*narrow, score=wide, **implementation, return_logsumexp=True)
    assert [found.context.dtype, found.logsumexp.dtype] == [jnp.float32, jnp.float32]
    is_close(found.context, oracle.attention(QUERY, KEY, VALUE, scaled_dot)[0])


def test_an_unknown_implementation_is_refused_by_name():
    with pytest.raises(ValueError, match=r"attend: implementation must be .*, got 'sparse'\."):
        attend(QUERY, KEY, VALUE, implementation="sparse")
