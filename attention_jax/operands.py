"""The operands of `attend`: arrays of all heads, and the letters of their leading axes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from attention_jax.base import checks
from attention_jax.base.binding import Sliced, function_of
from attention_jax.masks import Mask, algebra, batch_axes
from attention_jax.masks.intervals import indices
from attention_jax.normalizers import is_queried, with_query
from attention_jax.request import (
    DropoutKey,
    Request,
    cast,
    of_first_head,
    shape_of,
    value_letters,
)
from attention_jax.scores import separate
from attention_jax.scores.composition import finished, is_positional
from attention_jax.statistics import Pairs
from attention_jax.statistics.protocol import reads

Array = jax.Array


class Operand(NamedTuple):
    """One operand of `attend` for all heads: its arrays, and the letters of their leading axes.

    `build` makes of the arrays of one head what an implementation is given.
    """

    leaves: list[Any]
    axes: list[str]
    structure: Any
    finish: Callable[[Any], Any]

    def build(self, leaves: Sequence[Any]) -> Any:
        """Return the operand of one head, from its arrays."""
        return self.finish(jax.tree.unflatten(self.structure, leaves))

    def entries(self) -> dict[str, Operand]:
        """Return each entry of an operand that is a dict."""
        pairs = iter(zip(self.leaves, self.axes, strict=True))
        found = {}
        names = self.structure.node_data()[1]
        for name, structure in zip(names, self.structure.children(), strict=True):
            part = list(itertools.islice(pairs, structure.num_leaves))
            leaves, axes = ([each[n] for each in part] for n in (0, 1))
            found[name] = Operand(leaves, axes, structure, self.finish)
        return found


def operands(request: Request, as_given: bool = False) -> dict[str, Operand]:
    """Return every operand by its name in `Head`, each checked against the others.

    Queries, keys and values are in the dtype to compute in, or `as_given`.

    Raises:
      ShapeError, TypeError: as `attend`.
    """
    of_value = value_letters(request.mixes)
    return {
        "query": _operand(request, request.query, ["BTN"], as_given=as_given),
        "key": _operand(request, request.key, ["BSK"], as_given=as_given),
        "value": _operand(request, request.value, [of_value[:3]], as_given=as_given),
        "score": _score(request),
        "mask": _operand(request, *batch_axes.of_mask("attend", request.mask, request.sizes)),
        "bias": _bias(request),
        "normalizer": _normalizer(request),
        "dropout": _dropout(request),
        **_head_maps(request),
        **_statistics(request),
    }


def _operand(
    request: Request,
    tree: Any,
    letters: list[str],
    finish: Callable[[Any], Any] | None = None,
    as_given: bool = False,
) -> Operand:
    """Cast floating-point leaves, and split axis N into K and G where key heads are shared."""
    leaves, structure = jax.tree.flatten(tree)
    leaves = leaves if as_given else [cast(leaf, request.dtype) for leaf in leaves]
    grouped = [_grouped(request, leaf, axes) for leaf, axes in zip(leaves, letters, strict=True)]
    axes = [one.replace("N", heads(request)) for one in letters]
    return Operand(grouped, axes, structure, finish or _as_is)


def _function(
    request: Request, name: str, function: Any, finish: Callable[[Any], Any] | None = None
) -> Operand:
    """Return a bound function as an operand: the same for all heads, or one slice for each."""
    leaves = jax.tree.leaves(function)
    sizes = request.sizes
    if name == "normalizer" and request.mixes:
        sizes = sizes | {"N": request.counts[1]}
    if not isinstance(function, Sliced):
        return _operand(request, function, [""] * len(leaves), finish)
    for leaf in leaves:
        for axis, (letter, got) in enumerate(
            itertools.zip_longest(function.axes, jnp.shape(leaf)[: len(function.axes)])
        ):
            if got != sizes[letter]:
                mark = {"B": "per_example", "N": "per_head"}[letter]
                raise checks.ShapeError(
                    f"attend: every parameter of a {mark} {name} must have axis {axis} of size "
                    f"{letter} = {sizes[letter]}, got shape {jnp.shape(leaf)}."
                )
    return _operand(request, function.function, [function.axes] * len(leaves), finish)


def _score(request: Request) -> Operand:
    """Ask the score for the shape of its logits, so that its own checks speak first."""
    bound = of_first_head(request, request.score)
    rows = (
        jax.ShapeDtypeStruct((request.sizes[length], request.sizes[depth]), request.dtype)
        for length, depth in ("TQ", "SH")
    )
    operand = _function(request, "score", request.score, separate)
    logits = shape_of(separate(bound) if is_positional(bound) else bound, *rows)
    if jnp.shape(logits) != request.pairs:
        raise checks.ShapeError(
            f"attend: score must return logits [T, S] = {request.pairs}, got shape "
            f"{jnp.shape(logits)}."
        )
    if logits.dtype == request.dtype:
        return operand
    return operand._replace(finish=functools.partial(_separate_and_cast, dtype=request.dtype))


def _normalizer(request: Request) -> Operand:
    """Ask a normalizer that is the user's own, or takes queries, for the shape of its weights."""
    operand = _function(request, "normalizer", request.normalizer)
    takes_query = is_queried(function_of(request.normalizer))
    if request.streaming is not None and not takes_query:
        return operand
    bound = functools.partial(_weights, of_first_head(request, request.normalizer))
    logits, allowed = (jax.ShapeDtypeStruct(request.pairs, of) for of in (request.dtype, bool))
    rows = request.sizes["T"], request.sizes["Q"]
    query = jax.ShapeDtypeStruct(rows, request.dtype)
    refusal = (
        f"attend: normalizer must map (logits, allowed), both [T, S] = {request.pairs}, to weights "
        "[T, S], as normalizers.softmax does"
    )
    try:
        weights = shape_of(bound, logits, allowed, query)
    except TypeError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise TypeError(f"{refusal}; this one fails: {reason}.") from error
    if jnp.shape(weights) != request.pairs:
        raise checks.ShapeError(f"{refusal}; this one returns shape {jnp.shape(weights)}.")
    return operand


