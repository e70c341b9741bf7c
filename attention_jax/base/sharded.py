"""The axes of arrays that an explicit mesh splits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec


def aligned(arguments: Sequence[Any], axes: Sequence[str], order: str) -> list[Any]:
    """Reshard arguments along the axes in `order` to match the sharded ones, as `vmap` requires.

    Only an explicit mesh shards; without one the arguments are returned as they are.
    """
    split: dict[str, Any] = {}
    for letters, argument in zip(axes, arguments, strict=True):
        for letter, part in zip(letters, _parts(argument), strict=False):
            if letter in order and part is not None:
                split.setdefault(letter, part)
    return [_resharded(*pair, split) for pair in zip(arguments, axes, strict=True)]


def is_sharded(letter: str, axes: Sequence[str], arguments: Sequence[Any]) -> bool:
    """Tell whether an explicit mesh axis splits this one: then no part of it can be taken out."""
    return any(
        letter in letters and _parts(argument)[letters.index(letter)] is not None
        for letters, argument in zip(axes, arguments, strict=True)
    )


def _resharded(argument: Any, letters: str, split: dict[str, Any]) -> Any:
    parts = _parts(argument)
    wanted = [
        part if part is not None else split.get(letter)
        for letter, part in zip(letters.ljust(len(parts)), parts, strict=False)
    ]
    return jax.reshard(argument, PartitionSpec(*wanted)) if wanted != parts else argument


def _parts(argument: Any) -> list[Any]:
    """Return for each axis the axes of an explicit mesh that split it, or None."""
    return list(jax.typeof(argument).sharding.spec)
