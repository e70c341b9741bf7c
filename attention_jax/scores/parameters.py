"""Names, shapes and the papers' initialisers of what each score has to learn."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from jax.nn import initializers

from attention_jax.base.binding import rule
from attention_jax.base.parameters import (
    Parameter,
    initializer,
    luong_uniform,
    one_size,
    require_depths,
)
from attention_jax.scores import formulas, networks


@rule(formulas.bilinear, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Parameter]:
    require_depths("bilinear", query_depth=query_depth, key_depth=key_depth)
    return {"weight": Parameter((query_depth, key_depth), luong_uniform)}


@rule(formulas.low_rank_bilinear, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Parameter]:
    """Give the logits of unit-variance rows variance one; the paper names no initialiser."""
    require_depths("low_rank_bilinear", query_depth=query_depth, key_depth=key_depth)
    rank = one_size("low_rank_bilinear", attention_size, min(query_depth, key_depth))
    by_depth_and_rank = initializer(initializers.normal, (key_depth * rank) ** -0.5)
    return {
        "query_weight": Parameter((query_depth, rank), initializer(initializers.lecun_normal)),
        "key_weight": Parameter((key_depth, rank), by_depth_and_rank),
    }


@rule(formulas.shared_projection, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Parameter]:
    require_depths("shared_projection", query_depth=query_depth)
    size = one_size("shared_projection", attention_size, query_depth)
    return {"weight": Parameter((query_depth, size), initializer(initializers.glorot_uniform))}


@rule(networks.additive, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Parameter]:
    """Bahdanau, Cho and Bengio 2015, appendix B.1: W of variance 0.001^2, v and b zero."""
    require_depths("additive", query_depth=query_depth, key_depth=key_depth)
    size = one_size("additive", attention_size, query_depth)
    return {
        "query_weight": Parameter((query_depth, size), initializer(initializers.normal, 0.001)),
        "key_weight": Parameter((key_depth, size), initializer(initializers.normal, 0.001)),
        "value": Parameter((size,), initializers.zeros),
        "bias": Parameter((size,), initializers.zeros),
    }


@rule(networks.concat, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Any]:
    require_depths("concat", query_depth=query_depth, key_depth=key_depth)
    layers = attention_size if isinstance(attention_size, Sequence) else [attention_size]
    if not layers:
        raise ValueError("concat: attention_size must be one number for each layer, got ().")
    sizes = [one_size("concat", size, default=query_depth) for size in layers]
    sizes = [query_depth + key_depth, *sizes]
    shapes = list(itertools.pairwise(sizes))
    return {
        "weights": [Parameter(shape, luong_uniform) for shape in shapes],
        "biases": [Parameter((size,), initializers.zeros) for size in sizes[1:]],
        "value": Parameter((sizes[-1],), luong_uniform),
    }


@rule(networks.normalized_additive, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Parameter]:
    """Raffel et al. 2017, section 2.4: the gain starts at 1 / sqrt(A); under softmax r is idle."""
    require_depths("normalized_additive", query_depth=query_depth, key_depth=key_depth)
    size = one_size("normalized_additive", attention_size, query_depth)
    return {
        "query_weight": Parameter((query_depth, size), initializer(initializers.lecun_normal)),
        "key_weight": Parameter((key_depth, size), initializer(initializers.lecun_normal)),
        "value": Parameter((size,), initializer(initializers.normal, 1.0)),
        "bias": Parameter((size,), initializers.zeros),
        "gain": Parameter((), initializer(initializers.constant, size**-0.5)),
        "offset": Parameter((), initializers.zeros),
    }


@rule(formulas.trilinear, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Parameter]:
    """Give the logits of unit-variance rows variance one; the paper names no initialiser."""
    require_depths("trilinear", query_depth=query_depth)
    draw = initializer(initializers.normal, (3 * query_depth) ** -0.5)
    names = ("query_weight", "key_weight", "product_weight")
    return {name: Parameter((query_depth,), draw) for name in names}


@rule(formulas.gaussian, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Parameter]:
    """Give q . k the factor 1 / sqrt(H) that it has in the scaled dot product."""
    require_depths("gaussian", query_depth=query_depth)
    return {"width": Parameter((), initializer(initializers.constant, query_depth**0.25))}


@rule(formulas.location, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Parameter]:
    """Take `attention_size` as the number of positions that keys may have."""
    require_depths("location", query_depth=query_depth, attention_size=attention_size)
    length = one_size("location", attention_size, query_depth)
    return {"weight": Parameter((query_depth, length), luong_uniform)}


@rule(formulas.cosine, "parameters")
def _(query_depth: Any, key_depth: Any, attention_size: Any) -> dict[str, Parameter]:
    """Liu et al. 2022 (Swin v2), section 3.3: a learned scalar; theirs starts at 0.1."""
    return {"temperature": Parameter((), initializer(initializers.constant, 0.1))}
