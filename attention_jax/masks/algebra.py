"""The base class of masks, with `&`, `|`, `~` and tiles; masks from arrays and functions.

`as_mask` reads an array as a `Table` and a function as a `Predicate`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from attention_jax.base import checks
from attention_jax.base.equality import ByValue
from attention_jax.base.integers import as_int32
from attention_jax.base.typing import MaskFunction, require_callable
from attention_jax.masks import intervals
from attention_jax.masks.intervals import PARTIAL, Unknown, judge


class Mask(ByValue):
    """A predicate over (q_idx, kv_idx), True = may attend; a pytree whose leaves are its arrays.

    Subclasses are frozen dataclasses that define `__call__` with ordinary operators. A field
    that holds an array is a leaf; `example_rank` says how many axes it has for one example, so
    that a further leading axis is the batch (and one more the heads). A mask that
    calls an inner one with q_idx // n and kv_idx // n sets `coarseness` to n, or to n's field.
    """

    example_rank: ClassVar[dict[str, int]] = {}
    coarseness: ClassVar[int | str | None] = None
    __array_ufunc__ = None  # a numpy array on the left defers to the operators here

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "__eq__" not in cls.__dict__:  # else the dataclass would compare arrays by their truth
            cls.__eq__, cls.__hash__ = ByValue.__eq__, ByValue.__hash__
        jax.tree_util.register_pytree_with_keys(cls, _flatten_with_keys, cls._unflatten)

    def __post_init__(self) -> None:
        """Keep integers as int32, the dtype of an index; a subclass's own check calls this one."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if hasattr(self, field.name):  # else the subclass sets it
                value = _int32_field(self, field.name, getattr(self, field.name))
                object.__setattr__(self, field.name, value)

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        """Say whether the query may attend to the key."""
        raise NotImplementedError

    def entries(self, field: str, query_length: int, key_length: int) -> dict[str, int]:
        """Return the required sizes of the first axis of a field, by name; {} if any will do."""
        return {}

    def __and__(self, other: MaskLike) -> Mask:
        return And(self, as_mask(other))

    def __or__(self, other: MaskLike) -> Mask:
        return Or(self, as_mask(other))

    def __rand__(self, other: MaskLike) -> Mask:
        return And(as_mask(other), self)

    def __ror__(self, other: MaskLike) -> Mask:
        return Or(as_mask(other), self)

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError("mask: combine masks with & | ~, not with and, or, not.")

    def __str__(self) -> str:
        try:
            return f"{self!r}\n{draw(self)}"
        except (checks.ShapeError, jax.errors.TracerArrayConversionError):
            return repr(self)  # it differs between examples or heads, or is traced

    def to_dense(self, query_length: int, key_length: int | None = None) -> jax.Array:
        """Return the mask as an array [T, S]; for tests and pictures.

        >>> from attention_jax.masks import Causal
        >>> Causal().to_dense(3).astype(int)
        Array([[1, 0, 0],
               [1, 1, 0],
               [1, 1, 1]], dtype=int32)
        """
        _check_one_head(self)
        key_length = query_length if key_length is None else key_length
        q_idx = intervals.indices(query_length)[:, None]
        kv_idx = intervals.indices(key_length)[None, :]
        allowed = with_int32(self)(q_idx, kv_idx)
        return jnp.broadcast_to(allowed, (query_length, key_length))

    def tiles(self, query_length: int, key_length: int, query_size: int, key_size: int) -> Any:
        """Return EMPTY, PARTIAL or FULL for each tile, [ceil(T / bt), ceil(S / bk)].

        A NumPy array where the mask is known while tracing, else a JAX array.

        >>> from attention_jax.masks import Causal
        >>> Causal().tiles(4, 4, 2, 2)
        array([[1, 0],
               [2, 1]], dtype=int8)
        """
        _check_one_head(self)
        return intervals.classify(
            with_int32(self),
            intervals.tile_intervals(query_length, query_size, axis=0),
            intervals.tile_intervals(key_length, key_size, axis=1),
        )

    def of(self, example: int = 0, head: int = 0) -> Mask:
        """Return the mask of one example and head, where its arrays differ between them.

        >>> from attention_jax.masks import Prefix
        >>> print(draw(Prefix([1, 3]).of(example=1), 1, 4))
        ███·
        """
        wanted = np.array([example, head])
        of_one = [
            leaf[tuple(np.where(np.array(leaf.shape[:extra]) > 1, wanted[:extra], 0))]
            for leaf, extra in leading_axes(self)
        ]
        return jax.tree.structure(self).unflatten(of_one)

    def static(self) -> Mask:
        """Return the mask with Unknown for all that is not known while tracing.

        Where a mask closes over what is traced, in a function that it holds or in the class itself,
        its tiles are PARTIAL.
        """

        def known(part: Any) -> Any:
            if isinstance(part, Mask):
                return _Untraced(of_parts(part))
            return Unknown() if isinstance(part, jax.core.Tracer) else np.asarray(part)

        def of_parts(mask: Mask) -> Mask:
            return jax.tree.map(
                known, mask, is_leaf=lambda part: part is not mask and isinstance(part, Mask)
            )

        return known(self)

    @classmethod
    def _unflatten(cls, static: tuple[tuple[str, Any], ...], children: Any) -> Mask:
        (names, values) = static
        mask = object.__new__(cls)
        for name, value in (*zip(names, children, strict=True), *values):
            object.__setattr__(mask, name, value)
        return mask


