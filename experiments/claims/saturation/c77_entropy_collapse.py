"""Attention entropy collapses before training diverges, and a norm of queries and keys prevents it.

Source: Zhai et al. 2023, sections 1 and 3; for the norm Henry et al. 2020 and Dehghani et al. 2023,
section 2.

Method: Encoders of two layers learn to sort 12 symbols by Adam, at six learning rates of which the
largest are far too large, with and without an RMS norm of queries and keys. At every step the loss
of the batch is noted, and the mean entropy of the weights in the layer where it is least, as a
share of log 12; both are averaged over five steps. A run diverges where its loss first is 1.5 times
that of guessing, or no number; its entropy collapses where it first is below a quarter. Runs that
do not diverge are the control: entropy may collapse in them as well.

Criterion: Collapse comes first if, over seeds without the norm, the interval of the share of
diverging runs in which it came before lies above one half, and that share is conclusively higher
than the share of other runs with a collapse; it does not if the interval lies below one half. The
norm prevents divergence if conclusively fewer than half as many runs diverge with it, and does not
if conclusively more than half as many do. Holds if both are so, only in part if one is, fails if
neither is; undecided if a seed has no run that diverges or none that does not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attention_jax import statistics
from attention_jax.nnx import MultiHeadAttention, TokenEncoder
from experiments.claims.claim import Data, Setting, Verdict, fails, holds, holds_only_if, undecided
from experiments.claims.drawing import lines
from experiments.claims.evidence import higher, shown
from experiments.claims.tagging import HEADS, SYMBOLS, WIDTH, Batch, draw
from experiments.claims.training import arm_of, cross_entropy
from experiments.significance import interval
from experiments.translate.train_step import quick_options

LENGTH, EXAMPLES, TOGETHER = 12, 16, 5
RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
ARMS = {"plain": None, "norm": nnx.RMSNorm}
# What a loss that is no number, or larger, is noted as.
LARGEST_LOSS = 1000.0
DIVERGED, COLLAPSED = 1.5 * math.log(SYMBOLS), 0.25
ASKED = {
    "entropy": statistics.over_queries(statistics.entropy),
    "largest logit": statistics.head_largest_logit,
}


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Note loss, entropy and largest logit by arm, rate, seed and five steps."""
    rates = setting.pick(tiny=(1e-2, 1.0), quick=RATES, full=RATES)
    seeds = jax.random.split(rng, setting.pick(tiny=2, quick=6, full=8))
    steps = setting.pick(tiny=10, quick=200, full=400)
    data: Data = {"rates": rates, "steps": TOGETHER}
    for name, norm in ARMS.items():
        run = functools.partial(_run, norm, steps)
        of_rates = jax.vmap(jax.vmap(run, in_axes=(None, 0)), in_axes=(0, None))
        runs = jax.jit(of_rates, compiler_options=quick_options(1))
        found = runs(jnp.asarray(rates, jnp.float32), seeds)
        data[name] = {what: _noted(what, values) for what, values in found.items()}
    return data


def _noted(what: str, values: Any) -> list[Any]:
    """Return means over five steps with four digits, so that there is less to keep."""
    neutral = {"loss": LARGEST_LOSS, "entropy": 1.0, "largest logit": 0.0}[what]
    finite = np.nan_to_num(np.asarray(values, np.float64), nan=neutral, posinf=1e30, neginf=-1e30)
    finite = np.minimum(finite, LARGEST_LOSS) if what == "loss" else finite
    means = finite.reshape(*finite.shape[:2], -1, TOGETHER).mean(axis=-1)
    return [[[float(f"{x:.4g}") for x in of] for of in of_rate] for of_rate in means]


