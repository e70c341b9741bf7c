"""A cache of keys and values for decoding: a pytree, and pure functions from one to the next.

    cache = init(batch, capacity, num_key_heads, key_depth, value_depth)
    cache, view = extend(cache, key, value)           # any number of new tokens
    context = attend_cached(query, view)              # causal; mask= of the whole sequence

Each slot knows the position of the token it holds, so masks, biases and scores are given
positions as in the full pass, whatever slot a token is in. That allows ragged batches (each
example has its own length) and eviction under a local mask (slots are used in a ring).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from attention_jax import masks
from attention_jax.attention import attend
from attention_jax.base import checks
from attention_jax.base.binding import BiasLike, Sliced, as_pytree
from attention_jax.base.typing import AnyScore
from attention_jax.head_maps import NO_HALO, halo_of
from attention_jax.masks import MaskLike, batch_axes
from attention_jax.masks.intervals import Lookup, indices, judge
from attention_jax.normalizers import in_any_order, softmax, whole_sequences
from attention_jax.positions.shifting import Rows, shifted_bias, shifted_score
from attention_jax.request import DropoutKey, as_bias

Array = jax.Array
"""A bias as `attend` takes it."""

NO_TOKEN = -1
"""The position of a slot that holds nothing."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "value", "positions", "length"],
    meta_fields=["window"],
)
@dataclasses.dataclass(frozen=True)
class KeyValueCache:
    """Keys [B, C, K, H] and values [B, C, K, V] in C slots.

    `positions` [C] are those of the tokens in the slots, `length` [] counts the tokens seen; in a
    ragged batch they are [B, C] and [B]. With a `window`, slots are used in a ring.
    """

    key: Array
    value: Array
    positions: Array
    length: Array
    window: int | None = None

    @property
    def capacity(self) -> int:
        """The number of slots C."""
        return self.positions.shape[-1]


class View(NamedTuple):
    """What new queries attend to: keys, values and their positions, and those of the queries.

    `start` is the position of the first query, `count` how many of them are tokens and not
    padding; `overflow` is True where the cache was too small to hold the tokens.
    """

    key: Array
    value: Array
    positions: Array
    start: Array
    count: Array
    overflow: Array


def init(
    batch: int,
    capacity: int,
    num_key_heads: int,
    key_depth: int,
    value_depth: int | None = None,
    *,
    num_value_heads: int | None = None,
    window: int | None = None,
    ragged: bool = False,
    dtype: Any = jnp.float32,
) -> KeyValueCache:
    """Return an empty cache.

    Args:
      batch: B.
      capacity: C, how many tokens are kept.
      num_key_heads: K.
      key_depth: H.
      value_depth: V; H unless given.
      num_value_heads: where maps across heads change their number; K unless given.
      window: keep at least this many tokens before the newest ones and forget older ones: the
        `left` of a `masks.Window`. None keeps all, up to the capacity.
      ragged: let each example have its own length.
      dtype: of keys and values.

    Raises:
      ValueError: a capacity below 1, or below the window.

    >>> init(2, 16, 4, 8, ragged=True).length
    Array([0, 0], dtype=int32)
    """
    if capacity < max(window or 0, 1):
        raise ValueError(
            f"init: capacity must be at least 1 and at least the window, got {capacity} and "
            f"window {window}."
        )
    if window is not None and window < 0:
        raise ValueError(f"init: window must be 0 or more tokens, got {window}.")
    examples = (batch,) if ragged else ()
    value_depth = key_depth if value_depth is None else value_depth
    num_value_heads = num_key_heads if num_value_heads is None else num_value_heads
    return KeyValueCache(
        key=jnp.zeros((batch, capacity, num_key_heads, key_depth), dtype),
        value=jnp.zeros((batch, capacity, num_value_heads, value_depth), dtype),
        positions=jnp.full((*examples, capacity), NO_TOKEN, jnp.int32),
        length=jnp.zeros(examples, jnp.int32),
        window=window,
    )


