"""Evaluate the predicate of a mask on intervals of indices, in three-valued logic.

A mask is one predicate over indices, such as `q_idx >= kv_idx`. Called on an `Interval` of
query indices and one of key indices, the same code answers for a whole tile at once: FULL
(every pair may attend), EMPTY (none may) or PARTIAL (not decided). Bounds are arrays, so one
call answers for all tiles, and nothing of size T x S is built.

Every operation returns bounds that contain all values its operands can take, hence FULL and
EMPTY are always true; PARTIAL may be said of a tile that is neither when an index occurs twice.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

EMPTY, PARTIAL, FULL = 0, 1, 2

_NO_TRUTH_VALUE = (
    "mask: combine conditions with & | ~, not with and, or, not, if or a chain such as a <= b < c."
)


def _module(*operands: Any) -> ModuleType:
    """NumPy while everything is known at trace time, jax.numpy otherwise."""
    return jnp if any(isinstance(operand, jax.Array) for operand in operands) else np


class Truth:
    """What is known of a statement on each tile: EMPTY, PARTIAL or FULL (Kleene's logic)."""

    __hash__ = None  # type: ignore[assignment]
    __array_ufunc__ = None  # numpy scalars on the left defer to the operators here

    def __init__(self, state: Any):
        self.state = state

    def __and__(self, other: Any) -> Truth:
        return self._combine(other, "minimum")

    def __or__(self, other: Any) -> Truth:
        return self._combine(other, "maximum")

    def __xor__(self, other: Any) -> Truth:
        other = as_truth(other)
        return (self & ~other) | (~self & other)

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__

    def __invert__(self) -> Truth:
        return Truth(FULL - self.state)

    def __ne__(self, other: Any) -> Truth:  # type: ignore[override]
        return self ^ other

    def __eq__(self, other: Any) -> Truth:  # type: ignore[override]
        return ~(self ^ other)

    def __bool__(self) -> bool:
        raise TypeError(_NO_TRUTH_VALUE)

    def _combine(self, other: Any, name: str) -> Truth:
        other = as_truth(other)
        return Truth(getattr(_module(self.state, other.state), name)(self.state, other.state))


def as_truth(value: Any) -> Truth:
    """Read a truth value or a plain boolean as what is known of a tile.

    Raises:
      TypeError: the predicate returned something that is neither.
    """
    if isinstance(value, Truth):
        return value
    if isinstance(value, bool | np.bool_):
        return Truth(np.int8(FULL if value else EMPTY))
    raise TypeError(f"mask: a predicate must return a boolean, got {type(value).__name__}.")


def known(false: Any, true: Any) -> Truth:
    """Return EMPTY where no pair is allowed, FULL where every pair is, else PARTIAL."""
    module = _module(false, true)
    state = module.where(true, module.int8(FULL), module.int8(PARTIAL))
    return Truth(module.where(false, module.int8(EMPTY), state))


def _defers_to_unknown(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Let an Unknown operand decide the result, on either side of the operator."""

    @functools.wraps(operator)
    def deferring(self: Interval, other: Any) -> Any:
        return NotImplemented if isinstance(other, Unknown) else operator(self, other)

    return deferring


def _exact(operator: Callable[..., Any], *, largest: Callable[[int, int], int]) -> Any:
    """Return Unknown where bounds could be rounded or wrap around.

    Fractions of an index are rounded, sums and products beyond int32 wrap around: the smallest
    and the largest index then need not give the smallest and the largest result. `largest` says
    how large a result may be, given how large both operands are.
    """

    @_defers_to_unknown
    @functools.wraps(operator)
    def guarded(self: Interval, other: Any) -> Any:
        if _is_fractional(other) and not _is_fractional(self):
            return Unknown()
        if _is_fractional(self):
            return operator(self, other)
        if _module(*bounds(self), *bounds(other)) is np:
            if _is_int32(self) and _is_int32(other) and largest(*map(_size, (self, other))) < 2**31:
                return operator(self, other)
            return _narrow(operator(_wide(self), _wide(other)))
        found = operator(self, other)
        if largest is _of_division:
            return found
        return _unless_wrapped(found, operator(_rounded(self), _rounded(other)))

    return guarded


def _is_fractional(value: Any) -> bool:
    one = bounds(value)[0]
    return isinstance(one, float) or jnp.issubdtype(getattr(one, "dtype", np.int32), jnp.floating)


def _of_division(dividend: int, divisor: int) -> int:
    """Return how large what a division computes may be; its results do not wrap around."""
    return dividend + divisor


def _is_int32(value: Any) -> bool:
    return all(isinstance(x, int) or getattr(x, "dtype", None) == np.int32 for x in bounds(value))


def _size(value: Any) -> int:
    """Return the largest absolute value of an integer, or of the bounds of an interval."""
    least, most = bounds(value)
    return max(-int(np.min(least, initial=0)), int(np.max(most, initial=0)))


def _wide(value: Any) -> Any:
    """Let integers grow beyond int32."""
    if isinstance(value, Interval):
        return Interval(np.int64(value.low), np.int64(value.high))
    return np.int64(value) if isinstance(value, int | np.integer | np.ndarray) else value


def _narrow(found: Interval) -> Any:
    """Return bounds in int32 again, if they fit."""
    int32 = np.iinfo(np.int32)
    if np.any(found.low < int32.min) or np.any(found.high > int32.max):
        return Unknown()
    return Interval(np.int32(found.low), np.int32(found.high))


_LARGEST = np.iinfo(np.int32).max
_SURELY_FITS = float(2**31 - 2**10)  # though float32 rounds operands and result


def _rounded(value: Any) -> Any:
    """Turn integers to float32, which do not wrap around."""
    low, high = (jnp.asarray(bound).astype(jnp.float32) for bound in bounds(value))
    return Interval(low, high)


def _unless_wrapped(found: Interval, rounded: Interval) -> Interval:
    """Return bounds, or those of all integers where they do not fit in int32, at run time."""
    wrapped = (rounded.low <= -_SURELY_FITS) | (rounded.high >= _SURELY_FITS)
    low, high = (jnp.asarray(bound, jnp.int32) for bound in (found.low, found.high))
    return Interval(
        jnp.where(wrapped, jnp.int32(-_LARGEST), low), jnp.where(wrapped, jnp.int32(_LARGEST), high)
    )


class Interval:
    """All integers from `low` to `high`, both included; one interval per tile.

    `cut` is (length, size) where they are all the tiles of a sequence, in order.
    """

    __hash__ = None  # type: ignore[assignment]
    __array_ufunc__ = None  # numpy scalars on the left defer to the operators here

    def __init__(self, low: Any, high: Any, cut: tuple[int, int] | None = None):
        self.low, self.high, self.cut = low, high, cut

    @functools.partial(_exact, largest=operator.add)
    def __add__(self, other: Any) -> Interval:
        low, high = bounds(other)
        return Interval(self.low + low, self.high + high)

    def __neg__(self) -> Interval:
        return Interval(-self.high, -self.low)

    @functools.partial(_exact, largest=operator.add)
    def __sub__(self, other: Any) -> Interval:
        low, high = bounds(other)
        return Interval(self.low - high, self.high - low)

    def __rsub__(self, other: Any) -> Interval:
        return -self + other

    @functools.partial(_exact, largest=operator.mul)
    def __mul__(self, other: Any) -> Interval:
        corners = [a * b for a in (self.low, self.high) for b in bounds(other)]
        module = _module(*corners)
        low, high = corners[0], corners[0]
        for corner in corners[1:]:
            low, high = module.minimum(low, corner), module.maximum(high, corner)
        return Interval(low, high)

    @functools.partial(_exact, largest=_of_division)
    def __floordiv__(self, divisor: Any) -> Interval:
        _check_divisor("//", divisor)
        return Interval(self.low // divisor, self.high // divisor)

    @functools.partial(_exact, largest=_of_division)
    def __mod__(self, divisor: Any) -> Interval:
        _check_divisor("%", divisor)
        least, most = self.low // divisor, self.high // divisor
        same_period, module = least == most, _module(least, most)
        if _is_fractional(self):
            low, high, largest = self.low % divisor, self.high % divisor, divisor
        else:  # NumPy divides by a number many times faster than it finds what is left over
            low, high, largest = self.low - least * divisor, self.high - most * divisor, divisor - 1
        return Interval(module.where(same_period, low, 0), module.where(same_period, high, largest))

    def __abs__(self) -> Interval:
        module = _module(self.low, self.high)
        zero = 0 * self.low
        low = module.maximum(zero, module.maximum(self.low, -self.high))
        return Interval(low, module.maximum(-self.low, self.high))

    __radd__, __rmul__ = __add__, __mul__

    @_defers_to_unknown
    def __lt__(self, other: Any) -> Truth:
        low, high = bounds(other)
        return known(self.low >= high, self.high < low)

    @_defers_to_unknown
    def __le__(self, other: Any) -> Truth:
        low, high = bounds(other)
        return known(self.low > high, self.high <= low)

    @_defers_to_unknown
    def __gt__(self, other: Any) -> Truth:
        return ~(self <= other)

    @_defers_to_unknown
    def __ge__(self, other: Any) -> Truth:
        return ~(self < other)

    @_defers_to_unknown
    def __eq__(self, other: Any) -> Truth:  # type: ignore[override]
        if other is self:
            return Truth(np.int8(FULL))
        low, high = bounds(other)
        apart = (self.high < low) | (high < self.low)
        single = (self.low == self.high) & (low == high) & (self.low == low)
        return known(apart, single)

    @_defers_to_unknown
    def __ne__(self, other: Any) -> Truth:  # type: ignore[override]
        return ~(self == other)

    def __bool__(self) -> bool:
        raise TypeError("mask: an index has no truth value; compare it, and combine with & | ~.")


def bounds(value: Any) -> tuple[Any, Any]:
    """Return the smallest and the largest value of an interval or of a known number."""
    return (value.low, value.high) if isinstance(value, Interval) else (value, value)


def _check_divisor(symbol: str, divisor: Any) -> None:
    """Require a positive divisor, one that is known only inside `jit` excepted."""
    if isinstance(divisor, jax.core.Tracer):
        return
    is_number = isinstance(divisor, int | np.generic | np.ndarray | jax.Array)
    if not is_number or np.any(np.asarray(divisor) <= 0):
        raise TypeError(f"mask: an index can be divided ({symbol}) by positive numbers only.")


class Unknown:
    """A value that is not known while tracing: every comparison with it is PARTIAL."""

    __hash__ = None  # type: ignore[assignment]
    __array_ufunc__ = None

    def _unknown(self, *_: Any) -> Unknown:
        return self

    def _undecided(self, _: Any) -> Truth:
        return Truth(np.int8(PARTIAL))

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _unknown
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __neg__ = __abs__ = __getitem__ = _unknown
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _undecided  # type: ignore[assignment]


class Lookup:
    """A table of numbers, indexed by positions or by intervals of positions.

    On intervals the answer is the range of the table between the bounds. That of the tiles of a
    sequence is reduced tile by tile; any other is found in constant time from the minima and maxima
    over all runs of 2^k entries: O(S log S) numbers.
    """

    def __init__(self, table: Any):
        self.table = table

    def __getitem__(self, index: Any) -> Any:
        if isinstance(self.table, Unknown) or isinstance(index, Unknown):
            return Unknown()
        if not isinstance(index, Interval):
            table = jnp.asarray(self.table)
            return table.at[index].get(mode="clip", wrap_negative_indices=False)
        return Interval(self._extreme(index, "minimum"), self._extreme(index, "maximum"))

    def _extreme(self, index: Interval, name: str) -> Any:
        module = _module(self.table, index.low, index.high)
        select = getattr(module, name)
        if index.cut is not None:
            return select.reduce(self._tiles(module, *index.cut), axis=1).reshape(index.low.shape)
        last = self.table.shape[0] - 1
        bounds = _module(index.low, index.high)
        low, high = bounds.clip(index.low, 0, last), bounds.clip(index.high, 0, last)
        level = bounds.frexp(bounds.float32(high - low + 1))[1] - 1  # floor(log2), exactly
        levels = np.unique(level) if bounds is np else np.arange(last.bit_length() + 1)
        run = module.asarray(self.table)
        runs = []
        for k in range(levels[-1] + 1):
            if k in levels:
                runs.append(run)
            shifted = module.concatenate([run[2**k :], run[-1:].repeat(2**k)])
            run = select(run, shifted[: last + 1])
        stacked = module.stack(runs)
        kept = np.searchsorted(levels, level) if bounds is np else level
        return select(stacked[kept, low], stacked[kept, high - 2**level + 1])

    def _tiles(self, module: ModuleType, length: int, size: int) -> Any:
        """Return the entries of each tile, [tiles, size]; what is missing is the last entry."""
        entries = module.asarray(self.table)[:length]
        missing = -(-length // size) * size - len(entries)
        return module.concatenate([entries, entries[-1:].repeat(missing)]).reshape(-1, size)


def indices(length: int) -> jax.Array:
    """Return the indices of a sequence, int32 whatever the default integer is."""
    return jnp.arange(length, dtype=jnp.int32)


def tile_intervals(length: Any, size: int, axis: int, computed: bool = False) -> Interval:
    """Return the interval of indices of each tile, along axis 0 or 1 of the grid of tiles.

    In arrays of JAX where the program computes them, as it must if the length is a symbol of
    `jax.export`: it then holds no table of the grid.
    """
    shape = (-1, 1) if axis == 0 else (1, -1)
    if isinstance(length, int) and not computed:
        low = np.arange(0, length, size, dtype=np.int32).reshape(shape)
        return Interval(low, np.minimum(low + size, length) - 1, (length, size))
    low = (indices(-(-length // size)) * size).reshape(shape)
    high = jnp.minimum(low + size, jnp.asarray(length, jnp.int32)) - 1
    return Interval(low, high, (length, size) if isinstance(length, int) else None)


def judge(predicate: Callable[..., Any], q_idx: Any, kv_idx: Any) -> Any:
    """Evaluate a predicate on indices or on intervals of them, and require booleans.

    A predicate that cannot be read over intervals counts as PARTIAL: correct, just not skipped.

    Raises:
      TypeError: on indices, the predicate returns no booleans, or uses the truth value of an
        array.
    """
    if not isinstance(q_idx, Interval | Unknown) and not isinstance(kv_idx, Interval | Unknown):
        try:
            return _as_boolean(predicate(q_idx, kv_idx))
        except (ValueError, jax.errors.TracerBoolConversionError) as error:
            if isinstance(error, ValueError) and "truth value" not in str(error):
                raise
            raise TypeError(_NO_TRUTH_VALUE) from error
    try:
        return as_truth(predicate(q_idx, kv_idx))
    except Exception:  # an error shows again when it is evaluated on indices
        return Truth(np.int8(PARTIAL))


def judge_untraced(predicate: Callable[..., Any], q_idx: Any, kv_idx: Any) -> Any:
    """Evaluate a predicate that may close over traced values: PARTIAL if so."""
    answer = judge(predicate, q_idx, kv_idx)
    is_traced = isinstance(answer, Truth) and isinstance(answer.state, jax.core.Tracer)
    return Truth(np.int8(PARTIAL)) if is_traced else answer


def classify(predicate: Callable[..., Any], q_idx: Interval, kv_idx: Interval) -> Any:
    """Return EMPTY, PARTIAL or FULL for each tile of `q_idx [nq, 1]` x `kv_idx [1, nk]`."""
    grid = jnp.broadcast_shapes(np.shape(q_idx.low), np.shape(kv_idx.low))
    state = judge(predicate, q_idx, kv_idx).state
    return _module(state).broadcast_to(state, grid)


def _as_boolean(answer: Any) -> Any:
    """Return arrays of booleans as they are, and True or False as one of them."""
    if isinstance(answer, bool):
        return np.bool_(answer)
    if getattr(answer, "dtype", None) != np.bool_:
        kind = getattr(answer, "dtype", type(answer).__name__)
        raise TypeError(
            f"mask: a predicate must return booleans, got {kind}; compare the indices, and "
            "combine conditions with & | ~."
        )
    return answer