def _run(norm: Any, steps: int, rate: jax.Array, rng: jax.Array) -> dict[str, jax.Array]:
    """Train one encoder; return what is noted at every step."""

    def build(rngs: nnx.Rngs) -> TokenEncoder:
        sizes = {"hidden_features": 2 * WIDTH, "norm_placement": "before", "max_length": LENGTH}
        attention = functools.partial(MultiHeadAttention, qk_norm=norm)
        sizes |= {"num_heads": HEADS, "num_layers": 2, "attention": attention}
        return TokenEncoder(SYMBOLS + 1, WIDTH, **sizes, rngs=rngs)

    arm = arm_of(build, _loss)
    optimizer = optax.adam(optax.linear_schedule(0.0, 1.0, steps // 5), b2=0.98)

    def step(state: Any, number: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        parameters, moments = state
        batch = draw(_sorted, jax.random.fold_in(rng, number), LENGTH, LENGTH, EXAMPLES)
        gradient, noted = jax.grad(arm.loss, has_aux=True)(parameters, batch)
        updates, moments = optimizer.update(gradient, moments)
        updates = jax.tree.map(lambda update: rate * update, updates)
        return (optax.apply_updates(parameters, updates), moments), noted

    parameters = arm.init(rng)
    return jax.lax.scan(step, (parameters, optimizer.init(parameters)), jnp.arange(steps))[1]


def _sorted(tokens: jax.Array, length: jax.Array) -> jax.Array:
    del length
    return jnp.sort(tokens)


def _loss(model: TokenEncoder, batch: Batch) -> Any:
    logits, layers = model(batch.tokens, statistics=ASKED)
    loss = cross_entropy(logits, batch.labels)
    entropies = jnp.stack([jnp.mean(layer.attention["entropy"]) for layer in layers])
    largest = jnp.stack([jnp.max(layer.attention["largest logit"]) for layer in layers])
    noted = {
        "loss": loss,
        "entropy": jnp.min(entropies) / math.log(LENGTH),
        "largest logit": jnp.max(largest),
    }
    return loss, noted


def shares(data: Data) -> dict[str, list[float]]:
    """Return shares of the runs of each seed: that diverge, and in which entropy collapses.

    Of a seed without runs of a kind the share is -1.
    """
    first, calm, diverged = [], [], {}
    for name in ARMS:
        at = _first(np.asarray(data[name]["loss"]) >= DIVERGED)
        diverged[name] = np.mean(at < np.inf, axis=0).tolist()
    loss, entropy = (np.asarray(data["plain"][what]) for what in ("loss", "entropy"))
    at, collapse = _first(loss >= DIVERGED), _first(entropy < COLLAPSED)
    for seed in range(at.shape[1]):
        diverges = at[:, seed] < np.inf
        first.append(_share((collapse < at)[:, seed], diverges))
        calm.append(_share((collapse < np.inf)[:, seed], ~diverges))
    of_arms = {f"diverged, {name}": values for name, values in diverged.items()}
    return {"collapsed first": first, "collapsed, calm": calm, **of_arms}


def _first(is_so: np.ndarray) -> np.ndarray:
    """Return the first place on the last axis where it is so, infinity where there is none."""
    return np.where(is_so.any(axis=-1), is_so.argmax(axis=-1), np.inf)


def _share(of: np.ndarray, among: np.ndarray) -> float:
    return float(of[among].mean()) if among.any() else -1.0


def verdict(data: Data) -> Verdict:
    """Judge what comes first, then what the norm prevents."""
    first, calm, plain, norm = shares(data).values()
    largest = max(max(map(max, of_rate)) for of_rate in data["plain"]["largest logit"])
    found = (
        f"Of all runs {shown(plain)} diverge without the norm, {shown(norm)} with it. Without it "
        f"entropy collapsed before in {shown(first)} of those that diverge, and in {shown(calm)} "
        f"of the others; logits reach {largest:.3g}."
    )
    if min(*first, *calm) < 0:
        return undecided(found)
    precedes = _decided(
        interval(first).low > 0.5 and higher(first, calm), interval(first).high < 0.5
    )
    twice = [2 * share for share in norm]
    prevents = _decided(higher(plain, twice), higher(twice, plain))
    if None in (precedes, prevents):
        return undecided(found)
    if precedes and prevents:
        return holds(found)
    if precedes:
        return holds_only_if("nothing is said of the norm, which does not prevent it", found)
    if prevents:
        return holds_only_if("nothing is said of entropy, which does not collapse first", found)
    return fails(found)


def _decided(is_so: bool, is_not: bool) -> bool | None:
    """Return None where the data decide neither."""
    if is_so:
        return True
    return False if is_not else None


def figure(data: Data):
    """Draw the entropy of the plain runs at every rate."""
    series: dict[str, Sequence[Any]] = {}
    for number, rate in enumerate(data["rates"]):
        entropy = data["plain"]["entropy"][number]
        series[f"rate {rate:g}"] = list(map(list, zip(*entropy, strict=True)))
    count = len(next(iter(series.values())))
    return lines(
        [data["steps"] * (n + 1) for n in range(count)],
        series,
        xlabel="step",
        ylabel="least entropy of a layer / log 12",
        marks={"collapse": COLLAPSED},
        ylim=(0, 1.02),
    )


def table(data: Data) -> list[list[str]]:
    """Show by rate how many runs diverge, and how far the loss gets."""
    rows = [
        ["learning rate", *(f"{what}, {name}" for name in ARMS for what in ("diverged", "loss"))]
    ]
    for number, rate in enumerate(data["rates"]):
        row = [f"{rate:g}"]
        for name in ARMS:
            losses = data[name]["loss"][number]
            diverged = sum(max(loss) >= DIVERGED for loss in losses)
            row += [f"{diverged} of {len(losses)}", shown([loss[-1] for loss in losses])]
        rows.append(row)
    return rows
