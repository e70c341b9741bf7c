"""Models train on eight devices as on one, split over data, sequence and heads."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
FLAGS = "--xla_force_host_platform_device_count=8"


@functools.cache
def losses(api):
    """Train in a process of eight devices, and return the losses of every case."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.training_cases", api],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {one["case"]: one["losses"] for one in found}


@pytest.mark.slow
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_losses_are_those_of_one_device(api):
    found = losses(api)
    whole = found.pop("one device")
    assert len(set(whole)) > 1
    assert list(found) == {"nnx": ["ring", "ring, dealt"], "linen": ["ring, dealt"]}[api]
    for case, of_case in found.items():
        np.testing.assert_allclose(of_case, whole, rtol=1e-12, err_msg=case)
