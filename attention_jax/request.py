"""The arguments of `attend`: one record, checked once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from attention_jax.base import checks
from attention_jax.base.binding import BiasLike, Sliced, as_pytree, function_of, unbound
from attention_jax.base.matmul import Products, precision_in_force
from attention_jax.base.parameters import Learned
from attention_jax.base.sharded import is_sharded
from attention_jax.base.trees import flattened
from attention_jax.base.typing import (
    AnyNormalizer,
    AnyScore,
    Bias,
    HeadMap,
    Normalizer,
    PositionalScore,
    QueriedNormalizer,
    Score,
    at_least_float32,
    require_callable,
)
from attention_jax.head_maps import Halo, halo_of
from attention_jax.masks import Mask, algebra, batch_axes
from attention_jax.normalizers import LogSum, Streaming, is_queried, name_of, streaming
from attention_jax.scores.composition import is_positional
from attention_jax.statistics import Statistics, checked

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
    normalizer: AnyNormalizer | Sliced
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
            "value": (self.value, value_letters(self.mixes)),
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
    if is_queried(bound):
        waiting = [parameter for parameter in waiting if parameter != "query"]
    if waiting:
        raise TypeError(
            f"attend: {name} still waits for {', '.join(waiting)}; give them with "
            f"bind({name}, {waiting[0]}=...)."
        )
    of_score = PositionalScore if is_positional(bound) else Score
    of_row = QueriedNormalizer if is_queried(bound) else Normalizer
    kinds = {"score": of_score, "bias": Bias, "normalizer": of_row}
    require_callable(f"attend: {name}", bound, kinds.get(name, HeadMap))
    return dataclasses.replace(function, function=bound) if bare is not function else bound


def value_letters(mixes: bool) -> str:
    return "BSLV" if mixes else "BSKV"


def _check_arrays(query: Any, key: Any, value: Any, mixes: bool) -> None:
    checks.floating("attend", query=query, key=key, value=value)
    of_value = value, value_letters(mixes)
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


def _heads_after(request: Request, name: str, heads: int) -> int:
    """Ask a map how many heads it makes of so many, for tiles of several shapes.

    Raises:
      ShapeError: it does not return [N, T, S].
    """
    head_map = getattr(request, name)
    if head_map is None:
        return heads
    bound = of_first_head(request, head_map)
    padding = halo_of(bound).padding
    for shape in ((heads, 3, 5), (heads, 1, 1)):
        padded = (size + sum(more) for size, more in zip(shape, padding, strict=True))
        found = jnp.shape(shape_of(bound, jax.ShapeDtypeStruct(tuple(padded), request.dtype)))
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
        between heads whose number changes, or heads that an explicit mesh splits.
      ValueError: results that mixed heads do not have.
    """
    heads, between, after = request.counts
    if is_queried(function_of(request.normalizer)):
        raise ValueError(
            f"attend: {request.normalizer_name} needs the query of each row of logits, and "
            "mix_logits or mix_weights mixes heads; leave the maps out, or use another normalizer."
        )
    checks.multiple("attend", "heads of the context", after, "value heads", request.sizes["L"])
    for name in ("query", "key", "value"):
        if is_sharded("N", ["BTN"], [getattr(request, name)]):
            raise checks.ShapeError(
                f"attend: axis 2 of {name}, its heads, is split over an explicit mesh, and "
                "mix_logits or mix_weights mixes heads; jax.reshard it to hold heads together, or "
                "give an automatic mesh axis."
            )
    _, letters = batch_axes.of_mask("attend", request.mask, request.sizes)
    if between != heads and any("N" in axes for axes in letters):
        raise checks.ShapeError(
            f"attend: a mask that differs between heads cannot follow mix_logits from {heads} to "
            f"{between} heads; give a mask for all heads, or a map that keeps their number."
        )
    if request.return_logsumexp and request.mix_weights is not None:
        raise ValueError(
            "attend: return_logsumexp would belong to the heads before mix_weights, and the "
            "context to those after; leave one of the two out."
        )


def cast(leaf: Any, dtype: Any) -> Any:
    """Return floating-point numbers in the dtype to compute in, and others as they are."""
    is_floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return jnp.asarray(leaf, dtype) if is_floating else leaf


def of_first_head(request: Request, function: Any) -> Any:
    """Return a bound function with the parameters of the first head."""
    bound = function.of_first if isinstance(function, Sliced) else function
    return jax.tree.map(functools.partial(cast, dtype=request.dtype), bound)


def shape_of(function: Callable[..., Any], *examples: Any) -> Any:
    """Return the shape of a result, without a cache: what the function closes over may change."""
    return jax.eval_shape(*flattened(function, *examples))
