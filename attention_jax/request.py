"""The arguments of `attend`: one record, checked once, and its operands as arrays of all heads."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from attention_jax.base import checks
from attention_jax.base.binding import BiasLike, Sliced, as_pytree, function_of, unbound
from attention_jax.base.matmul import Products, precision_in_force
from attention_jax.base.parameters import Learned
from attention_jax.base.typing import (
    AnyScore,
    Bias,
    HeadMap,
    Normalizer,
    PositionalScore,
    Score,
    at_least_float32,
    require_callable,
)
from attention_jax.head_maps import Halo, halo_of
from attention_jax.masks import Mask, algebra, batch_axes
from attention_jax.masks.intervals import indices
from attention_jax.normalizers import LogSum, Streaming, name_of, streaming
from attention_jax.scores import separate
from attention_jax.scores.composition import finished, is_positional
from attention_jax.statistics import Pairs, Statistics, checked

Array = jax.Array


_EXAMPLES = {
    "score": "scores.scaled_dot",
    "normalizer": "normalizers.softmax",
    "mix_logits": "bind(head_maps.talking, weight=...)",
    "mix_weights": "bind(head_maps.difference, scale=0.5)",
}


class DropoutKey(NamedTuple):
    """A `jax.random` key for a part of a batch that begins with the example `first_example`."""

    rng: Any
    first_example: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of `attend`, checked against each other, and their sizes by axis letter.

    `lengths` are those of whole sequences [T, S] where query and key are parts of them;
    `precision` is the one of `jax.default_matmul_precision` where attention is called.
    """

    query: Array
    key: Array
    value: Array
    score: AnyScore | Sliced
    mask: Mask
    bias: BiasLike
    normalizer: Normalizer | Sliced
    dropout_key: Array | DropoutKey | None
    dropout_rate: float = dataclasses.field(metadata={"static": True})
    implementation: str | None = dataclasses.field(metadata={"static": True})
    tile_sizes: tuple[int, int] | None = dataclasses.field(metadata={"static": True})
    return_weights: bool = dataclasses.field(metadata={"static": True})
    return_logsumexp: bool = dataclasses.field(metadata={"static": True})
    statistics: Statistics | None = None
    mix_logits: HeadMap | Sliced | None = None
    mix_weights: HeadMap | Sliced | None = None
    lengths: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})
    precision: str | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def of(cls, query: Any, key: Any, value: Any, **options: Any) -> Request:
        """Check the arguments of `attend`, but for what has to be traced to be known.

        Raises:
          ShapeError, ValueError, TypeError: as `attend`.
        """
        for name in ("mix_logits", "mix_weights"):
            options[name] = _as_head_map(name, options.get(name))
        is_mixed = any(options[name] is not None for name in ("mix_logits", "mix_weights"))
        _check_arrays(query, key, value, is_mixed)
        _check_dropout(options["dropout_rate"], options["dropout_key"])
        _check_tile_sizes(options["tile_sizes"])
        if not options["dropout_rate"]:
            options["dropout_key"] = None
        if options["tile_sizes"] is not None:
            options["tile_sizes"] = tuple(map(int, options["tile_sizes"]))
        for name in ("score", "normalizer"):
            options[name] = _as_function(name, options[name])
        options["mask"] = algebra.with_int32(algebra.as_mask(options["mask"]))
        options["bias"] = as_bias(options["bias"])
        options["precision"] = precision_in_force()
        options["statistics"] = checked("attend", options.get("statistics"))
        request = cls(_as_array(query), _as_array(key), _as_array(value), **options)
        how = request.streaming  # refuses parameters out of range while they are known
        if request.return_logsumexp and not isinstance(how, LogSum):
            raise ValueError(
                "attend: return_logsumexp needs a normalizer of the softmax family; "
                f"{request.normalizer_name} has no log-sum-exp."
            )
        if request.mixes:
            _check_mixing(request)
        return request

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The size behind each letter: B T S N K, Q of a query, H of a key, V of a value.

        Where maps mix heads, values have heads of their own, L.
        """
        letters = {
            "query": (self.query, "BTNQ"),
            "key": (self.key, "BSKH"),
            "value": (self.value, _value_letters(self.mixes)),
        }
        found = checks.axes("attend", **letters)
        return found | dict(zip("TS", self.lengths or (), strict=False))

    @property
    def dtype(self) -> Any:
        """The dtype to compute in."""
        return at_least_float32(self.query.dtype)

    @property
    def products(self) -> Products:
        """How the products of tiles are computed."""
        return Products.of(self.query.dtype, self.precision)

    @property
    def groups(self) -> int:
        """The number of query heads that share a key head, G; 1 where all heads meet."""
        return 1 if self.mixes else self.sizes["N"] // self.sizes["K"]

    @property
    def mixes(self) -> bool:
        """Whether a map mixes heads, so that they are computed together."""
        return self.mix_logits is not None or self.mix_weights is not None

    @functools.cached_property
    def counts(self) -> tuple[int, int, int]:
        """The numbers of heads of queries, of those that are normalized, and of the context."""
        between = _heads_after(self, "mix_logits", self.sizes["N"])
        return self.sizes["N"], between, _heads_after(self, "mix_weights", between)

    @property
    def halos(self) -> tuple[Halo, Halo]:
        """The neighbours that the maps of logits and of weights look at."""
        return halo_of(self.mix_logits), halo_of(self.mix_weights)

    @property
    def streaming(self) -> Streaming | None:
        """How the normalizer is computed tile by tile; None if it needs the whole row."""
        return streaming(function_of(self.normalizer))

    @property
    def normalizer_name(self) -> str:
        """The normalizer in a message."""
        return name_of(function_of(self.normalizer))

    @property
    def pairs(self) -> tuple[int, int]:
        """The numbers of queries and keys, [T, S]."""
        return self.sizes["T"], self.sizes["S"]


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


def operands(request: Request, as_given: bool = False) -> dict[str, Operand]:
    """Return every operand by its name in `Head`, each checked against the others.

    Queries, keys and values are in the dtype to compute in, or `as_given`.

    Raises:
      ShapeError, TypeError: as `attend`.
    """
    of_value = _value_letters(request.mixes)
    return {
        "query": _operand(request, request.query, ["BTN"], as_given=as_given),
        "key": _operand(request, request.key, ["BSK"], as_given=as_given),
        "value": _operand(request, request.value, [of_value[:3]], as_given=as_given),
        "score": _score(request),
        "mask": _operand(request, *batch_axes.of_mask("attend", request.mask, request.sizes)),
        "bias": _bias(request),
        "normalizer": _normalizer(request),
        "dropout": _dropout(request),
    } | (_head_maps(request) if request.mixes else _statistics(request))


def as_bias(bias: Any) -> BiasLike:
    """Return a bias as a function that is a pytree, or numbers as an array.

    Raises:
      TypeError: a bias that is declared for a module, or that waits for its parameters.

    >>> as_bias([[1.0, 2.0]]).shape
    (1, 2)
    """
    if bias is None or (not callable(function_of(bias)) and not isinstance(bias, Learned)):
        return bias if bias is None else _as_array(bias)
    return _as_function("bias", bias)


def _as_array(numbers: Any) -> Array:
    """Move what is given in NumPy to a device, although `jax.transfer_guard` may be set."""
    with jax.transfer_guard_host_to_device("allow"):
        return jnp.asarray(numbers)


def _as_head_map(name: str, head_map: Any) -> Any:
    """Return a map across heads as a pytree; refuse one without its parameters."""
    if head_map is None:
        return None
    if isinstance(head_map, Sliced) and "N" in head_map.axes:
        raise TypeError(
            f"attend: {name} maps all heads together and cannot be per_head; give one map, or "
            "per_example of it."
        )
    return _as_function(name, head_map)


def _as_function(name: str, function: Any) -> Any:
    """Return a score, bias or normalizer as a pytree; refuse one without its parameters."""
    if isinstance(function, Learned):
        names = ", ".join(function.parameters)
        raise TypeError(
            f"attend: {name} still waits for {names}, which modules create; give it to a module, "
            "or bind its function to arrays."
        )
    bare = function_of(function)
    if not callable(bare):
        example = _EXAMPLES[name]
        raise TypeError(f"attend: {name} must be a function such as {example}, got {function!r}.")
    bound = as_pytree(bare)
    is_head_map = name.startswith("mix_")
    waiting = [] if is_positional(bound) else unbound(bound, given=1 if is_head_map else 2)
    if waiting:
        raise TypeError(
            f"attend: {name} still waits for {', '.join(waiting)}; give them with "
            f"bind({name}, {waiting[0]}=...)."
        )
    of_score = PositionalScore if is_positional(bound) else Score
    kinds = {"score": of_score, "bias": Bias, "normalizer": Normalizer}
    require_callable(f"attend: {name}", bound, kinds.get(name, HeadMap))
    return dataclasses.replace(function, function=bound) if bare is not function else bound


def _value_letters(mixes: bool) -> str:
    return "BSLV" if mixes else "BSKV"


def _check_arrays(query: Any, key: Any, value: Any, mixes: bool) -> None:
    checks.floating("attend", query=query, key=key, value=value)
    of_value = value, _value_letters(mixes)
    letters = {"query": (query, "BTNQ"), "key": (key, "BSKH"), "value": of_value}
    sizes = checks.axes("attend", **letters)
    checks.at_least("attend", 1, **{"query heads N": sizes["N"]})
    checks.multiple("attend", "query heads N", sizes["N"], "key heads K", sizes["K"])


def _check_tile_sizes(sizes: Any) -> None:
    is_pair = isinstance(sizes, tuple | list) and len(sizes) == 2
    if sizes is None or (
        is_pair and all(isinstance(size, int | np.integer) and size > 0 for size in sizes)
    ):
        return
    raise ValueError(
        f"attend: tile_sizes must be two positive numbers, got {sizes}; give how many "
        "queries and how many keys, as integers."
    )


def _check_dropout(rate: float, rng: Any) -> None:
    rng = rng.rng if isinstance(rng, DropoutKey) else rng
    if isinstance(rate, jax.core.Tracer):
        raise TypeError(
            "attend: dropout_rate must be a number that is known while tracing, got one known only "
            "inside jit; name it in static_argnames."
        )
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"attend: dropout_rate must be in [0, 1), got {rate}.")
    if rate and rng is None:
        raise ValueError(
            f"attend: dropout_rate {rate} needs a dropout_key; give a jax.random key, or rate 0."
        )
    if rate and not _is_one_rng(rng):
        is_array = hasattr(rng, "dtype")
        got = f"{rng.dtype} of shape {rng.shape}" if is_array else type(rng).__name__
        raise ValueError(f"attend: dropout_key must be one jax.random key, got {got}.")


def _is_one_rng(rng: Any) -> bool:
    """Tell whether it is one key of `jax.random.key`, or the words of one of `PRNGKey`."""
    if not hasattr(rng, "dtype"):
        return False
    if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        return rng.ndim == 0
    return rng.dtype == jnp.uint32 and rng.ndim == 1


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
    bound = _of_first_head(request, request.score)
    rows = (
        jax.ShapeDtypeStruct((request.sizes[length], request.sizes[depth]), request.dtype)
        for length, depth in ("TQ", "SH")
    )
    operand = _function(request, "score", request.score, separate)
    logits = _shape_of(separate(bound) if is_positional(bound) else bound, *rows)
    if jnp.shape(logits) != request.pairs:
        raise checks.ShapeError(
            f"attend: score must return logits [T, S] = {request.pairs}, got shape "
            f"{jnp.shape(logits)}."
        )
    if logits.dtype == request.dtype:
        return operand
    return operand._replace(finish=functools.partial(_separate_and_cast, dtype=request.dtype))


def _normalizer(request: Request) -> Operand:
    """Ask a normalizer that is the user's own for the shape of its weights."""
    operand = _function(request, "normalizer", request.normalizer)
    if request.streaming is not None:
        return operand
    bound = _of_first_head(request, request.normalizer)
    logits, allowed = (jax.ShapeDtypeStruct(request.pairs, of) for of in (request.dtype, bool))
    refusal = (
        f"attend: normalizer must map (logits, allowed), both [T, S] = {request.pairs}, to weights "
        "[T, S], as normalizers.softmax does"
    )
    try:
        weights = _shape_of(bound, logits, allowed)
    except TypeError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise TypeError(f"{refusal}; this one fails: {reason}.") from error
    if jnp.shape(weights) != request.pairs:
        raise checks.ShapeError(f"{refusal}; this one returns shape {jnp.shape(weights)}.")
    return operand


