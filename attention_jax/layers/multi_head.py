"""Multi-head attention, whichever of the two Flax APIs holds its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from attention_jax import masks, parallel
from attention_jax.attention import attend
from attention_jax.base.binding import BiasLike
from attention_jax.cache import (
    KeyValueCache,
    View,
    attend_cached,
    extend,
    init,
    next_positions,
    view_of,
)
from attention_jax.implementations import Attended
from attention_jax.layers.heads import HeadsMethods, ProjectedMemory, Projections
from attention_jax.masks import MaskLike
from attention_jax.masks.algebra import leading_axes
from attention_jax.masks.intervals import Interval, Unknown, judge
from attention_jax.statistics import Statistics

Array = jax.Array
ROWS_CHECKED = 64
"""How many rows next to each other are read before a windowed cache is trusted with a mask."""


class MultiHead(NamedTuple):
    """A layer y = combine_n(attend(x W_n^Q, m W_n^K, m W_n^V)) W^O from the parts that it has.

    `score`, `bias`, `normalizer` and the maps return the bound function when called.
    `sequence_axis` names the mesh axis that splits the sequence, and `implementation` then the
    method, or is None.
    """

    projections: Projections
    score: Callable[[], Any]
    bias: Callable[[], Any] | None
    normalizer: Callable[[], Any]
    implementation: str | None
    sequence_axis: str | None = None
    mix_logits: Callable[[], Any] | None = None
    mix_weights: Callable[[], Any] | None = None

    def __call__(
        self,
        query: Array,
        memory: Array | ProjectedMemory | None,
        value: Array | None,
        *,
        mask: MaskLike,
        functions: tuple[Any, BiasLike],
        positions: Array | None,
        memory_positions: Array | None,
        options: dict[str, Any],
        return_weights: bool,
        order: Any = None,
    ) -> tuple[Array, Attended | None]:
        """Return the output [B, T, out_features] and what else is asked for of `attend`, or None.

        `functions` are score and bias instead of the layer's own, `options` others of `attend`.
        """
        options = {**options, **self.functions(*functions), "mask": mask}
        if self.sequence_axis is not None:
            self._refuse_weights(return_weights)
            orders = _orders(self.projections.name, order, is_self=memory is None)
            positions = orders[0] if positions is None else positions
            if memory_positions is None and not isinstance(memory, ProjectedMemory):
                memory_positions = orders[1]
            heads = self.projections.heads(query, memory, value, positions, memory_positions)
            split = {"axis": self.sequence_axis, "method": self.implementation, "order": orders}
            return self.projections.join(parallel.attend(*heads, **split, **options)), None
        if order is not None:
            raise ValueError(
                f"{self.projections.name}: an order was given, and the sequence is not split; "
                "build the layer with sequence_axis, or put the rows back with parallel.restore."
            )
        heads = self.projections.heads(query, memory, value, positions, memory_positions)
        result = attend(
            *heads,
            **options,
            implementation=self.implementation,
            return_weights=return_weights,
        )
        if not isinstance(result, Attended):
            return self.projections.join(result), None
        return self.projections.join(result.context), result

    def _refuse_weights(self, return_weights: bool) -> None:
        """Refuse weights of a sequence that is split: no device has a row of them."""
        if return_weights:
            raise ValueError(
                f"{self.projections.name}: no device holds the weights of a sequence that the axis "
                f"{self.sequence_axis!r} splits; build the layer with sequence_axis=None to look "
                "at them."
            )

    def functions(self, score: Any = None, bias: BiasLike = None) -> dict[str, Any]:
        """Return score, bias, normalizer and maps with their parameters bound, as for `attend`."""
        if bias is None and self.bias is not None:
            bias = self.bias()
        score = self.score() if score is None else score
        maps = {"mix_logits": self.mix_logits, "mix_weights": self.mix_weights}
        given = {name: head_map() for name, head_map in maps.items() if head_map is not None}
        return {"score": score, "bias": bias, "normalizer": self.normalizer(), **given}

    def attend_view(
        self, heads: Array, view: View, *, bias: BiasLike, return_weights: bool, **options: Any
    ) -> tuple[Any, ...]:
        """Return the output of query heads that attend to a view, and the weights if asked for."""
        result = attend_cached(
            heads,
            view,
            **self.functions(bias=bias),
            **options,
            implementation=self.implementation,
            return_weights=return_weights,
        )
        context, *weights = result[:2] if return_weights else (result,)
        return self.projections.join(context), *weights


class Extras(NamedTuple):
    """What a call returns or leaves behind beside the output: weights, and statistics by name."""

    return_weights: bool
    sow_weights: bool
    statistics: Statistics | None
    sow_statistics: bool

    @property
    def options(self) -> dict[str, Any]:
        """The option of `attend`, if it is needed.

        Raises:
          ValueError: statistics are to be left behind, and none is named.
        """
        if self.sow_statistics and not self.statistics:
            raise ValueError(
                "MultiHeadAttention: sow_statistics needs statistics, a dict of those to compute."
            )
        return {"statistics": self.statistics} if self.statistics else {}

    def returned(self, output: Array, found: Attended | None) -> Any:
        """Return the output, and as a tuple with it what is to be returned."""
        weights = [found.weights] if found is not None and self.return_weights else []
        is_returned = found is not None and self.statistics and not self.sow_statistics
        statistics = [found.statistics] if found is not None and is_returned else []
        extras = weights + statistics
        return (output, *extras) if extras else output


class MultiHeadMethods(HeadsMethods):
    """The methods of `MultiHeadAttention` that the two APIs share."""

    sequence_axis: str | None

    def _layer(self) -> MultiHead:
        """Return the computation with this module's parameters."""
        raise NotImplementedError

    def _refuse_split(self) -> None:
        """Refuse to decode where the sequence is split, as caches are not."""
        if self.sequence_axis is not None:
            raise ValueError(
                f"MultiHeadAttention: a cache is not split over the axis {self.sequence_axis!r}; "
                "decode with a model of sequence_axis=None and the same parameters."
            )

    def init_cache(
        self,
        batch: int,
        capacity: int,
        *,
        window: int | None = None,
        ragged: bool = False,
        dtype: Any = None,
    ) -> KeyValueCache:
        """Return an empty cache for `decode`; see `attention_jax.cache.init`.

        Its dtype is that of the layer's computation unless given.

        Raises:
          ValueError: the sequence is split over devices.
        """
        self._refuse_split()
        projections = self._projections()
        sizes = projections.sizes
        depths = (sizes.num_key_heads, sizes.key_depth, sizes.value_depth)
        dtype = projections.dtype if dtype is None else dtype
        options = {"window": window, "ragged": ragged, "dtype": dtype}
        return init(batch, capacity, *depths, num_value_heads=sizes.num_value_heads, **options)

    def decode(
        self,
        query: Array,
        cache: KeyValueCache,
        *,
        mask: MaskLike = None,
        bias: BiasLike = None,
        causal: bool = True,
        count: Any = None,
        return_weights: bool = False,
    ) -> Any:
        """Attend from the next tokens of a sequence to all tokens so far, without dropout.

        Args:
          query: [B, T, in_features], any number T of tokens.
          cache: from `init_cache`, or from the previous call.
          mask: the mask of the whole sequence.
          bias: of the whole sequence, instead of the module's own.
          causal: no token attends to a later one, whatever the mask allows; False leaves that to
            the mask, for a prefix (`masks.Prefix`) that is given in one call.
          count: how many of the T are tokens, [B] in a ragged batch; the rest is padding.
          return_weights: also return the weights, by slot of the cache.

        Returns:
          What the full causal pass gives at these positions, [B, T, out_features], and the next
          cache; with them the weights [B, N, T, C] where asked for.

        Raises:
          ShapeError: inputs that do not fit each other or the module.
          ValueError: more tokens than the capacity, or a mask that is not known to leave out the
            tokens that a window has forgotten.
        """
        self._refuse_split()
        layer = self._layer()
        refuse_forgetting(layer.projections.name, cache.window, mask)
        positions = next_positions(cache, query.shape[1])
        heads, key, value = layer.projections.heads(query, positions=positions)
        cache, view = extend(cache, key, value, count)
        options = {"mask": mask, "causal": causal}
        output, *weights = layer.attend_view(
            heads, view, bias=bias, return_weights=return_weights, **options
        )
        return output, cache, *weights

    def decode_memory(
        self,
        query: Array,
        memory: Array | ProjectedMemory,
        cache: KeyValueCache,
        *,
        mask: MaskLike = None,
        bias: BiasLike = None,
        return_weights: bool = False,
    ) -> Any:
        """Attend from the next tokens of a sequence to a memory, without dropout.

        Args:
          query: [B, T, in_features], any number T of tokens.
          memory: [B, S, memory_features], or what `keys` made of it.
          cache: of the tokens before these.
          mask: as in the full pass, over the whole sequence and the memory.
          bias: likewise, instead of the module's own.
          return_weights: also return the weights [B, N, T, S].

        Returns:
          What the full pass gives at these positions, [B, T, out_features]; with it the weights
          where asked for.
        """
        self._refuse_split()
        layer = self._layer()
        positions = next_positions(cache, query.shape[1])
        heads, key, value = layer.projections.heads(query, memory, positions=positions)
        view = view_of((key, value), cache, query.shape[1])
        options = {"mask": mask, "causal": False}
        output, *weights = layer.attend_view(
            heads, view, bias=bias, return_weights=return_weights, **options
        )
        return (output, *weights) if return_weights else output


