"""Partial results of every exported normalizer: those that `merge` joins, and those refused."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attend, merge, normalizers
from attention_jax.normalizers import name_of
from tests.contract import examples

NORMALIZERS = {name: example.normalizer for name, example in examples.NORMALIZERS.items()} | {
    "monotonic": normalizers.monotonic,
    "hard_monotonic": normalizers.hard_monotonic,
}
MERGES = {"softmax", "softmax_with_sink", "softmax_plus_one", "signed_softmax", "odd_power"}
WITH_SINK = {"softmax_with_sink", "softmax_plus_one"}
QUICK = {"softmax", "softmax_with_sink"}
T, S, ENDS = 4, 7, (0, 3, 5, 7)


def of_part(normalizer, start, end):
    """Attention to the keys of a part; the first query may attend to none of the first part."""
    rng = np.random.default_rng(1)
    query, key, value = (jnp.asarray(rng.normal(size=(1, size, 2, 3))) for size in (T, S, S))
    allowed = (rng.random((1, 1, T, S)) < 0.7) & ~((np.arange(T)[:, None] < 1) & (np.arange(S) < 3))
    return attend(
        query,
        key[:, start:end],
        value[:, start:end],
        mask=jnp.asarray(allowed[..., start:end]),
        normalizer=normalizer,
        return_logsumexp=True,
    )


def test_every_normalizer_says_whether_it_merges():
    assert set(NORMALIZERS) >= MERGES
    assert {
        name
        for name, how in NORMALIZERS.items()
        if isinstance(normalizers.streaming(how), normalizers.LogSum)
    } == MERGES


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x not in QUICK)) for x in sorted(MERGES)]
)
def test_parts_that_merge_are_the_whole_row(name, x64):
    """A sink belongs to one of the parts; the others are of softmax."""
    of_others = normalizers.softmax if name in WITH_SINK else NORMALIZERS[name]
    parts = [
        of_part(of_others if start else NORMALIZERS[name], start, end)
        for start, end in itertools.pairwise(ENDS)
    ]
    whole = of_part(NORMALIZERS[name], 0, S)
    for ours, theirs in zip(jax.tree.leaves(merge(*parts)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", sorted(set(NORMALIZERS) - MERGES))
def test_the_others_are_refused_by_name(name):
    expected = (
        "attend: return_logsumexp needs a normalizer of the softmax family; "
        f"{name_of(NORMALIZERS[name])} has no log-sum-exp."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        of_part(NORMALIZERS[name], 0, S)
