"""Models train on eight devices as on one, split over data, sequence and heads."""

import functools
import json

import numpy as np
import pytest

from tests.parallel import eight


@functools.cache
def losses(api):
    """Train in a process of eight devices, and return the losses of every case."""
    output = eight.run("tests.parallel.training_cases", api, flags=eight.QUICK)
    found = [json.loads(line) for line in output.splitlines()]
    return {one["case"]: one["losses"] for one in found}


@pytest.mark.slow
@pytest.mark.parametrize("api", ["nnx", pytest.param("linen", marks=pytest.mark.exhaustive)])
def test_losses_are_those_of_one_device(api):
    found = losses(api)
    whole = found.pop("one device")
    assert len(set(whole)) > 1
    assert list(found) == ["ring, dealt"]
    for case, of_case in found.items():
        np.testing.assert_allclose(of_case, whole, rtol=1e-12, err_msg=case)
