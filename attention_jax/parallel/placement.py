"""Where the positions of a sequence are: which device of a mesh axis holds which of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from attention_jax.base import checks
from attention_jax.masks.intervals import indices

Array = jax.Array

Order = np.ndarray | jax.Array | None
"""The position of each row as it is stored, [T]; None where row i is position i."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """A mesh axis that splits the sequence.

    `is_manual` says that the caller is inside `shard_map` over it, with a part of each array.
    """

    name: str
    mesh: Any
    is_manual: bool

    @classmethod
    def of(cls, operation: str, name: Any, mesh: Any) -> Axis:
        """Find an axis in a mesh, or in the one of `jax.set_mesh`.

        Raises:
          ValueError: there is no mesh, or it has no such axis.
        """
        current = jax.sharding.get_abstract_mesh()
        is_manual = name in current.manual_axes
        if mesh is None or is_manual:
            mesh = current
        if mesh.empty:
            raise ValueError(
                f"{operation}: no mesh is set; call it within jax.set_mesh(mesh), or give mesh=."
            )
        if name not in mesh.axis_names:
            has = ", ".join(f"{axis!r} of {size}" for axis, size in mesh.shape.items())
            raise ValueError(
                f"{operation}: axis must be one of the mesh, which has {has}; got {name!r}."
            )
        return cls(name, mesh, is_manual)

    @property
    def platform(self) -> str | None:
        """The platform of the devices; None where they are CPUs, as programs for others have too.

        Also None for a mesh without devices.
        """
        if not isinstance(self.mesh, Mesh):
            return None
        platform = self.mesh.devices.flat[0].platform
        return None if platform == "cpu" else platform

    @property
    def devices(self) -> int:
        """How many parts the sequence is split into, D."""
        return self.mesh.shape[self.name]

    def share(self, operation: str, letter: str, length: int) -> int:
        """Return how many of `length` positions a device holds.

        Raises:
          ShapeError: the devices do not divide them.
        """
        if length % self.devices:
            what = {"T": "queries", "S": "keys"}[letter]
            padded = -(-length // self.devices) * self.devices
            raise checks.ShapeError(
                f"{operation}: the {self.devices} devices of axis {self.name!r} must divide the "
                f"{what} {letter}, got {letter} = {length}; pad them to {padded}, and keep the "
                "padding from being attended to, as masks.Lengths does."
            )
        return length // self.devices


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """The order in which queries and keys are dealt to devices in equal parts.

    Attributes:
      axis: the mesh axis.
      lengths: of the whole sequences, [T, S].
      orders: the order of queries and that of keys.
    """

    axis: Axis
    lengths: tuple[int, int]
    orders: tuple[Order, Order]

    @property
    def shares(self) -> tuple[int, int]:
        """How many queries and how many keys a device holds."""
        query_length, key_length = self.lengths
        return query_length // self.axis.devices, key_length // self.axis.devices

    def known(self, side: int) -> np.ndarray | None:
        """Return the positions of queries (0) or keys (1) by device, [D, T / D], where known."""
        order = self.orders[side]
        if order is None:
            order = np.arange(self.lengths[side], dtype=np.int32)
        return order.reshape(self.axis.devices, -1) if isinstance(order, np.ndarray) else None

    def positions(self, side: int, device: Any) -> Array:
        """Return the positions of the queries (0) or keys (1) of a device."""
        order, share = self.orders[side], self.shares[side]
        start = jnp.asarray(device, jnp.int32) * share
        if order is None:
            return start + indices(share)
        return lax.dynamic_slice_in_dim(
            jnp.asarray(order), start, share, allow_negative_indices=False
        )

    def all_positions(self, side: int) -> Array:
        """Return the positions of all rows as they are stored, [T] or [S]."""
        order = self.orders[side]
        return indices(self.lengths[side]) if order is None else jnp.asarray(order)


def orders_of(operation: str, order: Any, lengths: tuple[int, int]) -> tuple[Order, Order]:
    """Check an order, or one of the queries and one of the keys; concrete ones become NumPy.

    Raises:
      ShapeError: an order that is no permutation of the positions, or of the wrong length.
    """
    if not isinstance(order, tuple):
        if order is not None and lengths[0] != lengths[1]:
            raise checks.ShapeError(
                f"{operation}: order is one of queries and keys alike, and there are T = "
                f"{lengths[0]} queries and S = {lengths[1]} keys; give a pair, with None for rows "
                "that are stored in order."
            )
        order = order, order
    if len(order) != 2:
        raise checks.ShapeError(
            f"{operation}: order must be one array or a pair, of queries and keys; got a tuple of "
            f"{len(order)}."
        )
    first = _checked(operation, order[0], lengths[0])
    return first, first if order[1] is order[0] else _checked(operation, order[1], lengths[1])


def _checked(operation: str, order: Any, length: int) -> Order:
    if order is None:
        return None
    is_known = not isinstance(order, jax.core.Tracer)
    order = np.asarray(order) if is_known else order
    if order.shape != (length,) or not jnp.issubdtype(order.dtype, jnp.integer):
        raise checks.ShapeError(
            f"{operation}: order must be {length} integers, the position of each row as it is "
            f"stored; got {order.dtype} of shape {order.shape}."
        )
    if is_known and not np.array_equal(np.sort(order), np.arange(length)):
        raise checks.ShapeError(
            f"{operation}: order must hold each position from 0 to {length - 1} once; make it with "
            "parallel.deal."
        )
    return order.astype(np.int32)
