"""The options that blocks, stacks and models share in the two Flax APIs, for all layers or each.

They are keywords of the NNX modules and fields of the Linen modules, under the same names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from attention_jax.base.equality import ByValue

Array = jax.Array
Options = TypeVar("Options")
NORMS = {
    "before": {"before": "norm"},
    "after": {"after": "norm"},
    "both": {"before": "norm", "branch": "branch_norm"},
    "branch": {"branch": "norm"},
    "none": {},
}
"""By placement: where a sublayer has norms (a field of `Sublayer`), and what each is called."""
SUBLAYERS = ("attention", "cross_attention", "feed_forward")


@dataclasses.dataclass
class BlockOptions:
    """The options of a Transformer block; they are fields of the Linen modules.

    A stack or a model takes each of them once for all layers, as a list or tuple with one for
    each, or as `by_layer(function)` of the layer's number.

    Args:
      hidden_features: of the feed-forward layer; its own default (4 D) unless given.
      memory_features: of the memory that a decoder attends to; None for a block without, which in
        a stack may be some of them.
      attention: builds the self-attention, `MultiHeadAttention` unless given;
        `functools.partial(MultiHeadAttention, score=...)` for any score, bias, position or
        normalizer. Where no dropout is asked for, any layer called as `attention(x, mask=...)`
        will do; with positions given, it takes `positions=`. To decode it needs
        `init_cache(batch, capacity, ...)` and `decode(x, cache, mask=..., causal=..., count=...)`,
        which returns the output and the next cache.
      cross_attention: builds the attention to the memory; `MultiHeadAttention` unless given.
      feed_forward: builds the layer at each position, `FeedForward` unless given; called with D,
        `hidden_features` where it is given, `activation`, and dtypes.
        `functools.partial(FeedForward, gated=True, use_bias=False)` with `activation=jax.nn.silu`
        is SwiGLU.
      norm: Flax's `LayerNorm` or `RMSNorm`, or a partial application; `LayerNorm` unless given,
        with the variance computed from centred values: Flax's fast variance, E[x^2] - E[x]^2,
        loses float32's precision where the mean is large.
      norm_placement: "before", x + f(norm(x)); "after", norm(x + f(x)) as first published;
        "both", x + norm'(f(norm(x))) (sandwich); "branch", x + norm(f(x)); "none", x + f(x). A dict
        of these for some of attention, cross_attention and feed_forward, those left out "before".
      branch_norm: builds norm' of "both" and the norm of "branch", where it is another; any module
        built as a norm is, such as a learned scale of each feature (LayerScale).
      parallel: every sublayer reads the block's input, x + f(norm(x)) + g(norm'(x)), rather than
        what the one below has made of it.
      share_norm: of a parallel block: norm and norm' are one.
      activation: of the feed-forward layer.
      dropout_rate: of attention weights and of what each sublayer adds.
      attention_dropout_rate: of attention weights, where it is another.
      sequence_axis: of `MultiHeadAttention`: the axis of the mesh that splits the sequence.
      deterministic: True leaves dropout out; in NNX `model.train()` and `model.eval()` set it.
      dtype: of the computation.
      param_dtype: of the parameters.

    Xiong et al. 2020 (before); Vaswani et al. 2017, section 5.4 (after); Ding et al. 2021,
    section 2.2 (both); Liu et al. 2022, section 3.2 (branch); Touvron et al. 2021, section 2
    (LayerScale); Chowdhery et al. 2022 (PaLM), section 2 (parallel); Shazeer 2020 (gated).
    """

    _: dataclasses.KW_ONLY
    hidden_features: int | None = None
    memory_features: int | None = None
    attention: Callable[..., Any] | None = None
    cross_attention: Callable[..., Any] | None = None
    feed_forward: Callable[..., Any] | None = None
    norm: Callable[..., Any] | None = None
    norm_placement: str | Mapping[str, str] = "before"
    branch_norm: Callable[..., Any] | None = None
    parallel: bool = False
    share_norm: bool = False
    activation: Callable[[Array], Array] = jax.nn.relu
    dropout_rate: float = 0.0
    attention_dropout_rate: float | None = None
    sequence_axis: str | None = None
    deterministic: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32


@dataclasses.dataclass
class StackOptions(BlockOptions):
    """The options of a stack of blocks; they are fields of the Linen modules.

    Args:
      remat: keep only the input of each block for the backward pass, and compute the rest again;
        on a CPU what XLA compiles is then slower, and no smaller.
      shared_bias: added to the logits of every block's self-attention, a function
        (q_idx, kv_idx) -> numbers of one head; what it declares is created once for each head,
        and shared by all layers (T5's `positions.learned_buckets`).
      share_layers: one block, `block_0`, is applied as often as there are layers; masks and biases
        of a call may still differ.
      **options: of `BlockOptions`.

    Chen et al. 2016 (remat: "sublinear memory cost"); Raffel et al. 2020, section 2.1 (shared
    bias); Dehghani et al. 2019 (Universal Transformer) and Lan et al. 2020 (ALBERT), section 3.1
    (shared layers).
    """

    _: dataclasses.KW_ONLY
    remat: bool = False
    shared_bias: Any = None
    share_layers: bool = False


def options_of(kind: type[Options], operation: str, options: Mapping[str, Any]) -> Options:
    """Return the options that are given by name, completed by their defaults.

    Raises:
      TypeError: there is no option of that name.

    >>> options_of(StackOptions, "TransformerStack", {"remat": True}).norm_placement
    'before'
    """
    fields = [field.name for field in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    for name in options:
        if name not in fields:
            raise TypeError(
                f"{operation}: there is no option {name!r}; it takes {', '.join(fields)}."
            )
    return kind(**options)


def given_options(kind: type, options: Any) -> dict[str, Any]:
    """Return the options of one kind that an object has as attributes, by name.

    >>> given_options(BlockOptions, StackOptions(dropout_rate=0.5))["dropout_rate"]
    0.5
    """
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(kind)}


@dataclasses.dataclass(frozen=True)
class Norms:
    """Where the norms of each sublayer are, and whether those before sublayers are one."""

    placements: tuple[tuple[str, str], ...]
    are_shared: bool

    def names(self, sublayer: str) -> dict[str, str]:
        """Return what the norms of a sublayer are called, by where they are.

        >>> norms_of(BlockOptions(norm_placement="both")).names("feed_forward")
        {'before': 'feed_forward_norm', 'branch': 'feed_forward_branch_norm'}
        >>> norms_of(BlockOptions(parallel=True, share_norm=True)).names("feed_forward")
        {'before': 'attention_norm'}
        """
        roles = NORMS[dict(self.placements)[sublayer]]
        names = {where: f"{sublayer}_{name}" for where, name in roles.items()}
        return {**names, "before": "attention_norm"} if self.are_shared else names


def norms_of(given: BlockOptions) -> Norms:
    """Return where a block has norms.

    Raises:
      ValueError: an unknown placement or sublayer, or a placement that a parallel block lacks.
    """
    placed = placements(given.norm_placement)
    if given.parallel and "after" in placed.values():
        raise ValueError(
            "TransformerBlock: in a parallel block no norm comes after a sublayer; give "
            "norm_placement 'before', 'both', 'branch' or 'none', or leave out parallel."
        )
    have_before = all("before" in NORMS[placement] for placement in placed.values())
    if given.share_norm and not (given.parallel and have_before):
        raise ValueError(
            "TransformerBlock: share_norm needs parallel=True and a norm before every sublayer, "
            f"got parallel = {given.parallel} and norm_placement {given.norm_placement!r}."
        )
    return Norms(tuple(placed.items()), given.share_norm)


def placements(norm_placement: Any) -> dict[str, str]:
    """Return where the norms of each sublayer are.

    Raises:
      ValueError: an unknown placement or sublayer.

    >>> placements({"attention": "none"})["feed_forward"]
    'before'
    """
    is_one = not isinstance(norm_placement, Mapping)
    given: Any = dict.fromkeys(SUBLAYERS, norm_placement) if is_one else norm_placement
    for sublayer, placement in given.items():
        if sublayer not in SUBLAYERS or placement not in NORMS:
            names = ", ".join(repr(name) for name in NORMS)
            raise ValueError(
                f"TransformerBlock: norm_placement must be one of {names}, or a dict of these for "
                f"some of {', '.join(SUBLAYERS)}, got {placement!r} for {sublayer!r}."
            )
    return {sublayer: given.get(sublayer, "before") for sublayer in SUBLAYERS}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class ByLayer(ByValue):
    """Marks a function of the layer's number, which returns what an option is in that layer."""

    function: Callable[[int], Any]

    def __hash__(self) -> int:
        return super().__hash__()


def by_layer(function: Callable[[int], Any]) -> ByLayer:
    """Give each layer its own option: function(0) for the lowest, function(1) for the next ...

    >>> from attention_jax import masks
    >>> local = by_layer(lambda n: masks.Window(2, 0) if n % 2 == 0 else masks.Causal())
    >>> of_layer("TransformerStack", {"mask": local}, 3, num_layers=4)["mask"]
    Causal(offset=0)
    """
    return ByLayer(function)


def of_layer(
    operation: str, options: Mapping[str, Any], number: int, num_layers: int
) -> dict[str, Any]:
    """Return the options of one layer: entries of lists and tuples, and values of `by_layer`.

    Raises:
      ValueError: a list or tuple that does not have one entry for each layer.
    """
    chosen = {}
    for name, option in options.items():
        if isinstance(option, ByLayer):
            option = option.function(number)
        elif isinstance(option, list | tuple):
            if len(option) != num_layers:
                raise ValueError(
                    f"{operation}: {name} must have one entry for each of the {num_layers} "
                    f"layers, got {len(option)}; give as many, or by_layer(function)."
                )
            option = option[number]
        chosen[name] = option
    return chosen


def map_layers(function: Callable[[Any], Any], option: Any) -> Any:
    """Apply a function to an option, in each layer where layers have their own.

    >>> map_layers(abs, [-1, 2])
    [1, 2]
    """
    if isinstance(option, ByLayer):
        return ByLayer(lambda number: function(option.function(number)))
    if isinstance(option, list | tuple):
        return [function(of_one) for of_one in option]
    return function(option)


def attention_options(given: BlockOptions) -> dict[str, Any]:
    """Return what a block tells its attentions: nothing of what it does not ask for."""
    rate = given.attention_dropout_rate
    rate = given.dropout_rate if rate is None else rate
    dropped = {"dropout_rate": rate, "deterministic": given.deterministic} if rate else {}
    axis = given.sequence_axis
    return dropped if axis is None else {**dropped, "sequence_axis": axis}


def feed_forward_options(given: BlockOptions) -> dict[str, Any]:
    """Return what a block tells its feed-forward layer, dtypes apart."""
    sizes = {"hidden_features": given.hidden_features}
    return {"activation": given.activation, **(sizes if given.hidden_features is not None else {})}


def options_of_layers(given: StackOptions, num_heads: Any, num_layers: int) -> list[dict[str, Any]]:
    """Return the options of every block that has its own parameters, and its number of heads.

    Raises:
      ValueError: layers that are one and have options of their own, or too few or many of these.
    """
    options = {"num_heads": num_heads, **given_options(BlockOptions, given)}
    if given.share_layers:
        num_layers = min(num_layers, 1)
        for name, option in options.items():
            if isinstance(option, ByLayer | list | tuple):
                raise ValueError(
                    f"TransformerStack: with share_layers all layers are one, and {name} must be "
                    "one for all; give one, or leave out share_layers."
                )
    return [of_layer("TransformerStack", options, n, num_layers) for n in range(num_layers)]


def options_of_embedding(
    given: StackOptions, blocks: Sequence[dict[str, Any]], **own: Any
) -> dict[str, Any]:
    """Return the options of an embedding: dropout and dtypes of the lowest block, and its own."""
    first = blocks[0] if blocks else given_options(BlockOptions, given)
    names = ("dropout_rate", "deterministic", "dtype", "param_dtype")
    return {**{name: first[name] for name in names}, **own}


def options_of_last_norm(
    given: StackOptions, blocks: Sequence[dict[str, Any]]
) -> tuple[Any, dict[str, Any]] | None:
    """Return the norm after the last block and its dtypes; None where that ends with a norm."""
    last = blocks[-1] if blocks else given_options(BlockOptions, given)
    if placements(last["norm_placement"])["feed_forward"] == "after":
        return None
    return last["norm"], {name: last[name] for name in ("dtype", "param_dtype")}