def _flatten_with_keys(mask: Any) -> tuple[list[tuple[Any, Any]], Any]:
    name = type(mask).__name__
    if not dataclasses.is_dataclass(mask):
        raise TypeError(
            f"{name}: a mask must be a dataclass, whose fields are its arrays; write "
            f"@dataclasses.dataclass(frozen=True) above class {name}."
        )
    fields = [(field.name, getattr(mask, field.name)) for field in dataclasses.fields(mask)]
    dynamic = [(name, value) for name, value in fields if _is_dynamic(value)]
    static = tuple((name, value) for name, value in fields if not _is_dynamic(value))
    children = [(jax.tree_util.GetAttrKey(name), _as_array(value)) for name, value in dynamic]
    return children, (tuple(name for name, _ in dynamic), static)


def _as_array(value: Any) -> Any:
    """Read a list of numbers as an array, and leave masks in a tuple as they are."""
    is_numbers = isinstance(value, list | tuple) and not any(isinstance(v, Mask) for v in value)
    return np.asarray(value) if is_numbers else value


def _is_dynamic(value: Any) -> bool:
    return not isinstance(value, bool | int | float | str | type(None)) and not (
        callable(value) and not isinstance(value, Mask)
    )


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every query may attend to every key."""

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx == q_idx) | (kv_idx == kv_idx)


@dataclasses.dataclass(frozen=True)
class Table(Mask):
    """An explicit boolean array [T, S], with leading axes [B, N] if they differ.

    An axis of size 1 stands for all. It is as large as the array, and each of its tiles
    counts as PARTIAL; a predicate says the same in no memory.
    """

    allowed: Any
    example_rank: ClassVar[dict[str, int]] = {"allowed": 2}

    def __post_init__(self) -> None:
        _check_boolean(_as_array(self.allowed))
        super().__post_init__()

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        if isinstance(q_idx, intervals.Interval) or isinstance(self.allowed, Unknown):
            return intervals.Truth(np.int8(PARTIAL))
        query_length, key_length = self.allowed.shape
        q_idx = 0 * q_idx if _is_at_most_one(query_length) else q_idx
        kv_idx = 0 * kv_idx if _is_at_most_one(key_length) else kv_idx
        allowed = jnp.asarray(self.allowed)
        return allowed.at[q_idx, kv_idx].get(mode="clip", wrap_negative_indices=False)


def _is_at_most_one(length: Any) -> bool:
    return isinstance(length, int) and length <= 1  # not a symbol of `jax.export`


@dataclasses.dataclass(frozen=True)
class Predicate(Mask):
    """Any function (q_idx, kv_idx) -> bool made of ordinary operators.

    >>> print(draw(Predicate(lambda q_idx, kv_idx: (q_idx - kv_idx) % 2 == 0), 3))
    █·█
    ·█·
    █·█
    """

    function: MaskFunction

    def __post_init__(self) -> None:
        super().__post_init__()
        require_callable("mask", self.function, MaskFunction)

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        return judge(self.function, q_idx, kv_idx)


@dataclasses.dataclass(frozen=True)
class _Untraced(Mask):
    """A mask whose tiles are PARTIAL where it closes over what is traced; see `Mask.static`."""

    mask: Mask

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        return intervals.judge_untraced(self.mask, q_idx, kv_idx)


@dataclasses.dataclass(frozen=True)
class Shift(Mask):
    """A mask at shifted positions: mask(q_idx + query, kv_idx + key).

    A decoding step at position p uses `Shift(mask, query=p)`; p may be an array, [B] for ragged
    batches.
    """

    mask: Mask
    query: Any = 0
    key: Any = 0
    example_rank: ClassVar[dict[str, int]] = {"query": 0, "key": 0}

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        return self.mask(q_idx + self.query, kv_idx + self.key)


@dataclasses.dataclass(frozen=True, repr=False)
class And(Mask):
    """Both masks allow it."""

    first: Mask
    second: Mask
    coarseness: ClassVar[int] = 1

    def __repr__(self) -> str:
        return f"({self.first!r} & {self.second!r})"

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        return judge(self.first, q_idx, kv_idx) & judge(self.second, q_idx, kv_idx)


@dataclasses.dataclass(frozen=True, repr=False)
class Or(Mask):
    """One of the masks allows it."""

    first: Mask
    second: Mask
    coarseness: ClassVar[int] = 1

    def __repr__(self) -> str:
        return f"({self.first!r} | {self.second!r})"

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        return judge(self.first, q_idx, kv_idx) | judge(self.second, q_idx, kv_idx)


@dataclasses.dataclass(frozen=True, repr=False)
class Not(Mask):
    """The mask does not allow it."""

    mask: Mask
    coarseness: ClassVar[int] = 1

    def __repr__(self) -> str:
        return f"~{self.mask!r}"

    def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
        return ~judge(self.mask, q_idx, kv_idx)


MaskLike = Mask | MaskFunction | jax.Array | np.ndarray | None
"""What `as_mask` reads; None allows every pair."""


def as_mask(mask: MaskLike) -> Mask:
    """Read a mask, a boolean array or a function (q_idx, kv_idx) -> bool as a mask.

    Raises:
      TypeError: anything else.
    """
    if mask is None:
        return Full()
    if isinstance(mask, Mask):
        return mask
    if hasattr(mask, "dtype") and hasattr(mask, "shape"):
        return Table(mask)
    if isinstance(mask, type) and issubclass(mask, Mask):
        raise TypeError(
            f"mask: expected a Mask, got the class {mask.__name__}; make one of it, as "
            f"{mask.__name__}({_arguments(mask)})."
        )
    if callable(mask):
        return Predicate(mask)
    raise TypeError(
        "mask: expected a Mask, a boolean array or a function (q_idx, kv_idx) -> bool, "
        f"got {type(mask).__name__}."
    )


def _check_boolean(allowed: Any) -> None:
    """Refuse numbers, which would be read as indices or as something to add."""
    dtype = getattr(allowed, "dtype", jnp.bool_)
    if dtype != jnp.bool_:
        advice = (
            "write mask != 0 if 1 means may attend"
            if jnp.issubdtype(dtype, jnp.integer)
            else "for numbers that are added to the logits use bias="
        )
        raise TypeError(
            f"mask: an array must be boolean (True = may attend), got {dtype}; {advice}."
        )


def _arguments(mask: type[Mask]) -> str:
    """Return the names of the required arguments of a mask."""
    fields = dataclasses.fields(mask) if dataclasses.is_dataclass(mask) else ()
    return ", ".join(field.name for field in fields if field.default is dataclasses.MISSING)


def with_int32(mask: Mask) -> Mask:
    """Return the mask with its integers as int32, the dtype of an index.

    Raises:
      ValueError: a number that does not fit.
    """
    leaves = [_int32_field(owner, name, leaf) for owner, name, _, leaf in owners(mask)]
    return jax.tree.structure(mask).unflatten(leaves)


def _int32_field(owner: Mask, name: str, value: Any) -> Any:
    """Return a field with integers as int32; one with an axis of its own holds names or indices."""
    is_name = owner.example_rank.get(name, 0) > 0
    return as_int32(f"{type(owner).__name__}.{name}", value, is_name=is_name)


def owners(mask: Mask) -> Iterator[tuple[Mask, str, int | None, Any]]:
    """Yield (mask, field, divisor, leaf) for every leaf, with the mask and field that hold it.

    Its mask is called with the indices of the outermost one divided by `divisor`. That is None
    within a mask that changes the indices otherwise (a Shift), where an array along a sequence may
    have another length than the sequence.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(mask):
        owner, coarse = mask, 1
        for key in path[:-1]:
            if isinstance(owner, Mask):
                step = owner.coarseness
                step = getattr(owner, step) if isinstance(step, str) else step
                coarse = coarse * step if coarse and isinstance(step, int) else None
            owner = owner[key.idx] if isinstance(owner, tuple) else getattr(owner, key.name)
        yield owner, path[-1].name, coarse, leaf


