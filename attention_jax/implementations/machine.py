"""How much fast memory there is, by which tiles and heads at once are chosen.

Only the speed of a program depends on it, and the order in which numbers are added up. It is
read once a process, so that programs for the same shapes stay the same.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re

import jax
import numpy as np

VECTOR_MEMORY = {
    "TPU v4": 2**24,
    "TPU v4 lite": 2**24,
    "TPU v5": 2**26,
    "TPU v5p": 2**26,
    "TPU v5 lite": 2**27,
    "TPU v5e": 2**27,
    "TPU v6 lite": 2**27,
    "TPU v6e": 2**27,
    "TPU7": 2**26,
    "TPU7x": 2**26,
}
"""Bytes of the vector memory of a core, by the kind of a TPU as JAX names it."""

NOT_KNOWN = 2**27
"""What is taken where no TPU is there to ask, as when a program is exported: that of a v5e or v6e.

With the least there is, heads would go one by one: 26 to 49% more cycles on a v5e.
"""

BYTES_A_PAIR = 16
"""Of vector memory: the logit in float32, the weight, and what both are made from."""

PAIRS_OF_GPU = 2**23
"""On a GPU tiles go through its level-2 cache or its memory, however few; these keep it busy."""

CACHES = pathlib.Path("/sys/devices/system/cpu")

LEVEL_2 = 2**20
"""Bytes of the level-2 cache of a core, where the system does not tell."""

LEAST_PAIRS, MOST_PAIRS = 2**18, 2**21
"""Bounds of `pairs_of_cpu`: one large tile, and a visit that is as fast as larger ones."""


def pairs_at_once(platform: str) -> int:
    """Return of how many pairs the tiles may be that an accelerator computes at once.

    >>> pairs_at_once("gpu")
    8388608
    """
    return vector_memory() // BYTES_A_PAIR if platform == "tpu" else PAIRS_OF_GPU


def vector_memory() -> int:
    """Return the bytes of vector memory of the TPUs of this process, if it has any."""
    if jax.default_backend() != "tpu":
        return NOT_KNOWN
    least = min(VECTOR_MEMORY.values())
    return min(VECTOR_MEMORY.get(device.device_kind, least) for device in jax.devices())


def pairs_of_cpu() -> int:
    """Return of how many pairs tiles are that are visited together: a power of two.

    Their logits, in float32, fill the level-2 caches of all cores, each of which computes a part
    of the rows. So a core reads from its own cache what it has written there, and the products of
    a visit are as large as they can be: on many cores a small one takes as long to hand out as to
    compute.
    """
    return pairs_of(_cores(), level_2(CACHES))


def pairs_of(cores: int, cache: int) -> int:
    """Return the same for so many cores with caches of so many bytes.

    >>> pairs_of(cores=2, cache=2**21)
    1048576
    """
    pairs = np.clip(cores * cache // np.dtype(np.float32).itemsize, LEAST_PAIRS, MOST_PAIRS)
    return 2 ** int(np.log2(pairs))


@functools.cache
def _cores() -> int:
    """Return how many cores this process may use, as XLA counts its threads."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def level_2(folder: pathlib.Path) -> int:
    """Read the level-2 cache of a core as Linux tells it: its size over the cores that share it."""
    for cache in sorted(folder.glob("cpu0/cache/index*")):
        try:
            level, size, shared = (
                (cache / name).read_text(encoding="ascii").strip()
                for name in ("level", "size", "shared_cpu_map")
            )
            sharing = int(shared.replace(",", ""), 16).bit_count()
        except (OSError, ValueError):
            continue
        found = re.fullmatch(r"(\d+)([KM])", size)
        if level == "2" and found and sharing:
            return int(found[1]) * {"K": 2**10, "M": 2**20}[found[2]] // sharing
    return LEVEL_2
