"""Attention over a mesh axis that splits the sequence of queries and keys."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from attention_jax import attention
from attention_jax.base.placement import Where, is_on_cpu
from attention_jax.base.trees import flattened
from attention_jax.implementations import choice, constants, programs
from attention_jax.implementations.head import SAVED, Attended
from attention_jax.masks import as_mask
from attention_jax.normalizers import softmax
from attention_jax.operands import Operand, heads, operands
from attention_jax.parallel import methods
from attention_jax.parallel.parts import Parts
from attention_jax.parallel.placement import Axis, Order, Placement, orders_of
from attention_jax.request import Request
from attention_jax.scores import scaled_dot

Array = jax.Array

_DEFAULTS = {
    "score": scaled_dot,
    "mask": None,
    "bias": None,
    "normalizer": softmax,
    "dropout_rate": 0.0,
    "dropout_key": None,
    "tile_sizes": None,
    "return_logsumexp": False,
}
"""The options of `attend` that hold for a split sequence too."""


def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    axis: str,
    method: str | None = None,
    order: Order | tuple[Order, Order] = None,
    mesh: Mesh | None = None,
    **options: Any,
) -> Any:
    r"""Attention of `attention_jax.attend`, its sequence split over a mesh axis.

    The result is that of one device: context_i = sum_j normalizer(score(q_i, k_j) + bias_ij)_j v_j
    over all keys j, with every derivative. Each of the D devices of the axis holds the d-th part
    of the queries, keys and values, and of the result. Other axes of the mesh stay as they are:
    examples and heads may be split over them.

    Masks, scores, biases and dropout are asked at positions in the whole sequence. `order`
    says which row is stored where: row i of query, key, value and context is position `order[i]`.
    `parallel.deal` makes an order that gives all devices the same work. Arrays for mask and bias,
    segments and lengths are in the order of positions, whatever `order` is.

    Args:
      query: [B, T, N, Hq].
      key: [B, S, K, Hk].
      value: [B, S, K, V].
      axis: the mesh axis; D divides T and S. Within `shard_map` over this axis the three arrays
        are the parts of this device; else they are whole.
      method: "ring" sends keys and values around, those that a mask needs; "all_gather" gathers
        them first; "all_to_all" exchanges the sequence for heads and runs attention as on one
        device, K a multiple of D. A name is done or refused; None takes what moves least.
      order: [T], a permutation of positions, or one of queries and one of keys; None stores
        position i in row i. An array that is known while tracing lets tiles be left out then.
      mesh: None takes that of `jax.set_mesh`.
      **options: of `attend`: score, mask, bias, normalizer, dropout_rate, dropout_key,
        tile_sizes, return_logsumexp.

    Returns:
      Context [B, T, N, V]; with `return_logsumexp` an `Attended` with the log-sum-exp [B, T, N]
      over all keys.

    Raises:
      ShapeError: operands that do not fit each other, or that the devices do not divide.
      ValueError: no mesh, an axis that it lacks, something the method cannot do.
      TypeError: an argument of the wrong type, or one that is not known.

    Liu, Zaharia and Abbeel 2023 (ring attention); Brandon et al. 2023 (striped attention: an
    order that balances a causal mask); Jacobs et al. 2023 (DeepSpeed-Ulysses: heads for sequence).

    >>> from attention_jax import masks
    >>> mesh = jax.make_mesh((1,), ("sp",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> x = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    >>> context = attend(x, x, x, axis="sp", method="ring", mesh=mesh, mask=masks.Causal())
    >>> bool(jnp.allclose(context, attention.attend(x, x, x, mask=masks.Causal()), atol=1e-6))
    True
    """
    split, request = _split_of("parallel.attend", (query, key, value), (axis, mesh, order), options)
    split = dataclasses.replace(split, method=method)
    if 0 in request.pairs:
        attended = _of_nothing(request)
    elif split.has_tracer or programs.is_staged():
        attended = split(request)
    else:
        attended = programs.call(split, request)
    return attended if request.return_logsumexp else attended.context


def explain(
    query: Any,
    key: Any,
    value: Any,
    *,
    axis: str,
    method: str | None = None,
    order: Order | tuple[Order, Order] = None,
    mesh: Mesh | None = None,
    platform: str | None = None,
    **options: Any,
) -> methods.Split:
    """Tell what `attend` would run for the same arguments: the method, tiles, steps and bytes.

    Nothing is computed; the arrays may be `jax.ShapeDtypeStruct`. `platform` is "cpu", "gpu" or
    "tpu", that of this process unless given.

    Raises:
      ValueError: another platform; and as `attend`.

    >>> from attention_jax import masks
    >>> mesh = jax.sharding.AbstractMesh((4,), ("sp",))
    >>> x = jax.ShapeDtypeStruct((1, 4096, 2, 64), "float32")
    >>> print(explain(x, x, x, axis="sp", mesh=mesh, mask=masks.Window(512, 0)))
    ring: 4 devices, at most 4 tiles of 512 x 512 on one, 1.067 times the mean
    1 transfers, at most 1 MiB received forward
    """
    mask = constants.with_constants(as_mask(options.get("mask")))
    platform = choice.known_platform(platform)
    explained = functools.partial(_explained, (axis, mesh, order), (method, platform), options)
    return jax.eval_shape(*flattened(explained, mask, query, key, value))


def _explained(
    where: tuple[Any, Any, Any],
    how: tuple[str | None, str],
    options: dict[str, Any],
    mask: Any,
    *arrays: Any,
) -> methods.Split:
    options = options | {"mask": constants.without_constants(mask)}
    split, request = _split_of("parallel.explain", arrays, where, options)
    return methods.choose(request, split.placement(request), *how).split


def _of_nothing(request: Request) -> Attended:
    """Return what attention is without queries or without keys."""
    names = [field.name for field in dataclasses.fields(request)[3:-2]]
    options = {name: getattr(request, name) for name in names}
    found = attention.attend(request.query, request.key, request.value, **options)
    return found if request.return_logsumexp else Attended(found)


def _split_of(
    operation: str, arrays: Any, where: tuple[Any, Any, Any], options: dict[str, Any]
) -> tuple[_Split, Request]:
    """Check all arguments but the method."""
    unknown = sorted(set(options) - set(_DEFAULTS))
    if unknown:
        raise TypeError(
            f"{operation}: {', '.join(unknown)} cannot be given for a split sequence; it takes "
            f"{', '.join(_DEFAULTS)}."
        )
    name, mesh, order = where
    axis = Axis.of(operation, name, mesh)
    fixed = {"implementation": None, "return_weights": False}
    request = Request.of(*arrays, **(_DEFAULTS | options), **fixed)
    sizes = request.sizes
    if axis.is_manual:
        lengths = sizes["T"] * axis.devices, sizes["S"] * axis.devices
        request = dataclasses.replace(request, lengths=lengths)
    else:
        for letter in "TS":
            axis.share(operation, letter, sizes[letter])
    orders = orders_of(operation, order, request.pairs)
    orders = [constants.Constant.of(x) if isinstance(x, np.ndarray) else x for x in orders]
    return _Split(axis, None, (orders[0], orders[1])), request


@dataclasses.dataclass(frozen=True)
class _Split:
    """Attention of a request whose sequence is split; equal ones are one program."""

    axis: Axis
    method: str | None
    orders: tuple[Any, Any]

    @property
    def has_tracer(self) -> bool:
        """Whether an order is known only at run time."""
        return any(isinstance(order, jax.core.Tracer) for order in self.orders)

    def placement(self, request: Request) -> Placement:
        """Return who holds which positions."""
        known = (x.array if isinstance(x, constants.Constant) else x for x in self.orders)
        first, second = known
        return Placement(self.axis, request.pairs, (first, second))

    def __call__(self, request: Request, where: Where | None = None) -> Attended:
        platform = self.axis.platform or (where and where.platform)
        if self.axis.is_manual:
            return self.on_device(request, platform)
        # As a program of its own, score and mask may close over values under differentiation.
        run = jax.jit(functools.partial(self.on_all, request, platform))
        return run(request.query, request.key, request.value)

    def on_all(self, request: Request, platform: str | None, *arrays: Array) -> Attended:
        """Attend on all devices, from whole arrays."""
        names = ("query", "key", "value")
        request = dataclasses.replace(request, **dict(zip(names, arrays, strict=True)))
        parts, given, choices = self.prepared(request, platform)
        orders = parts.placement.orders
        is_by_heads = choices[0].split.method == "all_to_all"
        if not is_by_heads:
            given["bias"] = _with_rows(given["bias"], orders[0])
        specs = {name: self.specs(name, part, is_by_heads) for name, part in given.items()}
        rows = PartitionSpec(None, self.axis.name)
        # Were it checked what varies, the sums of gradients over devices would be inserted where a
        # parameter is used, in branches that only some devices take; so they come at the end.
        run = jax.shard_map(
            functools.partial(_of_part, parts, given, choices),
            mesh=self.axis.mesh,
            in_specs=(specs, PartitionSpec()),
            out_specs=[rows] * (1 + request.return_logsumexp),
            axis_names={self.axis.name},
            check_vma=False,
        )
        over = functools.partial(_over, self.axis.name)
        leaves = {name: [*map(over, given[name].leaves, specs[name])] for name in given}
        found = run(leaves, orders)
        return _attended(request, found)

    def on_device(self, request: Request, platform: str | None) -> Attended:
        """Attend from the parts of this device."""
        parts, given, choices = self.prepared(request, platform)
        device = lax.axis_index(self.axis.name)
        if choices[0].split.method == "all_to_all":
            part = functools.partial(_heads_of, device, self.axis.devices)
            given = {name: part(operand) for name, operand in given.items()}
        else:
            given["bias"] = _with_rows(given["bias"], parts.placement.positions(0, device))
        leaves = {name: operand.leaves for name, operand in given.items()}
        found = _of_part(parts, given, choices, leaves, parts.placement.orders)
        return _attended(request, found)

    def prepared(
        self, request: Request, platform: str | None
    ) -> tuple[Parts, dict[str, Operand], list[methods.Choice]]:
        """Check the operands, and choose a method: for CPUs and for others, or one for both."""
        placement = self.placement(request)
        choices = methods.by_platform(request, placement, self.method, platform)
        travels = request.key.dtype, request.value.dtype
        parts = Parts(
            placement, heads(request), travels, request.return_logsumexp, request.products
        )
        return parts, operands(request), choices

    def specs(self, name: str, operand: Operand, is_by_heads: bool) -> list[PartitionSpec]:
        """Say which axis of each leaf is split: rows, or heads where these are exchanged."""
        found = []
        for leaf, letters in zip(operand.leaves, operand.axes, strict=True):
            split = None
            if name in ("query", "key", "value"):
                split = 1
            elif is_by_heads and "K" in letters:
                split = letters.index("K")
            elif not is_by_heads and _has_rows(operand, leaf, name):
                split = len(letters)
            before = [] if split is None else [None] * split + [self.axis.name]
            found.append(PartitionSpec(*before))
        return found


def _over(axis: str, leaf: Any, spec: PartitionSpec) -> Any:
    """Split an array over an explicit axis that does not split it; automatic axes need no help."""
    held = jax.typeof(leaf).sharding
    types = dict(zip(held.mesh.axis_names, held.mesh.axis_types, strict=True))
    places = [*held.spec, *[None] * (leaf.ndim - len(held.spec))]
    if axis not in spec or types.get(axis) != AxisType.Explicit or places[spec.index(axis)]:
        return leaf
    places[spec.index(axis)] = axis
    return jax.sharding.reshard(leaf, PartitionSpec(*places))


def _has_rows(operand: Operand, leaf: Any, name: str) -> bool:
    """Tell whether this is an array for a bias, with rows of its own for each query."""
    is_array = name == "bias" and operand.structure == jax.tree.structure(0)
    return is_array and leaf.shape[-2] > 1


def _with_rows(bias: Operand, positions: Any) -> Operand:
    """Take the rows of an array for a bias as queries are stored; [..., T, S]."""
    if positions is None or not bias.leaves or not _has_rows(bias, bias.leaves[0], "bias"):
        return bias
    return bias._replace(leaves=[jnp.take(bias.leaves[0], positions, axis=-2, mode="clip")])


def _heads_of(device: Array, devices: int, operand: Operand) -> Operand:
    """Take the heads of a device, where an operand differs between heads."""
    leaves = []
    for leaf, letters in zip(operand.leaves, operand.axes, strict=True):
        if "K" in letters and not set("TS") & set(letters):
            at = letters.index("K")
            share = leaf.shape[at] // devices
            leaf = lax.dynamic_slice_in_dim(leaf, device * share, share, at)
        leaves.append(leaf)
    return operand._replace(leaves=leaves)


def _of_part(
    parts: Parts,
    given: dict[str, Operand],
    choices: list[methods.Choice],
    leaves: dict[str, list[Any]],
    orders: tuple[Any, Any],
) -> list[Array]:
    """Attend on one device; context and, if asked for, log-sum-exp."""
    ways = [functools.partial(_as_chosen, parts, given, chosen) for chosen in choices]
    if len(ways) == 1:
        return ways[0](leaves, orders)
    # Computed again for the derivative, the condition is a constant there too.
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED)
    either = functools.partial(_either, ways)
    return jax.checkpoint(either, policy=policy, prevent_cse=False)(leaves, orders)


def _either(ways: list[Any], leaves: dict[str, list[Any]], orders: tuple[Any, Any]) -> list[Array]:
    """Attend in the first way where the program is lowered for a CPU, else in the second."""
    near = leaves["query"][0]
    return lax.cond(is_on_cpu(near), *ways, leaves, orders)


def _as_chosen(
    parts: Parts,
    given: dict[str, Operand],
    chosen: methods.Choice,
    leaves: dict[str, list[Any]],
    orders: tuple[Any, Any],
) -> list[Array]:
    """Attend by a method, in tiles of a size."""
    given = {name: part._replace(leaves=leaves[name]) for name, part in given.items()}
    run = parts.by_heads if chosen.split.method == "all_to_all" else parts.by_steps
    found = run(given, orders, chosen.plan, chosen.platform)
    return [found.context] if found.logsumexp is None else [found.context, found.logsumexp]


def _attended(request: Request, found: list[Array]) -> Attended:
    """Join the axes K and G to N."""
    context, *logsumexp = (
        x.reshape(*x.shape[:2], request.sizes["N"], *x.shape[2 + len(heads(request)) :])
        for x in found
    )
    context = context.astype(request.value.dtype)
    return Attended(context, logsumexp=logsumexp[0] if logsumexp else None)
