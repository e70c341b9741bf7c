"""Train the translators of one mechanism, from the start or from the last checkpoint."""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from experiments import metrics
from experiments.translate import evaluate, looking
from experiments.translate.compile import Placement, Programs, compile_all
from experiments.translate.evaluate import Trained
from experiments.translate.log import ROUND
from experiments.translate.prepare import Run
from experiments.translate.stopping import Diverged, Interrupted, listening
from experiments.translate.train_step import Batches, State, initial_state
from experiments.translate.workdir import is_first


class ProgressMeter:
    """Shows step, loss, exact match, tokens per second and the time left of one training.

    A bar in a terminal, a line after each validation elsewhere.
    """

    def __init__(self, console: Console, name: str, done: int, total: int):
        self.console, self.name, self.first, self.total = console, name, done, total
        self.start = time.perf_counter()
        self.exact = "-"
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[text]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(name, total=total, completed=done, text="compiling")

    def __enter__(self) -> ProgressMeter:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def begin(self) -> None:
        """Start the clock after compilation."""
        self.start = time.perf_counter()

    def trained(self, step: int, loss: float, speed: float) -> None:
        """Show the step and the loss of a round of steps."""
        text = f"loss {loss:.3f}  exact {self.exact}  {speed / 1000:.0f}k tokens/s"
        self.bar.update(self.task, completed=step, text=text)

    def evaluated(self, step: int, loss: float, exact: float, speed: float) -> None:
        """Show a validation; outside of a terminal print a line."""
        self.exact = f"{exact:.1f}%"
        if self.console.is_terminal:
            return
        passed = time.perf_counter() - self.start
        left = passed / max(1, step - self.first) * (self.total - step)
        self.console.print(
            f"{self.name}: step {step}/{self.total}, valid loss {loss:.3f}, exact match "
            f"{exact:.1f}%, {speed / 1000:.0f}k tokens/s, {left:.0f} s left",
            soft_wrap=True,
        )


def train(score: str, run: Run) -> Trained:
    """Train all seeds of one mechanism, from the last checkpoint of the run if there is one.

    Raises:
      Diverged: a loss or a parameter is not finite.
      Interrupted: SIGINT or SIGTERM came; everything up to the last step is saved.
      OSError: a checkpoint cannot be saved.
      UsageError: the log before the checkpoint is lost.
    """
    checkpoints = run.checkpoints(score)
    placement = Placement(run.config.batch_size)
    drawn = initial_state(score, run.sizes[score], run.config)
    state, arrays = placement.put((drawn, run.task.arrays), placement.replicated)
    restored = checkpoints.restore(state)
    for sentence in checkpoints.damaged:
        run.console.print(sentence, soft_wrap=True)
    step, state = restored or (0, state)
    if step and is_first():
        run.log.complete_records(score, needed=[ROUND])
    for log in (run.log, run.looks):
        log.rewind(score, step)
    with ProgressMeter(run.console, score, step, run.config.steps) as meter:
        programs = compile_all(score, run, state)
        meter.begin()
        trainer = _Trainer(score, run, placement, programs, meter)
        state = trainer.train(step, state, arrays)
    return Trained(state.evaluated, programs)


class _Trainer:
    """The training of one mechanism after compilation: rounds, validations and checkpoints."""

    def __init__(
        self,
        score: str,
        run: Run,
        placement: Placement,
        programs: Programs,
        meter: ProgressMeter,
    ):
        self.score, self.run, self.placement = score, run, placement
        self.programs, self.meter = programs, meter
        self.checkpoints = run.checkpoints(score)
        self.shown = looking.sentences(run.task)
        self.saved, self.saved_at = 0, time.monotonic()

    def train(self, step: int, state: State, arrays: Any) -> State:
        """Take the remaining steps."""
        config, self.saved = self.run.config, step
        with listening() as listener:
            while step < config.steps:
                state, speed = self._take_round(step, state, arrays)
                step += config.round
                if step % config.evaluate_every == 0 or step == config.steps:
                    self._validate(step, state, speed)
                due = time.monotonic() - self.saved_at >= config.checkpoint_seconds
                # All processes save and stop together.
                due, heard = self.placement.largest(due, listener.heard or 0)
                if due or step == config.steps or heard:
                    self._save(step, state)
                if heard:
                    raise Interrupted(f"step {step} of {self.score}", heard)
        return state

    def _take_round(self, step: int, state: State, arrays: Any) -> tuple[State, float]:
        """Take the steps up to the next synchronisation; return the state and tokens/s."""
        config, task = self.run.config, self.run.task
        chunks = slice(step // config.chunk, (step + config.round) // config.chunk)
        start = time.perf_counter()
        batches = Batches(arrays, task.order[chunks], task.rows[chunks])
        state, losses = self.programs.train(state, batches)
        losses = jax.device_get(losses)
        seconds = time.perf_counter() - start
        self._check_losses(step, losses)
        step += config.round
        tokens = int(task.tokens[chunks].sum())
        self.run.log.append(
            {
                "score": self.score,
                "step": step,
                "train_loss": _rounded(losses.mean(axis=0)),
                "tokens": tokens,
                "seconds": round(seconds, 6),
            }
        )
        self.meter.trained(step, float(losses.mean()), tokens / seconds)
        return state, tokens / seconds

    def _validate(self, step: int, state: State, speed: float) -> None:
        trained = Trained(state.evaluated, self.programs)
        examples = self.run.task.sets["valid"]
        found = evaluate.translations(trained, examples, greedy=True)
        references = [pair.target for pair in examples.pairs]
        losses = _rounded(evaluate.losses(trained, examples))
        exact = _rounded([100 * metrics.exact_match(h, references) for h in found])
        self._check_validation(step, losses)
        record = {"valid_loss": losses, "exact_match": exact}
        self.run.log.append({"score": self.score, "step": step, **record})
        if self.programs.look:
            weights = self.programs.look(state.evaluated, *self.shown[1:])
            self.run.looks.append(looking.record(self.score, step, weights))
        self.meter.evaluated(step, float(np.mean(losses)), float(np.mean(exact)), speed)

    def _save(self, step: int, state: State) -> None:
        self._check_parameters(step, state)
        self.checkpoints.save(step, state)
        self.saved, self.saved_at = step, time.monotonic()

    def _check_losses(self, step: int, losses: np.ndarray) -> None:
        bad = np.argwhere(~np.isfinite(losses))
        if len(bad):
            at, seed = bad[0].tolist()
            raise self._diverged(seed, f"the loss of step {step + at + 1} is {losses[at, seed]}")

    def _check_validation(self, step: int, losses: list[float]) -> None:
        for seed, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise self._diverged(seed, f"the validation loss after step {step} is {loss}")

    def _check_parameters(self, step: int, state: State) -> None:
        """Refuse to save parameters from which training cannot recover."""
        leaves = jax.device_get(jax.tree.leaves(state.parameters))
        finite = np.all([np.isfinite(x).reshape(len(x), -1).all(1) for x in leaves], axis=0)
        if not finite.all():
            seed = int(np.argmin(finite))
            raise self._diverged(seed, f"parameters are not finite after step {step}")

    def _diverged(self, seed: int, what: str) -> Diverged:
        kept = "no step is"
        if self.saved:
            kept = f"the checkpoint of step {self.saved} in {self.checkpoints.folder} is"
        return Diverged(
            f"{self.score}, seed {seed}: {what}; {kept} kept. A lower --learning_rate may help."
        )


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 6) for value in jax.device_get(values)]
