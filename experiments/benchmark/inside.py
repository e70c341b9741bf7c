"""What a normalizer costs over softmax, and a statistic over the context alone, tile by tile.

Costs are processor time of all threads, which depends little on other work: programs take turns,
and a ratio is taken in every turn. Errors are those of "tiled" against "dense" in float64.
"""

from __future__ import annotations

import functools
import statistics as numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax import attend, bind, masks, normalizers, statistics
from experiments.benchmark.measure import (
    Cost,
    Program,
    compiled,
    mebibytes_of,
    milliseconds_of,
    take_turns,
)
from experiments.benchmark.programs import Shape, inputs

LENGTH, LONG, WINDOW = 4096, 65536, 1023
HEADS, DEPTH = 1, 64
OF_ERRORS = Shape(129, heads=2, depth=DEPTH)
TILE_OF_ERRORS = (32, 16)
ALONE, LOGGED, ALL = "context alone", "`entropy` with `largest_logit`", "all together"
FEW_PASSES = {"xla_backend_optimization_level": 0}
"""Of the compiler, for programs of few numbers."""
Options = dict[str, Any]


class Ratio(NamedTuple):
    """Of a turn: the median, the least and the most."""

    median: float
    least: float
    most: float


class Row(NamedTuple):
    """What a case costs, by pass: ratios over the base, and MiB of temporaries; and its errors."""

    ratios: dict[str, Ratio]
    mebibytes: dict[str, float]
    error_of_values: float
    error_of_gradients: float


class Long(NamedTuple):
    """What a case costs at the greatest length: seconds of processor time, MiB of temporaries."""

    seconds: float
    mebibytes: float


def normalizer_cases(_: int) -> dict[str, Options]:
    """Every exported normalizer; those that select or search with numbers that are in use."""
    table = jnp.asarray(np.random.default_rng(0).normal(size=(64, DEPTH)) / 8, jnp.float32)
    given: dict[str, Any] = {
        "softmax": normalizers.softmax,
        "softmax_plus_one": normalizers.softmax_plus_one,
        "softmax_with_sink": bind(normalizers.softmax_with_sink, sink=0.5),
        "sigmoid": bind(normalizers.sigmoid, shift=-8.0),
        "sparsemax": normalizers.sparsemax,
        "entmax15": normalizers.entmax15,
        "entmax": bind(normalizers.entmax, alpha=1.3),
        "top_k": bind(normalizers.top_k, k=32),
        "top_p": bind(normalizers.top_p, p=0.9),
        "hard": normalizers.hard,
        "signed_softmax": normalizers.signed_softmax,
        "odd_power": bind(normalizers.odd_power, power=3),
        "stick_breaking": normalizers.stick_breaking,
        "monotonic": normalizers.monotonic,
        "hard_monotonic": normalizers.hard_monotonic,
        "contextual_positions": bind(normalizers.contextual_positions, table=table),
    }
    return {name: {"normalizer": normalizer} for name, normalizer in given.items()}


def statistic_cases(length: int) -> dict[str, Options]:
    """Every exported statistic, two that are logged in training, and all of them in one call."""
    tokens = np.random.default_rng(0).integers(0, 64, length).astype(np.int32)
    edges = [0, *(2**power for power in range(0, max(length.bit_length() - 2, 1), 2))]
    each: dict[str, Any] = {
        "entropy": statistics.entropy,
        "effective_support": statistics.effective_support,
        "largest_logit": statistics.largest_logit,
        "largest_weight": statistics.largest_weight,
        "jacobian_trace": statistics.jacobian_trace,
        "expected_distance": statistics.expected_distance,
        "distance_spread": statistics.distance_spread,
        "heaviest": statistics.heaviest(4),
        "mass": statistics.mass(masks.Window(64, 0)),
        "mean_mass": statistics.mean_mass(statistics.diagonal),
        "previous_token_score": statistics.previous_token_score,
        "induction_score": statistics.induction_score(tokens),
        "mass_by_distance": statistics.mass_by_distance(edges),
        "saturated_rows": statistics.saturated_rows(0.95),
        "head_largest_logit": statistics.head_largest_logit,
        "received_mass": statistics.received_mass,
    }
    logged = {name: each[name] for name in ("entropy", "largest_logit")}
    cases = {name: {name: statistic} for name, statistic in each.items()}
    cases = {ALONE: {}} | cases | {LOGGED: logged, ALL: each}
    return {name: {"statistics": asked} if asked else {} for name, asked in cases.items()}