def is_constant(mask: Mask) -> bool:
    """Tell whether a mask says the same at any time, but for what its arrays hold.

    A function may read what changes, and so may a mask of another library.
    """
    if not type(mask).__module__.startswith("attention_jax."):
        return False
    fields = [getattr(mask, field.name) for field in dataclasses.fields(mask)]  # type: ignore[arg-type]
    parts = [part for field in fields for part in (field if isinstance(field, tuple) else [field])]
    return all(is_constant(x) if isinstance(x, Mask) else not callable(x) for x in parts)


def leading_axes(mask: Mask) -> list[tuple[Any, int]]:
    """Return every leaf of a mask with the number of axes it has beyond one example's."""
    found = []
    for owner, name, _, leaf in owners(mask):
        rank = owner.example_rank.get(name, 0)
        extra = jnp.ndim(leaf) - rank
        if not 0 <= extra <= 2:
            raise checks.ShapeError(
                f"{type(owner).__name__}: {name} has {rank} axes for one example and at most 2 "
                f"more (batch, heads), got shape {jnp.shape(leaf)}."
            )
        found.append((leaf, extra))
    return found


def _check_one_head(mask: Mask) -> None:
    """Refuse a mask whose arrays differ between examples or heads."""
    for owner, name, _, leaf in owners(mask):
        if not isinstance(leaf, Unknown) and jnp.ndim(leaf) > owner.example_rank.get(name, 0):
            raise checks.ShapeError(
                f"mask: {type(owner).__name__}.{name} differs between examples or heads, got "
                f"shape {jnp.shape(leaf)}; look at one of them with mask.of(example, head)."
            )


def draw(mask: MaskLike, query_length: int = 12, key_length: int | None = None) -> str:
    """Draw a mask in text, one line per query: █ may attend, · may not."""
    dense = np.asarray(as_mask(mask).to_dense(query_length, key_length))
    return "\n".join("".join("█" if allowed else "·" for allowed in row) for row in dense)