def next_positions(cache: Any, num_tokens: int) -> Array:
    """Return the positions of the next tokens: [T], or [B, T] where `cache.length` is [B].

    >>> next_positions(init(1, 8, 1, 1), 3)
    Array([0, 1, 2], dtype=int32)
    """
    return cache.length[..., None] + jnp.broadcast_to(
        indices(num_tokens), (*cache.length.shape, num_tokens)
    )


def extend(
    cache: KeyValueCache, key: Array, value: Array, count: Any = None
) -> tuple[KeyValueCache, View]:
    """Add tokens and return the next cache, and what their queries attend to.

    Args:
      cache: the cache so far.
      key: [B, T, K, H], T new tokens.
      value: [B, T, K, V].
      count: how many of the T are tokens, [B] in a ragged batch; the rest is padding.

    Returns:
      The next cache, and the view for `attend_cached`.

    Raises:
      ShapeError: keys, values or a count that do not fit the cache.
      ValueError: a count that is not in [0, T], or more tokens than the capacity, where it is known
        outside `jit`. Within `jit` a cache that overflows makes its queries' contexts NaN.

    >>> cache = init(1, 8, 1, 1)
    >>> cache, view = extend(cache, jnp.ones((1, 3, 1, 1)), jnp.ones((1, 3, 1, 1)))
    >>> cache.positions
    Array([ 0,  1,  2, -1, -1, -1, -1, -1], dtype=int32)
    """
    checks.axes("extend", cached=(cache.key, "BCKH"), key=(key, "BTKH"))
    heads = "K" if cache.value.shape[2] == cache.key.shape[2] else "L"
    values = {"cached": (cache.value, f"BC{heads}V"), "value": (value, f"BT{heads}V")}
    checks.axes("extend", **values, key=(key, "BTKH"))
    tokens, start = key.shape[1], cache.length
    count = checks.tokens("extend", count, tokens, start.shape)
    overflow = _overflows(cache, tokens, count)
    new = next_positions(cache, tokens)
    is_token = new < (start + count)[..., None]
    new_positions = jnp.where(is_token, new, NO_TOKEN)

    last = is_token & (new >= (start + count)[..., None] - cache.capacity)
    slots = jnp.where(last, new % cache.capacity, cache.capacity)
    by_example = 0 if start.ndim else None
    write = jax.vmap(_write, in_axes=(0, 0, by_example))
    written = dataclasses.replace(
        cache,
        key=write(cache.key, key.astype(cache.key.dtype), slots),
        value=write(cache.value, value.astype(cache.value.dtype), slots),
        positions=(jax.vmap(_write) if start.ndim else _write)(
            cache.positions, new_positions, slots
        ),
        length=start + count,
    )
    if cache.window is None or tokens + cache.window <= cache.capacity:
        view = View(written.key, written.value, written.positions, start, count, overflow)
        return written, view
    # The first of the new tokens still need what the last ones push out.
    view = View(
        jnp.concatenate([cache.key, key.astype(cache.key.dtype)], axis=1),
        jnp.concatenate([cache.value, value.astype(cache.value.dtype)], axis=1),
        jnp.concatenate([cache.positions, new_positions], axis=-1),
        start,
        count,
        overflow,
    )
    return written, view


def view_of(memory: tuple[Array, Array], cache: KeyValueCache, num_tokens: int) -> View:
    """Return the view of a memory, for `attend_cached(..., causal=False)`.

    Args:
      memory: keys [B, S, K, H] and values [B, S, K, V].
      cache: of the tokens before the next ones.
      num_tokens: T, how many next tokens attend to the memory.

    >>> view_of(2 * (jnp.ones((1, 5, 1, 1)),), init(1, 8, 1, 1), num_tokens=3).positions
    Array([0, 1, 2, 3, 4], dtype=int32)
    """
    key, value = memory
    start = cache.length
    return View(
        key,
        value,
        positions=jnp.broadcast_to(indices(key.shape[1]), (*start.shape, key.shape[1])),
        start=start,
        count=jnp.full_like(start, num_tokens),
        overflow=jnp.zeros_like(start, bool),
    )


