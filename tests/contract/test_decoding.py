"""Every exported normalizer, one token after another, in every kind of cache."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax import cache, linen, masks, normalizers
from attention_jax.nnx import MultiHeadAttention
from tests import oracle
from tests.contract import examples

LENGTH, WINDOW, PROMPT = 11, 3, 4
STEPS, ENDS = LENGTH - PROMPT, [PROMPT, PROMPT - 2]
MASK = masks.Causal() & masks.Window(WINDOW, 0)
REFUSED = ["monotonic", "hard_monotonic"]
CACHES = {
    "whole": {"capacity": LENGTH},
    "ring": {"capacity": WINDOW + 2, "window": WINDOW},
    "ragged ring": {"capacity": WINDOW + 2, "window": WINDOW, "ragged": True},
}


def cases():
    """Every normalizer with every cache; with one, in turn, outside the exhaustive tests."""
    kinds_in_turn = itertools.cycle(CACHES)
    for name in examples.NORMALIZERS:
        chosen = "ring" if name == "stick_breaking" else next(kinds_in_turn)
        for kind in CACHES:
            marks = [pytest.mark.slow] * ((name, kind) != ("stick_breaking", "ring"))
            marks += [pytest.mark.exhaustive] * (kind != chosen)
            yield pytest.param(name, kind, marks=marks, id=name + " " + kind)


def whole_numbers():
    """Keys and queries whose products are exact, and often equal to each other."""
    rng = np.random.default_rng(2)
    query, key = rng.integers(-1, 2, (2, 2, LENGTH, 2, 4)).astype(float)
    return query, key, rng.normal(size=(2, LENGTH, 2, 3))


def decoded(normalizer, options, operands):
    """Return the contexts of a prompt of 4 tokens (the second example's 2) and of 7 steps."""
    count = jnp.array(ENDS) if "ragged" in options else None
    size = {"num_key_heads": 2, "key_depth": 4, "value_depth": 3, "dtype": operands[0].dtype}

    def step(state, at, count=None):
        query, key, value = (jnp.take_along_axis(x, at[:, :, None, None], axis=1) for x in operands)
        state, view = cache.extend(state, key, value, count)
        how = {"mask": MASK, "normalizer": normalizer, "return_weights": True}
        context, weights, *_ = cache.attend_cached(query, view, **how)
        return state, (context, jnp.einsum("bnts,bsnv->btnv", weights, view.value))

    at = jnp.tile(jnp.arange(PROMPT), (2, 1))
    state, prompt = step(cache.init(2, **size, **options), at, count)
    at = jnp.broadcast_to(cache.next_positions(state, STEPS), (2, STEPS))
    state, steps = jax.lax.scan(step, state, at.T[:, :, None])
    return prompt, [x[:, :, 0].swapaxes(0, 1) for x in steps]


@pytest.mark.parametrize(("name", "kind"), list(cases()))
def test_tokens_one_by_one_are_the_whole_sequence(name, kind, x64):
    """In a ring, slots are not in the order of positions; contexts and weights know these."""
    normalizer, of_row = examples.NORMALIZERS[name]
    operands = whole_numbers()
    expected, _ = oracle.attention(
        *operands,
        lambda q, k: q @ k / 2,
        allowed=lambda b, n, i, j: i - WINDOW <= j <= i,
        normalizer=of_row,
    )
    run = jax.jit(functools.partial(decoded, normalizer, CACHES[kind]))
    for prompt, steps in zip(*run([jnp.asarray(x) for x in operands]), strict=True):
        for b, end in enumerate(ENDS if kind == "ragged ring" else [PROMPT, PROMPT]):
            np.testing.assert_allclose(prompt[b, :end], expected[b, :end], atol=1e-13)
            np.testing.assert_allclose(steps[b], expected[b, end : end + STEPS], atol=1e-13)


@pytest.mark.slow
def test_every_normalizer_says_whether_keys_may_change_places():
    logits, allowed = jnp.array([[1.0, 0.0, 0.0], [2.0, 2.0, 0.0]]), jnp.ones((2, 3), bool)
    for name, (normalizer, _) in examples.NORMALIZERS.items():
        stays = normalizer(logits, allowed), normalizer(logits[:, ::-1], allowed)[:, ::-1]
        assert normalizers.in_any_order(normalizer) == np.allclose(*stays), name
    assert not normalizers.in_any_order(lambda logits, allowed: logits)


@pytest.mark.parametrize("name", REFUSED)
def test_those_that_need_the_query_before_are_refused(name):
    state = cache.init(1, 4, 1, 1)
    _, view = cache.extend(state, *2 * [jnp.ones((1, 1, 1, 1))])
    with pytest.raises(ValueError, match=f"^attend_cached: {name} goes on from the weights of"):
        cache.attend_cached(jnp.ones((1, 1, 1, 1)), view, normalizer=getattr(normalizers, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stick_breaking", "top_k"])
def test_modules_of_both_apis_decode_in_a_ring(name):
    """Tokens that are equal tie."""
    normalizer, _ = examples.NORMALIZERS[name]
    module = MultiHeadAttention(3, 12, normalizer=normalizer, rngs=nnx.Rngs(0))
    twin = linen.MultiHeadAttention(3, 12, normalizer=normalizer)
    tree = {"params": nnx.to_pure_dict(nnx.state(module, nnx.Param))}
    x = jax.random.normal(jax.random.key(0), (2, 3, 12))[:, jnp.arange(LENGTH) % 3]

    def run(module):
        states = [
            module.init_cache(2, WINDOW + 1, window=WINDOW, ragged=ragged)
            for ragged in (False, True)
        ]

        def step(states, token):
            found = [module.decode(token[:, None], state, mask=MASK) for state in states]
            return [state for _, state in found], [output[:, 0] for output, _ in found]

        outputs = jax.lax.scan(step, states, x.swapaxes(0, 1))[1]
        return module(x, mask=MASK), [output.swapaxes(0, 1) for output in outputs]

    whole, steps = nnx.jit(run)(module)
    for output in steps:
        chex.assert_trees_all_close(output, whole, atol=1e-5)
    of_twin = jax.jit(functools.partial(twin.apply, method=run))(tree)
    chex.assert_trees_all_close(of_twin, (whole, steps), atol=1e-6)
