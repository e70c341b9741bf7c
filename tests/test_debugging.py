"""JAX's own checks find nothing to complain of: infinite numbers, leaked tracers, transfers."""

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import Attended, attend, bind, masks, merge, normalizers

NORMALIZERS = {
    "softmax": normalizers.softmax,
    "sink": bind(normalizers.softmax_with_sink, sink=0.5),
    "plus_one": normalizers.softmax_plus_one,
    "sigmoid": normalizers.sigmoid,
    "top_k": bind(normalizers.top_k, k=2),
    "hard": normalizers.hard,
    "sparsemax": normalizers.sparsemax,
    "entmax15": normalizers.entmax15,
    "contextual_positions": bind(
        normalizers.contextual_positions,
        table=np.linspace(-1.0, 1.0, 8, dtype=np.float32).reshape(2, 4),
        query=np.ones((3, 4), np.float32),
    ),
}
X = np.random.default_rng(0).standard_normal((1, 6, 1, 4)).astype(np.float32)


class Changeable:
    """What a mask closes over here can change, so that `attend` is no program that is kept."""

    reach = 1


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.slow] * (x != "softmax")) for x in NORMALIZERS],
)
def test_a_normalizer_makes_no_infinite_number(name):
    logits = jnp.array([[1.0, -2.0, 0.5], [3.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    allowed = jnp.array([[True, False, True], [False, False, False], [True, True, True]])
    with jax.debug_infs(True):
        weights = NORMALIZERS[name](logits, allowed)
        gradient = jax.grad(lambda logits: jnp.sum(NORMALIZERS[name](logits, allowed)[:, 0]))
        chex.assert_tree_all_finite(gradient(logits))
    np.testing.assert_array_equal(weights[~np.asarray(allowed)], 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax", "sink"])
def test_attend_outside_jit_makes_no_infinite_number(name, implementation):
    def loss(x, mask):
        context = attend(x, x, x, mask=mask, normalizer=NORMALIZERS[name], **implementation)
        return jnp.sum(context**2)

    kept = Changeable()
    known = masks.Causal() & masks.Lengths(6, 4)  # the last two queries attend to nothing
    for mask in (known, known & (lambda q_idx, kv_idx: kv_idx < 6 * kept.reach)):
        with jax.debug_infs(True):
            chex.assert_tree_all_finite(jax.value_and_grad(loss)(jnp.asarray(X), mask))


def test_merging_an_empty_block_makes_no_infinite_number_but_its_own():
    context, log = jnp.ones((1, 2, 1, 3)), jnp.array([[[0.5], [-jnp.inf]]])
    with jax.debug_infs(True):
        gradient = jax.grad(
            lambda context: jnp.sum(
                merge(Attended(context, logsumexp=log), Attended(context, logsumexp=log)).context
            )
        )
        # The log-sum-exp of nothing is -inf by contract; no other number is.
        expected = np.broadcast_to([[[[1.0]], [[0.0]]]], context.shape)
    np.testing.assert_array_equal(gradient(context), expected)


@pytest.mark.parametrize("hides", [-np.inf, np.finfo(np.float32).min])
def test_a_bias_that_hides_does_so_in_every_implementation(hides, implementation):
    """Of a row that the smallest number hides, softmax takes the average; of -inf, nothing."""
    bias = np.zeros((6, 6), np.float32)
    bias[1], bias[:, 4] = hides, hides
    found = attend(*3 * [jnp.asarray(X)], bias=jnp.asarray(bias), **implementation)
    logits = np.einsum("btnh,bsnh->bnts", X, X)[0, 0] / 2 + bias
    largest = np.maximum(logits.max(axis=1), np.finfo(np.float32).min)
    exponentials = np.exp(logits - largest[:, None])
    total = np.maximum(exponentials.sum(axis=1), 1e-9)[:, None]
    np.testing.assert_allclose(found[0, :, 0], exponentials / total @ X[0, :, 0], atol=1e-5)


@pytest.mark.slow
def test_no_tracer_leaks(implementation):
    def loss(x, lengths):
        mask = masks.Causal() & masks.Lengths(lengths)
        return jnp.sum(attend(x, x, x, mask=mask, **implementation))

    x, lengths = jnp.asarray(X), jnp.array([4])
    with jax.checking_leaks():
        chex.assert_tree_all_finite(loss(x, lengths))
        chex.assert_tree_all_finite(jax.jit(jax.grad(loss))(x, lengths))


@dataclasses.dataclass(frozen=True)
class Asked(masks.Mask):
    """A mask that holds a function and another mask."""

    inner: masks.Mask
    function: Callable

    def __call__(self, q_idx, kv_idx):
        return self.inner(q_idx, kv_idx) & self.function(q_idx, kv_idx)


def _closing(end):
    @dataclasses.dataclass(frozen=True)
    class Closing(masks.Mask):
        def __call__(self, q_idx, kv_idx):
            return kv_idx < end

    return Closing()


CLOSING = {
    "field": lambda end: Asked(masks.Causal(), lambda q_idx, kv_idx: kv_idx < end),
    "class": lambda end: masks.Causal() & _closing(end),
    "nested": lambda end: masks.Heads(
        [Asked(masks.Causal(), lambda q_idx, kv_idx: kv_idx < end), masks.Full()]
    ).of(head=0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CLOSING)
def test_a_mask_may_close_over_what_is_traced(name, implementation):
    def context(end, mask_of=CLOSING[name]):
        return attend(x, x, x, mask=mask_of(end), **implementation)

    x = jnp.asarray(X)
    expected = [context(end, lambda end: masks.Causal() & masks.Prefix(end)) for end in (2, 5)]
    for lifted in (jax.vmap(context), jax.jit(jax.vmap(context))):
        np.testing.assert_allclose(lifted(jnp.array([2, 5])), expected, atol=1e-6)
    np.testing.assert_allclose(jax.jit(context)(2), expected[0], atol=1e-6)


def test_what_a_mask_closes_over_leaves_the_tiles_of_others_known():
    @jax.jit
    def states(end):
        mask = masks.Causal() & Asked(masks.Full(), lambda q_idx, kv_idx: kv_idx < end)
        return mask.static().tiles(4, 4, 2, 2)

    assert states(jnp.int32(3)).tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize("mask", [None, np.tri(6, dtype=bool), masks.Lengths(np.array([4]))])
def test_attend_outside_jit_moves_nothing_to_a_device_in_secret(mask, implementation):
    x = jnp.asarray(X)
    sink = bind(normalizers.softmax_with_sink, sink=0.5)
    with jax.transfer_guard("disallow"):
        found = attend(x, x, x, mask=mask, normalizer=sink, **implementation)
    np.testing.assert_allclose(
        found, attend(x, x, x, mask=mask, normalizer=sink, **implementation), atol=1e-6
    )