def _weights(normalizer: Any, logits: Array, allowed: Array, query: Array) -> Array:
    return with_query(normalizer, query)(logits, allowed)


def _bias(request: Request) -> Operand:
    if request.bias is None:
        return _operand(request, None, [])
    if not callable(function_of(request.bias)):
        array, letters = batch_axes.of_array("attend: bias", request.bias, request.sizes)
        return _operand(request, array, [letters])
    operand = _function(request, "bias", request.bias)
    bound = of_first_head(request, request.bias)
    for expected in (request.pairs, (1, 1)):  # a bias is to answer for any tile
        q_idx, kv_idx = (
            jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((expected[0], 1), (1, expected[1]))
        )
        shape = jnp.shape(shape_of(bound, q_idx, kv_idx))
        padded = (1,) * (2 - len(shape)) + shape
        if len(shape) > 2 or any(
            got not in (1, full) for got, full in zip(padded, expected, strict=True)
        ):
            raise checks.ShapeError(
                "attend: bias must return numbers that broadcast to its indices [T, S] = "
                f"{expected}, got shape {shape}."
            )
    return operand


def _dropout(request: Request) -> Operand:
    """Draw the two words of each example and head that decide which of its pairs are kept."""
    if not request.dropout_rate:
        return _operand(request, None, [])
    batch, num_heads = request.sizes["B"], request.counts[2]
    rng: Any = request.dropout_key
    first = 0
    if isinstance(rng, DropoutKey):
        rng, first = rng
    numbers = indices(batch * num_heads) + first * num_heads
    rngs = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, numbers)
    words = jax.vmap(_two_words)(rngs).reshape(batch, num_heads, 2)
    return _operand(request, words, ["BN"], functools.partial(_with_rate, request.dropout_rate))


def _statistics(request: Request) -> dict[str, Operand]:
    """Return the statistics as an operand: masks as they differ between heads, and the rest alike.

    Raises:
      ShapeError: sums without the leading axis that they are to have.
      ValueError: logits that are of other heads than the weights.
    """
    if request.statistics is None:
        return {}
    sizes = request.sizes | {"N": request.counts[2]}
    parts, structure = jax.tree.flatten(request.statistics, is_leaf=_is_mask)
    letters: list[str] = []
    for number, part in enumerate(parts):
        if _is_mask(part):
            mask = algebra.with_int32(part)
            parts[number], found = batch_axes.of_mask("attend: statistics", mask, sizes)
            letters += found
        else:
            letters += [""]
    operand = _operand(request, jax.tree.unflatten(structure, parts), letters)
    _check_sums(request, operand)
    _check_heads(request, operand)
    return {"statistics": operand}


