"""Run a module in a process that has eight devices, all on this CPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLAGS = "--xla_force_host_platform_device_count=8"
# What is computed does not depend on how well it is compiled.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def run(*arguments, flags="", environment=None):
    """Run `python -m` with arguments; return its output once it has ended well."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "XLA_FLAGS": f"{FLAGS} {flags}",
            "JAX_PLATFORMS": "cpu",
            **(environment or {}),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    return done.stdout
