"""The measured programs: `attend` and its peers on the same inputs.

Every program takes query, key and value [1, S, N, H] in float32 (PyTorch in its own layout
[1, N, S, H]); `with_gradients` makes it also compute the gradients of all its arguments.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax import attend, bind, masks, scores
from experiments.benchmark.measure import Program, milliseconds, take_turns

Array = jax.Array

HAS_TORCH = importlib.util.find_spec("torch") is not None


class Shape(NamedTuple):
    """Length, heads and depth of a head."""

    length: int
    heads: int = 8
    depth: int = 64


def inputs(shape: Shape, num_arrays: int = 3) -> tuple[Array, ...]:
    """Return independent normal arrays [1, S, N, H]."""
    keys = jax.random.split(jax.random.key(0), num_arrays)
    size = (1, shape.length, shape.heads, shape.depth)
    return tuple(jax.random.normal(key, size) for key in keys)


def with_gradients(function: Callable[..., Array]) -> Callable[..., Any]:
    """Return a function that also computes the gradients of all arguments, for fixed cotangents."""

    def both(*arguments: Any) -> Any:
        result, pull = jax.vjp(function, *arguments)
        return result, pull(jnp.cos(result))

    return both


def ours(shape: Shape, backward: bool = False, **options: Any) -> Program:
    """`attend` with the given options."""
    return _program(functools.partial(attend, **options), shape, backward)


def jax_nn(shape: Shape, backward: bool = False, **options: Any) -> Program:
    """`jax.nn.dot_product_attention`."""
    function = functools.partial(jax.nn.dot_product_attention, **options)
    return _program(function, shape, backward)


PRODUCT_SHAPES = ((256, 512), (512, 512), (1024, 512), (1024, 1024), (2048, 512), (2048, 2048))
"""Queries and keys of a tile, of which the fastest is the limit of attention in tiles."""


def products_alone(shape: Shape) -> Program:
    """The products of attention and nothing else, in tiles of the shape that is fastest here.

    Each tile of q k^T is multiplied by its values; there is no softmax, and nothing is added up.
    """
    tiles = [(min(rows, shape.length), min(keys, shape.length)) for rows, keys in PRODUCT_SHAPES]
    programs = {
        tile: Program(functools.partial(_products, tile=tile), inputs(shape))
        for tile in dict.fromkeys(tiles)
    }
    costs = take_turns({tile: milliseconds(each) for tile, each in programs.items()}, repeats=3)
    return programs[min(costs, key=lambda tile: min(cost.cpu for cost in costs[tile]))]


def _products(query: Array, key: Array, value: Array, tile: tuple[int, int]) -> Array:
    heads = (jnp.moveaxis(x[0], 1, 0) for x in (query, key, value))
    return jax.lax.map(functools.partial(_products_of_head, tile), tuple(heads))


def _products_of_head(tile: tuple[int, int], arrays: tuple[Array, Array, Array]) -> Array:
    grid = [
        np.arange(0, len(x), size, dtype=np.int32) for x, size in zip(arrays, tile, strict=False)
    ]
    places = np.stack(np.meshgrid(*grid, indexing="ij"), axis=-1).reshape(-1, 2)
    visit = functools.partial(_products_of_tile, arrays, tile)
    return jax.lax.scan(visit, jnp.zeros_like(arrays[2]), jnp.asarray(places))[0]


def _products_of_tile(
    arrays: tuple[Array, Array, Array], tile: tuple[int, int], context: Array, place: Array
) -> tuple[Array, None]:
    query, key, value = arrays
    rows = jax.lax.dynamic_slice_in_dim(query, place[0], tile[0])
    keys, values = (jax.lax.dynamic_slice_in_dim(x, place[1], tile[1]) for x in (key, value))
    product = (rows @ keys.T) @ values
    return jax.lax.dynamic_update_slice_in_dim(context, product, place[0], 0), None


def packed(shape: Shape, document: int) -> Program:
    """`attend` within documents of one length, with the segment ids as an argument."""

    def function(query: Array, key: Array, value: Array, ids: Array) -> Array:
        return attend(query, key, value, mask=masks.Segment(ids, ids))

    ids = jnp.arange(shape.length, dtype=jnp.int32)[None, :] // document
    return Program(function, (*inputs(shape), ids))


def additive_ours(shape: Shape, backward: bool = False, **options: Any) -> Program:
    """`attend` with the additive score."""

    def function(query: Array, key: Array, value: Array, parameters: Any) -> Array:
        score = bind(scores.additive, **parameters)
        return attend(query, key, value, score=score, **options)

    return _additive_program(function, shape, backward)


def additive_textbook(shape: Shape, backward: bool = False) -> Program:
    """Additive attention as the formula says: tanh of an array of every pair and feature."""

    def function(query: Array, key: Array, value: Array, parameters: Any) -> Array:
        query = query @ parameters["query_weight"]
        key = key @ parameters["key_weight"] + parameters["bias"][None, None, None, :]
        features = jnp.tanh(query[:, :, None] + key[:, None, :])
        weights = jax.nn.softmax(features @ parameters["value"], axis=2)
        return jnp.einsum("btsn,bsnv->btnv", weights, value)

    return _additive_program(function, shape, backward)


def torch_dot(shape: Shape, backward: bool = False) -> Program:
    """PyTorch's `scaled_dot_product_attention`."""
    import torch.nn.functional  # pyright: ignore[reportMissingImports]

    return _torch_program(torch.nn.functional.scaled_dot_product_attention, shape, {}, backward)


