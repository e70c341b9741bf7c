"""The sweep over families of masks: shares are true, and a table tells how costs grow."""

import numpy as np
import pytest

from attention_jax import masks
from experiments.benchmark import patterns
from experiments.benchmark.patterns import Point

LENGTH = 256


@pytest.mark.parametrize("name", ["longformer", "strided", "segment", "swin in order"])
def test_live_tiles_hold_all_that_is_allowed(name):
    mask = patterns.families(scale=8)[name].mask(LENGTH)
    allowed = patterns.allowed_share(mask, LENGTH)
    assert 0 < allowed <= patterns.live_share(mask, LENGTH) <= 1


def test_allowed_pairs_are_counted():
    for mask in (masks.Causal(), masks.Window(3, 1), np.arange(49).reshape(7, 7) % 3 == 0):
        counted = masks.as_mask(mask).to_dense(7).mean()
        assert patterns.allowed_share(mask, 7) == pytest.approx(float(counted))


def test_the_table_gives_exponents_and_what_the_longest_length_costs():
    """Work like S^2, time like S^1.5 and bytes like S, by construction."""
    points = [Point(s, s**1.5, s / 64, 1.0, 0.5) for s in (64, 128, 256)]
    found = dict.fromkeys(patterns.families(scale=8), points)
    lines = patterns.report(found, 8, "a machine").split("|---|\n")[1].splitlines()
    assert len(lines) == len(found)
    causal = next(line for line in lines if line.startswith("| causal |"))
    assert causal == "| causal | `Causal()` | 50 | 100 | 2.00 | 4.1e+03 | 1.50 | 4 | 1.00 |"
    assert "`Prefix(32) \\| Causal()`" in lines[2], "a | inside a cell is escaped"
