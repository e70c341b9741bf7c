"""One operator: any score, any mask, any bias and normalizer, by the implementation that fits."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax import masks
from attention_jax.base import placement
from attention_jax.base.binding import BiasLike, Sliced
from attention_jax.base.placement import Where
from attention_jax.base.remembering import one_call
from attention_jax.base.trees import flattened
from attention_jax.base.typing import AnyNormalizer, AnyScore, HeadMap
from attention_jax.implementations import (
    choice,
    constants,
    cudnn,
    describing,
    mixed,
    mixed_choice,
    mixed_tiled,
    programs,
)
from attention_jax.implementations.choice import IMPLEMENTATIONS
from attention_jax.implementations.dense import dense
from attention_jax.implementations.head import SAVED, Attended, Head
from attention_jax.implementations.lifting import lift
from attention_jax.implementations.mixed_heads import Heads
from attention_jax.implementations.pallas.attending import pallas
from attention_jax.implementations.pallas.choosing import can_lower_for_gpu
from attention_jax.implementations.tiled import tiled
from attention_jax.implementations.tiles import Plan
from attention_jax.masks import as_mask
from attention_jax.normalizers import softmax
from attention_jax.operands import Operand, heads, operands
from attention_jax.request import Request
from attention_jax.scores import scaled_dot
from attention_jax.statistics import Statistics

__all__ = ["IMPLEMENTATIONS", "attend", "explain"]

Array = jax.Array


def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    score: AnyScore | Sliced = scaled_dot,
    mask: masks.MaskLike = None,
    bias: BiasLike = None,
    normalizer: AnyNormalizer | Sliced = softmax,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    implementation: str | None = None,
    tile_sizes: tuple[int, int] | None = None,
    return_weights: bool = False,
    return_logsumexp: bool = False,
    statistics: Statistics | None = None,
    mix_logits: HeadMap | Sliced | None = None,
    mix_weights: HeadMap | Sliced | None = None,
) -> Any:
    r"""Attention: context_i = sum_j normalizer(score(q_i, k_j) + bias_ij)_j v_j, j as masked.

    A query that may attend to nothing gets zeros and zero gradients. NaN or Inf in a masked key
    or value reaches nothing; attended, it makes NaN of that query's context.

    Accelerators multiply operands in half precision as they are and add up in float32, a CPU
    multiplies float32. `jax.default_matmul_precision`, where `attend` is called, holds for its
    products and their derivatives; above the default, no operand is rounded.

    Args:
      query: [B, T, N, Hq].
      key: [B, S, K, Hk]; K divides N, and each key head serves N / K query heads.
      value: [B, S, K, V].
      score: a score of one head (`attention_jax.scores`, or your own function), bound with `bind`
        if it has parameters; `per_head` of it if every query head has its own, `per_example` if
        every example has.
      mask: a mask (`attention_jax.masks`), a function (q_idx, kv_idx) -> bool, or a boolean array
        that broadcasts to [B, N, T, S]. True = may attend.
      bias: added to the logits: an array that broadcasts to [B, N, T, S], or a function
        (q_idx, kv_idx) -> numbers, bound and marked like a score.
      normalizer: from logits to weights (`attention_jax.normalizers`).
      dropout_rate: share of weights that are dropped, in [0, 1).
      dropout_key: a `jax.random` key; which pairs are dropped depends on it, on example, head
        and position alone, whatever the implementation.
      implementation: "dense" holds all T x S weights; "tiled" never does, in memory linear in T
        and S, with every derivative; "pallas" does so by kernels generated for TPU and GPU;
        "cudnn" is NVIDIA's kernel, for plain dot products in half precision. A name is done or
        refused; None takes "dense" where weights are asked for or all pairs fit in one tile,
        "cudnn" where it applies, then "pallas" where a program is lowered for TPU or GPU, is not
        spread over devices by an automatic mesh, and consists of what kernels are known to be
        lowered from, and else "tiled".
      tile_sizes: queries and keys a tile; None chooses from shapes, mask and device.
      return_weights: also return the weights [B, N, T, S], after dropout.
      return_logsumexp: also return the log of the softmax normalizer, [B, T, N], in float32 or
        better; -inf for a query that may attend to nothing.
      statistics: also return statistics (`attention_jax.statistics`) by these names, such as
        {"entropy": statistics.entropy}: of weights that need not be held, in float32 or better;
        of mixed logits [.., M] and mixed weights [.., O] where maps mix heads.
      mix_logits: a map across heads (`attention_jax.head_maps`), [N, T, S] -> [M, T, S], of the
        logits before the normalizer; what the mask leaves out counts as zero.
      mix_weights: a map across heads of the weights after it, [M, T, S] -> [O, T, S]; values then
        have a number of heads that divides O, and the context has O heads. Dropout follows it.

    Returns:
      Context [B, T, N, V] in the dtype of `value`; with `return_weights`, `return_logsumexp` or
      `statistics` an `Attended`, the named tuple (context, weights, logsumexp, statistics) with
      None for what was not asked for.

    Raises:
      ShapeError: operands that do not fit each other.
      ValueError: an argument out of range, or something the implementation cannot do.
      TypeError: an argument of the wrong type.

    Vaswani et al. 2017, equation 1, for a general score; Bahdanau, Cho and Bengio 2015.

    >>> x = jax.random.normal(jax.random.key(0), (2, 5, 4, 8))
    >>> attend(x, x[:, :, :2], x[:, :, :2], mask=masks.Causal()).shape
    (2, 5, 4, 8)
    """
    request = Request.of(
        query,
        key,
        value,
        score=score,
        mask=mask,
        bias=bias,
        normalizer=normalizer,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        implementation=implementation,
        tile_sizes=tile_sizes,
        return_weights=return_weights,
        return_logsumexp=return_logsumexp,
        statistics=statistics,
        mix_logits=mix_logits,
        mix_weights=mix_weights,
    )
    with one_call():
        attended = programs.call(_attended, request)
    return attended if return_weights or return_logsumexp or statistics else attended.context


def explain(
    query: Any,
    key: Any,
    value: Any,
    *,
    score: AnyScore | Sliced = scaled_dot,
    mask: masks.MaskLike = None,
    bias: BiasLike = None,
    normalizer: AnyNormalizer | Sliced = softmax,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    implementation: str | None = None,
    tile_sizes: tuple[int, int] | None = None,
    return_weights: bool = False,
    return_logsumexp: bool = False,
    statistics: Statistics | None = None,
    mix_logits: HeadMap | Sliced | None = None,
    mix_weights: HeadMap | Sliced | None = None,
    platform: str | None = None,
) -> describing.Choice:
    """Tell what `attend` would run for the same arguments: tiles of each kind, operations, bytes.

    Nothing is computed. `bytes` are those of temporaries forward, and for an accelerator
    `gradient_bytes` those of gradients, as its compiler allocates them. The arguments are those of
    `attend`; the arrays [B, T, N, H] may be `jax.ShapeDtypeStruct`. `platform` is "cpu", "gpu" or
    "tpu", that of this process unless given.

    Raises:
      ValueError: another platform; or what the implementation cannot do there.
      ShapeError, TypeError: as `attend`.

    >>> x = jax.ShapeDtypeStruct((1, 4096, 8, 64), "float32")
    >>> found = explain(x, x, x, mask=masks.Causal(), tile_sizes=(512, 512))
    >>> found.implementation, found.empty, found.partial, found.full
    ('tiled', 28, 8, 28)
    >>> print(explain(x, x, x, mask=masks.Causal(), platform="tpu"))
    pallas: 8 heads, tiles of 512 x 512: 28 empty (skipped), 8 partial, 28 full
    ...
    kernels of score scaled_dot, mask Causal(offset=0)
    """
    request_of = functools.partial(
        Request.of,
        score=score,
        bias=bias,
        normalizer=normalizer,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        implementation=implementation,
        tile_sizes=tile_sizes,
        return_weights=return_weights,
        return_logsumexp=return_logsumexp,
        statistics=statistics,
        mix_logits=mix_logits,
        mix_weights=mix_weights,
    )
    explained = functools.partial(_explained, choice.known_platform(platform), request_of)
    mask = as_mask(mask)
    if programs.is_staged():
        return jax.eval_shape(functools.partial(explained, mask), query, key, value)
    late = constants.with_constants(mask)
    return jax.eval_shape(*flattened(explained, late, query, key, value))


def _attended(request: Request, where: Where, dtype: Any = None) -> Attended:
    """Choose an implementation and run it over all heads and examples; see `lift` for `where`.

    The context is in `dtype`; that of the value unless given.
    """
    name = choice.choose(request, where.platform)
    dtype = request.value.dtype if dtype is None else dtype
    apart = None if name == "dense" else mixed_choice.of_contexts(request)
    if apart is not None:
        context = _attended(apart, where, request.dtype).context
        mixed_context = mixed_choice.mixed_contexts(request.mix_weights, context)
        return Attended(mixed_context.astype(dtype))
    if request.implementation is None and name != "dense":
        kernels = [] if where.spread else _with_kernels(request, where, name)
        if kernels:
            return _by_kernels((request, dtype), where, kernels, name)
        name = "tiled" if name == "pallas" else name
    if name == "cudnn" and request.implementation is None and where.platform is None:
        return _by_platform(request, where, dtype)
    if name == "cudnn":
        return Attended(cudnn.attend(request).astype(dtype))
    if request.mixes:
        return _attended_together(request, name, where)
    given = operands(request, as_given=name in ("tiled", "pallas"))
    of_head: Any = functools.partial(dense, with_logsumexp=request.return_logsumexp)
    one_head = functools.partial(_one_head, (request, dtype), given)
    sequential, elsewhere = "", None
    if name == "tiled":
        of_plan = functools.partial(tiled, products=request.products)
        of_head, other, plan = _tiled(request, where, of_plan)
        of_shared = functools.partial(other or of_head, apart=True)
        other = other and functools.partial(one_head, other)
        axes = given["mask"].axes
        sequential, elsewhere = "BKG", choice.elsewhere(other, plan, axes, where.platform)
        if request.groups > 1:
            elsewhere = elsewhere._replace(spread=functools.partial(one_head, of_shared))
    elif name == "pallas":
        plan = choice.plan_of_kernels(request, where.platform)
        of_head = functools.partial(
            pallas,
            plan=plan,
            products=request.products,
            shares_keys=request.groups > 1,
            only_on=None if where.platform == "cpu" else where.platform,
        )
    one_head = functools.partial(one_head, of_head)
    axes = [letters for operand in given.values() for letters in operand.axes]
    letters = jax.tree.map(lambda x: x.replace("N", heads(request)), _letters(request))
    lifted = lift(
        one_head, axes, letters, f"B{heads(request)}", sequential, SAVED, where, elsewhere
    )
    leaves = [leaf for operand in given.values() for leaf in operand.leaves]
    if name == "pallas":  # vectorised, NumPy's arrays would be constants of its derivatives
        leaves = [jnp.asarray(leaf) for leaf in leaves]
    attended = lifted(*leaves)
    ungrouped = functools.partial(_ungrouped, request)
    return jax.tree.map(ungrouped, attended, jax.tree.broadcast(letters, attended))


def _attended_together(request: Request, name: str, where: Where) -> Attended:
    """Run all heads of an example together, as maps mix them, mapped over the examples."""
    given = operands(request, as_given=name == "tiled")
    of_example = functools.partial(_one_example, request, given)
    of_heads: Any = functools.partial(mixed.dense, with_logsumexp=request.return_logsumexp)
    sequential, elsewhere = "", None
    if name == "tiled":
        by_context = mixed_choice.mixes_contexts(request)
        how = {"counts": request.counts, "by_context": by_context, "products": request.products}
        of_heads, other, plan = _tiled(request, where, functools.partial(mixed_tiled.tiled, **how))
        other = other and functools.partial(of_example, other)
        sequential, elsewhere = "B", choice.elsewhere(other, plan, given["mask"].axes)
    axes = [letters for operand in given.values() for letters in operand.axes]
    lifted = lift(
        functools.partial(of_example, of_heads),
        axes,
        _letters(request),
        "B",
        sequential,
        SAVED,
        where,
        elsewhere,
    )
    return lifted(*(leaf for operand in given.values() for leaf in operand.leaves))


def _letters(request: Request) -> Attended:
    """Return the letters of the axes of each result."""
    of_each = {name: f"B{each.axis}N" for name, each in (request.statistics or {}).items()}
    return Attended("BTN", "BN", "BTN", of_each or None)  # type: ignore[arg-type]


def _with_kernels(request: Request, where: Where, name: str) -> list[str]:
    """Return the accelerators whose kernels are chosen, of those the program may be lowered for."""
    if where.platform is not None:
        return [where.platform] if name == "pallas" else []
    able = [of for of in ("tpu", "gpu") if of != "gpu" or can_lower_for_gpu()]
    return [of for of in able if choice.kernels_lack(request, of) is None]


def _by_kernels(
    asked: tuple[Request, Any], where: Where, kernels: list[str], name: str
) -> Attended:
    """Run kernels where the program is lowered for an accelerator that has them, and not spread.

    A kernel is run on one device, or on each within `shard_map`.
    """
    request, dtype = asked
    leaves, structure = jax.tree.flatten(request)
    arrays = [leaf for leaf in leaves if isinstance(leaf, Array)]
    run = functools.partial(_rebuilt, structure, (leaves, dtype))
    if where.platform is not None and where.spread is False:
        return run("pallas", where, *arrays)
    ways: dict[str, Any] = {}
    for platform in kernels:
        names = ("cuda", "rocm") if platform == "gpu" else (platform,)
        ways |= dict.fromkeys(names, functools.partial(run, "pallas", Where(False, platform)))
    if name == "cudnn":
        ways["cuda"] = functools.partial(run, "cudnn", where)
    # Where both accelerators have kernels, what is left is a CPU.
    rest = Where(False, "cpu") if len(kernels) > 1 else where._replace(spread=False)
    one = functools.partial(_on_platform, ways, functools.partial(run, "tiled", rest))
    many = functools.partial(run, "tiled", where._replace(spread=True))
    chosen = one if where.spread is False else functools.partial(_if_spread, many, one)
    # What the backward pass needs of each platform is the same, and the rest is computed again.
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED)
    return jax.checkpoint(chosen, policy=policy, prevent_cse=False)(*arrays)


def _rebuilt(
    structure: Any, rest: tuple[list[Any], Any], implementation: str, where: Where, *arrays: Array
) -> Attended:
    """Attend by an implementation, to a request whose arrays are given."""
    (leaves, dtype), those = rest, iter(arrays)
    leaves = [next(those) if isinstance(leaf, Array) else leaf for leaf in leaves]
    request = jax.tree.unflatten(structure, leaves)
    request = dataclasses.replace(request, implementation=implementation)
    return _attended(request, where, dtype)


def _if_spread(many: Any, one: Any, *arrays: Array) -> Attended:
    return jax.lax.cond(placement.is_spread(arrays[0]), many, one, *arrays)


def _on_platform(ways: dict[str, Any], tiles: Any, *arrays: Array) -> Attended:
    return jax.lax.platform_dependent(*arrays, default=tiles, **ways)


def _by_platform(request: Request, where: Where, dtype: Any) -> Attended:
    """Run cuDNN where the program is lowered for NVIDIA, and tiles elsewhere."""

    def kernel(query: Array, key: Array, value: Array) -> Array:
        given = dataclasses.replace(request, query=query, key=key, value=value)
        return cudnn.attend(given).astype(dtype)

    tiles = functools.partial(_in_tiles, request, where, dtype)
    arrays = request.query, request.key, request.value
    return Attended(jax.lax.platform_dependent(*arrays, cuda=kernel, default=tiles))


def _in_tiles(
    request: Request, where: Where, dtype: Any, query: Array, key: Array, value: Array
) -> Array:
    arrays = {"query": query, "key": key, "value": value}
    tiled_request = dataclasses.replace(request, implementation="tiled", **arrays)
    return _attended(tiled_request, where, dtype).context


def _explained(
    platform: str, request_of: Any, mask: masks.Mask, query: Array, key: Array, value: Array
) -> describing.Choice:
    request = request_of(query, key, value, mask=constants.without_constants(mask))
    with one_call():
        found = describing.describe(request, platform)
    operands(request)  # refuses what does not fit
    return found


def _tiled(request: Request, where: Where, of_plan: Any) -> tuple[Any, Any, Plan]:
    """Return tiled attention for CPUs and for other platforms, and the tiles of the latter.

    `of_plan` is attention that waits for its plan. None stands for the second if it is the same.
    """
    if where.platform is not None:
        plan = choice.plan_for(request, where.platform)
        return functools.partial(of_plan, plan=plan), None, plan
    sized = {
        platform: dataclasses.replace(request, tile_sizes=choice.tile_for(request, platform))
        for platform in ("cpu", "tpu")
    }
    on_cpu = choice.plan_for(sized["cpu"], "cpu")
    here = functools.partial(of_plan, plan=on_cpu)
    if sized["tpu"].tile_sizes == sized["cpu"].tile_sizes:
        return here, None, on_cpu
    other = choice.plan_for(sized["tpu"], "tpu")
    return here, functools.partial(of_plan, plan=other), other


def _one_head(
    wanted: tuple[Request, Any], given: dict[str, Operand], of_head: Any, *leaves: Any
) -> Attended:
    """Run an implementation on the arrays of one head."""
    rest = iter(leaves)
    built = {name: part.build([next(rest) for _ in part.leaves]) for name, part in given.items()}
    return _wanted(*wanted, of_head(Head(**built)))


def _one_example(
    request: Request, given: dict[str, Operand], of_heads: Any, *leaves: Any
) -> Attended:
    """Run an implementation on the arrays of all heads of an example."""
    return _wanted(request, request.value.dtype, of_heads(Heads.of(given, leaves)))


def _wanted(request: Request, dtype: Any, found: Attended) -> Attended:
    """Leave out what is not asked for."""
    return found._replace(
        context=found.context.astype(dtype),
        weights=found.weights if request.return_weights else None,
        logsumexp=found.logsumexp if request.return_logsumexp else None,
    )


def _ungrouped(request: Request, x: Array, letters: str) -> Array:
    """Join the axes K and G to N."""
    axis = letters.index("K")
    end = axis + len(heads(request))
    return x.reshape(x.shape[:axis] + (request.sizes["N"],) + x.shape[end:])
