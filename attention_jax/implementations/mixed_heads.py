"""All heads of an example, which maps mix: their operands, and what each head has of its own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.head_maps import group_of
from attention_jax.implementations.head import kept
from attention_jax.operands import Operand

Array = jax.Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["leaves"], meta_fields=["axes", "build"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class OfHeads:
    """An operand of all heads: its arrays, of which each head has its own where the axis is 0.

    `build` makes of the arrays of one head what an implementation is given.
    """

    leaves: list[Any]
    axes: tuple[int | None, ...]
    build: Callable[[Sequence[Any]], Any]

    @classmethod
    def of(cls, operand: Operand, leaves: Sequence[Any]) -> OfHeads:
        """Return an operand of one example, whose arrays are `leaves`."""
        axes = tuple(0 if "N" in letters else None for letters in operand.axes)
        return cls(list(leaves), axes, functools.partial(_built, operand.structure, operand.finish))

    @classmethod
    def of_each(cls, operand: Operand, leaves: Sequence[Any]) -> dict[str, OfHeads]:
        """Return each entry of an operand that is a dict, whose arrays are `leaves`."""
        parts, rest = operand.entries(), iter(leaves)
        return {
            name: cls.of(part, [next(rest) for _ in part.leaves]) for name, part in parts.items()
        }

    @property
    def differs(self) -> bool:
        """Whether heads have arrays of their own."""
        return 0 in self.axes

    def then(self, change: Callable[[Any], Any]) -> OfHeads:
        """Return the operand changed, whatever head it is of."""
        return dataclasses.replace(self, build=functools.partial(_changed, self.build, change))

    def map(self, use: Callable[..., Any], *arguments: Any, axes: Sequence[Any] = ()) -> Any:
        """Return use(operand, *arguments) of every head; of one where nothing differs.

        `axes` are those of the heads in the arguments, the first unless given.
        """
        axes = tuple(axes) or (0,) * len(arguments)
        if not self.differs and all(axis is None for axis in axes):
            return use(self.build(self.leaves), *arguments)
        of_one = functools.partial(_used, self.build, use)
        return jax.vmap(of_one, in_axes=([*self.axes], *axes))(self.leaves, *arguments)


class Heads(NamedTuple):
    """The operands of all heads of an example, and the maps between heads.

    query [N, T, Hq], key [K, S, Hk], value [L, S, V]. `bias` is None, an array that broadcasts to
    [N, T, S], or a function of each head; `dropout` is None, or the words of each head and the
    rate. The two maps are bound functions, or None. `statistics` are those that are asked for.
    """

    query: Array
    key: Array
    value: Array
    score: OfHeads
    mask: OfHeads
    bias: OfHeads | Array | None
    normalizer: OfHeads
    dropout: OfHeads | None
    mix_logits: Any
    mix_weights: Any
    statistics: dict[str, OfHeads]

    @classmethod
    def of(cls, given: dict[str, Operand], leaves: Sequence[Any]) -> Heads:
        """Return the operands of an example, whose arrays are `leaves`, rows before heads."""
        those = iter(leaves)
        arrays = {name: [next(those) for _ in operand.leaves] for name, operand in given.items()}
        built = {name: OfHeads.of(operand, arrays[name]) for name, operand in given.items()}
        rows = {name: jnp.moveaxis(arrays[name][0], 1, 0) for name in ("query", "key", "value")}
        maps = {name: built[name].build(arrays[name]) for name in ("mix_logits", "mix_weights")}
        bias: Any = built["bias"]
        if not arrays["bias"]:
            bias = bias if callable(bias.build([])) else None
        elif not callable(bias.build(arrays["bias"])):
            (array,) = arrays["bias"]
            bias = array if bias.differs else array[None]
        dropout = built["dropout"] if arrays["dropout"] else None
        statistics = {}
        if "statistics" in given:
            statistics = OfHeads.of_each(given["statistics"], arrays["statistics"])
        rest = {"bias": bias, "dropout": dropout, "statistics": statistics}
        return cls(**{**built, **rows, **maps, **rest})


def repeated(rows: Array, times: int) -> Array:
    """Return rows of heads [K, ...] for every head that shares them, [N, ...]."""
    return rows if times == 1 else jnp.repeat(rows, times, axis=0)


def allowed_of(mask: OfHeads, q_idx: Array, kv_idx: Array) -> Array:
    """Return what each head may attend to, [N, T, S], or all alike, [1, T, S]."""
    allowed = mask.map(_of_pairs, q_idx, kv_idx, axes=(None, None))
    return allowed if mask.differs else allowed[None]


def attendable_of(allowed: Array, head_map: Any, number: int) -> Array:
    """Return what each of so many heads of the context may attend to, of `allowed` [1 or M, T, S].

    A map of weights lets a head attend to what any head that it hears may attend to: one of its
    group, or any one where no groups are known.
    """
    if head_map is None or len(allowed) == 1:
        return allowed
    group = group_of(head_map) or len(allowed)
    found = jnp.any(allowed.reshape(-1, group, *allowed.shape[1:]), axis=1)
    return found if len(found) == 1 else repeated(found, number // len(found))


def bias_of(bias: OfHeads | Array | None, dtype: Any, q_idx: Array, kv_idx: Array) -> Any:
    """Return the bias of each head, or of all alike, as it broadcasts to [N, T, S]."""
    if isinstance(bias, OfHeads):
        found = bias.map(_of_pairs, q_idx, kv_idx, axes=(None, None))
        return jnp.asarray(found if bias.differs else found[None], dtype)
    return 0.0 if bias is None else jnp.asarray(bias, dtype)


def kept_of(dropout: OfHeads, q_idx: Array, kv_idx: Array, dtype: Any) -> Array:
    """Return the factors of the weights of each head after dropout, [N, T, S]."""
    use = functools.partial(_kept, dtype=dtype)
    return dropout.map(use, q_idx, kv_idx, axes=(None, None))


def _of_pairs(function: Any, q_idx: Array, kv_idx: Array) -> Array:
    """Return what a mask or a bias says of every pair."""
    shape = jnp.broadcast_shapes(q_idx.shape, kv_idx.shape)
    return jnp.broadcast_to(function(q_idx, kv_idx), shape)


def _kept(dropout: Any, q_idx: Array, kv_idx: Array, dtype: Any) -> Array:
    return kept(dropout, q_idx, kv_idx, dtype)


def _built(structure: Any, finish: Callable[[Any], Any], leaves: Sequence[Any]) -> Any:
    return finish(jax.tree.unflatten(structure, leaves))


def _changed(build: Any, change: Any, leaves: Sequence[Any]) -> Any:
    return change(build(leaves))


def _used(build: Any, use: Any, leaves: Sequence[Any], *arguments: Any) -> Any:
    return use(build(leaves), *arguments)
