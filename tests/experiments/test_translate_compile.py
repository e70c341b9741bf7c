"""Training on several devices is training on one, within rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.translate.compile import num_devices

ROOT = Path(__file__).parents[2]


FLAGS = (
    "--data=copy",
    "--train_size=200",
    "--valid_size=16",
    "--test_size=16",
    "--width=8",
    "--seeds=2",
    "--scores=dot",
    "--steps=20",
    "--evaluate_every=10",
    "--batch_size=16",
    "--buckets=2",
    "--learning_rate=0.001",
)


def test_a_batch_is_spread_over_as_many_devices_as_divide_it():
    assert [num_devices(batch, 8) for batch in (64, 12, 7, 1, 9)] == [8, 6, 7, 1, 3]
    assert num_devices(64, 1) == 1


@pytest.mark.slow
@pytest.mark.exhaustive
def test_eight_devices_train_as_one_does(tmp_path):
    """A process with eight virtual devices, and one with a single one."""
    records = []
    for count in (1, 8):
        flags = f"--xla_force_host_platform_device_count={count}"
        folder = tmp_path / str(count)
        done = subprocess.run(
            [sys.executable, "-m", "experiments.translate", *FLAGS, f"--workdir={folder}"],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert ("each batch on 8 devices" in done.stdout) == (count == 8)
        lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
        records.append([json.loads(line) for line in lines])
        config = json.loads((folder / "config.json").read_text("utf-8"))
        assert config["environment"]["device"].startswith(f"{count} x ")
    one, eight = records
    assert len(one) == len(eight) > 2
    for first, second in zip(one, eight, strict=True):
        for name in ("train_loss", "valid_loss"):
            if name in first:
                np.testing.assert_allclose(first[name], second[name], rtol=1e-4)
