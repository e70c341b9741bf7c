"""How far kernel and low-rank attention are from softmax: ``python -m experiments.approximation``.

Each error is compared with its theory and with the error of averaging the values.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments import command_line
from experiments.command_line import UsageError
from experiments.files import write_text

_HELP = """\
Approximates softmax attention by random features (FAVOR+), by linear attention and by Linformer,
on Gaussian queries, keys and values, and prints the relative error of the context beside that of
predicting the mean of the values, and the mean squared error of the kernel beside its formula.

  python -m experiments.approximation
  python -m experiments.approximation --depth=64 --scales=0.25,0.5,1

  --length=128           queries and keys
  --depth=16             of a head
  --features=64,256      random directions
  --ranks=16,64,128      rows that Linformer projects keys and values to
  --scales=0.5,1         standard deviations of queries and keys
  --draws=20             of random directions and projections
  --seed=0               of everything
  --out=                 a Markdown file for the tables; none written unless given"""

# Larger sizes do not fit in memory.
_LARGEST = 1_000_000
# JAX accepts seeds of signed 64-bit integers.
_SEEDS = 2**63


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    length: int = 128
    depth: int = 16
    features: tuple[int, ...] = (64, 256)
    ranks: tuple[int, ...] = (16, 64, 128)
    scales: tuple[float, ...] = (0.5, 1.0)
    draws: int = 20
    seed: int = 0
    out: str = ""


class Row(NamedTuple):
    """One line of the tables: errors of one approximation, its theory, and the baseline."""

    scale: float
    name: str
    size: int | None
    baseline: float
    context: float
    measured: float | None = None
    theory: float | None = None


def parse(arguments: Sequence[str]) -> Options:
    """Read the arguments behind the program's name.

    Raises:
      UsageError: an unknown flag, or a value that cannot be used.
      HelpRequested: the help text was asked for.

    >>> parse(["--ranks=4,8", "--length=32"]).ranks
    (4, 8)
    """
    values = flags.FlagValues()
    defaults = dataclasses.asdict(Options())
    for name, default in defaults.items():
        text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        flags.DEFINE_string(name, text, "", flag_values=values)
    given = command_line.parse_flags("approximation", values, arguments, lambda: _HELP)
    given = {
        name: _parse_value(name, str(given[name]), default) for name, default in defaults.items()
    }
    options = Options(**given)
    if max(options.ranks) > options.length:
        raise UsageError(
            f"--ranks: a rank is at most --length={options.length}, got {max(options.ranks)}."
        )
    if not -_SEEDS <= options.seed < _SEEDS:
        raise UsageError(
            f"--seed: must be at least -{_SEEDS} and below {_SEEDS}, got {options.seed}."
        )
    if options.out:
        command_line.check_file("out", pathlib.Path(options.out))
    return options


def _parse_value(name: str, text: str, default: Any) -> Any:
    """Parse the text of a flag as the type of its default; numbers but the seed have a range."""
    if isinstance(default, str):
        return text
    several = isinstance(default, tuple)
    kind = type(default[0] if several else default)
    try:
        numbers = [kind(part) for part in (text.split(",") if several else [text])]
    except ValueError:
        words = "numbers" if several else "a number"
        raise UsageError(f"--{name}: must be {words}, got {text}.") from None
    if name != "seed" and not all(0 < number < math.inf for number in numbers):
        raise UsageError(f"--{name}: must be above 0, got {text}.")
    if name != "seed" and kind is int and max(numbers) > _LARGEST:
        raise UsageError(f"--{name}: must be at most {_LARGEST}, got {text}.")
    return tuple(numbers) if several else numbers[0]


def measure(options: Options) -> list[Row]:
    """Measure everything that is asked for."""
    import jax
    import jax.numpy as jnp

    *rngs, rng = jax.random.split(jax.random.key(options.seed), 4)
    shape = (1, options.length, 1, options.depth)
    query, key, value = (jax.random.normal(of_one, shape) for of_one in rngs)
    draws = jax.random.split(rng, options.draws)
    mean = jnp.broadcast_to(jnp.mean(value, axis=1, keepdims=True), shape)

    rows: list[Row] = []
    for scale in options.scales:
        arrays = scale * query, scale * key, value
        baseline = float(_error(mean, *arrays))
        for name, size, function in _approximations(options):
            found = (float(x) for x in function(draws, *arrays))
            rows.append(Row(scale, name, size, baseline, *found))
    return rows


def _error(context: Any, query: Any, key: Any, value: Any) -> Any:
    """Return the norm of the error of a context relative to that of the exact one."""
    import jax.numpy as jnp

    from attention_jax import attend

    exact = attend(query, key, value)
    return jnp.linalg.norm(context - exact) / jnp.linalg.norm(exact)


@functools.cache
def _approximations(options: Options) -> list[tuple[str, int | None, Callable[..., Any]]]:
    """Return name, size and a compiled function from draws and arrays to the numbers of a Row."""
    from attention_jax.linear import feature_maps, linear_attention, linformer, performer

    found: list[tuple[str, int | None, Callable[..., Any]]] = []
    for kind in (performer.positive, performer.hyperbolic, performer.trigonometric):
        for orthogonal in (False, True):
            for size in options.features:
                name = f"FAVOR+ {kind.__name__}, {'orthogonal' if orthogonal else 'independent'}"
                one = functools.partial(_favor, kind=kind, num_features=size, orthogonal=orthogonal)
                found.append((name, size, _drawn(one)))
    for phi in (feature_maps.elu_plus_one, feature_maps.taylor):
        linear = functools.partial(linear_attention, feature_map=phi)
        found.append((f"linear, {phi.__name__}", None, _fixed(linear)))
    for rank in options.ranks:
        found.append(
            ("Linformer, random E = F", rank, _drawn(functools.partial(_random, rank=rank)))
        )
        projection = linformer.mean_pooling(rank, options.length)
        pooled = functools.partial(linformer.linformer_attention, key_projection=projection)
        found.append(("Linformer, mean pooling", rank, _fixed(pooled)))
    return found


def _drawn(one: Callable[..., Any]) -> Callable[..., Any]:
    """Average over draws, and over pairs or entries."""
    import jax
    import jax.numpy as jnp

    def average(draws: Any, *arrays: Any) -> Any:
        found = jax.lax.map(lambda draw: one(draw, *arrays), draws)
        return jax.tree.map(jnp.mean, found)

    return jax.jit(average)


def _fixed(context: Callable[..., Any]) -> Callable[..., Any]:
    """Return the error of a context that needs no random draws."""
    import jax

    return jax.jit(lambda draws, *arrays: (_error(context(*arrays), *arrays),))


def _favor(
    rng: Any, query: Any, key: Any, value: Any, *, kind: Any, num_features: int, orthogonal: bool
) -> tuple[Any, ...]:
    """Return the error of FAVOR+, that of its kernel and what theory says of it."""
    import jax.numpy as jnp

    from attention_jax import bind, scores
    from attention_jax.linear import linear_attention, performer

    depth = query.shape[-1]
    projection = performer.random_features(rng, num_features, depth, orthogonal=orthogonal)
    phi = bind(kind, projection=projection)
    rows = query[0, :, 0], key[0, :, 0]
    exact = jnp.exp(scores.scaled_dot(*rows))
    kernel = phi(rows[0]) @ phi(rows[1]).T
    context = linear_attention(query, key, value, feature_map=phi)
    theory = performer.variance(phi, *rows) / exact**2
    return _error(context, query, key, value), (kernel / exact - 1) ** 2, theory


def _random(rng: Any, query: Any, key: Any, value: Any, *, rank: int) -> tuple[Any, ...]:
    """Return the error of Linformer, that of the context of exact weights, and its theory."""
    import jax
    import jax.numpy as jnp

    from attention_jax import scores
    from attention_jax.linear import linformer

    projection = linformer.random_projection(rng, rank, key.shape[1])
    context = linformer.linformer_attention(query, key, value, projection)
    values = value[0, :, 0]
    weights = jax.nn.softmax(scores.scaled_dot(query[0, :, 0], key[0, :, 0]))
    exact = weights @ values
    joined = weights @ projection.T @ (projection @ values)
    squares = jnp.sum(weights**2, axis=1)[:, None] * jnp.sum(values**2, axis=0)[None, :]
    theory = (squares + exact**2) / rank
    return _error(context, query, key, value), (joined - exact) ** 2, theory


def table(rows: Sequence[Row]) -> str:
    """Write the rows as Markdown."""

    def number(x: float | None) -> str:
        return "" if x is None else f"{x:.3g}"

    lines = [
        "| std of q, k | approximation | M or R | relative error | just the mean | better? "
        "| mean squared error | its theory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        better = "yes" if row.context < row.baseline else "no"
        cells = (
            f"{row.scale:g}",
            row.name,
            "" if row.size is None else str(row.size),
            number(row.context),
            number(row.baseline),
            better,
            number(row.measured),
            number(row.theory),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(options: Options, rows: Sequence[Row]) -> str:
    """Write the table and what its columns mean."""
    return f"""\
# Approximations of softmax attention beside the mean of the values

Made by `python -m experiments.approximation`: {options.length} queries and keys, depth
{options.depth}, {options.draws} draws. Queries and keys are Gaussian with the standard deviation in
the first column, values with one. The relative error is that of the context, in norm; "just the
mean" is the error of giving every query the mean of all values.

For FAVOR+ the mean squared error is that of phi(q) . phi(k) relative to exp(q . k / sqrt(H)), and
its theory lemma 2 of Choromanski et al. 2021, for independent directions. It is a mean over heavy
tails: where the theory is large, a few draws see less than it. For Linformer it is that of
P E^T E V, with P the exact weights, and its theory (|p|^2 |v|^2 + (p . v)^2) / R.

{table(rows)}
"""


def print_errors(options: Options) -> None:
    """Measure, print the table and write the report that is asked for."""
    rows = measure(options)
    command_line.show(table(rows))
    if options.out:
        path = pathlib.Path(options.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, report(options, rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: see `command_line.run`."""
    return command_line.run("approximation", arguments, parse, print_errors)


if __name__ == "__main__":
    sys.exit(main())
