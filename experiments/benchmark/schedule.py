"""Bundles of instructions that a kernel takes on a TPU, read from the schedule of its compiler.

A TPU executes one bundle a cycle, in the order that the compiler fixed. So the bundles of each
block of a kernel times how often it is executed tell how long it takes where memory is no limit.
"""

from __future__ import annotations

import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import jaxprs_in_params

from experiments.benchmark import accelerators, compilers

TARGET = "v5e"
PROGRAMS = ("attend, scaled dot", "flash", "splash")
MASK = "causal"

LEAST_TILE = 600
"""Blocks of this many bundles compute tiles; shorter ones begin or end a row of tiles."""

LEAST_BLOCK = 25
"""Shorter blocks are counted as executed each time."""


class Trips(NamedTuple):
    """How often a kernel does what for one head.

    Attributes:
      steps: steps of its grid.
      rows: rows of tiles.
      masked, unmasked: tiles that the mask cuts, and those that it allows wholly.
    """

    steps: int
    rows: int
    masked: int
    unmasked: int

    @property
    def live(self) -> int:
        """Tiles that are computed."""
        return self.masked + self.unmasked


class Block(NamedTuple):
    """Bundles that a branch may skip, from `first` up to `last`."""

    first: int
    last: int

    @property
    def size(self) -> int:
        """Bundles."""
        return self.last - self.first

    def holds(self, other: Block) -> bool:
        """Tell whether another block lies in it."""
        return self != other and self.first <= other.first and other.last <= self.last


def bundles(text: str, trips: Trips) -> int:
    """Return the bundles that a kernel executes for one head, of its final program.

    The outermost loop goes over the grid. Of the blocks that it may skip, the long ones compute a
    tile: one for any tile, or one with the mask and one without; a third is for tiles with NaN or
    Inf, and not executed here. A block around them is executed where a tile is live; those before
    and behind them once a row.

    Raises:
      ValueError: the program has other blocks than these.
    """
    loop, blocks = _blocks(text)
    tiles = [
        block
        for block in blocks
        if block.size >= LEAST_TILE
        and not any(block.holds(x) and x.size >= LEAST_TILE for x in blocks)
    ]
    of_tiles = {
        1: (trips.live,),
        2: (trips.masked, trips.unmasked),
        3: (trips.masked, trips.unmasked, 0),
    }
    if len(tiles) not in of_tiles:
        raise ValueError(f"a kernel has 1 to 3 blocks that compute tiles, got {len(tiles)}")
    counts = dict(zip(tiles, of_tiles[len(tiles)], strict=True))
    total = _own(loop, blocks) * trips.steps
    for block in blocks:
        is_around = any(block.holds(tile) for tile in tiles)
        count = counts.get(block, trips.live if is_around else trips.rows)
        total += _own(block, blocks) * count
    return total


def _own(block: Block, blocks: list[Block]) -> int:
    """Return the bundles of a block that are in none of those within it."""
    within = [x for x in blocks if block.holds(x)]
    outermost = [x for x in within if not any(y.holds(x) for y in within)]
    return block.size - sum(x.size for x in outermost)


_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s*(?:LH|LB|LE|PB|PF|CT)?\s*:")


def _blocks(text: str) -> tuple[Block, list[Block]]:
    """Return the longest loop and the blocks in it that branches skip, in order."""
    lines = [line for line in text.splitlines() if _BUNDLE.match(line)]
    starts: dict[str, int] = {}
    for number, line in enumerate(lines):
        for region in re.findall(r"Start(?:/End empty)? region (\d+)", line):
            starts.setdefault(region, number)
    jumps = [
        (number, starts[region])
        for number, line in enumerate(lines)
        for region in re.findall(r"sbr\.rel \(!?%?\w+\) target = \$region(\d+)", line)
        if region in starts
    ]
    loops = [Block(target, number) for number, target in jumps if target < number]
    if not loops:
        raise ValueError("a kernel has a loop over its grid, got none")
    loop = max(loops, key=lambda block: block.size)
    skipped = {Block(*jump) for jump in jumps if jump[1] - jump[0] > LEAST_BLOCK}
    return loop, sorted(block for block in skipped if loop.holds(block))


