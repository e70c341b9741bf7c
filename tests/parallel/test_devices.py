"""Run the tests that need several devices: in a process that has eight, all on this CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ["tests/parallel/test_sequence.py", "tests/parallel/test_sequence_derivatives.py"]
# What is computed does not depend on how well it is compiled.
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)


@pytest.mark.slow
def test_sequences_are_split_over_eight_devices():
    command = [sys.executable, "-m", "pytest", "-n", "0", "-v", "-m", "", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *FILES],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout
