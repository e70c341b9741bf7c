"""Compile programs for TPUs and an NVIDIA GPU that need not be there, and read what they cost.

The compilers take the description of a device in place of a device, and do all that they would do
for it. So legality, memory, layouts and traffic are those of the device; times are not known.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding


class Target(NamedTuple):
    """A device to compile for; one of those of the smallest topology that a compiler knows."""

    platform: str
    topology: str


TARGETS = {
    "v4": Target("tpu", "v4:2x2x1"),
    "v5e": Target("tpu", "v5e:2x2"),
    "v5p": Target("tpu", "v5p:2x2x1"),
    "v6e": Target("tpu", "v6e:2x2"),
    "tpu7x": Target("tpu", "tpu7x:2x2x1"),
    "H100": Target("cuda", "1x1x1"),
}


def lacks(name: str) -> str | None:
    """Say in one sentence why this machine cannot compile for a target, or None if it can."""
    if TARGETS[name].platform == "tpu":
        needed, install = "libtpu", "pip install 'attention_jax[aot]'"
    else:
        needed = "jax_cuda12_plugin"
        install = "pip install 'attention_jax[aot-gpu]'"
    if importlib.util.find_spec(needed) is None:
        return f"compiling for {name} needs {needed}: {install}"
    try:
        _device(name)
    except NotImplementedError:  # JAX looked for a driver, found none, and left the plugin out
        have = "a GPU" if TARGETS[name].platform == "cuda" else "a TPU"
        return f"compiling for {name} without {have} needs JAX_PLATFORMS=cpu in the environment"
    return None


class Cost(NamedTuple):
    """What a compiled program costs.

    Attributes:
      seconds: processor time to trace, lower and compile it.
      operands, results, temporaries: bytes.
      traffic: bytes of device memory that its kernels read and write, every array once a kernel;
        None where it has loops.
      copied: bytes of arrays that are only brought into another layout, copies and transpositions
        of LEAST_COPY and more.
    """

    seconds: float
    operands: int
    results: int
    temporaries: int
    traffic: int | None
    copied: int = 0


def cost(function: Callable[..., Any], shapes: Sequence[jax.ShapeDtypeStruct], name: str) -> Cost:
    """Compile a function for a target and read its cost."""
    device = SingleDeviceSharding(_device(name))
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device) for x in shapes]
    start = time.process_time()
    lowered = jax.jit(function).trace(*placed).lower(lowering_platforms=(TARGETS[name].platform,))
    compiled = lowered.compile(compiler_options=_options(name))
    seconds = time.process_time() - start
    memory, program = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert program is not None
    return Cost(
        seconds,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        traffic(program),
        copied(program),
    )


@functools.cache
def _device(name: str) -> Any:
    target = TARGETS[name]
    if target.platform == "tpu":
        # There is no machine to ask about, and no device that two processes could fight for.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        found = topologies.get_topology_desc(platform="tpu", topology_name=target.topology)
    else:
        description = pathlib.Path(__file__).with_name("h100.txtpb").read_text(encoding="utf-8")
        found = topologies.get_topology_desc(
            "h100", platform="cuda", topology=target.topology, target_config=description
        )
    return found.devices[0]


def _options(name: str) -> dict[str, Any] | None:
    if TARGETS[name].platform == "tpu":
        return None
    options: dict[str, Any] = {"xla_gpu_autotune_level": 0}
    toolkit = importlib.util.find_spec("nvidia.cuda_nvcc")
    if toolkit is not None and toolkit.submodule_search_locations:
        options["xla_gpu_cuda_data_dir"] = next(iter(toolkit.submodule_search_locations))
    return options


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f64": 8, "s64": 8, "u64": 8}
_MOVES_NOTHING = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("copy-done", "async-done"),
}
_LOOPS = {"while", "conditional", "call"}


def traffic(program: str) -> int | None:
    """Return the bytes that an optimized program moves; see `Cost`.

    Arrays in memory of another kind than that of the device, S(1) and above, are left out.

    >>> traffic('''
    ... ENTRY %main (x: f32[8,128]) -> f32[8,128] {
    ...   %x = f32[8,128]{1,0:T(8,128)} parameter(0)
    ...   ROOT %y = f32[8,128]{1,0:T(8,128)} custom-call(%x), custom_call_target="kernel"
    ... }''')
    8192
    """
    types: dict[str, str] = {}
    total = 0
    for name, kind, operation, operands in _instructions(program):
        types[name] = kind
        if operation in _LOOPS:
            return None
        if operation in _MOVES_NOTHING:
            continue
        total += _size(kind)
        if operation != "copy-start":  # whose type lists both sides
            total += sum(_size(types.get(operand, "")) for operand in operands)
    return total


LEAST_COPY = 2**16
"""Bytes; smaller arrays, such as lists of tiles, may have any layout."""


def copied(program: str) -> int:
    """Return the bytes that an optimized program only brings into another layout; see `Cost`.

    A fusion counts by its name: compilers name it by what it computes.

    >>> copied('''
    ... ENTRY %main (x: f32[256,128]) -> f32[128,256] {
    ...   %x = f32[256,128]{1,0} parameter(0)
    ...   ROOT %wrapped_transpose = f32[128,256]{1,0} fusion(%x), kind=kInput, calls=%fused
    ... }''')
    131072
    """
    return sum(
        size
        for name, kind, operation, _ in _instructions(program)
        if operation in ("copy", "transpose") or (operation == "fusion" and _COPIES.search(name))
        if (size := _size(kind)) >= LEAST_COPY
    )


_COPIES = re.compile("transpose|copy")


def _instructions(program: str) -> Iterator[tuple[str, str, str, list[str]]]:
    """Yield name, type, operation and operands of each instruction of the entry computation."""
    _, _, entry = program.partition("\nENTRY ")
    for line in entry.split("\n}")[0].splitlines()[1:]:
        found = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)$", line)
        if not found:
            continue
        end = _closed(found[2]) if found[2].startswith("(") else found[2].index(" ")
        kind, rest = found[2][:end], found[2][end:].lstrip()
        operation, _, arguments = rest.partition("(")
        arguments = arguments[: _closed("(" + arguments) - 1]
        yield found[1], kind, operation, re.findall(r"%([\w.\-]+)", arguments)


def _closed(text: str) -> int:
    """Return where the first parenthesis is closed."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    return len(text)


def _size(kind: str) -> int:
    """Return the bytes of a type, or of those that it lists, in memory of the device."""
    shapes = re.findall(r"(pred|[a-z]+\d+)\[([\d,]*)\](?:\{([^}]*)\})?", kind)
    return sum(
        _BYTES.get(dtype, 4) * math.prod(map(int, filter(None, sizes.split(","))))
        for dtype, sizes, layout in shapes
        if not re.search(r"S\([1-9]\)", layout)
    )
