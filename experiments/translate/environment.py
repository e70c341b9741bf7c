"""What a result depends on beside the flags: versions, devices, and the revision of the code."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "sacrebleu",
    "sentencepiece",
)


def environment() -> dict[str, Any]:
    """Return the versions, the device and the revision of the code that a result depends on."""
    import jax

    return {
        **versions(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "processors": os.cpu_count(),
        "machine": platform.platform(),
        "revision": _revision(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    packages = {package: metadata.version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), **packages}


def _revision() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None
