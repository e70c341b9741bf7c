"""Full attention costs O(S^2), cross-attention O(TS), a window of w O(Sw), linear attention O(S).

Source: Vaswani et al. 2017, table 1; Katharopoulos et al. 2020; Beltagy et al. 2020.

Method: Processor time of a forward pass of one head, of compiled programs that take turns, at four
lengths of keys, and the bytes of temporaries that the compiler plans; the exponent is the slope of
a log-log line, one for every turn. Cross-attention has 512 queries.

Criterion: Holds if every exponent of time is within 0.35 of the one claimed (2, 1, 1, 1). Bytes
are reported beside: where all weights are held they grow like time, in tiles they need not.
"""

from __future__ import annotations

from functools import partial

import jax

from attention_jax import attend, masks
from attention_jax.linear import linear_attention
from experiments.benchmark.measure import (
    Program,
    compiled,
    mebibytes_of,
    milliseconds_of,
    take_turns,
)
from experiments.benchmark.patterns import slope
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, undecided
from experiments.claims.drawing import lines
from experiments.claims.evidence import shown
from experiments.significance import interval

DEPTH, QUERIES, WINDOW = 64, 512, 128
CLAIMED = {"full": 2, "full, dense": 2, "cross": 1, "window": 1, "linear": 1}


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Measure milliseconds by turn and length, and bytes by length."""
    lengths = setting.pick(
        tiny=(64, 128), quick=(1024, 2048, 4096, 8192), full=(1024, 2048, 4096, 8192, 16384)
    )
    window = masks.Window(WINDOW, 0) & masks.Causal()
    tiled = partial(attend, implementation="tiled")
    functions = {
        "full": tiled,
        "full, dense": partial(attend, implementation="dense"),
        "cross": lambda query, key, value: tiled(query[:, :QUERIES], key, value),
        "window": partial(tiled, mask=window),
        "linear": linear_attention,
    }
    rows = {n: tuple(jax.random.normal(rng, (3, 1, n, 1, DEPTH))) for n in lengths}
    programs = {
        (name, n): compiled(Program(function, rows[n]))
        for name, function in functions.items()
        for n in lengths
        if name != "full, dense" or n <= 4096
    }
    meters = {f"{name}@{n}": milliseconds_of(p, rows[n]) for (name, n), p in programs.items()}
    costs = take_turns(meters, setting.pick(tiny=2, quick=7, full=15))
    data: Data = {}
    for name in functions:
        of = [n for n in lengths if (name, n) in programs]
        data[name] = {
            "lengths": of,
            "milliseconds": [[cost.cpu for cost in costs[f"{name}@{n}"]] for n in of],
            "mebibytes": [mebibytes_of(programs[name, n]) for n in of],
        }
    return data


def exponents(of: Data) -> list[float]:
    """Return the exponent of time in every turn."""
    return [slope(of["lengths"], turn) for turn in zip(*of["milliseconds"], strict=True)]


def verdict(data: Data) -> Verdict:
    """Judge by the exponents of time."""
    found = {name: interval(exponents(of)) for name, of in data.items()}
    bytes_of = {name: slope(of["lengths"], of["mebibytes"]) for name, of in data.items()}
    of_time = ", ".join(
        f"{name} {shown(exponents(data[name]))} (claimed {CLAIMED[name]})" for name in found
    )
    because = (
        f"Exponents of time: {of_time}. Of bytes: full attention {bytes_of['full, dense']:.2f} "
        f"dense, {bytes_of['full']:.2f} in tiles."
    )
    if all(abs(of.mean - CLAIMED[name]) <= 0.35 for name, of in found.items()):
        return holds(because)
    clearly = any(
        max(of.low - CLAIMED[name], CLAIMED[name] - of.high) > 0.35 for name, of in found.items()
    )
    return fails(because) if clearly else undecided(because)


def figure(data: Data):
    """Draw the median time of a turn against the length."""
    longest = data["full"]["lengths"]
    series = {
        name: of["milliseconds"] + [[float("nan")]] * (len(longest) - len(of["lengths"]))
        for name, of in data.items()
    }
    return lines(
        longest, series, xlabel="length S", ylabel="ms of processor", xscale="log", yscale="log"
    )


def table(data: Data) -> list[list[str]]:
    """Show exponents of time and bytes."""
    rows = [
        [
            name,
            str(CLAIMED[name]),
            shown(exponents(of)),
            f"{slope(of['lengths'], of['mebibytes']):.2f}",
            f"{of['mebibytes'][-1]:.2f} at {of['lengths'][-1]}",
        ]
        for name, of in data.items()
    ]
    return [["case", "claimed", "exponent of time", "exponent of bytes", "MiB"], *rows]