def forward(options: Options) -> Callable[..., Any]:
    """Return the attention of a case, as a function of query, key and value."""
    return functools.partial(attend, implementation="tiled", **options)


def gradients(options: Options, implementation: str = "tiled", **more: Any) -> Callable[..., Any]:
    """Return the gradients of a loss of the context and all statistics, and these."""
    run = functools.partial(attend, implementation=implementation, **options, **more)

    def loss(*arrays: Any) -> Any:
        found = run(*arrays)
        leaves = [x for x in jax.tree.leaves(found) if jnp.issubdtype(x.dtype, jnp.floating)]
        waves = (jnp.sum(jnp.where(jnp.isfinite(x), jnp.sin(3.0 * x), 0.0)) for x in leaves)
        return sum(waves), found

    return jax.grad(loss, (0, 1, 2), has_aux=True)


PASSES = {"forward": forward, "with gradients": gradients}


def measure(
    cases_of: Callable[[int], Mapping[str, Options]], scale: int, repeats: int
) -> dict[str, Row]:
    """Measure all cases over the first of them, at the length 4096."""
    cases, of_errors = (cases_of(length) for length in (LENGTH // scale, OF_ERRORS.length))
    arrays = inputs(Shape(LENGTH // scale, HEADS, DEPTH))
    ratios: dict[str, dict[str, Ratio]] = {name: {} for name in cases}
    held: dict[str, dict[str, float]] = {name: {} for name in cases}
    base = next(iter(cases))
    for of_pass, function_of in PASSES.items():
        calls = {
            name: compiled(Program(function_of(options), arrays)) for name, options in cases.items()
        }
        costs = take_turns(
            {name: milliseconds_of(call, arrays) for name, call in calls.items()}, repeats
        )
        for name, call in calls.items():
            ratios[name][of_pass] = ratio_of(costs[name], costs[base])
            held[name][of_pass] = mebibytes_of(call)
    return {name: Row(ratios[name], held[name], *errors(of_errors[name])) for name in cases}


def ratio_of(costs: list[Cost], of_base: list[Cost]) -> Ratio:
    """Return how many times as much processor time a case takes, turn by turn.

    >>> ratio_of([Cost(0, 3), Cost(0, 4), Cost(0, 2)], 3 * [Cost(0, 2)])
    Ratio(median=1.5, least=1.0, most=2.0)
    """
    found = [mine.cpu / theirs.cpu for mine, theirs in zip(costs, of_base, strict=True)]
    return Ratio(numbers.median(found), min(found), max(found))


def errors(options: Options) -> tuple[float, float]:
    """Return the largest errors of values and of gradients, relative where numbers exceed 1."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        shape = (3, 1, OF_ERRORS.length, OF_ERRORS.heads, OF_ERRORS.depth)
        arrays = tuple(jnp.asarray(2.0 * rng.standard_normal(shape)))
        given = options | {"mask": masks.Causal()}
        ways = {"tiled": {"tile_sizes": TILE_OF_ERRORS}, "dense": {}}
        (ours, our_values), (theirs, their_values) = (
            jax.jit(gradients(given, name, **more), compiler_options=FEW_PASSES)(*arrays)
            for name, more in ways.items()
        )
        return largest(our_values, their_values), largest(ours, theirs)


def largest(ours: Any, theirs: Any) -> float:
    """Return the largest difference of two trees, relative where numbers exceed 1."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return float(np.max([_difference(np.asarray(x), np.asarray(y)) for x, y in pairs]))


def _difference(ours: Any, theirs: Any) -> float:
    is_same = ours == theirs  # also where both are infinite
    apart = np.abs(np.where(is_same, 0, ours) - np.where(is_same, 0, theirs))
    size = np.maximum(np.where(is_same, 1, np.abs(theirs)), 1)
    return float(np.max(apart / size, initial=0))


def at_length(scale: int, length: int = LONG) -> dict[str, Long]:
    """Measure every statistic once, of one head under a causal window at the length 65,536."""
    mask = masks.Causal() & masks.Window(max(WINDOW // scale, 1), 0)
    arrays = inputs(Shape(length // scale, 1, DEPTH))
    found = {}
    for name, options in statistic_cases(length // scale).items():
        call = compiled(Program(forward(options | {"mask": mask}), arrays))
        cost = milliseconds_of(call, arrays)()
        found[name] = Long(cost.cpu / 1e3, mebibytes_of(call))
    return found


def table(rows: Mapping[str, Row], long: Mapping[str, Long] | None = None) -> str:
    """Write a table in Markdown, with what each costs at the greatest length if that is given."""
    titles = ["", *(f"{of_pass} (least to most)" for of_pass in PASSES)]
    titles += ["MiB", "MiB with gradients", "error of values", "error of gradients"]
    titles += ["s, long", "MiB, long"] if long else []
    lines = [titles, ["---"] * len(titles)]
    for name, row in rows.items():
        ratios = [f"{x.median:.2f} ({x.least:.2f} to {x.most:.2f})" for x in row.ratios.values()]
        held = [f"{x:.1f}" for x in row.mebibytes.values()]
        wrong = [f"{x:.0e}" for x in (row.error_of_values, row.error_of_gradients)]
        written = name if " " in name else f"`{name}`"
        more = [f"{long[name].seconds:.1f}", f"{long[name].mebibytes:.0f}"] if long else []
        lines.append([written, *ratios, *held, *wrong, *more])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_MEASURED = """\
{subject}, `implementation="tiled"`, S={length}, {heads} head of depth {depth},
no mask, float32, on {machine}. Ratios of processor time of all threads; the programs take turns in
one process, a ratio is taken in every turn, and their median, least and most are given. MiB are
temporaries. Errors are the largest against `implementation="dense"` in float64, S={odd} in tiles of
{rows} x {keys} under `Causal()`, relative where numbers exceed 1."""


def report_of_normalizers(rows: Mapping[str, Row], scale: int, machine: str) -> str:
    """Write the results of the suite normalizers as a page of Markdown."""
    return f"""\
# What every normalizer costs over softmax

Made by `python -m experiments.benchmark --suites=normalizers`:
{_measured("`attend`", scale, machine)}

{table(rows)}
"""


def report_of_statistics(
    rows: Mapping[str, Row], long: Mapping[str, Long], scale: int, machine: str
) -> str:
    """Write the results of the suite statistics as a page of Markdown."""
    subject = "`attend` with statistics over the same call without"
    window = max(WINDOW // scale, 1)
    return f"""\
# What every statistic costs over the context alone

Made by `python -m experiments.benchmark --suites=statistics`:
{_measured(subject, scale, machine)}

"Long" is S={LONG // scale}, one head of depth {DEPTH}, `Causal() & Window({window}, 0)`, forward:
seconds of processor time of the context and the statistic, and all temporaries.

{table(rows, long)}
"""


def _measured(subject: str, scale: int, machine: str) -> str:
    return _MEASURED.format(
        subject=subject,
        length=LENGTH // scale,
        heads=HEADS,
        depth=DEPTH,
        machine=machine,
        odd=OF_ERRORS.length,
        rows=TILE_OF_ERRORS[0],
        keys=TILE_OF_ERRORS[1],
    )