class Schedule(NamedTuple):
    """Bundles of one head: of the forward pass alone, and of the kernels of its gradients."""

    forward: int
    backward: int


def measure(scale: int) -> dict[str, Schedule]:
    """Return the schedules of causal scaled dot products: ours and those of JAX, by program."""
    length = 4096 // scale
    return {name: _of_program(name, length) for name in PROGRAMS}


def report(scale: int) -> str:
    """Compile and write the table, or say in one sentence why there is none."""
    missing = compilers.lacks(TARGET)
    if missing is not None:
        return f"Not read: {missing}."
    if 4096 // scale < 2 * accelerators.TILES["tpu"][0]:
        return "Not read: one tile holds all pairs."
    said = f"Bundles of a head that a {TARGET} executes, of causal scaled dot products:"
    return f"{said}\n\n{table(measure(scale))}"


def _of_program(name: str, length: int) -> Schedule:
    trips = _trips(name, length)
    forward, *_ = _kernels(name, length, is_gradient=False)
    _, *backward = _kernels(name, length, is_gradient=True)
    return Schedule(bundles(forward, trips), sum(bundles(each, trips) for each in backward))


def _trips(name: str, length: int) -> Trips:
    """Count the tiles of a causal mask, and the steps of the grid as the program has them.

    Kernels of `attend` are made while lowering; their grid is the list of live tiles.
    """
    program = accelerators.programs("tpu", length)[name, MASK]
    shapes = accelerators.operands("tpu", length)
    grids = {
        math.prod(equation.params["grid_mapping"].grid) // accelerators.HEADS
        for equation in _calls(jax.make_jaxpr(program)(*shapes).jaxpr)
    }
    rows = -(-length // accelerators.TILES["tpu"][0])
    trips = Trips(0, rows, masked=rows, unmasked=rows * (rows - 1) // 2)
    (steps,) = grids or {trips.live}
    return trips._replace(steps=steps)


def _calls(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for inner in jaxprs_in_params(equation.params):
            yield from _calls(inner)


def _kernels(name: str, length: int, is_gradient: bool) -> list[str]:
    """Return the final programs of the kernels that a function is made of, in its order.

    The compiler writes them where it is told when it is loaded: in a process of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        written = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        command = f"from experiments.benchmark import schedule; schedule.compile_one({name!r}, "
        command += f"{length}, {is_gradient})"
        subprocess.run(
            [sys.executable, "-c", command],
            env=os.environ | {"LIBTPU_INIT_ARGS": written, "JAX_PLATFORMS": "cpu"},
            check=True,
            capture_output=True,
        )
        paths = sorted(pathlib.Path(folder).glob("*-final_bundles.txt"))
        texts = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
        return [text for text in texts if re.search(r"entry bundle: \S+ = custom-call\(", text)]


def compile_one(name: str, length: int, is_gradient: bool) -> None:
    """Compile one program for a TPU."""
    function = accelerators.programs("tpu", length)[name, MASK]
    compilers.cost(
        accelerators.gradient(function) if is_gradient else function,
        accelerators.operands("tpu", length),
        TARGET,
    )


def table(found: dict[str, Schedule]) -> str:
    """Write bundles a head, and those of the first over those of each other, as Markdown.

    >>> print(table({"attend": Schedule(110, 300), "flash": Schedule(100, 200)}))
    | pass | attend | flash | over flash |
    |---|---|---|---|
    | forward | 110 | 100 | 1.10 |
    | backward | 300 | 200 | 1.50 |
    """
    ours, *others = found
    head = ["pass", *found, *(f"over {name}" for name in others)]
    lines = [head, ["---"] * len(head)]
    for name in Schedule._fields:
        counts = {program: getattr(each, name) for program, each in found.items()}
        ratios = (f"{counts[ours] / counts[other]:.2f}" for other in others)
        lines.append([name, *(f"{count:,}" for count in counts.values()), *ratios])
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return text.replace("| --- ", "|---").replace("--- |", "---|")
