"""Split pytrees by what can be differentiated, convert closures, and match mesh axes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun


@jax.tree_util.register_pytree_node_class
class Rest:
    """What is left of a pytree without its floating-point leaves."""

    def __init__(self, leaves: list[Any], is_float: tuple[bool, ...], structure: Any):
        self.leaves, self.is_float, self.structure = leaves, is_float, structure

    def tree_flatten(self) -> tuple[tuple[list[Any]], tuple[Any, Any]]:
        return (self.leaves,), (self.is_float, self.structure)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, Any], children: tuple[list[Any]]) -> Rest:
        return cls(*children, *static)


def split_floats(tree: Any) -> tuple[list[Any], Rest]:
    """Split a pytree into its floating-point leaves and the rest.

    >>> floats, rest = split_floats({"weight": 1.5, "table": 2})
    >>> floats, merge_floats([2.5], rest)
    ([1.5], {'table': 2, 'weight': 2.5})
    """
    leaves, structure = jax.tree.flatten(tree)
    is_float = tuple(jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves)
    floats = [leaf for leaf, floating in zip(leaves, is_float, strict=True) if floating]
    others = [leaf for leaf, floating in zip(leaves, is_float, strict=True) if not floating]
    return floats, Rest(others, is_float, structure)


def merge_floats(floats: list[Any], rest: Rest) -> Any:
    """Put floating-point leaves back where `split_floats` took them from."""
    first, second = iter(floats), iter(rest.leaves)
    leaves = [next(first) if floating else next(second) for floating in rest.is_float]
    return jax.tree.unflatten(rest.structure, leaves)


def flattened(function: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    """Return a function of the leaves of arguments, and these leaves.

    JAX keeps the structures of the arguments of what it traces, and with them the functions in
    such structures and all that these close over; those of leaves hold nothing.

    >>> jax.eval_shape(*flattened(lambda pair: pair["first"], {"first": jnp.ones(3)})).shape
    (3,)
    """
    leaves, structure = jax.tree.flatten(arguments)
    return functools.partial(_of_leaves, function, structure), *leaves


def _of_leaves(function: Callable[..., Any], structure: Any, *leaves: Any) -> Any:
    return function(*jax.tree.unflatten(structure, leaves))


def hoisted(function: Callable[..., Any], *examples: Any) -> tuple[Callable[..., Any], list[Any]]:
    """Make the arrays that a function closes over its last arguments; return it and the arrays.

    `jax.closure_convert` leaves traced integers inside, where they would outlive their trace in
    the rule of a custom derivative. The arguments are to be shaped as the examples.

    >>> table = jnp.arange(4)
    >>> look_up, values = hoisted(lambda index: table[index], jnp.int32(0))
    >>> look_up(jnp.int32(3), *values)
    Array(3, dtype=int32)
    """
    flat, *leaves = flattened(function, *examples)
    closed, shape = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    result = jax.tree.structure(shape)
    return functools.partial(_evaluate, closed.jaxpr, result, len(examples)), closed.consts


def _evaluate(jaxpr: Any, result: Any, number: int, *arguments: Any) -> Any:
    """Evaluate a jaxpr on its own first `number` arguments and the values it closes over."""
    own, values = jax.tree.leaves(arguments[:number]), list(arguments[number:])
    return jax.tree.unflatten(result, jaxpr_as_fun(ClosedJaxpr(jaxpr, values))(*own))


def varying_like(tree: Any, *like: Any) -> Any:
    """Let arrays vary over the mesh axes that others vary over; no change outside `shard_map`.

    A sum that starts from zeros must be of the type of what is added to it.
    """
    return varying_over(mesh_axes(like), tree)


def mesh_axes(tree: Any) -> frozenset[str]:
    """Return the mesh axes that arrays vary over; none outside `shard_map`."""
    return frozenset().union(*(_mesh_axes(leaf) for leaf in jax.tree.leaves(tree)))


def varying_over(axes: frozenset[str], tree: Any) -> Any:
    """Let arrays vary over mesh axes."""

    def vary(leaf: Any) -> Any:
        missing = tuple(axes - _mesh_axes(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, tree)


def _mesh_axes(leaf: Any) -> frozenset[str]:
    return jax.typeof(leaf).manual_axis_type.varying