def _head_maps(request: Request) -> dict[str, Operand]:
    """Return the maps across heads as operands, with None for the one that is not given."""
    if not request.mixes:
        return {}
    names = ("mix_logits", "mix_weights")
    maps = {name: getattr(request, name) for name in names}
    return {
        name: _operand(request, None, [])
        if head_map is None
        else _function(request, name, head_map)
        for name, head_map in maps.items()
    }


def _is_mask(part: Any) -> bool:
    return isinstance(part, Mask)


def _check_sums(request: Request, operand: Operand) -> None:
    """Require that the sums of a statistic are those of the queries, or of the keys, of a tile."""
    sizes = {"T": 3, "S": 5}
    of_head = [
        jax.ShapeDtypeStruct(jnp.shape(leaf)[len(letters) :], jnp.result_type(leaf))
        for leaf, letters in zip(operand.leaves, operand.axes, strict=True)
    ]
    pairs = jax.eval_shape(functools.partial(Pairs.none, *sizes.values(), request.dtype))
    sums = shape_of(functools.partial(_sums_of_tile, operand), of_head, pairs)
    for name, statistic in (request.statistics or {}).items():
        leading, axis = ("S", 0) if statistic.of == "key" else ("T", 1)
        for leaf in jax.tree.leaves(sums[name]):
            if leaf.shape[:1] != (sizes[leading],):
                raise checks.ShapeError(
                    f"attend: statistics[{name!r}] must return sums with the leading axis "
                    f"{leading}, got shape {leaf.shape} for a tile of {sizes['T']} queries and "
                    f"{sizes['S']} keys; sum over axis {axis}."
                )


def _check_heads(request: Request, operand: Operand) -> None:
    """Require of a statistic that what it reads belongs to the same heads.

    Logits are of the heads that are normalized, weights of those of the context.
    """
    _, between, after = request.counts
    if between == after:
        return
    for name, part in operand.entries().items():
        like_one = [
            np.zeros(jnp.shape(leaf)[len(letters) :], jnp.result_type(leaf))
            for leaf, letters in zip(part.leaves, part.axes, strict=True)
        ]
        reads_logits, reads_weights = reads(part.build(like_one), request.dtype)
        differs = any("N" in letters for letters in part.axes)
        if reads_logits and (reads_weights or differs):
            what = "weights" if reads_weights else "a mask that differs between heads"
            raise ValueError(
                f"attend: statistics[{name!r}] reads logits, of {between} heads, and {what}, of "
                f"{after} heads after mix_weights; give two statistics, or a map that keeps the "
                "number of heads."
            )


def _sums_of_tile(operand: Operand, leaves: list[Any], pairs: Pairs) -> dict[str, Any]:
    statistics = operand.build(leaves)
    return {name: statistic.of_tile(pairs) for name, statistic in statistics.items()}


def heads(request: Request) -> str:
    """Return the letters that stand for the axis N: K, and G where key heads are shared."""
    if request.mixes:
        return "N"
    return "KG" if request.groups > 1 else "K"


def _grouped(request: Request, leaf: Any, letters: str) -> Any:
    if "N" not in letters or request.groups == 1:
        return leaf
    axis = letters.index("N")
    return leaf.reshape(
        leaf.shape[:axis] + (request.sizes["K"], request.groups) + leaf.shape[axis + 1 :]
    )


def _as_is(operand: Any) -> Any:
    return operand


def _two_words(rng: Array) -> Array:
    return jax.random.bits(rng, (2,), jnp.uint32)


def _with_rate(rate: float, words: Array) -> tuple[Array, Array]:
    return words, jnp.float32(rate)


def _separate_and_cast(score: Any, dtype: Any) -> Any:
    return finished(separate(score), Partial(functools.partial(_cast_logits, dtype=dtype)))


def _cast_logits(logits: Array, dtype: Any) -> Array:
    return logits.astype(dtype)