def _bias(request: Request) -> Operand:
    if request.bias is None:
        return _operand(request, None, [])
    if not callable(function_of(request.bias)):
        array, letters = batch_axes.of_array("attend: bias", request.bias, request.sizes)
        return _operand(request, array, [letters])
    operand = _function(request, "bias", request.bias)
    bound = _of_first_head(request, request.bias)
    for expected in (request.pairs, (1, 1)):  # a bias is to answer for any tile
        q_idx, kv_idx = (
            jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((expected[0], 1), (1, expected[1]))
        )
        shape = jnp.shape(_shape_of(bound, q_idx, kv_idx))
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
    """
    if request.statistics is None:
        return {}
    parts, structure = jax.tree.flatten(request.statistics, is_leaf=_is_mask)
    letters: list[str] = []
    for number, part in enumerate(parts):
        if _is_mask(part):
            mask = algebra.with_int32(part)
            parts[number], found = batch_axes.of_mask("attend: statistics", mask, request.sizes)
            letters += found
        else:
            letters += [""]
    operand = _operand(request, jax.tree.unflatten(structure, parts), letters)
    _check_sums(request, operand)
    return {"statistics": operand}


def _head_maps(request: Request) -> dict[str, Operand]:
    """Return the maps across heads as operands, with None for what is not mapped."""
    names = ("mix_logits", "mix_weights")
    maps = {name: getattr(request, name) for name in names}
    return {
        name: _operand(request, None, [])
        if head_map is None
        else _function(request, name, head_map)
        for name, head_map in maps.items()
    }


def _heads_after(request: Request, name: str, heads: int) -> int:
    """Ask a map how many heads it makes of so many, for tiles of several shapes.

    Raises:
      ShapeError: it does not return [N, T, S].
    """
    head_map = getattr(request, name)
    if head_map is None:
        return heads
    bound = _of_first_head(request, head_map)
    padding = halo_of(bound).padding
    for shape in ((heads, 3, 5), (heads, 1, 1)):
        padded = (size + sum(more) for size, more in zip(shape, padding, strict=True))
        found = jnp.shape(_shape_of(bound, jax.ShapeDtypeStruct(tuple(padded), request.dtype)))
        if len(found) != 3 or found[1:] != shape[1:]:
            raise checks.ShapeError(
                f"attend: {name} must map [M, T, S] = {shape} with its halo around it to [N, T, S] "
                f"= [N, {shape[1]}, {shape[2]}], got shape {found}; declare the neighbours that it "
                'looks at by the rule "halo".'
            )
        number = found[0]
    return number


def _check_mixing(request: Request) -> None:
    """Check what maps across heads need of the other arguments.

    Raises:
      ShapeError: heads of values that do not divide those of the context, or a mask that differs
        between heads whose number changes.
      ValueError: results that mixed heads do not have.
    """
    heads, between, after = request.counts
    checks.multiple("attend", "heads of the context", after, "value heads", request.sizes["L"])
    _, letters = batch_axes.of_mask("attend", request.mask, request.sizes)
    if between != heads and any("N" in axes for axes in letters):
        raise checks.ShapeError(
            f"attend: a mask that differs between heads cannot follow mix_logits from {heads} to "
            f"{between} heads; give a mask for all heads, or a map that keeps their number."
        )
    if request.statistics is not None:
        raise ValueError(
            "attend: statistics are of heads that stand alone, and mix_logits or mix_weights mixes "
            "them; leave statistics out, or compute them from return_weights=True."
        )
    if request.return_logsumexp and request.mix_weights is not None:
        raise ValueError(
            "attend: return_logsumexp would belong to the heads before mix_weights, and the "
            "context to those after; leave one of the two out."
        )


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
    sums = _shape_of(functools.partial(_sums_of_tile, operand), of_head, pairs)
    for name, statistic in (request.statistics or {}).items():
        leading, axis = ("S", 0) if statistic.of == "key" else ("T", 1)
        for leaf in jax.tree.leaves(sums[name]):
            if leaf.shape[:1] != (sizes[leading],):
                raise checks.ShapeError(
                    f"attend: statistics[{name!r}] must return sums with the leading axis "
                    f"{leading}, got shape {leaf.shape} for a tile of {sizes['T']} queries and "
                    f"{sizes['S']} keys; sum over axis {axis}."
                )


def _sums_of_tile(operand: Operand, leaves: list[Any], pairs: Pairs) -> dict[str, Any]:
    statistics = operand.build(leaves)
    return {name: statistic.of_tile(pairs) for name, statistic in statistics.items()}


def heads(request: Request) -> str:
    """Return the letters that stand for the axis N: K, and G where key heads are shared."""
    if request.mixes:
        return "N"
    return "KG" if request.groups > 1 else "K"


def cast(leaf: Any, dtype: Any) -> Any:
    """Return floating-point numbers in the dtype to compute in, and others as they are."""
    is_floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return jnp.asarray(leaf, dtype) if is_floating else leaf


def _grouped(request: Request, leaf: Any, letters: str) -> Any:
    if "N" not in letters or request.groups == 1:
        return leaf
    axis = letters.index("N")
    return leaf.reshape(
        leaf.shape[:axis] + (request.sizes["K"], request.groups) + leaf.shape[axis + 1 :]
    )


def _of_first_head(request: Request, function: Any) -> Any:
    """Return a bound function with the parameters of the first head."""
    bound = function.of_first if isinstance(function, Sliced) else function
    return jax.tree.map(functools.partial(cast, dtype=request.dtype), bound)


def _shape_of(function: Callable[..., Any], *examples: Any) -> Any:
    """Return the shape of a result, without a cache: what the function closes over may change."""
    return jax.eval_shape(lambda *arguments: function(*arguments), *examples)


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
