"""From features to heads and back: the options and the computation that the Flax layers share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import initializers as standard

from attention_jax.base import checks
from attention_jax.base.parameters import Initializer, Learned
from attention_jax.base.typing import at_least_float32
from attention_jax.masks.intervals import indices

Array = jax.Array
Learnable = Callable[..., Any] | Learned
"""A score, bias or normalizer whose declared parameters a module creates, if it has any."""
Position = Callable[[Array, Array], Array]
"""`position(x [T, H], positions [T]) -> [T, H]`, applied to queries and keys, such as `rotary`."""


class HeadSizes(NamedTuple):
    """N query heads and K key heads, their depths Hq, Hk and V, and the features outside."""

    num_heads: int
    num_key_heads: int
    query_depth: int
    key_depth: int
    value_depth: int
    in_features: int
    memory_features: int
    out_features: int
    num_value_heads: int
    num_context_heads: int


class LinearShape(NamedTuple):
    """The axes that a projection contracts and those that it returns; where the former are."""

    inputs: int | tuple[int, ...]
    outputs: int | tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    use_bias: bool = True


@dataclasses.dataclass
class HeadOptions:
    """The options that every multi-head layer has; they are fields of the Linen modules.

    Args:
      num_heads: N.
      in_features: D of the queries' input.
      memory_features: D of the input of keys and values; `in_features` unless given.
      out_features: of the result; `in_features` unless given.
      num_key_heads: K, a divisor of N (grouped-query; 1 is multi-query); N unless given.
      num_value_heads: heads of values, where `mix_weights` changes their number; K unless given.
      num_context_heads: heads of the context, as `mix_weights` returns them; N unless given.
      query_depth: Hq; in_features / N unless given.
      key_depth: Hk; Hq unless given. Another depth needs a score for two depths.
      value_depth: V; Hq unless given.
      position: `position(x [T, H], positions [T])` applied to queries and keys (rotary).
      qk_norm: Flax's `RMSNorm` or `LayerNorm`, applied to the depth of queries and of keys.
      joint_qk_norm: the norm is over all heads' features together, not over those of each head.
      context_norm: likewise, applied to the context of each head before W^O.
      context_scale: multiplies the normed context.
      share_query_key: one projection for query and key.
      projections: False attends to the input as it is, cut into heads: X X^T.
      combine: "concat" or "sum" of the heads.
      use_bias: of the four projections, or by their names query, key, value and out; those
        left out have one.
      kernel_init: of the four projections.
      bias_init: of the four projections.
      dtype: of the computation; that of inputs and parameters unless given.
      param_dtype: of the parameters.
    """

    num_heads: int
    in_features: int
    _: dataclasses.KW_ONLY
    memory_features: int | None = None
    out_features: int | None = None
    num_key_heads: int | None = None
    num_value_heads: int | None = None
    num_context_heads: int | None = None
    query_depth: int | None = None
    key_depth: int | None = None
    value_depth: int | None = None
    position: Position | None = None
    qk_norm: Callable[..., Any] | None = None
    joint_qk_norm: bool = False
    context_norm: Callable[..., Any] | None = None
    context_scale: float = 1.0
    share_query_key: bool = False
    projections: bool = True
    combine: str = "concat"
    use_bias: bool | Mapping[str, bool] = True
    kernel_init: Initializer = standard.glorot_uniform()  # noqa: RUF009
    bias_init: Initializer = standard.zeros
    dtype: Any = None
    param_dtype: Any = jnp.float32


def head_sizes(operation: str, options: HeadOptions) -> HeadSizes:
    """Complete the sizes of a layer, and check that its options fit each other.

    Raises:
      ValueError: heads that do not divide, a size below 1, or options that exclude each other.
    """
    if options.joint_qk_norm and options.qk_norm is None:
        raise ValueError(f"{operation}: joint_qk_norm needs a norm; give qk_norm.")
    if options.combine not in ("concat", "sum"):
        raise ValueError(
            f"{operation}: combine must be 'concat' or 'sum', got {options.combine!r}."
        )
    checks.sizes(operation, **{name: getattr(options, name) for name in HeadSizes._fields})
    num_heads, in_features = options.num_heads, options.in_features
    num_key_heads = _or(options.num_key_heads, num_heads)
    memory_features = _or(options.memory_features, in_features)
    checks.multiple(operation, "num_heads", num_heads, "num_key_heads", num_key_heads)
    if not options.projections:
        depths = _depths_of_inputs(operation, options, num_key_heads, memory_features)
    else:
        query_depth = options.query_depth
        if query_depth is None:
            divided = ("in_features", in_features, "num_heads", num_heads)
            query_depth = checks.multiple(operation, *divided)
        depths = (query_depth, _or(options.key_depth, query_depth))
        depths = (*depths, _or(options.value_depth, query_depth))
    features = (in_features, memory_features, _or(options.out_features, in_features))
    later = _or(options.num_value_heads, num_key_heads), _or(options.num_context_heads, num_heads)
    sizes = HeadSizes(num_heads, num_key_heads, *depths, *features, *later)
    query = (in_features, num_heads, sizes.query_depth)
    key = (memory_features, num_key_heads, sizes.key_depth)
    if options.share_query_key and query != key:
        raise ValueError(
            f"{operation}: share_query_key needs one shape for query and key, got (features, "
            f"heads, depth) = {query} and {key}."
        )
    return sizes


def _depths_of_inputs(
    operation: str, options: HeadOptions, num_key_heads: int, memory_features: int
) -> tuple[int, int, int]:
    """Return the depths of heads that are cut out of the inputs without a projection."""
    given = (options.query_depth, options.key_depth, options.value_depth, options.num_value_heads)
    if given != (None, None, None, None) or options.share_query_key:
        raise ValueError(
            f"{operation}: without projections the depths follow from the inputs and nothing is "
            "shared; leave out query_depth, key_depth, value_depth, num_value_heads and "
            "share_query_key."
        )
    divided = ("in_features", options.in_features, "num_heads", options.num_heads)
    of_query = checks.multiple(operation, *divided)
    divided = ("memory_features", memory_features, "num_key_heads", num_key_heads)
    of_memory = checks.multiple(operation, *divided)
    return of_query, of_memory, of_memory


def linear_shapes(options: HeadOptions, sizes: HeadSizes) -> dict[str, LinearShape]:
    """Return what the projections of a layer map, by their names in Flax's own layers.

    Raises:
      ValueError: biases for a projection that does not exist, or that are neither True nor False.
    """
    biases = _biases(options.use_bias)
    if not options.projections:
        return {}
    num_heads, num_key_heads = sizes.num_heads, sizes.num_key_heads
    shapes = {
        "query": LinearShape(sizes.in_features, (num_heads, sizes.query_depth)),
        "key": LinearShape(sizes.memory_features, (num_key_heads, sizes.key_depth)),
        "value": LinearShape(sizes.memory_features, (sizes.num_value_heads, sizes.value_depth)),
        "out": LinearShape(
            (sizes.num_context_heads, sizes.value_depth), sizes.out_features, (-2, -1)
        ),
    }
    if options.share_query_key:
        del shapes["key"]
    if options.combine == "sum":
        shapes["out"] = LinearShape(sizes.value_depth, sizes.out_features)
    return {name: shape._replace(use_bias=biases[name]) for name, shape in shapes.items()}


def _biases(use_bias: Any) -> dict[str, bool]:
    """Return which of the four projections have a bias."""
    names = ("query", "key", "value", "out")
    given: Any = use_bias if isinstance(use_bias, Mapping) else dict.fromkeys(names, use_bias)
    for name, has_bias in given.items():
        if name not in names or not isinstance(has_bias, bool):
            raise ValueError(
                "use_bias must be True, False or a dict of these for some of query, key, value and "
                f"out, got {has_bias!r} for {name!r}."
            )
    return {name: given.get(name, True) for name in names}


class ProjectedMemory(NamedTuple):
    """A memory that has been projected: keys [B, S, K, Hk] and values [B, S, K, V]."""

    key: Array
    value: Array


class Projections(NamedTuple):
    """From x to heads x W_n^Q, m W_n^K and m W_n^V, and from their contexts back by W^O.

    `query`, `key`, `value`, `out`, `query_ln`, `key_ln` and `context_ln` map arrays, or are None.
    `dtype` is that of a cache, unless told otherwise.
    """

    name: str
    sizes: HeadSizes
    query: Any
    key: Any
    value: Any
    out: Any
    query_ln: Any
    key_ln: Any
    position: Position | None
    combine: str
    dtype: Any
    context_ln: Any = None
    context_scale: float = 1.0
    joint_qk_norm: bool = False

    def heads(
        self,
        query: Array,
        memory: Array | ProjectedMemory | None = None,
        value: Array | None = None,
        positions: Array | None = None,
        memory_positions: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """Return queries [B, T, N, Hq], keys [B, S, K, Hk] and values [B, S, K, V].

        Raises:
          ValueError: a value or positions of a memory that is already projected.
        """
        if isinstance(memory, ProjectedMemory):
            _refuse_too_late(self.name, value=value, memory_positions=memory_positions)
        if memory is None:
            memory = query
            memory_positions = positions if memory_positions is None else memory_positions
        queries = self.queries(query, positions)
        if not isinstance(memory, ProjectedMemory):
            memory = self.memory(memory, value, memory_positions)
        return queries, memory.key, memory.value

    def queries(self, x: Array, positions: Array | None = None) -> Array:
        """Return the queries [B, T, N, Hq] of x [B, T, D]."""
        checks.axes(self.name, query=(x, "BTD"))
        checks.features(self.name, "query", x, self.sizes.in_features)
        heads = _apply(self.query, x, self.sizes.num_heads)
        heads = self._normed(self.query_ln, heads)
        return apply_position(self.position, heads, positions)

    def _normed(self, norm: Any, heads: Array) -> Array:
        """Return heads [B, T, N, H], normed each for itself or all features together."""
        if norm is None:
            return heads
        return norm(concat_heads(heads)).reshape(heads.shape) if self.joint_qk_norm else norm(heads)

    def memory(
        self, memory: Array, value: Array | None = None, positions: Array | None = None
    ) -> ProjectedMemory:
        """Return the keys [B, S, K, Hk] of a memory [B, S, D], and the values [B, S, K, V]."""
        value = memory if value is None else value
        checks.axes(self.name, memory=(memory, "BSD"), value=(value, "BSD"))
        checks.features(self.name, "memory", memory, self.sizes.memory_features)
        heads = _apply(self.key, memory, self.sizes.num_key_heads)
        heads = self._normed(self.key_ln, heads)
        values = _apply(self.value, value, self.sizes.num_value_heads)
        return ProjectedMemory(apply_position(self.position, heads, positions), values)

    def join(self, context: Array) -> Array:
        """Norm and join the heads of a context [B, T, N, V], and project: [B, T, out_features].

        Raises:
          ShapeError: another number of heads than the layer was built for.
        """
        checks.axes(self.name, context=(context, "BTNV"))
        if context.shape[2] != self.sizes.num_context_heads:
            raise checks.ShapeError(
                f"{self.name}: the context has {context.shape[2]} heads, and the layer is built "
                f"for {self.sizes.num_context_heads}; give num_context_heads={context.shape[2]}."
            )
        if self.context_ln is not None:
            context = self.context_ln(context)
        if self.context_scale != 1.0:
            context = context * jnp.asarray(self.context_scale, context.dtype)
        if self.combine == "sum":
            context = sum_heads(context)
        elif self.out is None:
            context = concat_heads(context)
        return context if self.out is None else self.out(context)


class HeadsMethods:
    """The methods of every module with heads: a memory projected once, x to heads, and back."""

    def _projections(self) -> Projections:
        """Return the projections with this module's parameters."""
        raise NotImplementedError

    def keys(self, memory: Array, positions: Array | None = None) -> ProjectedMemory:
        """Project a memory [B, S, memory_features] once, for all the calls that attend to it."""
        return self._projections().memory(memory, None, positions)

    def heads(
        self,
        query: Array,
        memory: Array | ProjectedMemory | None = None,
        value: Array | None = None,
        *,
        positions: Array | None = None,
        memory_positions: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """Return what the layer attends with: the operands of `attend`, or of your own function.

        Args:
          query: [B, T, in_features].
          memory: [B, S, memory_features], or what `keys` made of it; the query unless given.
          value: [B, S, memory_features], for values; the memory unless given.
          positions: of the queries, [T] or [B, T]; 0, 1, ... unless given.
          memory_positions: of the keys; as `positions` for self-attention.

        Returns:
          Queries [B, T, N, Hq], keys [B, S, K, Hk] and values [B, S, K, V]: projected, normed,
          turned by positions.
        """
        return self._projections().heads(query, memory, value, positions, memory_positions)

    def join(self, context: Array) -> Array:
        """Join the contexts [B, T, N, V] of `heads` and project them: [B, T, out_features]."""
        return self._projections().join(context)


def cache_dtype(dtype: Any, param_dtype: Any) -> Any:
    """Return the dtype of cached keys and values: that of a layer's computation.

    Where it is not given, that of the parameters, or float32 if that is better: the input may be.

    >>> cache_dtype(None, jnp.bfloat16), cache_dtype(jnp.bfloat16, jnp.float32)
    (dtype('float32'), dtype(bfloat16))
    """
    return at_least_float32(param_dtype) if dtype is None else jnp.dtype(dtype)


def split_heads(x: Array, num_heads: int) -> Array:
    """Cut features into heads without a projection: [B, T, D] -> [B, T, N, D / N]."""
    return x.reshape(*x.shape[:-1], num_heads, -1)


def concat_heads(context: Array) -> Array:
    """Put heads side by side: [B, T, N, V] -> [B, T, N V] (Vaswani et al. 2017, section 3.2.2)."""
    return context.reshape(*context.shape[:-2], -1)


def sum_heads(context: Array) -> Array:
    """Add heads up: [B, T, N, V] -> [B, T, V]; concatenation whose W^O repeats one block."""
    return jnp.sum(context, axis=-2)


def apply_position(position: Position | None, x: Array, positions: Array | None) -> Array:
    """Apply `position(x [T, H], positions [T])`, such as a rotation, to every head.

    Args:
      position: the function of one head; None leaves x as it is.
      x: [B, T, N, H].
      positions: [T], or [B, T] where examples have different ones; None is 0, 1, ...

    Returns:
      [B, T, N, H].

    >>> from attention_jax import positions
    >>> x = jnp.ones((2, 5, 4, 8))
    >>> apply_position(positions.rotary, x, None).shape
    (2, 5, 4, 8)
    """
    if position is None:
        return x
    positions = indices(x.shape[1]) if positions is None else jnp.asarray(positions)
    by_head = jax.vmap(position, in_axes=(1, None), out_axes=1)
    return jax.vmap(by_head, in_axes=(0, 0 if positions.ndim == 2 else None))(x, positions)


def _refuse_too_late(operation: str, **options: Any) -> None:
    given = [name for name, option in options.items() if option is not None]
    if given:
        raise ValueError(
            f"{operation}: {' and '.join(given)} cannot be honoured, because the memory is already "
            "projected; give the memory itself, or its positions to keys."
        )


def _apply(projection: Any, x: Array, num_heads: int) -> Array:
    return split_heads(x, num_heads) if projection is None else projection(x)


def _or(size: int | None, default: int) -> int:
    return default if size is None else size