# Statistics would take the slots of a cache for positions.
_OPTIONS = [
    name
    for name, parameter in inspect.signature(attend).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in ("mask", "statistics")
]


def attend_cached(
    query: Array, view: View, *, mask: MaskLike = None, causal: bool = True, **options: Any
) -> Any:
    """Attend from new tokens to all that the cache holds, as the full causal pass would.

    Args:
      query: [B, T, N, Hq], the queries of the tokens just added.
      view: from `extend`.
      mask: the mask of the whole sequence; index 0 is its first token.
      causal: no query attends to a later token, whatever the mask allows. False leaves that to
        the mask: for a prefix whose tokens attend to each other (`masks.Prefix`), all of it in
        one call, and for a memory (`view_of`).
      **options: the others of `attend`. A `positional` score and a bias are given positions in
        the whole sequence. Which pairs dropout_rate drops depends on dropout_key, example, head,
        query among the new tokens and slot, or where the order of keys counts their order: give
        every step a key of its own. Where it counts, a window costs a copy of keys and values.

    Returns:
      What `attend` returns; zeros for padding.

    Raises:
      ShapeError: operands that do not fit each other.
      TypeError: an unknown option.
      ValueError: a map across heads that looks at neighbouring pairs, or a normalizer that needs
        the weights of the query before.

    >>> @jax.jit
    ... def step(query, key, value, cache):
    ...     cache, view = extend(cache, key, value)
    ...     return attend_cached(query, view), cache
    >>> context, cache = step(*3 * [jnp.ones((1, 3, 2, 4))], init(1, 8, 2, 4))
    >>> context.shape, cache.length
    ((1, 3, 2, 4), Array(3, dtype=int32))
    """
    unknown = [name for name in options if name not in _OPTIONS]
    if unknown:
        raise TypeError(
            f"attend_cached: there is no option {unknown[0]}; it takes mask, causal, "
            f"{', '.join(_OPTIONS)}."
        )
    for name in ("mix_logits", "mix_weights"):
        if halo_of(options.get(name)) != NO_HALO:
            raise ValueError(
                f"attend_cached: {name} looks at neighbouring pairs, and a cache holds neither "
                "earlier queries nor keys in order; decode with the whole sequence, or with a map "
                "without a halo."
            )
    whole_sequences("attend_cached", options.get("normalizer", softmax))
    sizes = checks.axes("attend_cached", query=(query, "BTNH"), key=(view.key, "BSKE"))
    mask = masks.Shift(and_causal(mask) if causal else masks.as_mask(mask))
    options["bias"] = as_bias(options.get("bias"))
    if view.start.ndim == 0:
        return _attend(query, view, mask, **options)
    mask, letters = batch_axes.of_mask("attend_cached", mask, sizes)
    arrays, structure = jax.tree.flatten(mask)
    mask_axes = [0 if "B" in axes else None for axes in letters]
    own = {name: part for name, part in options.items() if _is_per_example(part)}
    options = {name: part for name, part in options.items() if name not in own}
    bias = as_pytree(options.pop("bias", None))
    bias_axis = 0 if _is_array(bias) and bias.ndim == 4 and len(bias) > 1 else None
    one_example = functools.partial(
        _one_example,
        mask_of=functools.partial(_mask_of_example, structure, letters),
        dropout_key=options.pop("dropout_key", None),
        **options,
    )
    lifted = jax.vmap(one_example, in_axes=(0, 0, mask_axes, bias_axis, 0, 0))
    return lifted(query, view, arrays, bias, own, indices(sizes["B"]))


def _is_per_example(part: Any) -> bool:
    return isinstance(part, Sliced) and "B" in part.axes


