"""What a compiled program exchanges between devices and multiplies, read from its text."""

import math
import re

COLLECTIVE = re.compile(
    r" = (\S+|\(.*?\)) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    r"|collective-broadcast|ragged-all-to-all)(?:-start)?\("
)
SHAPE = re.compile(r"\w+\[([\d,]*)\]")
DOT = re.compile(
    r" = \w+\[([\d,]*)\]\S* dot\((?:\w+\[[\d,]*\]\S* )?%?([\w.\-]+),"
    r".*lhs_contracting_dims=\{([\d,]*)\}"
)
DEFINED = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]*)\]")


def collectives(text):
    """Return the operation and the shape of every exchange between devices, as text."""
    return [f"{operation} {shape}" for shape, operation in COLLECTIVE.findall(text)]


def numbers(collective):
    """Return how many numbers each operand of a collective has."""
    return [_size(shape) for shape in SHAPE.findall(collective)]


def product_flops(text):
    """Count the operations of the matrix products in a program; the body of a loop counts once."""
    total, shapes = 0, {}
    for line in text.splitlines():
        if line.endswith("{"):
            shapes = {}
        defined = DEFINED.match(line)
        if defined:
            shapes[defined[1]] = _axes(defined[2])
        found = DOT.search(line)
        if found:
            contracted = math.prod(shapes[found[2]][axis] for axis in _axes(found[3]))
            total += 2 * _size(found[1]) * contracted
    return total


def _axes(text):
    return [int(size) for size in text.split(",") if size]


def _size(text):
    return math.prod(_axes(text))