def refuse_forgetting(operation: str, window: int | None, mask: MaskLike) -> None:
    """Require a mask that lets no query attend to what a cache with a window has forgotten.

    Rows at many distances are read over intervals of keys: an array, or a mask known only inside
    `jit`, counts as if it allowed everything.

    Raises:
      ValueError: the mask may let a query attend to a token before the window.

    >>> refuse_forgetting("f", 3, masks.Window(3, 0))
    """
    if window is None:
        return
    distances = {*range(ROWS_CHECKED), *(2**power for power in range(20))}
    last = np.array(sorted(distances), np.int32)[:, None]
    row = last + window + 1
    forgotten = Interval(np.zeros_like(last), last)
    if np.all(judge(_of_any_example(mask), Interval(row, row), forgotten).state == masks.EMPTY):
        return
    raise ValueError(
        f"{operation}: a cache with window = {window} forgets older tokens, to which the mask may "
        f"let a query attend; join the mask by & with masks.Window({window}, 0), or init the cache "
        "without a window."
    )


def _of_any_example(mask: MaskLike) -> masks.Mask:
    """Return a mask with Unknown for what differs between examples or heads, or is traced."""
    mask = masks.as_mask(mask)
    own = [extra > 0 for _, extra in leading_axes(mask)]
    leaves, structure = jax.tree.flatten(mask.static())
    return structure.unflatten(
        [Unknown() if differs else leaf for leaf, differs in zip(leaves, own, strict=True)]
    )


def _orders(operation: str, order: Any, is_self: bool) -> tuple[Any, Any]:
    """Return the orders of queries and of keys; a memory lies in order unless told otherwise."""
    if not isinstance(order, tuple):
        return order, order if is_self else None
    if is_self or len(order) != 2:
        raise ValueError(
            f"{operation}: order must be one array [T], or a pair with that of the memory if there "
            f"is one, got a tuple of {len(order)}."
        )
    return order
