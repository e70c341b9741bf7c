"""What is known of a map across heads: the neighbours that it looks at, and which heads meet."""

from __future__ import annotations

from typing import Any, NamedTuple

from attention_jax.base.binding import Sliced, ask

__all__ = ["NO_HALO", "Halo", "group_of", "halo_of"]


class Halo(NamedTuple):
    """How many neighbours a map looks at, before and after, along queries and along keys.

    Of a tile [T, S] it is given [M, before + T + after, before + S + after] and returns [N, T, S].

    >>> Halo(queries=(2, 0)) + Halo(queries=(1, 0), keys=(3, 3))
    Halo(queries=(3, 0), keys=(3, 3))
    """

    queries: tuple[int, int] = (0, 0)
    keys: tuple[int, int] = (0, 0)

    def __add__(self, other: Any) -> Halo:
        """Return the halo of two maps, one after the other."""
        pairs = zip(self, other, strict=True)
        return Halo(*((one[0] + two[0], one[1] + two[1]) for one, two in pairs))

    @property
    def padding(self) -> tuple[tuple[int, int], ...]:
        """What to pad [M, T, S] with, for all pairs to have neighbours."""
        return ((0, 0), self.queries, self.keys)

    def inside(self, shape: tuple[int, ...]) -> tuple[Any, ...]:
        """Return the slices of an array [..., T, S] that leave the halo out."""
        pairs = zip(self, shape[-2:], strict=True)
        return (..., *(slice(before, size - after) for (before, after), size in pairs))


NO_HALO = Halo()
"""That of a map in which each pair stands alone."""


def halo_of(head_map: Any) -> Halo:
    """Return the halo that a map declares by the rule "halo" of its parameters; else none.

    >>> from attention_jax import bind, head_maps
    >>> import jax.numpy as jnp
    >>> halo_of(bind(head_maps.neighbours, kernel=jnp.ones((4, 3, 5))))
    Halo(queries=(2, 0), keys=(2, 2))
    """
    head_map = head_map.of_first if isinstance(head_map, Sliced) else head_map
    return NO_HALO if head_map is None else ask(head_map, "halo") or NO_HALO


def group_of(head_map: Any) -> int | None:
    """Return how many heads of a linear map form a group, or None where that is not known.

    A map says so by the rule "group" of its parameters: it is linear, has no halo, and the n-th of
    as many equal runs of its results as there are groups follows from the n-th group alone.

    >>> from attention_jax import bind, head_maps
    >>> group_of(bind(head_maps.difference, scale=0.5))
    2
    """
    head_map = head_map.of_first if isinstance(head_map, Sliced) else head_map
    return ask(head_map, "group")
