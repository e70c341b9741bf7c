"""Whether generated kernels are chosen where no implementation is asked for.

Functions are traced on one tile, as a kernel computes it, and what they consist of is compared with
the operations that both compilers are known to take. Nothing is lowered, so that it is cheap; and
what is not known to be taken is left to `tiled`, so that it is safe.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxprs_in_params

from attention_jax.base.binding import function_of
from attention_jax.implementations.pallas.replay import in_kernel
from attention_jax.implementations.pallas.splitting import Split, split
from attention_jax.implementations.pallas.tables import TooManyEntriesError
from attention_jax.masks import Mask
from attention_jax.normalizers import Exponential, LogSum, name_of, streaming
from attention_jax.operands import operands
from attention_jax.request import Request

Array = jax.Array

ON_BOTH = {
    *("abs", "add", "add_any", "and", "broadcast_in_dim", "ceil", "clamp", "cond"),
    *("convert_element_type", "copy", "cos", "custom_jvp_call", "div", "dot_general", "eq", "exp"),
    *("exp2", "floor", "ge", "gt", "integer_pow", "iota", "jit", "le", "log", "log1p", "logistic"),
    *("lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "reduce_max", "reduce_min"),
    *("reduce_sum", "rem", "reshape", "rsqrt", "scan", "select_n", "shift_left", "sign", "sin"),
    *("shift_right_arithmetic", "shift_right_logical", "sqrt", "square", "squeeze"),
    *("stop_gradient", "sub", "tanh", "transpose", "while", "xor"),
}
"""Primitives that kernels for TPU and for GPU are lowered from."""

MOST_PADDING = 2.0
"""At most so many times the pairs that there are may be computed, in tiles that stick out."""

MOST_BYTES = {"tpu": 10 * 2**20, "gpu": 2**19}
"""What the numbers of a tile that are held at once may take: most of the vector memory that a TPU
kernel may use, and twice the registers of an SM."""

MULTIPLES = {"tpu": (8, 128), "gpu": (16, 16)}
"""Tiles of other sizes are no blocks of a kernel."""

LEAST_DEPTH, MOST_DEPTH = {"tpu": 1, "gpu": 16}, {"tpu": 256, "gpu": 128}
"""Shallower heads are no operand of the matrix units, deeper ones fill the memory of a kernel."""


KERNEL_TILES = {"tpu": (512, 256, 128), "gpu": (64,), "cpu": (128,)}
"""Queries, or keys, of a tile of a kernel; traced on a CPU, as many as suit both accelerators."""

CLOSE = 1.25
"""The first of them is taken that pads a length to at most so many times; else the last."""


def lacks(request: Request, platform: str, tile: tuple[int, int]) -> str | None:
    """Say why kernels are not chosen on a platform for tiles of a size, or None if they are.

    What `choice.lacks` refuses is known to be absent.
    """
    if not all(isinstance(size, int) for size in request.sizes.values()):
        return "a size is a symbol"
    if any(size % of for size, of in zip(tile, MULTIPLES[platform], strict=True)):
        return f"tiles of {tile[0]} x {tile[1]} are no blocks of a kernel"
    pairs = [-(-length // size) * size for length, size in zip(request.pairs, tile, strict=True)]
    if math.prod(pairs) > MOST_PADDING * math.prod(request.pairs):
        return (
            f"[T, S] = {list(request.pairs)} would be padded to {pairs} by tiles of "
            f"{tile[0]} x {tile[1]}"
        )
    depths = sorted({request.sizes[letter] for letter in "QHV"})
    least, most = LEAST_DEPTH[platform], MOST_DEPTH[platform]
    if not least <= depths[0] <= depths[-1] <= most:
        return f"depths of heads must be {least} to {most}, got {depths}"
    return _of_tile(request, platform, tile)


def can_lower_for_gpu() -> bool:
    """Tell whether kernels for a GPU can be lowered in this process.

    From jax 0.11 on, Pallas asks for which GPU: the default device, or the mesh's abstract one.
    """
    if jax.__version_info__ < (0, 11):
        return True
    of_mesh = jax.sharding.get_abstract_mesh().abstract_device
    default = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
    platforms = {default if isinstance(default, str) else default.platform}
    platforms |= set() if of_mesh is None else {of_mesh.platform}
    return not platforms.isdisjoint({"gpu", "cuda", "rocm"})


def _of_tile(request: Request, platform: str, tile: tuple[int, int]) -> str | None:
    """Say what of the functions of a tile is not known to be a kernel on a platform."""
    given = operands(request, as_given=True)
    shapes = [
        of_one_head(leaf, letters)
        for operand in given.values()
        for leaf, letters in zip(operand.leaves, operand.axes, strict=True)
    ]
    traced: list[Jaxpr] = []
    trace = functools.partial(_trace, given, tile, math.prod(request.pairs), traced)
    try:
        jax.eval_shape(trace, *shapes)
    except TooManyEntriesError as error:
        return error.reason
    for jaxpr in traced:
        reason = _refused(jaxpr, platform)
        if reason is not None:
            return reason
    return None


def of_one_head(leaf: Any, letters: str) -> jax.ShapeDtypeStruct:
    """Return what one head has of an array whose leading axes have these letters."""
    mapped = sum(letter in "BKGN" for letter in letters)
    return jax.ShapeDtypeStruct(jnp.shape(leaf)[mapped:], jnp.result_type(leaf))


def _trace(
    given: Any, tile: tuple[int, int], pairs: int, traced: list[Jaxpr], *leaves: Any
) -> None:
    """Trace the functions of one head on a tile, with the derivative of the logits."""
    rest = iter(leaves)
    built = {name: part.build([next(rest) for _ in part.leaves]) for name, part in given.items()}
    score, bias, mask, normalizer = (built[x] for x in ("score", "bias", "mask", "normalizer"))
    rows = [
        jax.eval_shape(of_row, jax.ShapeDtypeStruct((size, built[name].shape[1]), jnp.float32))
        for name, of_row, size in zip(
            ("query", "key"), (score.query_map, score.key_map), tile, strict=True
        )
    ]
    functions, structure = jax.tree.flatten((score, bias if callable(bias) else None))
    logits = split(functools.partial(_logits, structure), rows, tile, functions, pairs)
    traced += _parts(logits, rows, functions, tile, is_differentiated=True)
    how = streaming(normalizer)
    if not isinstance(how, Exponential):
        numbers, structure = jax.tree.flatten(normalizer)
        data = [jax.ShapeDtypeStruct(tile, jnp.float32)] * 2
        weights = split(functools.partial(_weights, structure), data, tile, numbers, pairs)
        traced += _parts(weights, data, numbers, tile, is_differentiated=True)
    fields, structure = jax.tree.flatten(mask)
    allowed = split(functools.partial(_allowed, structure), [], tile, fields, pairs)
    traced += _parts(allowed, [], fields, tile)


def _logits(
    structure: Any, data: Sequence[Array], q_idx: Array, kv_idx: Array, leaves: Any
) -> Array:
    score, bias = jax.tree.unflatten(structure, leaves)
    logits = score.paired(*data, q_idx[:, 0], kv_idx[0])
    return logits if bias is None else logits + jnp.asarray(bias(q_idx, kv_idx), logits.dtype)


def _weights(
    structure: Any, data: Sequence[Array], q_idx: Array, kv_idx: Array, leaves: Any
) -> Array:
    how = streaming(jax.tree.unflatten(structure, leaves))
    assert how is not None
    logits, base = data
    if isinstance(how, LogSum):
        logits = how.exponent(logits)
    return how.weight(logits, base[:, 0])


def _allowed(structure: Any, data: Any, q_idx: Array, kv_idx: Array, leaves: Any) -> Array:
    return jax.tree.unflatten(structure, leaves)(q_idx, kv_idx)


def _parts(
    function: Split,
    data: Sequence[Any],
    leaves: Sequence[Any],
    tile: tuple[int, int],
    is_differentiated: bool = False,
) -> Iterator[Jaxpr]:
    """Yield what a kernel computes of a function of a tile, and of its derivative."""
    indices = [jax.ShapeDtypeStruct(size, jnp.int32) for size in ((tile[0], 1), (1, tile[1]))]
    first = [jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for x in indices]
    looked = jax.eval_shape(functools.partial(function.looked_up, leaves), tuple(first))
    of_tile = [
        [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in part]
        for part in (looked.of_query, looked.of_key)
    ]
    looked = looked._replace(of_query=of_tile[0], of_key=of_tile[1])
    compute = functools.partial(in_kernel, function)
    yield jax.make_jaxpr(compute)(data, *indices, looked).jaxpr
    if is_differentiated:
        derivative = functools.partial(in_kernel, functools.partial(_pulled_back, function))
        change = jax.ShapeDtypeStruct(tile, jnp.float32)
        yield jax.make_jaxpr(derivative)(change, data, *indices, looked).jaxpr


def _pulled_back(
    function: Split, change: Array, data: Any, q_idx: Array, kv_idx: Array, looked: Any
) -> Any:
    leaves, structure = jax.tree.flatten((data, looked))
    moves = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
    here = leaves, structure
    of_moving = functools.partial(_of_moving, function, here, moves, (q_idx, kv_idx))
    result, pull = jax.vjp(of_moving, [x for x, move in zip(leaves, moves, strict=True) if move])
    return pull(jnp.broadcast_to(change, result.shape))


def _of_moving(function: Split, here: Any, moves: list[bool], indices: Any, moving: Any) -> Array:
    leaves, structure = here
    those = iter(moving)
    leaves = [next(those) if move else x for x, move in zip(leaves, moves, strict=True)]
    data, looked = jax.tree.unflatten(structure, leaves)
    q_idx, kv_idx = indices
    return function(data, q_idx, kv_idx, looked)


def _refused(jaxpr: Jaxpr, platform: str) -> str | None:
    """Say which part of a computation is not known to be a kernel's."""
    for equation in _equations(jaxpr):
        name = equation.primitive.name
        if name not in ON_BOTH:
            return f"the primitive {name} is not known to be one of kernels"
        shapes = [x.aval.shape for x in equation.outvars]
        if platform == "gpu" and any(size & (size - 1) for shape in shapes for size in shape):
            return f"sizes in a GPU's kernel are powers of two, got {shapes[0]}"
    held = _held(jaxpr)
    if held > MOST_BYTES[platform]:
        return f"a tile would hold {held / 2**20:.3g} MiB at once"
    return None