def torch_additive(shape: Shape, backward: bool = False) -> Program:
    """The textbook formula in PyTorch."""
    import torch  # pyright: ignore[reportMissingImports]

    def function(query: Any, key: Any, value: Any, query_weight, key_weight, **vectors: Any) -> Any:
        query, key = query @ query_weight, key @ key_weight + vectors["bias"]
        features = torch.tanh(query[:, :, :, None] + key[:, :, None, :])
        return torch.softmax(features @ vectors["value_weight"], dim=3) @ value

    parameters = dict(_additive_parameters(shape))
    parameters["value_weight"] = parameters.pop("value")
    return _torch_program(function, shape, parameters, backward)


def _program(function: Callable[..., Array], shape: Shape, backward: bool) -> Program:
    return Program(with_gradients(function) if backward else function, inputs(shape))


def _additive_program(function: Callable[..., Array], shape: Shape, backward: bool) -> Program:
    program = _program(function, shape, backward)
    return program._replace(arguments=(*program.arguments, _additive_parameters(shape)))


def _additive_parameters(shape: Shape) -> dict[str, Array]:
    depth = shape.depth
    square = {"query_weight": (depth, depth), "key_weight": (depth, depth)}
    sizes = square | {"value": (depth,), "bias": (depth,)}
    keys = jax.random.split(jax.random.key(1), len(sizes))
    return {
        name: jax.random.normal(key, size) / depth**0.5
        for (name, size), key in zip(sizes.items(), keys, strict=True)
    }


def _torch_program(
    function: Callable[..., Any], shape: Shape, parameters: dict[str, Array], backward: bool
) -> Program:
    import torch  # pyright: ignore[reportMissingImports]

    def tensor(array: Array) -> Any:
        return torch.from_numpy(np.array(array)).requires_grad_(backward)

    tokens = [tensor(x.swapaxes(1, 2)) for x in inputs(shape)]
    weights = {name: tensor(x) for name, x in parameters.items()}
    return Program(functools.partial(_run_in_torch, function, tokens, weights, backward), jit=False)


def _run_in_torch(
    function: Callable[..., Any], tokens: list[Any], weights: dict[str, Any], backward: bool
) -> None:
    """Compute a result and, if asked for, the gradients of all arguments."""
    import torch  # pyright: ignore[reportMissingImports]

    with torch.set_grad_enabled(backward):
        result = function(*tokens, **weights)
        if backward:
            leaves = [*tokens, *weights.values()]
            torch.autograd.grad(result, leaves, torch.cos(result.detach()))
