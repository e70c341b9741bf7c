"""Which tiles are visited: every live pair once, and none without the mask that it hides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_jax import explain, masks
from attention_jax.implementations import machine, tiles

lengths = st.integers(1, 700)
bands = st.builds(masks.Window, st.integers(0, 300), st.integers(0, 300))
some = st.one_of(
    st.just(masks.Full()),
    st.just(masks.Causal()),
    bands,
    st.builds(lambda band: band & masks.Causal(), bands),
    st.builds(lambda band, prefix: band | masks.Prefix(prefix), bands, st.integers(0, 300)),
)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    mask=some,
    query_length=lengths,
    key_length=lengths,
    sizes=st.sampled_from([(16, 128), (64, 256), (100, 384), (512, 128), (7, 30)]),
    tall=st.sampled_from([1, 2, 4]),
    together=st.sampled_from([1, 2, 8]),
)
def test_visits_meet_every_live_pair_once(mask, query_length, key_length, sizes, tall, together):
    query_size, key_size = sizes
    within = mask & masks.Lengths(key_length)
    plan = tiles.make_plan(within, (query_length, key_length), sizes)
    visits = tiles.group(plan, tall, together)

    rows = -(-query_length // (query_size * 8)) * query_size * 8
    met = np.zeros((rows, plan.covered), int)
    unmasked = np.zeros((rows, plan.covered), bool)
    for group in visits:
        for first, keys in zip(group.queries, group.keys, strict=True):
            for place, key in enumerate(keys):
                here = first + place * group.rows, key
                tile = tuple(
                    slice(start, start + size)
                    for start, size in zip(here, (group.rows, key_size), strict=True)
                )
                assert met[tile].shape == (group.rows, key_size)
                met[tile] += 1
                unmasked[tile] |= not group.masked
    allowed = np.asarray(mask.to_dense(query_length, key_length))
    inside = slice(0, query_length), slice(0, key_length)
    assert met.max(initial=0) <= 1
    assert (met[inside][allowed] == 1).all()
    assert allowed[unmasked[inside]].all()
    assert not unmasked[:query_length, key_length:].any()
    assert key_length <= plan.covered < key_length + key_size


@pytest.mark.parametrize(
    ("mask", "sizes", "expected"),
    [
        (masks.Full(), (512, 512), [(False, 1024, 1, 8, 1)]),
        (
            masks.Causal(),
            (512, 512),
            [(False, 1024, 1, 2, 1), (True, 1024, 1, 2, 1), (True, 512, 1, 2, 1)],
        ),
        (masks.Causal() & masks.Window(256, 0), (256, 512), [(True, 256, 4, 2, 1)]),
        (masks.Causal() & masks.Window(256, 0), (128, 384), [(True, 128, 8, 2, 4)]),
    ],
)
def test_few_large_visits_on_cpu(mask, sizes, expected, monkeypatch):
    monkeypatch.setattr(machine, "pairs_of_cpu", lambda: 2**19)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    found = tiles.make_plan(mask, (2048, 2048), sizes).visits
    assert [(v.masked, v.rows, v.together, len(v.queries), v.lanes) for v in found] == expected


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (lambda ids: masks.Full(), (512, 512)),
        (lambda ids: masks.Causal(), (512, 512)),
        (lambda ids: masks.Causal() & masks.Window(256, 0), (128, 384)),
        (lambda ids: masks.Segment(ids), (512, 512)),
        (lambda ids: masks.Segment(ids) & masks.Causal() & masks.Window(256, 0), (256, 512)),
    ],
    ids=["every pair", "causal", "window", "run time", "window at run time"],
)
def test_tiles_that_are_visited_one_by_one_are_large(mask, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")

    def choose(x, ids):
        return explain(x, x, x, mask=mask(ids))

    x = jax.ShapeDtypeStruct((1, 4096, 2, 64), jnp.float32)
    found = jax.eval_shape(choose, x, jax.ShapeDtypeStruct((4096,), jnp.int32))
    assert found.tile == expected


def test_elsewhere_every_tile_is_a_visit(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    (found,) = tiles.make_plan(masks.Full(), (1024, 1024), (256, 256)).visits
    assert (found.masked, found.rows, found.together, len(found.queries)) == (False, 256, 1, 16)