def _equations(jaxpr: Jaxpr) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inner(equation):
            yield from _equations(inner)


def _inner(equation: Any) -> list[Jaxpr]:
    """Return the bodies of a call, loop or condition."""
    inner = jaxprs_in_params(equation.params)
    return [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in inner]


def _held(jaxpr: Jaxpr) -> int:
    """Return the most bytes that are alive at once, those of inner loops with all around them."""
    last = {}
    for n, equation in enumerate(jaxpr.eqns):
        last |= {atom: n for atom in equation.invars if not isinstance(atom, Literal)}
    last |= {atom: len(jaxpr.eqns) for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    alive = {atom for atom in (*jaxpr.invars, *jaxpr.constvars) if atom in last}
    most = now = sum(map(_bytes, alive))
    for n, equation in enumerate(jaxpr.eqns):
        new = [x for x in equation.outvars if x in last]
        now += sum(map(_bytes, new))
        most = max(most, now + max(map(_held, _inner(equation)), default=0))
        alive |= set(new)
        over = [atom for atom in alive if last[atom] <= n]
        now -= sum(map(_bytes, over))
        alive -= set(over)
    return most


def _bytes(atom: Any) -> int:
    return math.prod(atom.aval.shape) * atom.aval.dtype.itemsize


def kernel_tile(request: Request, platform: str) -> tuple[int, int]:
    """Return queries and keys of a tile of a kernel."""
    if request.tile_sizes is not None:
        return request.tile_sizes
    sizes = KERNEL_TILES.get(platform, KERNEL_TILES["cpu"])
    rows, columns = (
        next((x for x in sizes if -(-length // x) * x <= CLOSE * length), sizes[-1])
        for length in request.pairs
    )
    return rows, columns


def described(request: Request) -> str:
    """Say of which functions kernels are generated."""
    named = [f"score {name_of(function_of(request.score))}", f"mask {_named(request.mask)}"]
    if request.bias is not None:
        is_function = callable(function_of(request.bias))
        named.append(f"bias {name_of(function_of(request.bias)) if is_function else 'array'}")
    return ", ".join(named)


def _named(mask: Mask) -> str:
    """Write a mask with shapes in place of arrays, and functions by their names."""
    leaves, structure = jax.tree.flatten(mask)
    shapes = [ShapedArray(x.shape, x.dtype) if hasattr(x, "shape") else x for x in leaves]
    text = repr(jax.tree.unflatten(structure, shapes))
    return re.sub(r"<function (\S+) at \w+>|ShapedArray\((.*?)\)", r"\1\2", text)
