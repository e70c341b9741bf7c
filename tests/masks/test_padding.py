"""Masks that name no pairs, read into who is there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import masks
from attention_jax.masks import padding

SIZES = {"B": 2, "N": 3, "T": 3, "S": 4}


def read(mask, causal=True):
    return padding.from_mask("f", mask, SIZES, causal=causal, reason="it is a test")


KEYS = np.array([[True, True, False, False], [False, True, True, True]])
EVERYONE = {"query": np.ones((2, 3), bool), "key": np.ones((2, 4), bool), "causal": None}


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, {}),
        (masks.Full(), {}),
        (masks.Lengths(2), {"key": np.arange(4)[None] < np.array([[2], [2]])}),
        (
            masks.Lengths(np.array([4, 0]), jnp.array([1, 3])),
            {
                "key": np.arange(4)[None] < np.array([[4], [0]]),
                "query": np.arange(3)[None] < np.array([[1], [3]]),
            },
        ),
        (KEYS[:, None, None], {"key": KEYS}),
        (KEYS[1][None], {"key": np.stack(2 * [KEYS[1]])}),
        (KEYS[:, None, :3, None], {"query": KEYS[:, :3]}),
        (masks.Causal(), {"causal": 0}),
        (masks.Causal(np.int64(2)) & masks.Causal(-1), {"causal": -1}),
        (
            masks.Causal() & (KEYS[:, None, None] & masks.Lengths(3)),
            {"causal": 0, "key": KEYS & (np.arange(4) < 3)},
        ),
    ],
)
def test_who_is_there(mask, expected):
    found = read(mask)._asdict()
    for name, value in (EVERYONE | expected).items():
        np.testing.assert_array_equal(
            value if value is None else np.broadcast_to(value, np.shape(value)), found[name]
        )


def test_under_jit():
    found = jax.jit(lambda lengths: read(masks.Lengths(lengths)).key)(jnp.array([1, 4]))
    np.testing.assert_array_equal(found.sum(axis=1), [1, 4])


@pytest.mark.parametrize(
    ("mask", "what"),
    [
        (masks.Window(2, 0), "the mask Window"),
        (masks.Causal() & masks.Segment(np.zeros(4, int)), "the mask Segment"),
        (masks.Prefix(2) | masks.Causal(), "the mask Or"),
        (~masks.Lengths(2), "the mask Not"),
        (lambda q_idx, kv_idx: q_idx > kv_idx, "the mask Predicate"),
        (np.ones((3, 4), bool), "an array of pairs"),
        (masks.Lengths(np.ones((2, 3), int)), "padding that differs between heads"),
        (masks.Causal(np.zeros(2, int)), "a Causal mask whose offset is not one number"),
    ],
)
def test_what_names_pairs_is_refused(mask, what):
    with pytest.raises(ValueError, match=f"^f: {what}.* cannot be honoured, because it is a test;"):
        read(mask)


def test_causal_is_refused_where_there_is_no_time():
    with pytest.raises(
        ValueError, match=r"it takes masks\.Lengths, arrays over the keys alone and"
    ):
        read(masks.Causal(), causal=False)
    with pytest.raises(ValueError, match=r"f: Lengths.key_length .* got shape \(3,\)"):
        read(masks.Lengths(np.ones(3, int)))
