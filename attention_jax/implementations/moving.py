"""The leaves of a pytree that have a tangent, in the rule of a custom derivative."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
from jax.custom_derivatives import SymbolicZero

Array = jax.Array


def is_symbolic_zero(tangent: Any) -> bool:
    """Tell whether a tangent stands for zeros."""
    return isinstance(tangent, SymbolicZero)


@dataclasses.dataclass(frozen=True, eq=False)
class Moving:
    """A pytree, and the tangents of its leaves; None for a leaf that does not move."""

    leaves: list[Any]
    tangents: list[Array | None]
    structure: Any

    @classmethod
    def of(cls, tree: Any, tangents: Any) -> Self:
        """Return a pytree with the tangents that the rule of a custom derivative was given."""
        leaves, structure = jax.tree.flatten(tree)
        found = jax.tree.leaves(tangents, is_leaf=is_symbolic_zero)
        return cls(leaves, [None if is_symbolic_zero(x) else x for x in found], structure)

    @property
    def direction(self) -> list[Array]:
        """The tangents of what moves."""
        return [x for x in self.tangents if x is not None]

    @property
    def primal(self) -> list[Any]:
        """What moves."""
        both = zip(self.leaves, self.tangents, strict=True)
        return [leaf for leaf, tangent in both if tangent is not None]

    def moved(self, primal: list[Any]) -> Any:
        """Return the pytree with other leaves in place of those that move."""
        those, both = iter(primal), zip(self.leaves, self.tangents, strict=True)
        leaves = [leaf if tangent is None else next(those) for leaf, tangent in both]
        return jax.tree.unflatten(self.structure, leaves)
