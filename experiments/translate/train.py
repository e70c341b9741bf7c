"""Training the translators of one mechanism, from the start or from where it was left."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from experiments import metrics
from experiments.translate import evaluate, history
from experiments.translate.checkpoints import Checkpoints
from experiments.translate.config import Config
from experiments.translate.devices import Placement
from experiments.translate.interrupts import Interrupted, listening
from experiments.translate.learning import State, initial_state
from experiments.translate.model import Sizes
from experiments.translate.programs import Programs, compile_all
from experiments.translate.progress import Meter
from experiments.translate.task import Task
from experiments.translate.workdir import Log


class Diverged(Exception):  # noqa: N818  the caller reports it as a sentence
    """A loss or a parameter became NaN or infinite."""


class Trained(NamedTuple):
    """Translators at the end of their training, one for each seed, and what runs them."""

    parameters: Any
    programs: Programs


def train(
    score: str, sizes: Sizes, config: Config, task: Task, folder: Path, console: Console
) -> Trained:
    """Train all seeds of one mechanism; what was done before in `folder` is not done again.

    Raises:
      Diverged: a loss is not a number any more.
      Interrupted: SIGINT or SIGTERM came; everything up to the last step is saved.
      UsageError: a checkpoint cannot be saved, or what was measured before it is lost.
    """
    log = Log(folder / "metrics.jsonl")
    checkpoints = Checkpoints(folder / "checkpoints" / score)
    state = initial_state(score, sizes, config)
    restored = checkpoints.restore(state)
    for sentence in checkpoints.damaged:
        console.print(sentence, soft_wrap=True)
    step, state = restored or (0, state)
    if step:
        history.read(log, score, needed=[history.ROUND])
    placement = Placement(config.batch_size)
    state, arrays = jax.device_put((state, task.arrays), placement.everywhere)
    task = dataclasses.replace(task, arrays=arrays)
    log.rewind(score, step)
    with Meter(console, score, step, config.steps) as meter:
        shapes = (task.training, task.most_words, task.widths, task.longest)
        programs = compile_all(score, sizes, config, placement, state, *shapes)
        meter.begin()
        state = _remaining_steps(
            score, config, task, programs, step, state, log, checkpoints, meter
        )
    return Trained(state.parameters, programs)


def _remaining_steps(
    score: str,
    config: Config,
    task: Task,
    programs: Programs,
    step: int,
    state: State,
    log: Log,
    checkpoints: Checkpoints,
    meter: Meter,
) -> State:
    saved, saved_at = step, time.monotonic()
    with listening() as listener:
        while step < config.steps:
            chunks = slice(step // config.chunk, (step + config.round) // config.chunk)
            start = time.perf_counter()
            taken = task.arrays, task.order[chunks], task.rows[chunks]
            state, found = programs.train(state, *taken)
            values = jax.device_get(found)
            seconds = time.perf_counter() - start
            _check_finite(score, step, values, saved, checkpoints)
            step += config.round
            tokens = int(task.tokens[chunks].sum())
            log.append(
                {
                    "score": score,
                    "step": step,
                    "train_loss": _rounded(values.mean(axis=0)),
                    "tokens": tokens,
                    "seconds": round(seconds, 6),
                }
            )
            meter.trained(step, float(values.mean()), tokens / seconds)
            if step % config.evaluate_every == 0 or step == config.steps:
                record = _validate(programs, state, task)
                _check_validation(score, step, record["valid_loss"], saved, checkpoints)
                log.append({"score": score, "step": step, **record})
                loss, exact = (
                    float(np.mean(record[name])) for name in ("valid_loss", "exact_match")
                )
                meter.evaluated(step, loss, exact, tokens / seconds)
            due = time.monotonic() - saved_at >= config.checkpoint_seconds
            if due or step == config.steps or listener.heard:
                _check_parameters(score, step, state, saved, checkpoints)
                checkpoints.save(step, state)
                saved, saved_at = step, time.monotonic()
            if listener.heard:
                raise Interrupted(f"step {step} of {score}", listener.heard)
    return state


def _validate(programs: Programs, state: State, task: Task) -> dict[str, Any]:
    given = task.sets["valid"]
    found = evaluate.translations(programs, state.parameters, given, greedy=True)
    references = [pair.target for pair in given.pairs]
    return {
        "valid_loss": _rounded(evaluate.losses(programs, state.parameters, given)),
        "exact_match": _rounded([100 * metrics.exact_match(h, references) for h in found]),
    }


def _check_finite(
    score: str, step: int, values: np.ndarray, saved: int, checkpoints: Checkpoints
) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        at, seed = bad[0].tolist()
        what = f"the loss of step {step + at + 1} is {values[at, seed]}"
        raise Diverged(_sentence(score, seed, what, saved, checkpoints))


def _check_validation(
    score: str, step: int, losses: list[float], saved: int, checkpoints: Checkpoints
) -> None:
    for seed, loss in enumerate(losses):
        if not math.isfinite(loss):
            what = f"the validation loss after step {step} is {loss}"
            raise Diverged(_sentence(score, seed, what, saved, checkpoints))


def _check_parameters(
    score: str, step: int, state: State, saved: int, checkpoints: Checkpoints
) -> None:
    """Refuse to save what the next step could only turn into more of the same."""
    leaves = jax.device_get(jax.tree.leaves(state.parameters))
    finite = np.all([np.isfinite(leaf).reshape(len(leaf), -1).all(1) for leaf in leaves], axis=0)
    if not finite.all():
        what = f"parameters are not finite after step {step}"
        raise Diverged(_sentence(score, int(np.argmin(finite)), what, saved, checkpoints))


def _sentence(score: str, seed: int, what: str, saved: int, checkpoints: Checkpoints) -> str:
    kept = f"the checkpoint of step {saved} in {checkpoints.folder}" if saved else "no step"
    return f"{score}, seed {seed}: {what}; {kept} is kept. A lower --learning_rate may help."


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 6) for value in jax.device_get(values)]