def _one_example(
    query: Array,
    view: View,
    mask_arrays: list[Array],
    bias: BiasLike,
    own: dict[str, Any],
    number: Array,
    *,
    mask_of: Callable[[list[Array]], masks.Mask],
    dropout_key: Any,
    **options: Any,
) -> Any:
    """Attend in one example of a ragged batch."""
    view = view._replace(key=view.key[None], value=view.value[None])
    if dropout_key is not None:
        options["dropout_key"] = DropoutKey(dropout_key, number)
    options |= {"bias": bias} | jax.tree.map(lambda x: x[None], own)
    result = _attend(query[None], view, mask_of(mask_arrays), **options)
    return jax.tree.map(lambda x: x[0], result)


def _mask_of_example(structure: Any, letters: list[str], arrays: list[Array]) -> masks.Mask:
    """Rebuild a mask from arrays without the axis of examples; that of heads follows it."""
    fitted = [x[None] if "N" in axes else x for x, axes in zip(arrays, letters, strict=True)]
    return structure.unflatten(fitted)


def and_causal(mask: MaskLike) -> masks.Mask:
    """Return a mask that allows what the given one allows, and no later key.

    >>> print(masks.draw(and_causal(masks.Window(1, 1)), 3))
    █··
    ██·
    ·██
    """
    return masks.Causal() & masks.as_mask(mask)


@dataclasses.dataclass(frozen=True)
class Placed(masks.Mask):
    """The mask of a whole sequence over the slots of a cache.

    Query i is at position start + i, and padding from `count` on; slot j holds the token at
    positions[j], or none.
    """

    mask: masks.Mask
    start: Any
    count: Any
    positions: Any
    example_rank: ClassVar[dict[str, int]] = {"start": 0, "count": 0, "positions": 1}

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        position = Lookup(self.positions)[kv_idx]
        present = (position >= 0) & (q_idx < self.count)
        return present & judge(self.mask, q_idx + self.start, position)


def _attend(
    query: Array,
    view: View,
    mask: masks.Mask,
    *,
    score: AnyScore | Sliced | None = None,
    bias: BiasLike = None,
    **rest: Any,
) -> Any:
    """Attend where all examples are at the same positions."""
    normalizer = rest.get("normalizer", softmax)
    slots = None if in_any_order(normalizer) else jnp.argsort(view.positions)
    if slots is not None:
        view = _in_order(view, slots)
    rows = Rows(view.start, view.positions)
    if score is not None:
        rest["score"] = shifted_score(score, rows)
    query = jnp.where(view.overflow, jnp.nan, query)
    attended = attend(
        query,
        view.key.astype(query.dtype),
        view.value.astype(query.dtype),
        mask=Placed(mask, view.start, view.count, view.positions),
        bias=shifted_bias(bias, rows, query.shape[1]),
        **rest,
    )
    if slots is None or not rest.get("return_weights"):
        return attended
    weights = jnp.take(attended.weights, jnp.argsort(slots), axis=3)
    return attended._replace(weights=weights)


def _in_order(view: View, slots: Array) -> View:
    """Return a view whose keys are those of the slots [C], one after the other."""
    key, value = (jnp.take(x, slots, axis=1) for x in (view.key, view.value))
    return view._replace(key=key, value=value, positions=view.positions[slots])


def _write(slots_of_cache: Array, new: Array, slots: Array) -> Array:
    """Write new [T, ...] into slots [T]; a slot past the end drops its token."""
    return slots_of_cache.at[slots].set(new, mode="drop", wrap_negative_indices=False)


def _overflows(cache: KeyValueCache, tokens: int, count: Array) -> Array:
    if cache.window is not None:
        return jnp.zeros(cache.length.shape, bool)
    overflow = cache.length + count > cache.capacity
    known = not isinstance(overflow, jax.core.Tracer)
    if tokens > cache.capacity or (known and bool(jnp.any(overflow))):
        raise ValueError(
            f"extend: {tokens} more tokens do not fit a cache of {cache.capacity} slots"
            + (f" that holds {cache.length}" if known else "")
            + "; init it with a larger capacity, or with the window of a local mask."
        )
    return overflow


def _is_array(x: Any) -> bool:
    return hasattr(x, "dtype") and hasattr(x, "shape")
